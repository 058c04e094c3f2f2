"""Memory that the other ranks of a host can read: messages that nobody sends.

A collective of NCCL is a kernel. While it runs it takes multiprocessors from the matrix products beside it, and they
take longer. But ranks of one host can map each other's memory, and then each copies what it needs out of it. On a GPU
its copy engines do that, over NVLink, and take no multiprocessor (only memory bandwidth):

    all_gather        x of rank 0    x of rank 1    x of rank 2
                          |              |              |          copied side by side
    out of rank 1     | x of 0       | x of 1       | x of 2     |

    reduce_scatter    x of rank 0    x of rank 1    x of rank 2
                         [1]            [1]            [1]         part 1 of each is copied to rank 1,
    out of rank 1             [1] + [1] + [1]                      and added up there, in the order of the ranks

The memory is called symmetric: every rank of an axis makes a buffer of the same size at the same time, and finds those
of the others. What a collective brought along must now be said: a reader must know that the others have written, and a
writer that they have read. `meet` says both. Gradients need it twice a message. Weights change once a step: all that
is gathered between two updates needs it twice together.

Ranks on the CPU share pages in the same way. There the core that needs the bytes copies them, at once. On a GPU to meet
is a kernel, too: one that sets a flag at every rank and waits for theirs.

PyTorch's own, underneath here on GPUs: torch.distributed._symmetric_memory (alpha). NCCL has collectives by copy
engines since 2.28.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError
from ..mesh import Axis
from .asynchronous import Done, Work
from .counting import ledger

ADDRESS = 1024  # bytes in which a rank says where its memory is
TIMEOUT = 600_000  # ms after which a GPU that waits in vain fails, as NCCL does


class SymmetricMemory:
    """Buffers of the ranks of one axis, each readable by all, and collectives out of them.

        memory = SymmetricMemory(mesh["dp"], device)
        shard = memory.empty(1000, torch.bfloat16)         # all ranks at the same time, of one size
        shard.copy_(...)
        memory.meet()                                      # now all have written
        work = memory.all_gather_several([whole], [shard])
        work.wait()

    What `x` is in the collectives lies in a buffer from here, at the same place on every rank, in one piece. All ranks
    of the axis must make the same calls in the same order, but `all_gather_several`.

    Raises:
        ConfigError: the ranks of the axis are on several hosts or cannot open each other's memory, or there is no room.
    """

    bytes_held: ClassVar[int] = 0  # in this process; PyTorch's allocator does not know of them

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.axis, self.device = axis, device
        self._buffers: dict[int, list[Tensor]] = {}  # of each rank, by where this rank's begins
        self._barriers: dict[int, Callable[[int], object]] = {}  # on GPUs
        self._free: defaultdict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
        hosts = self._exchange(_host())
        if len(set(hosts)) > 1:
            raise ConfigError(
                f"symmetric_memory needs the {axis.size} ranks that share on one host, and those of {axis.name} are on "
                f"{len(set(hosts))}; use zero_group=N with N ranks of one host, or symmetric_memory=False"
            )
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._signal = self._make(1, torch.int64)  # what `meet` needs beside the buffers

    # --- memory -------------------------------------------------------------------------------------------

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer that the other ranks can read, [numel], not filled; one that was given back, if there is one.

        It stays until the process ends: take few sizes.
        """
        free = self._free[numel, dtype]
        return free.pop() if free else self._make(numel, dtype)

    def give_back(self, buffer: Tensor) -> None:
        """Let `empty` hand out a buffer again, that no rank reads any more."""
        self._free[buffer.numel(), buffer.dtype].append(buffer)

    def _make(self, numel: int, dtype: torch.dtype) -> Tensor:
        make = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        mine = make(max(numel, 1), dtype)[:numel]
        SymmetricMemory.bytes_held += mine.nbytes
        return mine

    def _on_gpu(self, numel: int, dtype: torch.dtype) -> Tensor:
        from torch.distributed import _symmetric_memory

        mine = _symmetric_memory.empty(numel, dtype=dtype, device=self.device)
        # PyTorch fills new memory with zeros, and the flags by which ranks meet with it, behind what the GPU has to do
        # already: a rank that is ahead would set a flag here, and the late zero wipe it out
        torch.cuda.synchronize(self.device)
        handle = _symmetric_memory.rendezvous(mine, self.axis.group)
        self._barriers[mine.data_ptr()] = lambda channel: handle.barrier(channel, TIMEOUT)
        self._buffers[mine.data_ptr()] = [handle.get_buffer(r, (numel,), dtype) for r in range(self.axis.size)]
        return mine

    def _on_cpu(self, numel: int, dtype: torch.dtype) -> Tensor:
        size = numel * dtype.itemsize
        with _shared_file(size) as (mine, path):
            said = self._exchange(f"{path} {os.fstat(mine).st_ino} {size}")
            buffers = [torch.frombuffer(self._opened(each, size), dtype=dtype) for each in said]
            self.meet()  # all have it
        self._buffers[buffers[self.axis.index].data_ptr()] = buffers
        return buffers[self.axis.index]

    def _opened(self, said: str, size: int) -> mmap.mmap:
        """The memory that a rank has made, here."""
        path, number, its_size = said.rsplit(" ", 2)
        if int(its_size) != size:
            raise ValueError(
                f"a buffer is of {its_size} bytes on one rank of {self.axis.name} and of {size} on another"
            )
        handle = -1
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)  # never creates one: then each rank would read its own
        try:
            if handle < 0 or os.fstat(handle).st_ino != int(number):
                raise ConfigError(
                    f"symmetric_memory needs ranks that can open each other's memory, and those of {self.axis.name} "
                    "cannot (do they run in containers of their own?); use symmetric_memory=False"
                )
            return mmap.mmap(handle, size)
        finally:
            if handle >= 0:
                os.close(handle)

    def _exchange(self, text: str) -> list[str]:
        """What every rank of the axis says."""
        mine = torch.zeros(ADDRESS, dtype=torch.uint8)
        mine[: len(text.encode())] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        mine = mine.to(self.device)
        all_ = [torch.empty_like(mine) for _ in range(self.axis.size)]
        dist.all_gather(all_, mine, group=self.axis.group)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in all_]

    def meet(self) -> None:
        """Until here all ranks of the axis have come: what they wrote before is there, what they read is read."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().wait_stream(self._stream)
            self._barriers[self._signal.data_ptr()](0)
        else:
            dist.barrier(self.axis.group)

    def all_have_read(self, buffer: Tensor) -> Work:
        """As `meet`, to be waited for later: behind what this rank has begun to read."""
        return self._later(partial(self._meet_at, buffer, 1))

    # --- collectives --------------------------------------------------------------------------------------

    def all_gather_several(self, outs: Sequence[Tensor], xs: Sequence[Tensor], fresh: bool = False) -> Work:
        """Start copying the ranks' x, in rank order, into `out`, for each pair.

        Args:
            outs: flat, [N n]; filled after `wait()`.
            xs: flat, [n], in symmetric memory; nobody writes there before all have waited and met.
            fresh: they were written since the last meeting, so there is one first, and all ranks must call this. Else
                no other rank has to.
        """
        for x in xs:
            ledger.record(self.axis.key, "all_gather", x)
        ranks, index = self.axis.size, self.axis.index
        order = [(index + each) % ranks for each in range(ranks)]  # not all out of one rank at once

        def copy() -> None:
            if fresh:
                self._meet_at(xs[0], 0)
            for rank in order:
                for out, x in zip(outs, xs, strict=True):
                    out.view(ranks, -1)[rank].copy_(self._at(x, rank), non_blocking=True)

        return self._run(copy)

    def reduce_scatter_several(self, outs: Sequence[Tensor], xs: Sequence[Tensor]) -> Work:
        """Start adding up this rank's part of the ranks' x into `out`, for each pair.

        Args:
            outs: flat, [n]; filled after `wait()`.
            xs: flat, [N n], in one buffer of symmetric memory, filled; left alone until `wait()`.
        """
        for x in xs:
            ledger.record(self.axis.key, "reduce_scatter", x)
        return self._later(partial(self._add_up, outs, xs))

    def _add_up(self, outs: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        index, ranks = self.axis.index, range(self.axis.size)
        first = 0 if index else 1  # of the other ranks; between two there is nothing else to copy
        parts = [torch.empty_like(out) for out in outs] if len(ranks) > 2 else []
        self._meet_at(xs[0], 0)
        self._copy_part(outs, xs, first)
        for rank in [rank for rank in ranks if rank != first]:  # in this order on every rank: x0 + x1 is x1 + x0
            if rank == index:
                torch._foreach_add_(list(outs), [x.view(len(ranks), -1)[index] for x in xs])
            else:
                self._copy_part(parts, xs, rank)
                torch._foreach_add_(list(outs), parts)
        self._meet_at(xs[0], 1)

    def _copy_part(self, outs: Sequence[Tensor], xs: Sequence[Tensor], rank: int) -> None:
        """This rank's part of what another one has."""
        for out, x in zip(outs, xs, strict=True):
            out.copy_(self._at(x, rank).view(self.axis.size, -1)[self.axis.index], non_blocking=True)

    def _at(self, x: Tensor, rank: int) -> Tensor:
        """What lies on another rank where x lies here."""
        theirs = self._buffers[x.untyped_storage().data_ptr()][rank]
        return theirs[x.storage_offset() : x.storage_offset() + x.numel()]

    def _meet_at(self, x: Tensor, channel: int) -> None:
        """As `meet`, for what is done with one buffer: others may be under way at the same time."""
        if self.device.type == "cuda":
            self._barriers[x.untyped_storage().data_ptr()](channel)
        else:
            self.meet()

    def _run(self, copy: Callable[[], object]) -> Work:
        """Copy behind what the GPU has to do until now, and beside what it will be given; on a CPU at once."""
        if self.device.type != "cuda":
            copy()
            return Done()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copy()
            return _Copied(self._stream.record_event())

    def _later(self, do: Callable[[], object]) -> Work:
        """For what has to meet others: as `_run`, but on a CPU when it is waited for, and not at once."""
        return self._run(do) if self.device.type == "cuda" else _Later(do)


class _Copied:
    """What the copy engines were given, until a point in their stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class _Later:
    """What is done when it is waited for."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def wait(self) -> None:
        self.do()


@contextlib.contextmanager
def _shared_file(size: int) -> Iterator[tuple[int, str]]:
    """A file in memory, and a path by which other processes open it while the block runs.

    On Linux it has no name, so whatever ends this process leaves nothing behind.
    """
    named = not hasattr(os, "memfd_create")
    try:
        if named:
            handle, path = tempfile.mkstemp(prefix="picotron_mini-")
        else:
            handle = os.memfd_create("picotron_mini")
            path = f"/proc/{os.getpid()}/fd/{handle}"
        try:
            os.ftruncate(handle, size)  # pages come with the first write, as with any memory
            yield handle, path
        finally:
            os.close(handle)
            if named:
                os.unlink(path)
    except OSError as error:
        raise ConfigError(
            f"symmetric_memory found no room for {size:,} bytes that ranks share ({error.strerror}): make room, or use "
            "symmetric_memory=False"
        ) from None


def _host() -> str:
    """What only processes of one host have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.exists() else platform.node()
