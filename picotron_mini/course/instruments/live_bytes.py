"""Where the memory of one training step goes: every tensor that lives, by what it is for, from operation to operation.

    history = watch_step(run)
    history[0]           Moment("forward", {"weights": ..., "activations": 0, ...})
    draw_memory(history, words)

A dispatch mode sees each operation that PyTorch runs, forward, backward and optimizer. A storage that it has not met
is new memory, and a weak reference tells when that is given back. So what is counted is what an allocator would be
asked for, on any device; what a kernel uses inside itself is not seen, and neither are the allocator's own gaps.

Kinds: the state that stays between steps (weights, masters, gradients, moments) and the batch are known beforehand.
What a forward makes is an activation, or belongs to the logits if its last dim is the vocabulary's; what is made later
is a temporary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...config import MeshShape, RunConfig
from ...mesh import Mesh
from ...parallel.data import GradientBuckets
from ...parallel.parallelize import Parallel, parallelize
from ...training.optimizer import make_optimizer
from ...training.step import apply_gradients, compute_gradients, train_step
from ...verify import make_batches
from ..figures.picture import GREY, PALE, Picture, drawing, figure, picture

STATE = ("weights", "masters", "gradients", "moments")
KINDS = (*STATE, "batch", "activations", "logits", "temporaries")
COLOURS = dict(zip(KINDS, PALE, strict=True))


class Moment(NamedTuple):
    """What lives after one operation: the phase of the step, and bytes by kind."""

    phase: str
    live: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.live.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the `with` block, as long as they live.

    Args:
        owned: tensors that exist already, by kind.
        vocab_size: tells logits from other activations.
    """

    def __init__(self, owned: Mapping[str, Iterable[Tensor]], vocab_size: int) -> None:
        super().__init__()
        self.phase = "forward"
        self.history: list[Moment] = []
        self._vocab_size = vocab_size
        self._live = dict.fromkeys(KINDS, 0)
        self._kinds: dict[int, str] = {}  # of the storages that live, by their address in C++
        for kind, tensors in owned.items():
            for tensor in tensors:
                self._enter(tensor, kind)
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.phase == "forward" and torch._C._current_graph_task_id() != -1:
            self.phase = "backward"  # autograd's engine is at work
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self._enter(tensor, self._kind(tensor))
        self._note()
        return out

    def _kind(self, tensor: Tensor) -> str:
        if self.phase != "forward":
            return "temporaries"
        return "logits" if tensor.shape[-1:] == (self._vocab_size,) else "activations"

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kinds:
            self._kinds[storage._cdata] = kind
            self._live[kind] += storage.nbytes()
            weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._live[self._kinds.pop(key)] -= size

    def _note(self) -> None:
        if not self.history or self.history[-1] != (self.phase, self._live):
            self.history.append(Moment(self.phase, dict(self._live)))


def watch_step(run: RunConfig) -> list[Moment]:
    """One step of the library on one device and one micro-batch, the second, when the optimizer's state exists.

    Args:
        run: resolved, with layout dp=1 and the vocabulary's size filled.
    """
    parallel = parallelize(run, Mesh(MeshShape(), 0), torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    batch = make_batches(replace(run, train=replace(run.train, steps=1)))[0]
    train_step(parallel, optimizer, [batch])
    owned = {**_state(parallel, optimizer), "batch": vars(batch).values()}
    with LiveBytes(owned, run.model.vocab_size) as live:
        loss, tokens = compute_gradients(parallel, [batch])
        live.phase = "optimizer"
        apply_gradients(parallel, optimizer, loss, tokens)
    return live.history


def _state(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    assert isinstance(parallel.gradients, GradientBuckets)
    # where weights are their own masters the storage is entered once, as weights
    return {
        "weights": list(parallel.parameters.values()),
        "masters": list(parallel.masters.values()),
        "gradients": [bucket.buffer for bucket in parallel.gradients.buckets],
        "moments": [tensor for state in optimizer.state.values() for tensor in state.values()],
    }


def draw_memory(history: Sequence[Moment], words: str) -> Picture:
    """The step as stacked areas, one colour a kind, from operation to operation.

    Args:
        words: what the picture shows, for those who do not see it.
    """
    with drawing():
        fig = figure(7.2, 3.2)
        axes = fig.subplots()
        peak = max(history, key=lambda moment: moment.total)
        kinds = [kind for kind in KINDS if any(100 * moment.live[kind] > peak.total for moment in history)]
        below = [0.0] * len(history)
        for kind in kinds:
            above = [base + moment.live[kind] / 1e6 for base, moment in zip(below, history, strict=True)]
            edges = list(zip(below, above, strict=True))
            # a stretch in which nothing changes needs its two ends
            kept = [i for i, edge in enumerate(edges) if not edge == edges[i - 1] == edges[(i + 1) % len(edges)]]
            kept = sorted({0, *kept, len(edges) - 1})
            lower, upper = zip(*(edges[i] for i in kept), strict=True)
            axes.fill_between(kept, lower, upper, label=kind, facecolor=COLOURS[kind], edgecolor=GREY, linewidth=0.3)
            below = above
        start = 0
        top = peak.total / 1e6
        for phase, moments in groupby(history, key=lambda moment: moment.phase):
            axes.axvline(start, color=GREY, linestyle=":", linewidth=0.8)
            axes.text(start + 0.01 * len(history), 1.03 * top, phase)
            start += len(list(moments))
        axes.set(xlim=(0, len(history) - 1), ylim=(0, 1.12 * top), ylabel="MB", xticks=[])
        axes.set_xlabel("operations of one training step, in their order")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    return picture(fig, words)
