"""The uneven all_to_all: values, gradients, bytes, and what may happen between its start and its wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from picotron_mini.collectives import all_to_all_async, ledger
from picotron_mini.config import MeshShape
from picotron_mini.course.instruments.witness import Witness
from picotron_mini.launch import RankError
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.moe import exchange
from picotron_mini.moe.exchange import UnevenExchange

# sends[i][j]: rows that rank i sends to rank j
NUMBERS: dict[str, list[list[int]]] = {
    "uneven": [[0, 3, 1], [2, 0, 4], [1, 1, 0]],
    "one rank takes all": [[0, 2, 0], [0, 5, 0], [0, 1, 0]],
    "one rank has nothing to give": [[1, 2, 3], [0, 0, 0], [2, 0, 1]],
    "nobody sends anything": [[0] * 3] * 3,
    "even": [[2] * 3] * 3,
}


def rows_of(sends: list[list[int]], rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows, 2]; each number says whose row it is and which."""
    return torch.arange(2 * sum(sends[rank])).view(-1, 2).to(dtype) + 100 * rank


def arrivals(sends: list[list[int]], rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What `rank` must receive, found on one process."""
    parts = [rows_of(sends, other, dtype).split(numbers)[rank] for other, numbers in enumerate(sends)]
    return torch.cat(parts)


def check(sends: list[list[int]], dtype: torch.dtype) -> None:
    axis = Mesh.build(MeshShape(dp=3))["dp"]
    rank = axis.index
    x = rows_of(sends, rank, dtype)
    receives = [numbers[rank] for numbers in sends]
    out = x.new_empty(sum(receives), 2)
    all_to_all_async(out, x, axis, receives, sends[rank]).wait()
    assert torch.equal(out, arrivals(sends, rank, dtype)), out.tolist()
    if not dtype.is_floating_point:
        return
    trip = UnevenExchange(axis, sends[rank], receives)
    x.requires_grad_()
    arriving = trip.start(x)
    between = (x.detach() ** 2).sum().requires_grad_()  # something else, while the rows travel
    got = trip.wait(arriving)
    assert torch.equal(got, out)
    # each rank weighs what it receives by its own number: it must come back from where the row went
    ((got * (rank + 1)).sum() + between).backward()
    want = torch.cat([torch.full((n, 2), float(j + 1)) for j, n in enumerate(sends[rank])]).to(dtype)
    assert x.grad is not None and torch.equal(x.grad, want), x.grad


@pytest.mark.parametrize("numbers", NUMBERS)
def test_rows_arrive_and_their_gradients_go_back(ranks, numbers: str) -> None:
    ranks(check, NUMBERS[numbers], torch.float64, world_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32], ids=str)
def test_dtypes(ranks, dtype: torch.dtype) -> None:
    ranks(check, NUMBERS["uneven"], dtype, world_size=3)


def swap_the_splits() -> None:
    """Broken on purpose: on the way back the numbers are those of the way there."""

    def start(self: UnevenExchange, x: Tensor) -> Tensor:
        self.sends = [*self.receives]
        return original(self, x)

    original = UnevenExchange.wait
    UnevenExchange.wait = start  # type: ignore[method-assign]


def broken(sends: list[list[int]]) -> None:
    swap_the_splits()
    check(sends, torch.float64)


def test_swapped_splits_are_noticed_unless_all_are_even(ranks) -> None:
    with pytest.raises(RankError):
        ranks(broken, NUMBERS["uneven"], world_size=3)
    ranks(broken, NUMBERS["even"], world_size=3)


def forget_to_wait() -> None:
    """Broken on purpose: the rows are read before they are here."""

    class Late:
        def __init__(self, out: Tensor) -> None:
            out.fill_(-1)

        def wait(self) -> None: ...

    exchange.all_to_all_async = lambda out, *_: Late(out)


def broken_wait(sends: list[list[int]]) -> None:
    forget_to_wait()
    check(sends, torch.float64)


def test_rows_that_are_read_too_early_are_noticed(ranks) -> None:
    with pytest.raises(RankError):
        ranks(broken_wait, NUMBERS["uneven"], world_size=3)


def count(sends: list[list[int]]) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    axis = Mesh.build(MeshShape(dp=3))["dp"]
    x = rows_of(sends, axis.index, torch.float32).requires_grad_()
    receives = [numbers[axis.index] for numbers in sends]
    with ledger.recording() as sent, Witness() as witness:
        numbers = torch.zeros(3, dtype=torch.int64)
        ones = [1] * 3
        all_to_all_async(torch.empty_like(numbers), numbers, axis, ones, ones, "counts").wait()
        UnevenExchange(axis, sends[axis.index], receives)(x).sum().backward()
    return dict(sent), dict(witness.bytes)


def test_bytes_forward_are_of_what_is_sent_and_backward_of_what_came(ranks) -> None:
    sends = NUMBERS["uneven"]
    for rank, (sent, seen) in enumerate(ranks(count, sends, world_size=3)):
        rows = sum(sends[rank]) + sum(numbers[rank] for numbers in sends)
        assert sent == {("dp", "all_to_all"): 4 * 2 * rows, ("dp", "counts"): 24}
        assert seen["all_to_all"] == sum(sent.values())


def test_one_rank_sends_nothing() -> None:
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    with ledger.recording() as sent:
        y = UnevenExchange(Axis("ep", 1, 0, (0,)), [3], [3])(x)
        y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones(3, 2)) and not sent  # type: ignore[arg-type]
