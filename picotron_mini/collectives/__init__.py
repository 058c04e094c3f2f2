"""Every byte between ranks passes through here, and is counted.

    plain.py          all_reduce, all_gather, ...: a tensor and an axis, and the result when it returns
    asynchronous.py   the same started and waited for later; send, receive, rotate
    conjugate.py      pairs with gradients: copy_to, reduce_from, gather_from, scatter_to, exchange
    operators.py      what calls torch.distributed for the first and the third, so that it can be compiled
    symmetric.py      all_gather and reduce_scatter by reading other ranks' memory, on one host
    counting.py       the ledger: bytes by axis and operation

An axis of size 1 costs nothing and counts nothing.
"""

from .asynchronous import (
    Done,
    Work,
    all_gather_async,
    all_gather_several,
    all_reduce_async,
    all_to_all_async,
    receive,
    reduce_scatter_async,
    reduce_scatter_several,
    rotate,
    send,
)
from .conjugate import copy_to, exchange, gather_from, reduce_from, scatter_to
from .counting import Ledger, ledger
from .plain import (
    all_gather,
    all_reduce,
    all_reduce_max,
    all_to_all,
    barrier,
    broadcast,
    reduce_scatter,
    shard_size,
)
from .symmetric import SymmetricMemory

__all__ = [
    "Done",
    "Ledger",
    "SymmetricMemory",
    "Work",
    "all_gather",
    "all_gather_async",
    "all_gather_several",
    "all_reduce",
    "all_reduce_async",
    "all_reduce_max",
    "all_to_all",
    "all_to_all_async",
    "barrier",
    "broadcast",
    "copy_to",
    "exchange",
    "gather_from",
    "ledger",
    "receive",
    "reduce_from",
    "reduce_scatter",
    "reduce_scatter_async",
    "reduce_scatter_several",
    "rotate",
    "scatter_to",
    "send",
    "shard_size",
]
