"""Exchanges of tensor parallelism behind the products: the same numbers and bytes, and really at the same time."""

from dataclasses import replace
from typing import Any

import pytest

from picotron_mini.config import ConfigError, RunConfig
from picotron_mini.course.tensor_overlap import exposed, order_of_work
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.verify import MODEL, TRAIN, verify

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("tp=2", {"tensor_overlap": 2}),
    ("tp=2", {"tensor_overlap": 2, "sequence_parallel": True, "freeze": ("layers.0", "layers.3.mlp.down")}),
    ("tp=2,dp=2", {"tensor_overlap": 5, "sequence_parallel": True, "zero": 3}),
    ("tp=2,cp=2", {"tensor_overlap": 3, "sequence_parallel": True}),
    ("tp=2,pp=2", {"tensor_overlap": 2, "schedule": "interleaved", "micro_batches": 4, "recompute": "full"}),
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
            "all_gather all_gather wait wait dW reduce_scatter dW dW wait "
            "all_gather all_gather wait wait dW reduce_scatter dW dW dW wait",
        ),
    ],
)
def test_what_is_started_is_waited_for_after_the_products(sequence_parallel, forward, backward):
    for seen in launch(order_of_work, sequence_parallel, 2, world_size=2):
        assert " ".join(seen) == forward + backward


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
