"""Each rank updates its share, and all of them end where one device does, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.training.sharded_optimizer import ShardedOptimizer, cut_anywhere, whole

Ranks = Callable[..., list[Any]]
WORLD = 3
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw, one by one": ("AdamW", {"lr": 0.01, "foreach": False}),
    "nadam": ("NAdam", {"lr": 0.01}),
    "radam": ("RAdam", {"lr": 0.01}),
    "adamax": ("Adamax", {"lr": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "asgd": ("ASGD", {"lr": 0.01}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "adafactor": ("Adafactor", {"lr": 0.01}),
    "muon": ("Muon", {"lr": 0.01}),
}
WHOLE = ("Adafactor", "Muon")


def weights(kind: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 7), (3, 2), (1, 4), (6, 6), (2, 3)]
    if kind != "Muon":  # it takes matrices only
        shapes += [(11,), ()]
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """The same on every rank; the second parameter gets none in step 1, the third never."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.grad = None if number == 2 or (number, step) == (1, 1) else gradient


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]


def axis_of_world() -> Axis:
    return Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))["dp"]


def after_steps(names: list[str]) -> list[tuple[list[Tensor], int, int]]:
    """In a rank, for each kind: the weights, the elements of state that this rank has, the bytes sent in a step."""
    axis = axis_of_world()
    out = []
    for name in names:
        kind, options = KINDS[name]
        parameters = weights(kind)
        optimizer = ShardedOptimizer(groups(parameters), getattr(torch.optim, kind), axis, **options)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = options["lr"] / (step + 1)
            give_gradients(parameters, step)
            with ledger.recording() as sent:
                optimizer.step()
        states = [x for state in optimizer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        elements = sum(x.numel() for x in states if x.ndim and x.numel() > 1)
        out.append(([p.detach() for p in parameters], elements, sent["dp", "all_gather"]))
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)
    return out


def one_device(name: str) -> tuple[list[Tensor], int]:
    kind, options = KINDS[name]
    parameters = weights(kind)
    optimizer = getattr(torch.optim, kind)(groups(parameters), **options)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = options["lr"] / (step + 1)
        give_gradients(parameters, step)
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return [p.detach() for p in parameters], sum(x.numel() for x in states if x.ndim and x.numel() > 1)


@pytest.mark.parametrize("world", [1, WORLD])
def test_every_kind_ends_where_one_device_does(ranks: Ranks, world: int) -> None:
    names = list(KINDS)
    for results in ranks(after_steps, names, world_size=world):
        for name, (got, _, sent) in zip(names, results, strict=True):
            want, _ = one_device(name)
            for mine, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            total = sum(p.numel() for p in want)
            if world == 1:
                assert sent == 0
            elif KINDS[name][0] not in WHOLE:
                assert sent == 8 * -(-total // world), "each hands over its share, padded"
            else:
                assert sent == 8 * 36, "the largest matrix is the largest share"


def test_each_rank_has_its_share_of_the_state(ranks: Ranks) -> None:
    names = [name for name in KINDS if KINDS[name][0] not in ("Adafactor", "SGD") or "momentum" in name]
    results = ranks(after_steps, names, world_size=WORLD)
    for number, name in enumerate(names):
        held = [result[number][1] for result in results]
        _, everything = one_device(name)
        assert everything > 0
        assert abs(sum(held) - everything) <= 2 * WORLD, f"{name}: {held} of {everything}"  # a state of one is not seen
        if KINDS[name][0] not in WHOLE:
            assert max(held) <= 0.6 * everything


def refusals() -> list[str]:
    axis = axis_of_world()
    said = []
    for kind, parameter in (
        (torch.optim.LBFGS, torch.ones(3)),
        (torch.optim.SparseAdam, torch.ones(3)),
        (torch.optim.SGD, torch.ones(3, 2).T),
    ):
        try:
            ShardedOptimizer([nn.Parameter(parameter)], kind, axis)
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_shared_out_is_refused(ranks: Ranks) -> None:
    for lbfgs, sparse, strided in ranks(refusals, world_size=2):
        assert lbfgs.startswith("LBFGS cannot be shared out over dp=2: it needs the scalar products of whole gradients")
        assert sparse.startswith("SparseAdam cannot be shared out over dp=2: it updates the rows")
        assert strided.startswith("a parameter is not contiguous")


class Rotation(torch.optim.Optimizer):
    """One's own, which nobody can know to be elementwise: it gets whole parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.flip(-1) / parameter.grad.norm(), alpha=group["lr"])


def own_kind() -> list[Tensor]:
    parameters = weights("Muon")
    optimizer = ShardedOptimizer(parameters, Rotation, axis_of_world(), lr=0.1)
    give_gradients(parameters, 0)
    optimizer.step()
    return [p.detach() for p in parameters]


def test_an_unknown_kind_gets_whole_parameters(ranks: Ranks) -> None:
    parameters = weights("Muon")
    give_gradients(parameters, 0)
    Rotation(parameters, lr=0.1).step()
    for got in ranks(own_kind, world_size=WORLD):
        for mine, theirs in zip(got, parameters, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)


class Mine(torch.optim.SGD):
    """One's own that is elementwise."""


def cut_or_not(elementwise: bool | None) -> tuple[list[Tensor], list[int]]:
    parameters = weights("SGD")
    optimizer = ShardedOptimizer(parameters, Mine, axis_of_world(), elementwise=elementwise, lr=0.1)
    give_gradients(parameters, 0)
    optimizer.step()
    return [p.detach() for p in parameters], [sum(end - start for _, start, end in s) for s in optimizer.shares]


def test_ones_own_kind_is_cut_anywhere_if_it_is_said_to_be_elementwise(ranks: Ranks) -> None:
    parameters = weights("SGD")
    give_gradients(parameters, 0)
    Mine(parameters, lr=0.1).step()
    for elementwise in (None, True):
        for got, shares in ranks(cut_or_not, elementwise, world_size=WORLD):
            assert (max(shares) - min(shares) <= 1) == bool(elementwise)
            for mine, theirs in zip(got, parameters, strict=True):
                torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["Adafactor", "Muon"])
def test_what_looks_at_whole_parameters_is_never_elementwise(kind: str) -> None:
    axis = Axis("dp", 2, 0, (0, 1))
    with pytest.raises(ConfigError, match=f"^{kind} looks at whole parameters"):
        ShardedOptimizer(weights(kind), getattr(torch.optim, kind), axis, elementwise=True, lr=0.1)
    with pytest.raises(ConfigError, match="^elementwise='no' must be True, False or None"):
        ShardedOptimizer(weights(kind), getattr(torch.optim, kind), axis, elementwise="no", lr=0.1)  # type: ignore[arg-type]


def test_shares() -> None:
    assert cut_anywhere([5, 1, 4], 3) == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 1), (2, 0, 2)], [(2, 2, 4)]]
    assert cut_anywhere([1], 3) == [[(0, 0, 1)], [], []]
    assert whole([5, 1, 4, 3], 2) == [[(0, 0, 5), (1, 0, 1)], [(2, 0, 4), (3, 0, 3)]]
    assert whole([2], 3) == [[(0, 0, 2)], [], []]
