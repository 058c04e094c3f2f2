"""NCCL's rule, acted out on gloo: the messages of one process group run one after the other, in the order of the calls.

gloo matches messages by sender and lets them overtake each other, so on the CPU an order that is wrong on GPUs can
look fine. After `messages_in_order()` each process group of this rank has one thread that takes the sends and
receives of the pipeline from a queue and finishes each before it begins the next:

    two groups    queue "pp"            queue "pp.backward"        a receive that waits holds up its own direction only
    one group     queue "pp": receive gradient 1, send activation 2 ...      the send waits behind the receive

It is a model of the one thing that decides here, the order within a group. NCCL's streams have more rules;
tests/parallel/test_pipeline.py lays them over the executor's calls as a graph and looks for cycles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue

from torch import Tensor

from ...collectives import Work, receive, send
from ...mesh import Axis
from ...parallel import pipeline

_Start = Callable[[Tensor, Axis, int], Work]


class _Ticket:
    """Stands for a message that is in the queue or under way."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def wait(self) -> None:
        self.done.wait()


def messages_in_order() -> None:
    """From here on, the executor's messages in this process run in order, group by group. Call it inside a rank."""
    queues: dict[str, Queue[tuple[_Start, Tensor, Axis, int, _Ticket]]] = {}

    def work_off(queue: Queue[tuple[_Start, Tensor, Axis, int, _Ticket]]) -> None:
        while True:
            start, x, axis, peer, ticket = queue.get()
            start(x, axis, peer).wait()
            ticket.done.set()

    def queued(start: _Start) -> _Start:
        def put(x: Tensor, axis: Axis, peer: int) -> Work:
            if axis.key not in queues:
                queues[axis.key] = Queue()
                threading.Thread(target=work_off, args=(queues[axis.key],), daemon=True).start()
            ticket = _Ticket()
            queues[axis.key].put((start, x, axis, peer, ticket))
            return ticket

        return put

    pipeline.send, pipeline.receive = queued(send), queued(receive)  # type: ignore[attr-defined, assignment]
