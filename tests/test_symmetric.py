"""Collectives by reading other ranks' memory: values, order of the sum, who must be there, and what is left behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picotron_mini.collectives import SymmetricMemory, ledger, symmetric
from picotron_mini.config import ConfigError, MeshShape, RunConfig, TrainConfig
from picotron_mini.launch import RankError
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")


def axis_of_world() -> Axis:
    import torch.distributed as dist

    return Mesh.build(MeshShape(dp=dist.get_world_size()))["dp"]


def numbers(size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gathered(dtype: torch.dtype) -> tuple[list[Tensor], dict[tuple[str, str], int]]:
    """In a rank: two pairs out of one buffer, the second from its middle, and one out of another."""
    axis = axis_of_world()
    memory = SymmetricMemory(axis, CPU)
    first, second = memory.empty(10, dtype), memory.empty(3, dtype)
    first.copy_(numbers(10, axis.index, dtype))
    second.copy_(numbers(3, 10 + axis.index, dtype))
    memory.meet()
    xs = [first[:4], first[4:9], second]
    outs = [x.new_full((axis.size * len(x),), 7) for x in xs]
    with ledger.recording() as sent:
        memory.all_gather_several(outs, xs).wait()
    memory.meet()
    return outs, dict(sent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [2, 3])
def test_all_gather(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    firsts = [numbers(10, rank, dtype) for rank in range(size)]
    seconds = [numbers(3, 10 + rank, dtype) for rank in range(size)]
    want = [torch.cat([x[:4] for x in firsts]), torch.cat([x[4:9] for x in firsts]), torch.cat(seconds)]
    for outs, sent in ranks(gathered, dtype, world_size=size):
        for got, expected in zip(outs, want, strict=True):
            assert torch.equal(got, expected)
        assert sent == {("dp", "all_gather"): 12 * dtype.itemsize}


def reduced(dtype: torch.dtype) -> tuple[list[Tensor], dict[tuple[str, str], int]]:
    """In a rank: two tables in one buffer, twice in the same memory, with other numbers."""
    axis, sent = axis_of_world(), {}
    memory = SymmetricMemory(axis, CPU)
    outs = []
    for again in (0, 100):
        whole = memory.empty(axis.size * 7, dtype)
        whole.copy_(numbers(axis.size * 7, again + axis.index, dtype))
        parts = [whole.new_empty(5), whole.new_empty(2)]
        with ledger.recording() as counted:
            work = memory.reduce_scatter_several(parts, [whole[: axis.size * 5], whole[axis.size * 5 :]])
        work.wait()
        memory.give_back(whole)
        outs, sent = outs + parts, dict(counted)
    assert len(memory._buffers) == 1, "the second took what the first gave back"
    return outs, sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_reduce_scatter_adds_up_in_the_order_of_the_ranks(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    """To the bit: (x0 + x1) + x2, on whichever rank."""
    for rank, (outs, sent) in enumerate(ranks(reduced, dtype, world_size=size)):
        for n, again in enumerate((0, 100)):
            all_ = [numbers(size * 7, again + each, dtype) for each in range(size)]
            total = all_[0]
            for x in all_[1:]:
                total = total + x
            assert torch.equal(outs[2 * n], total[: size * 5].view(size, 5)[rank])
            assert torch.equal(outs[2 * n + 1], total[size * 5 :].view(size, 2)[rank])
        assert sent == {("dp", "reduce_scatter"): size * 7 * dtype.itemsize}


def read_alone() -> list[float]:
    """In a rank: the first one gathers three times, while the other does nothing."""
    axis = axis_of_world()
    memory = SymmetricMemory(axis, CPU)
    shard = memory.empty(1, torch.float32)
    shard.fill_(axis.index + 1)
    memory.meet()
    out = torch.zeros(2)
    for _ in range(3 if axis.index == 0 else 0):
        memory.all_gather_several([out], [shard])
    memory.meet()
    return out.tolist()


def test_a_reader_needs_nobody(ranks: Ranks) -> None:
    assert ranks(read_alone, world_size=2) == [[1.0, 2.0], [0.0, 0.0]]


def late_writer() -> float:
    """In a rank: rank 1 writes late; who met has seen it."""
    axis = axis_of_world()
    memory = SymmetricMemory(axis, CPU)
    shard = memory.empty(1, torch.float32)
    shard.zero_()
    memory.meet()
    if axis.index == 1:
        time.sleep(0.5)
        shard.fill_(5)
    memory.meet()
    out = torch.zeros(2)
    memory.all_gather_several([out], [shard]).wait()
    memory.meet()
    return float(out[1])


def test_after_a_meeting_all_have_written(ranks: Ranks) -> None:
    assert ranks(late_writer, world_size=2) == [5.0, 5.0]


def shared_files() -> set[str]:
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return {str(path) for folder in folders if folder.is_dir() for path in folder.glob("picotron_mini-*")}


def held(named: bool) -> tuple[set[str], int]:
    """In a rank: names that this memory has while it is used, and bytes that it takes."""
    if named:
        del os.memfd_create
    before, names = SymmetricMemory.bytes_held, shared_files()
    memory = SymmetricMemory(axis_of_world(), CPU)
    memory.empty(1000, torch.float64).fill_(1)
    memory.meet()
    return shared_files() - names, SymmetricMemory.bytes_held - before


@pytest.mark.parametrize("named", [False, True])
def test_memory_in_use_has_no_name_that_could_be_left_behind(ranks: Ranks, named: bool) -> None:
    assert named or hasattr(os, "memfd_create") or sys.platform != "linux"
    assert ranks(held, named or not hasattr(os, "memfd_create"), world_size=2) == [(set(), 8000)] * 2


def killed_at_once() -> None:
    memory = SymmetricMemory(axis_of_world(), CPU)
    memory._exchange = lambda text: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign, return-value]
    memory.empty(1000, torch.float64)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files without a name")
def test_a_rank_that_is_killed_while_it_makes_memory_leaves_nothing(ranks: Ranks) -> None:
    before = shared_files()
    with pytest.raises(RankError, match="SIGKILL"):
        ranks(killed_at_once, world_size=2)
    assert shared_files() <= before


def of_two_sizes() -> None:
    axis = axis_of_world()
    SymmetricMemory(axis, CPU).empty(100 + axis.index, torch.float32)


def test_buffers_of_different_sizes_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="a buffer is of 40[04] bytes on one rank of dp and of 40[04] on another"):
        ranks(of_two_sizes, world_size=2)


def too_much() -> None:
    SymmetricMemory(axis_of_world(), CPU).empty(2**55, torch.float64)


def test_no_room_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match="found no room for 288,230,376,151,711,744 bytes"):
        ranks(too_much, world_size=2)


def on_two_hosts() -> None:
    axis = axis_of_world()
    symmetric._host = lambda: f"host {axis.index}"
    SymmetricMemory(axis, CPU)


def test_ranks_of_several_hosts_are_refused(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match="the 2 ranks that share on one host, and those of dp are on 2"):
        ranks(on_two_hosts, world_size=2)


def in_two_containers(what: str) -> None:
    """In a rank: one kernel, but what rank 0 says is not there for rank 1, or is another file."""
    axis = axis_of_world()
    memory = SymmetricMemory(axis, CPU)
    exchange = memory._exchange

    def other(text: str) -> list[str]:
        said = exchange(text)
        if axis.index == 1:
            path, number, size = said[0].split()
            said[0] = f"/nowhere/at/all {number} {size}" if what == "missing" else f"{path} {int(number) + 1} {size}"
        return said

    memory._exchange = other  # type: ignore[method-assign]
    memory.empty(10, torch.float32)


@pytest.mark.parametrize("what", ["missing", "another"])
def test_ranks_that_cannot_open_each_others_memory_are_refused(ranks: Ranks, what: str) -> None:
    with pytest.raises(ConfigError, match="cannot .do they run in containers"):
        ranks(in_two_containers, what, world_size=2)


def test_only_some_exchanges_go_through_it() -> None:
    with pytest.raises(ConfigError, match="symmetric_memory is for what zero cuts, and for tokens that travel"):
        resolve(RunConfig(layout="dp=2", train=TrainConfig(symmetric_memory=True)))
    train = TrainConfig(symmetric_memory=True)
    for run in (
        RunConfig(layout="dp=2", train=replace(train, zero=2)),
        RunConfig(layout="tp=2", train=replace(train, sequence_parallel=True, tensor_overlap=2)),
    ):
        assert resolve(run).train.symmetric_memory


def late_to_write_or_read(late: str) -> Tensor:
    """In a rank: rank 1 fills its buffer late, or reads the others' late; rank 0 overwrites its own when it is done."""
    axis = axis_of_world()
    memory = SymmetricMemory(axis, CPU)
    whole = memory.empty(4, torch.float32).fill_(0)
    memory.meet()
    if axis.index == 1 and late == "read":
        at = memory._at

        def slowly(x: Tensor, rank: int) -> Tensor:
            time.sleep(0.5)
            return at(x, rank)

        memory._at = slowly  # type: ignore[method-assign]
    if axis.index == 1 and late == "write":
        time.sleep(0.5)
    whole.copy_(torch.arange(4) + 10 * axis.index)
    out = torch.zeros(2)
    memory.reduce_scatter_several([out], [whole]).wait()
    whole.fill_(torch.nan)
    return out


@pytest.mark.parametrize("late", ["write", "read"])
def test_a_reduction_waits_for_writers_and_readers(ranks: Ranks, late: str) -> None:
    first, second = ranks(late_to_write_or_read, late, world_size=2)
    assert first.tolist() == [10, 12]
    assert second.tolist() == [14, 16]
