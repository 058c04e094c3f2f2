"""A second opinion on the ledger: what torch itself sees being handed to other ranks.

The ledger of `collectives` counts where our code calls `torch.distributed`. If we forgot a line there, it would
never know. The witness asks one floor below: each call becomes an operator named `c10d::...`, and a *dispatch mode*
is shown every operator that runs, forward, backward, sends and receives alike.

    all_reduce(x, axis)  ->  ledger.record(...)  ->  c10d::allreduce_  ->  gloo or NCCL
                                   |                        |
                                 ledger   == bytes ==    witness

The two share no code. It is slow (Python at every operator), so it is for tests and lessons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# c10d's operator -> our name for it, and which argument holds the payload (None: a receive hands nothing over).
_PAYLOAD = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", None),
    "barrier": ("barrier", None),
}


class Witness(TorchDispatchMode):
    """Counts, inside a `with` block, the calls and bytes that this rank hands to `torch.distributed`.

        with Witness() as witness:
            step()
        witness.bytes["all_reduce"], witness.calls["all_reduce"]

    Raises (at the operator that asks for it):
        KeyError: a c10d operator that it does not know, so that nothing passes unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()  # operation -> payload, without those of no bytes
        self.calls: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method below, and each rank imports the compiler: over a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "picotron_mini":
            # Our operators call torch.distributed inside. A mode is off while it handles an operator, so turn it
            # on again and go straight to the kernel: else what is inside would pass unseen.
            kernel = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, args[0].device.type.upper()))
            with self:
                return func.redispatch(kernel, *args, **(kwargs or {}))
        if func.namespace == "c10d":
            operation, position = _PAYLOAD[func.__name__.split(".")[0]]
            self.calls[operation] += 1
            if position is not None and not (operation == "broadcast" and _is_not_root(args)):
                payload = args[position]
                tensors: list[Tensor] = [payload] if isinstance(payload, Tensor) else payload
                self.bytes[operation] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def _is_not_root(args: Sequence[Any]) -> bool:
    _, group, root = args[:3]
    return dist.ProcessGroup.unbox(group).rank() != root
