"""A step's forward and backward as one CUDA graph: launched once, and no more kernel by kernel.

A GPU runs what its host has launched. Where kernels are short, because each rank has few tokens or many cuts, the host
is the slower of the two, and the GPU waits between any two kernels:

    host    launch a | launch b | launch c |        replay |
    GPU              [a]        [b]        [c]             [a][b][c]

A graph is a recording: kernels, collectives and what waits for what, with the addresses they read and write, but not
the Python in between. So it is right for as long as every step does the same at the same addresses:

    warm up    one step as usual: compiles, opens NCCL's connections, leaves gradients where they will be
    record     all micro-batches of the next step, from buffers of ours; nothing is computed
    replay     copy the step's batches into those buffers, launch the recording

What Python does while it is recorded, it does once: what the ledger counts then is counted again at each replay.
Whatever has to *read* a number from the GPU cannot be recorded (a mixture's rows for each rank, a gradient that is
missing on some rank): it raises an error then. The optimizer's step stays outside: it is long kernels.

All of a rank's work runs on a stream that is not the default one, since that one cannot be recorded, and autograd adds
gradients up on the stream on which the parameters' nodes were made (`own_stream`, before anything else).

PyTorch's own: `torch.cuda.make_graphed_callables` for a module, `torch.compile(mode="reduce-overhead")` for each
compiled piece. Neither takes in the whole step, with the collectives that run beside backward.

Source: CUDA C++ Programming Guide, "CUDA Graphs".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..collectives import ledger
from ..data.loader import Batch

Fill = Callable[[Sequence[Batch]], tuple[Tensor, Tensor]]  # fills gradients from a step's batches: loss and targets
WARM_UP = 1  # steps


def own_stream(device: torch.device) -> None:
    """Let all that this thread does on the device from now on run on a stream that can be recorded."""
    torch.cuda.set_stream(torch.cuda.Stream(device))


class RecordedStep:
    """Fills gradients: in the first step as it is told, from then on by a recording of that."""

    def __init__(self) -> None:
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches: list[Batch] = []  # what the recording reads
        self.found: tuple[Tensor, Tensor] | None = None  # what it writes, beside gradients
        self.sent: Counter[tuple[str, str]] = Counter()  # what it sends

    def __call__(self, fill: Fill, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """What `fill(batches)` returns, for batches of one shape.

        Args:
            fill: leaves gradients at the same addresses each time, and reads nothing from the GPU.
        """
        self.seen += 1
        if self.seen <= WARM_UP:
            return fill(batches)
        if self.graph is None:
            self._record(fill, batches)
        else:
            for mine, batch in zip(self.batches, batches, strict=True):
                for each in fields(batch):
                    getattr(mine, each.name).copy_(getattr(batch, each.name))
            ledger.again(self.sent)
        assert self.graph is not None and self.found is not None
        self.graph.replay()
        loss, tokens = self.found
        return loss.clone(), tokens.clone()  # the next replay writes over them

    def _record(self, fill: Fill, batches: Sequence[Batch]) -> None:
        self.batches = [Batch(*(getattr(batch, each.name).clone() for each in fields(batch))) for batch in batches]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a recording has memory of its own
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # NCCL's watchdog, a thread of this process, may ask about its events meanwhile: hence "thread_local"
        with ledger.recording() as self.sent, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.found = fill(self.batches)
        self.graph = graph
