"""Float32 masters in two halves, of which the upper one is the weight.

An optimizer with float32 masters beside bf16 weights keeps 6 bytes a parameter for one number. But a bf16 number *is*
the upper half of a float32, rounded; so keep what the rounding took, and put the two together for the update only:

    master   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm      float32, 32 bits
    weight   s eeeeeeee mmmmmmm                       bf16: the upper half of (bits + 0x8000), so rounded to the nearest
    rest                        rrrrrrrrrrrrrrrr      int16: bits - (upper half << 16), between -0x8000 and 0x7fff

    bits(master) = (bits(weight) << 16) + rest        exact for every number; a NaN becomes the one NaN 0x7fc00000

That is 4 bytes a parameter, and with a float32 gradient and AdamW's two moments 16 in place of 18. A tie is rounded
away from zero where torch rounds it to the even neighbour: if both directions were used, 0x8000 would need a 17th bit.

The whole masters exist for one part of the parameters at a time, while the optimizer updates that part:

    for names in parts:   masters.put_together(names) -> optimizer.step() -> masters.take_apart(names)

Price: each half is read and written once more a step, 12 bytes a parameter if the passes are fused (`fuse`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

PART = 64 * 2**20  # elements whose masters are whole at once: 256 MiB in float32


def join(master: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Fill `master` (float32) from its halves `weight` (bfloat16) and `rest` (int16), all flat and of one size."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + rest
    master.view(torch.int32).copy_(bits)


def cut(master: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Fill `weight` (bfloat16) and `rest` (int16) from `master` (float32), all flat and of one size."""
    bits = master.view(torch.int32)
    bits = torch.where(master.isnan(), 0x7FC00000, bits)  # rounded, CUDA's NaN 0x7fffffff would become -0
    upper = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(upper)
    rest.copy_(bits - (upper << 16))


def parts(sizes: Mapping[str, int], limit: int = PART) -> list[list[str]]:
    """Names in groups of at most `limit` elements, in order; what is larger has a group of its own."""
    out: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not out or filled + size > limit:
            out.append([])
            filled = 0
        out[-1].append(name)
        filled += size
    return out


class SplitMasters(Mapping[str, Tensor]):
    """Masters by global name, each made whole when it is asked for, as a copy of its own.

    Args:
        weights: bfloat16, contiguous; from here on they are the upper halves.
        values: the float32 masters to begin with.
        fuse: compile the passes, one kernel each. On a GPU they else cost about four times as much.
    """

    def __init__(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], fuse: bool = False) -> None:
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.rests = {name: torch.empty_like(weight, dtype=torch.int16) for name, weight in self.weights.items()}
        self.held: dict[str, Tensor] = {}  # by the optimizer; with memory between put_together and take_apart only
        self._join, self._cut = (torch.compile(f, dynamic=True) if fuse else f for f in (join, cut))
        for name, value in values.items():
            cut(value.view(-1), self.weights[name].view(-1), self.rests[name].view(-1))
            self.held[name] = torch.empty_like(value)
            self.held[name].untyped_storage().resize_(0)

    def put_together(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The masters of these names, whole, as the tensors that the optimizer holds."""
        for name in names:
            held = self.held[name]
            held.untyped_storage().resize_(held.numel() * held.itemsize)
            self._join(held.view(-1), self.weights[name].view(-1), self.rests[name].view(-1))
        return {name: self.held[name] for name in names}

    def take_apart(self, names: Sequence[str]) -> None:
        """Write the masters of these names back to their halves, the weights among them, and drop them."""
        for name in names:
            held = self.held[name]
            self._cut(held.view(-1), self.weights[name].view(-1), self.rests[name].view(-1))
            held.untyped_storage().resize_(0)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        whole = torch.empty_like(weight, dtype=torch.float32)
        join(whole.view(-1), weight.view(-1), self.rests[name].view(-1))
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
