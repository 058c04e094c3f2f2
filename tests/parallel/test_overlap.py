"""Exchanges of tensor parallelism behind the products: the same numbers and bytes, and really at the same time."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from picotron_mini.collectives import gather_from, ledger, scatter_to
from picotron_mini.config import ConfigError, MeshShape, RunConfig
from picotron_mini.course.instruments.tensor_overlap import exposed, order_of_work
from picotron_mini.data.loader import Batch
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.parallel.tensor import by_rows
from picotron_mini.training.step import compute_gradients, gradients_of
from picotron_mini.verify import MODEL, TRAIN, make_batches, verify

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("tp=2", {"tensor_overlap": 2}),
    ("tp=2", {"tensor_overlap": 2, "sequence_parallel": True, "freeze": ("layers.0", "layers.3.mlp.down")}),
    ("tp=2,dp=2", {"tensor_overlap": 5, "sequence_parallel": True, "zero": 3}),
    ("tp=2,cp=2", {"tensor_overlap": 3, "sequence_parallel": True}),
    ("tp=4,pp=2", {"tensor_overlap": 4, "sequence_parallel": True, "micro_batch_size": 3}),
    ("tp=2", {"tensor_overlap": 2, "sequence_parallel": True, "freeze": ("embed", "layers.0.attention_norm")}),
    ("tp=2,pp=2", {"tensor_overlap": 2, "schedule": "interleaved", "micro_batches": 4, "recompute": "full"}),
    ("tp=4", {"tensor_overlap": 3, "sequence_parallel": True, "symmetric_memory": True}),
    ("tp=2,cp=2", {"tensor_overlap": 2, "sequence_parallel": True, "symmetric_memory": True, "recompute": "full"}),
    ("tp=2,dp=2", {"tensor_overlap": 2, "sequence_parallel": True, "symmetric_memory": True, "zero": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "settings"), LAYOUTS)
def test_equal_to_one_device_in_the_same_bytes(layout, settings):
    report = verify(layout, MODEL, replace(TRAIN, steps=2, **settings))
    assert report.ok, report.to_dict()


def test_equal_to_one_device():
    report = verify("tp=2", MODEL, replace(TRAIN, steps=2, tensor_overlap=3, sequence_parallel=True))
    assert report.ok, report.to_dict()


@pytest.mark.parametrize(
    ("sequence_parallel", "forward", "backward"),
    [
        (False, 2 * "all_reduce all_reduce wait wait ", "dW all_reduce dW dW wait dW all_reduce dW dW dW wait"),
        (
            True,
            2 * "all_gather all_gather wait wait reduce_scatter reduce_scatter wait wait ",
            "all_gather all_gather wait wait dW reduce_scatter reduce_scatter dW dW wait wait "
            "all_gather all_gather wait wait dW reduce_scatter reduce_scatter dW dW dW wait wait",
        ),
    ],
)
def test_what_is_started_is_waited_for_after_the_products(sequence_parallel, forward, backward):
    for seen in launch(order_of_work, sequence_parallel, 2, world_size=2):
        assert " ".join(seen) == forward + backward


def part_of_rows(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    tokens = torch.arange(20.0).view(2, 10, 1)  # [B, T, D]
    mine = by_rows(scatter_to, tokens, axis, parts, ranks=2)  # [B, T/tp, D], twice the tokens
    return mine, by_rows(gather_from, mine, axis, parts)


def test_a_rank_has_rows_of_each_part_and_a_gather_puts_them_where_they_belong():
    runs = [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17], [4, 5, 6, 7, 12, 13, 14, 15, 18, 19]]  # 10 rows in parts of 4, 4, 2
    for run, (mine, whole) in zip(runs, launch(part_of_rows, 3, world_size=2), strict=True):
        assert (mine.flatten() / 2).tolist() == run and mine.shape == (2, 5, 1)
        assert torch.equal(whole, 2 * torch.arange(20.0).view(2, 10, 1))


def compiled_and_not(settings: dict[str, Any]) -> list[Any]:
    from torch._dynamo.utils import counters  # it imports the compiler

    warnings.simplefilter("ignore")  # which makes some of its own
    compile_ = torch.compile
    torch.compile = lambda function, **rest: compile_(function, backend="aot_eager", **rest)  # type: ignore[assignment]
    out = []
    for compiled in (False, True):
        train = replace(TRAIN, tensor_overlap=2, micro_batches=2, steps=1, compile=compiled, **settings)
        run = resolve(RunConfig("tp=2", model=replace(MODEL, num_layers=3), train=train))
        parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
        (batch,) = make_batches(run)
        halves = [Batch(*(x[rows] for x in vars(batch).values())) for rows in (slice(2), slice(2, 4))]
        with ledger.recording() as sent:
            loss, _ = compute_gradients(parallel, halves)
        gradients = {name: gradient.clone() for name, gradient in gradients_of(parallel).items()}
        out.append((loss.item(), gradients, dict(sent), counters["stats"]["unique_graphs"]))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sequence_parallel": True},
        {"sequence_parallel": True, "recompute": "full", "loss_chunks": 5},
        {"sequence_parallel": True, "symmetric_memory": True},
    ],
)
def test_a_compiled_layer_is_one_graph_for_all_layers(settings):
    """In one graph, or the compiler would refuse; and no second one for other layers, or it would give up at many."""
    for eager, compiled in launch(compiled_and_not, settings, world_size=2):
        assert compiled[0] == pytest.approx(eager[0], rel=1e-12)
        assert compiled[1].keys() == eager[1].keys()
        for name, gradient in eager[1].items():
            torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-9, atol=1e-12)
        assert compiled[2] == eager[2]
        layers = 2 if "recompute" in settings else 1  # without a gradient, and with
        assert eager[3] == 0 and compiled[3] == layers + 2  # and the last norm and the loss


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("dp=2", {}, "tensor_overlap=2 hides exchanges between tp ranks, and tp=1 has none"),
        ("tp=2,pp=2", {"schedule": "zb-h1"}, "does not go with schedule=zb-h1"),
        ("tp=2", {"recompute": "selective"}, "does not go with recompute=selective"),
        ("tp=2", {"tensor_overlap": 0}, "tensor_overlap=0 must be at least 1"),
    ],
)
def test_what_does_not_go_is_refused(layout, settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(RunConfig(layout, model=MODEL, train=replace(TRAIN, **{"tensor_overlap": 2, **settings})))


def test_what_is_exposed():
    assert exposed(2.0, 1.0, 1) == 1.0, "all of it in one part"
    assert exposed(2.0, 1.0, 4) == 0.25, "the last part, where links are faster than products"
    assert exposed(1.0, 2.0, 4) == pytest.approx(2.0 - 0.75), "else what the products are too short for"
