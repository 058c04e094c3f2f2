"""The predicted bytes: checked here against sums done by hand. That the ledger counts the same is for `verify`."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from picotron_mini.config import ModelConfig, RunConfig, TrainConfig
from picotron_mini.legality import layout_problems, resolve
from picotron_mini.mesh import coordinates
from picotron_mini.parallel import buckets, expert_traffic, traffic
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.traffic import predict_step

# V = 96, D = 32, F = 64, 4 heads of 8 and 2 for keys and values
MODEL = ModelConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2)
TRAIN = TrainConfig(seq_len=16, micro_batch_size=2, micro_batches=3, device="cpu")
LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; gate, up, down; two norms
LAYER_PARAMETERS = 9
HIDDEN = 2 * 16 * 32 * 4  # hidden states of a micro-batch, in bytes


def predicted(layout: str, model: ModelConfig = MODEL, **train: object) -> list[Counter[tuple[str, str]]]:
    """For each rank."""
    run = resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **train)))  # type: ignore[arg-type]
    places = layout_of(run)
    return [predict_step(run, places, coordinates(run.mesh, rank)) for rank in range(run.mesh.world_size)]


def test_one_rank_sends_nothing() -> None:
    assert predicted("dp=1") == [{}]


@pytest.mark.parametrize("size", [2, 3, 64])
def test_data_parallel(size: int) -> None:
    elements = 96 * 32 + 4 * LAYER + 32
    parameters = 1 + 4 * LAYER_PARAMETERS + 1
    expected = {("dp", "all_reduce"): 4 * (elements + parameters) + 8, ("world", "all_reduce"): 24}
    assert predicted(f"dp={size}") == [expected] * size


def test_data_parallel_does_not_depend_on_the_batch() -> None:
    assert predicted("dp=2", micro_batches=7, seq_len=100, micro_batch_size=5) == predicted("dp=2")


def test_a_frozen_parameter_is_not_reduced() -> None:
    (full, _), (frozen, _) = predicted("dp=2"), predicted("dp=2", freeze=("layers.1.", "norm"))
    saved = 4 * (LAYER + LAYER_PARAMETERS + 32 + 1)
    assert full["dp", "all_reduce"] - frozen["dp", "all_reduce"] == saved


def test_an_untied_head_is_reduced_too() -> None:
    (tied, _), (untied, _) = predicted("dp=2"), predicted("dp=2", replace(MODEL, tie_embeddings=False))
    assert untied["dp", "all_reduce"] - tied["dp", "all_reduce"] == 4 * (96 * 32 + 1)


def test_tensor_parallel() -> None:
    forward = 4 * 2 + 1  # exits of attention and MLP, of the embedding
    backward = 4 * 2 + 1  # entries of attention and MLP, of the head
    loss = 3 * 2 * 16 * 4  # maximum, sum, target's logit
    expected = {("tp", "all_reduce"): 3 * (HIDDEN * (forward + backward) + loss), ("world", "all_reduce"): 24}
    assert predicted("tp=2") == [expected] * 2


def test_tensor_parallel_with_norms_on_heads() -> None:
    more = predicted("tp=2", replace(MODEL, qk_norm=True))[0]["tp", "all_reduce"]
    assert more - predicted("tp=2")[0]["tp", "all_reduce"] == 4 * 2 * 8 * 4  # two weights of 8 a layer, once a step


@pytest.mark.parametrize(
    ("freeze", "entries"),
    [
        ((), 9),  # two a layer, and that of the head
        (("norm",), 9),
        (("embed",), 9),  # the first layer's norm is trained, and it lies below its entry
        (("embed", "layers.0", "layers.1"), 5),
        (("embed", "layers", "norm"), 0),  # the head's own gradient flows no further
    ],
)
def test_no_gradient_is_summed_below_the_first_trained_parameter(freeze: tuple[str, ...], entries: int) -> None:
    sent = predicted("tp=2", replace(MODEL, tie_embeddings=False), freeze=freeze)[0]["tp", "all_reduce"]
    loss = 3 * 3 * 2 * 16 * 4
    assert sent == loss + 3 * HIDDEN * (9 + entries)


KV = 2 * (2 * 8) * 2 * 8 * 4  # keys and values of a rank's half of a micro-batch, 2 heads of 8, in bytes
QUERIES = (2 * 8) * 4 * 8 * 4


def test_context_parallel_by_a_ring() -> None:
    elements, parameters = 96 * 32 + 4 * LAYER + 32, 1 + 4 * LAYER_PARAMETERS + 1
    expected = {
        ("cp", "send"): 3 * 4 * (KV + KV + 2 * KV),  # forward; backward again; gradients, all the way home
        ("dp_cp", "all_reduce"): 4 * (elements + parameters) + 8,
        ("world", "all_reduce"): 24,
    }
    assert predicted("cp=2") == [expected] * 2
    four = predicted("cp=4")[0]["cp", "send"]
    assert four == 3 * 4 * (3 + 3 + 4) * KV // 2


def test_context_parallel_by_trading_heads() -> None:
    sent = predicted("cp=2", context="ulysses", document_mask=True)
    assert sent[0]["cp", "all_to_all"] == 3 * 4 * 2 * (QUERIES + KV + QUERIES)
    assert sent[0]["cp", "all_gather"] == 3 * 4 * (2 * 8 * 8)
    assert ("cp", "all_gather") not in predicted("cp=2", context="ulysses")[0]


def test_documents_travel_with_the_keys_and_only_forward() -> None:
    plain, masked = (predicted("cp=2", document_mask=d)[0]["cp", "send"] for d in (False, True))
    assert masked - plain == 3 * 4 * (2 * 8 * 8)


def test_heads_and_tokens_are_shared_at_once() -> None:
    both, cp, tp = (predicted(layout)[0] for layout in ("cp=2,tp=2", "cp=2", "tp=2"))
    assert both["cp", "send"] * 2 == cp["cp", "send"]
    assert both["tp", "all_reduce"] * 2 == tp["tp", "all_reduce"]


@pytest.mark.parametrize(
    ("freeze", "layers"),
    [
        ((), 4),
        (("embed",), 4),  # the first layer's norm is trained
        (("embed", "layers.0", "layers.1"), 2),
        (
            (
                "embed",
                "layers.0.attention_norm",
                "layers.0.attention.q",
                "layers.0.attention.k",
                "layers.0.attention.v",
            ),
            3,
        ),
        # an MLP trained below makes a frozen layer pass gradients
        (("embed", "layers.0.attention", "layers.0.attention_norm", "layers.1."), 3),
        (("embed", "layers", "norm"), 0),
    ],
)
def test_no_gradient_goes_round_below_the_first_trained_parameter(freeze: tuple[str, ...], layers: int) -> None:
    untied = replace(MODEL, tie_embeddings=False)
    assert predicted("cp=2", untied, freeze=freeze)[0]["cp", "send"] == 3 * KV * (4 + 3 * layers)
    trade = predicted("cp=2", untied, freeze=freeze, context="ulysses")[0]["cp", "all_to_all"]
    assert trade == 3 * (2 * QUERIES + KV) * (4 + layers)


def test_recomputed_layers_ask_for_the_keys_again() -> None:
    usual, again = (predicted("cp=2", recompute=r, document_mask=True)[0]["cp", "send"] for r in ("none", "full"))
    assert again - usual == 3 * 4 * (KV + 2 * 8 * 8)
    usual, again = (predicted("cp=2", recompute=r, context="ulysses")[0]["cp", "all_to_all"] for r in ("none", "full"))
    assert again * 2 == usual * 3
    assert predicted("cp=2", recompute="selective") == predicted("cp=2")


def test_gradients_of_keys_travel_in_float32_at_least() -> None:
    assert predicted("cp=2", dtype="bfloat16")[0]["cp", "send"] == 3 * 4 * (KV // 2 + KV // 2 + 2 * KV)


def test_pipeline() -> None:
    first, second, last = predicted("pp=3", replace(MODEL, tie_embeddings=False))
    assert first == {("pp", "send"): 3 * HIDDEN, ("world", "all_reduce"): 24}
    assert second == {("pp", "send"): 3 * 2 * HIDDEN, ("world", "all_reduce"): 24}
    assert last == first


def test_a_tied_embedding_is_exchanged_between_the_ends() -> None:
    untied = predicted("pp=3", replace(MODEL, tie_embeddings=False))
    more = [a["pp", "send"] - b["pp", "send"] for a, b in zip(predicted("pp=3"), untied, strict=True)]
    assert more == [4 * 96 * 32, 0, 4 * 96 * 32]


def test_only_the_last_stage_sums_the_loss_and_only_the_first_the_embedding() -> None:
    first, _, last, _ = predicted("pp=2,tp=2", replace(MODEL, num_layers=6))
    both = first["tp", "all_reduce"] + last["tp", "all_reduce"]
    assert both == predicted("tp=2", replace(MODEL, num_layers=6))[0]["tp", "all_reduce"]


@pytest.mark.parametrize(("dtype", "ratio"), [("float64", 2.0), ("bfloat16", 0.5)])
def test_widths(dtype: str, ratio: float) -> None:
    """Activations travel in the compute dtype; gradients, and the loss, in float32 at least."""
    narrow, usual = (predicted("pp=2,dp=2,tp=2", dtype=d) for d in (dtype, "float32"))
    middle = predicted("pp=4", replace(MODEL, num_layers=8), dtype=dtype)[1]["pp", "send"]
    assert middle == 3 * 2 * HIDDEN * ratio
    grown = [(a["dp", "all_reduce"] - 8) / (b["dp", "all_reduce"] - 8) for a, b in zip(narrow, usual, strict=True)]
    assert grown == [max(ratio, 1.0)] * 8


def test_uneven_vocabulary_and_layers() -> None:
    """The ranks of a stage hold different parts of an odd vocabulary, and what they sum over dp differs."""
    ranks = predicted("dp=2,tp=4", replace(MODEL, vocab_size=98, num_kv_heads=4))
    sent = [rank["dp", "all_reduce"] for rank in ranks]
    assert sent[:4] == sent[4:]
    assert [sent[0] - s for s in sent[:4]] == [0, 0, 0, 2 * 32 * 4]  # rows 25, 25, 25 and 23, not padded
    run = resolve(RunConfig(layout="dp=2,tp=4", model=replace(MODEL, vocab_size=98, num_kv_heads=4), train=TRAIN))
    rows = layout_of(run)["embed.weight"].shards[0].ranges
    assert rows == ((0, 25), (25, 50), (50, 75), (75, 98))


def test_hundreds_of_ranks_need_no_process() -> None:
    model = replace(MODEL, num_layers=64, num_heads=64, num_kv_heads=8, head_dim=2)
    ranks = predicted("dp=8,tp=8,pp=8", model)
    assert len(ranks) == 512
    sent = Counter(axis for rank in ranks for axis, _ in rank)
    assert sent == {"dp": 512, "tp": 512, "pp": 512, "world": 512}
    assert not layout_problems(model, resolve(RunConfig(layout="dp=8,tp=8,pp=8", model=model)).mesh)


def test_the_prediction_does_not_know_the_code_that_sends() -> None:
    """Else one mistake could be in both numbers."""
    allowed = {"__future__", "collections", "collections.abc", "math", "config", "layout", "mesh", "actions", "typing"}
    for module in (traffic, expert_traffic, buckets):
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert imported <= allowed | {"expert_traffic", "moe.placement", "buckets"}
