"""The ledger: bytes between ranks by axis and operation, counted where they are handed to `torch.distributed`.

Its unit is the *payload a rank hands to torch.distributed*, padding included: N for an all_reduce of
N bytes, the own shard for an all_gather, the whole input for a reduce_scatter, nothing for a receive. A ring
moves 2(n-1)/n of an all_reduce's payload over each rank's wire; a tree moves other amounts; the payload is the same.

    with ledger.recording() as sent:
        all_reduce(torch.ones(3), mesh["tp"])
    sent == {("tp", "all_reduce"): 12}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Ledger:
    """Bytes by (axis, operation), counted where they are handed to `torch.distributed`."""

    def __init__(self) -> None:
        self._open: list[Counter[tuple[str, str]]] = []

    @contextmanager
    def recording(self) -> Iterator[Counter[tuple[str, str]]]:
        """Count what happens inside the `with` block; recordings may be nested."""
        counter: Counter[tuple[str, str]] = Counter()
        self._open.append(counter)
        try:
            yield counter
        finally:
            self._open = [each for each in self._open if each is not counter]  # another may be equal to it

    def __reduce__(self) -> str:
        # A function that names the ledger travels to a rank by value. It must meet the rank's own ledger there, not
        # a copy that nothing is written to: so pickle the name and not the object.
        return "ledger"

    def again(self, sent: Counter[tuple[str, str]]) -> None:
        """Count once more what was counted before: a recording of it runs."""
        for counter in self._open:
            counter.update(sent)

    def record(self, key: str, operation: str, payload: Tensor) -> None:
        axis = key.split(":")[0].split(".")[0]  # what stands behind a point is a further group of the same ranks
        for counter in self._open:
            counter[axis, operation] += payload.numel() * payload.element_size()


ledger = Ledger()
