"""What calls `torch.distributed`, as custom operators.

So the collectives and the ledger inside them behave the same eagerly and in `torch.compile(fullgraph=True)`. An
operator takes tensors, numbers and text: therefore the key of a group, and not an axis. What is cut or put together
is dim 0. Operators have no gradients; those are in `conjugate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import GROUPS
from .counting import ledger

# torch renamed two collectives on the way from 2.11 to 2.13.
torch_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
torch_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Defined through torch.library itself: its decorator `custom_op` imports the compiler at the first call, which
# would cost every rank over a second.
_library = torch.library.Library("picotron_mini", "DEF")

_rehearsing = False  # inside `rehearsal`


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside the block operators run also on tensors without memory (fake ones), so that the ledger counts them.

    For a dry run: with torch's fake process group nothing is sent, and all that is left of a collective is its count.
    """
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the operator `torch.ops.picotron_mini.NAME`.

    Args:
        schema: its name and the types of what it takes and returns, in torch's form.
        fake: takes the same, and returns something of the result's shape and dtype: what a compiler asks for.
    """

    def define(fn: Callable[..., Any]) -> Callable[..., Any]:
        def without_memory(*args: Any) -> Any:
            return fn(*args) if _rehearsing else fake(*args)

        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"picotron_mini::{name}", without_memory, lib=_library)
        return getattr(torch.ops.picotron_mini, name).default

    return define


def _same(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reduced(x: Tensor, key: str, by: dist.ReduceOp.RedOpType) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    ledger.record(key, "all_reduce", out)
    dist.all_reduce(out, op=by, group=GROUPS[key])
    return out


@operator("all_reduce(Tensor x, str key) -> Tensor", _same)
def all_reduce(x: Tensor, key: str) -> Tensor:
    """The sum over the group."""
    return _reduced(x, key, dist.ReduceOp.SUM)


@operator("all_reduce_max(Tensor x, str key) -> Tensor", _same)
def all_reduce_max(x: Tensor, key: str) -> Tensor:
    """The elementwise maximum over the group."""
    return _reduced(x, key, dist.ReduceOp.MAX)


@operator(
    "all_gather(Tensor x, str key, int size) -> Tensor",
    lambda x, key, size: x.new_empty((size * x.shape[0], *x.shape[1:])),
)
def all_gather(x: Tensor, key: str, size: int) -> Tensor:
    """The x of the group's `size` ranks, one behind the other."""
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    ledger.record(key, "all_gather", x)
    torch_all_gather(out, x, group=GROUPS[key])
    return out


@operator(
    "reduce_scatter(Tensor x, str key, int size) -> Tensor",
    lambda x, key, size: x.new_empty((x.shape[0] // size, *x.shape[1:])),
)
def reduce_scatter(x: Tensor, key: str, size: int) -> Tensor:
    """This rank's part, one of `size`, of the sum over the group."""
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    ledger.record(key, "reduce_scatter", x)
    torch_reduce_scatter(out, x, group=GROUPS[key])
    return out


@operator("all_to_all(Tensor x, str key) -> Tensor", _same)
def all_to_all(x: Tensor, key: str) -> Tensor:
    """The parts of the ranks' x that are meant for this one, in rank order."""
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = torch.empty_like(x)
    ledger.record(key, "all_to_all", x)
    dist.all_to_all_single(out, x, group=GROUPS[key])
    return out
