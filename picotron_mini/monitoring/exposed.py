"""How much of the communication does a rank wait for? Read from a profile of what its device did.

A GPU runs the kernels of an exchange beside those of the model. What overlaps costs little; what does not is waiting:

    compute         |=====|======|        |=====|=======|
    communication        |----|-----------|        |--|
    exposed                       |-------|

    exposed = time in which a kernel of communication runs and no other kernel does

A kernel of communication also runs while it waits for a peer that is late, so a pipeline's bubble is exposed time too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType

Spans = list[tuple[float, float]]  # beginning and end, in seconds; sorted, none touches another


@dataclass(frozen=True)
class Exposed:
    """One step on one device, in seconds."""

    step: float  # from the beginning of the first kernel to the end of the last
    compute: float  # at least one kernel runs that is not communication
    communication: float  # at least one kernel of communication runs
    exposed: float  # communication runs, and no compute
    kernels: list[tuple[str, float]]  # name and seconds of the kernels that took longest, longest first

    @property
    def idle(self) -> float:
        """No kernel runs: the device waits for the host."""
        return self.step - self.compute - self.exposed

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.__dict__, "idle": self.idle}


def profiled(step: Callable[[], object], top: int = 12) -> Exposed:
    """Run one step under PyTorch's profiler and say where the current CUDA device's time went.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    ]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel on the device; is another profiler (CUPTI) attached?")
    return exposed(kernels, top)


def exposed(kernels: Iterable[tuple[str, float, float]], top: int = 12) -> Exposed:
    """The account of some kernels: name, beginning and end in seconds. Copies and fills count as compute."""
    kernels = list(kernels)
    exchanges: Spans = merged((start, end) for name, start, end in kernels if is_communication(name))
    others = merged((start, end) for name, start, end in kernels if not is_communication(name))
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, start, end in kernels:
        seconds[name] += end - start
    return Exposed(
        step=max(end for _, _, end in kernels) - min(start for _, start, _ in kernels),
        compute=length(others),
        communication=length(exchanges),
        exposed=length(merged([*exchanges, *others])) - length(others),
        kernels=sorted(seconds.items(), key=lambda item: -item[1])[:top],
    )


def is_communication(name: str) -> bool:
    """Whether a kernel of this name is NCCL's, or what symmetric memory has in its place: a copy, or a meeting."""
    return any(part in name.lower() for part in ("nccl", "memcpy ptop", "symmetric_memory"))


def merged(spans: Iterable[tuple[float, float]]) -> Spans:
    """The union of some spans of time."""
    out: Spans = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(spans: Spans) -> float:
    """Seconds that are covered."""
    return sum(end - start for start, end in spans)
