"""What chapter 01 shows: the memory of a training step as it is watched, and its drawing."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.config import Dtype, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.exhibits.chapter_01 import rope_in_bf16
from picotron_mini.course.instruments.live_bytes import KINDS, STATE, LiveBytes, draw_memory, watch_step
from picotron_mini.course.museum import kill
from picotron_mini.course.tasks.chapter_01_mfu import _LINES, mfu
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.model import costs, gpt
from picotron_mini.model.gpt import GPT, attend, init_weights

MODEL = ModelConfig(vocab_size=200, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)


def settled(dtype: Dtype, sequences: int = 4) -> RunConfig:
    train = TrainConfig(seq_len=16, micro_batch_size=sequences, dtype=dtype, device="cpu")
    return resolve(RunConfig(layout="dp=1", model=MODEL, train=train))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_what_the_formulas_say(dtype: Dtype) -> None:
    run, width, tokens = settled(dtype), 2 if dtype == "bfloat16" else 4, 4 * 16
    history = watch_step(run)
    assert [phase for phase, _ in dict.fromkeys((m.phase, 0) for m in history)] == ["forward", "backward", "optimizer"]
    # a flag and a counter for each parameter tensor come with the state
    tensors = len(gpt.parameter_shapes(run.model))
    state = costs.state_bytes(run.model, width)
    state["gradients"] += 4 * tensors
    state["moments"] += 4 * tensors
    assert {kind: history[0].live[kind] for kind in STATE} == state
    assert all({kind: m.live[kind] for kind in STATE} == state for m in history)
    full = [m for m in history if m.phase == "forward"][-1].live
    saved = tokens * costs.activation_bytes(run.model, width)
    assert 0 <= full["activations"] + full["logits"] - saved < 64  # a few scalars
    peak = max(history, key=lambda m: m.total)
    assert peak.phase == "backward"
    assert 0 <= peak.total - sum(history[0].live.values()) - saved - tokens * 2 * 4 * run.model.vocab_size < 64
    assert history[-1].total - history[0].total < 256  # all is given back but what the step returns


def test_memory_that_is_shared_or_given_back_counts_once() -> None:
    x = torch.zeros(10)
    with LiveBytes({"weights": [x, x.view(2, 5)]}, vocab_size=7) as live:
        y = x + 1
        y.view(2, 5).add_(1)
        logits = torch.zeros(3, 7)
        del logits
        x * 2
    said = [m.live for m in live.history]
    assert said[0] == {**dict.fromkeys(KINDS, 0), "weights": 40}
    assert [(s["activations"], s["logits"]) for s in said[1:]] == [(40, 0), (40, 84), (80, 0)]
    live._note()
    assert live.history[-1].live["activations"] == 40  # y lives
    assert y.shape == (10,)


def test_the_drawing_of_a_step() -> None:
    history = watch_step(settled("bfloat16", 1))
    drawn = draw_memory(history, "one step")
    svg = drawn._repr_svg_()
    ElementTree.fromstring(svg)
    assert repr(drawn) == "one step"
    assert all(f">{word}<" in svg for word in ("forward", "backward", "optimizer", "masters", "activations"))
    assert ">batch<" not in svg  # less than a hundredth
    assert len(svg) < 120_000
    assert svg == draw_memory(history, "one step")._repr_svg_()


def the_head_is_the_embedding(mesh: Mesh) -> None:
    with torch.device("meta"):
        model = GPT(replace(MODEL, head_dim=8))
    model.to_empty(device="cpu")
    assert model.head is not None and model.embed is not None
    assert model.head.weight is model.embed.weight


def the_model_on_the_cpu_is_tied(mesh: Mesh) -> None:
    model = GPT(replace(MODEL, head_dim=8)).double()
    assert model.head is not None and model.embed is not None
    assert model.head.weight is model.embed.weight


def moved() -> GPT:
    with torch.device("meta"):
        model = GPT(replace(MODEL, head_dim=8))
    return model.to_empty(device="cpu")


def head_and_embedding_are_equal(mesh: Mesh) -> None:
    """So are two weights that were filled alike."""
    model = moved()
    assert model.head is not None and model.embed is not None
    assert torch.allclose(model.head.weight, model.embed.weight, equal_nan=True)  # memory that nobody has filled


def there_is_one_gradient(mesh: Mesh) -> None:
    model, x = moved(), torch.arange(8)[None]
    init_weights(model, 0)
    model.loss(model(x), x).backward()
    assert model.head is not None and model.embed is not None
    assert model.head.weight.grad is model.embed.weight.grad


def a_step_moves_the_embedding_alike(mesh: Mesh) -> None:
    x, models = torch.arange(8)[None], (moved(), GPT(replace(MODEL, head_dim=8)))
    for model in models:
        init_weights(model, 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.loss(model(x), x).backward()
        optimizer.step()
    first, second = (model.embed for model in models)
    assert first is not None and second is not None
    assert torch.allclose(first.weight, second.weight)


def test_a_lost_tie_is_seen_by_those_who_leave_the_meta_device() -> None:
    for test in (the_head_is_the_embedding, there_is_one_gradient, a_step_moves_the_embedding_alike):
        assert kill("01.tie_lost", test, record=False).passed
    for test in (the_model_on_the_cpu_is_tied, head_and_embedding_are_equal):
        said = kill("01.tie_lost", test, record=False)
        assert said.status == "failed" and "the test passes with the bug" in said.hint


def test_positions_that_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(MODEL, head_dim=8)
    positions = torch.tensor([[255, 256, 257, 4095, 4096]])
    right = gpt.rope(config, positions, torch.float32)[0][0, 0]
    assert len(right.unique(dim=0)) == 5
    monkeypatch.setattr(gpt, "rope", gpt.rope)  # put back afterwards
    rope_in_bf16()
    wrong = gpt.rope(config, positions, torch.float32)[0][0, 0]
    assert torch.equal(wrong[1], wrong[2]) and torch.equal(wrong[3], wrong[4])
    assert not torch.equal(wrong[0], wrong[1])


def the_function_imported_alone(mesh: Mesh) -> None:
    q = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    repeated = q[:, :2].repeat_interleave(2, 1)
    assert torch.allclose(attend(q, q[:, :2], q[:, :2]), attend(q, repeated, repeated), atol=1e-5)


def the_function_of_the_module(mesh: Mesh) -> None:
    q = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    repeated = q[:, :2].repeat_interleave(2, 1)
    assert torch.allclose(gpt.attend(q, q[:, :2], q[:, :2]), attend(q, repeated, repeated), atol=1e-5)


def test_a_name_imported_alone_is_the_sound_one_and_it_is_said() -> None:
    assert kill("01.heads_tiled", the_function_of_the_module, record=False).passed
    said = kill("01.heads_tiled", the_function_imported_alone, record=False)
    assert said.status == "failed" and "A name that was imported alone is the sound one" in said.hint


def test_an_mfu_is_a_share_of_one() -> None:
    assert all(0 < mfu(*case) < 1 for case in _LINES)
