"""What the report says about experts, and the count of who gets what."""

from dataclasses import replace

import pytest
import torch

from picotron_mini.config import ModelConfig, MoEConfig
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.monitoring.experts import KINDS, experts_section, information, kind_of, specialisation

MODEL = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4,
    moe=MoEConfig(num_experts=3, top_k=1, normalize=False, expert_size=4, dense_layers=1),
)  # fmt: skip
TEXTS = ("a", "7", " ", "\n", "(", "\ufffd", " b", "")


def test_kinds() -> None:
    assert [KINDS[kind_of(text)] for text in TEXTS] == [
        "letters", "digits", "spaces", "line breaks", "punctuation", "other", "letters", "other",
    ]  # fmt: skip


def test_information_of_a_table() -> None:
    assert information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(1.0)
    assert information(torch.tensor([[2, 4], [3, 6]])) == pytest.approx(0.0, abs=1e-12)
    assert information(torch.zeros(2, 2)) == 0.0


def test_specialisation_counts_each_choice_once() -> None:
    """A router that reads the expert off the token's embedding: expert 1 for digits, else 0."""
    torch.manual_seed(0)
    model = GPT(MODEL)
    init_weights(model, 0)
    with torch.no_grad():
        for weight in (*model.layers["0"].parameters(), *model.layers["1"].get_submodule("attention").parameters()):
            weight.mul_(0.0)  # the residual stream is the embedding
        model.embed.weight.zero_()  # type: ignore[union-attr, operator]
        model.embed.weight[:, 0] = 1.0  # type: ignore[index, union-attr]
        model.embed.weight[1, 0] = -1.0  # type: ignore[index, union-attr]
        router = model.layers["1"].get_parameter("mlp.router.weight")
        router.zero_()
        router[:2, 0] = torch.tensor([1.0, -1.0])
        model.layers["1"].get_parameter("mlp_norm.weight").fill_(1.0)
    rows = torch.tensor([[0, 1, 1, 2, 0], [3, 4, 1, 0, 0], [5, 6, 6, 1, 1]])
    found = specialisation(model, rows, lambda token: TEXTS[token], batch=2)
    (layer,) = found["layers"]
    assert layer["layer"] == 1 and found["tokens"] == 15
    assert layer["counts"] == [[6, 0, 1, 1, 1, 1], [0, 5, 0, 0, 0, 0], [0] * 6]
    p = 5 / 15
    assert layer["bits"] == pytest.approx(
        -p * torch.tensor(p).log2().item() - (1 - p) * torch.tensor(1 - p).log2().item()
    )
    assert 0 < layer["chance"] < 0.5


def line(step: int, load: list[list[float]], **more: float) -> dict[str, object]:
    zeros = {"moe_drop_rate": 0.0, "moe_dead_experts": 0, "moe_not_finite": 0, "moe_aux": 1.0}
    return {"step": step, "loss": 2.0, "moe_load": load, "moe_entropy": 0.9, "moe_max_load": 1.5} | zeros | more


def test_the_section_shows_what_there_is() -> None:
    assert experts_section([{"step": 1, "loss": 2.0}], None) == ""
    lines = [line(n, [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]) for n in range(1, 200)]
    page = experts_section(lines, None)
    assert page.count("<h3>Mixture") == 2 and page.count("<rect") == 2 * 3 * 80
    assert "Busiest expert" in page and "Rows dropped" not in page and "not finite" not in page
    assert page.count('fill-opacity="0.750"') == 2 * 80 and page.count('fill-opacity="1.000"') == 80
    loud = experts_section([line(1, [[1.0, 0.0, 0.0]], moe_drop_rate=0.2, moe_not_finite=7)], None)
    assert "Rows dropped" in loud and "Routers met 7 tokens with logits that are not finite" in loud


def test_the_section_shows_specialisation() -> None:
    table = {"layer": 1, "counts": [[3, 1, 0, 0, 0, 0], [0] * 6], "bits": 0.5, "chance": 0.1}
    page = experts_section([line(1, [[1.0, 0.0]])], {"kinds": list(KINDS), "tokens": 4, "layers": [table]})
    assert "Layer 1: 0.500 bits (chance alone: 0.100)" in page and "<td>75 %</td>" in page and "<td>-</td>" in page


def test_a_dense_model_has_no_experts_to_look_at() -> None:
    model = GPT(replace(MODEL, moe=None))
    with pytest.raises(AssertionError):
        specialisation(model, torch.zeros(1, 2, dtype=torch.int64), lambda _: "a")
