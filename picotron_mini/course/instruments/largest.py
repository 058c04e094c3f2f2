"""How large the largest tensor is that a piece of code makes: what says that nothing of T x T exists.

    with Largest() as largest:
        step()
    largest.elements

It looks where the witness looks, at every operator that runs, forward and backward, inside this library's own operators
as well. What a kernel keeps to itself is not seen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .witness import Witness


class Largest(Witness):
    """Notes the most elements that any operator returned as one tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out
