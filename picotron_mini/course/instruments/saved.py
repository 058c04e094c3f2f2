"""How many bytes autograd keeps for later: the activations, counted where they are kept.

    saved = SavedBytes(model.parameters())
    with saved.watching():
        loss = model(x)          saved.now is what backward will read
    loss.backward()              and is freed here: saved.now == 0;  saved.peak was the most

Autograd tells of each tensor that it keeps for a backward, and lets a wrapper be kept in its place. The wrapper is
counted as long as it lives. Two tensors that share memory count once; parameters, which stay anyway, not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Kept:
    """A tensor that autograd keeps; gone from the count when autograd lets go of it."""

    def __init__(self, tensor: Tensor, count: SavedBytes) -> None:
        self.tensor, self.count = tensor, count
        count._enter(tensor)

    def __del__(self) -> None:
        self.count._leave(self.tensor)


class SavedBytes:
    """Counts what is kept for the backwards of all forwards that ran inside `watching()`.

    Args:
        owned: tensors that exist anyway and do not count, as the parameters.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0  # bytes
        self._owned = {_address(tensor) for tensor in owned}
        self._uses: Counter[int] = Counter()  # address of a storage -> by how many nodes it is kept

    @contextmanager
    def watching(self) -> Iterator[SavedBytes]:
        """Count what forwards keep inside the `with` block, until it is freed, there or later."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor):
            yield self

    def _enter(self, tensor: Tensor) -> None:
        address = _address(tensor)
        self._uses[address] += 1
        if self._uses[address] == 1 and address not in self._owned:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)

    def _leave(self, tensor: Tensor) -> None:
        address = _address(tensor)
        self._uses[address] -= 1
        if not self._uses[address]:
            del self._uses[address]
            if address not in self._owned:
                self.now -= tensor.untyped_storage().nbytes()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
