"""What a run measured, one JSON object a line, in a file that survives a killed run.

    {"step": 1, "loss": 7.62, "lr": 0.00015, "grad_norm": 2.1, ..., "time": 1764000000.5}
    {"step": 100, "val_loss": 4.31, "val_bits_per_byte": 2.07, "time": ...}

A line is written and flushed as a whole. When a run is killed, at most the last line is torn, and every
line before it can still be read. That is why the file is not one JSON array.

**Numbers that are not finite.** JSON has no NaN, and a diverging run is the one whose numbers matter most.
They are written as the strings "NaN", "Infinity" and "-Infinity", which `float()` of Python and `Number()`
of JavaScript read; `read_metrics` turns them back into floats.

Units: losses in nats per target token, `tokens` counted from the start of the run over all ranks,
`tokens_per_second` over all ranks, `memory_bytes` of rank 0, `time` in seconds since 1970 (UTC).
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from picotron_mini.collectives import SymmetricMemory
from picotron_mini.config import UserError

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Append lines to `path`; a context manager. Only rank 0 has one.

    Where the file exists, lines are added to it, and a torn last line is cut off first.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (old := path.read_bytes()) and not old.endswith(b"\n"):
            path.write_bytes(old[: old.rfind(b"\n") + 1])
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Write one line of numbers (0-dimensional tensors too) and strings; `time` is added where it is absent."""
        line = {name: _plain(value) for name, value in ({"time": time.time()} | values).items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Metrics:
    """The lines of a run in the order they were written, and what the end of the file looked like."""

    lines: list[dict[str, Any]]
    torn: str | None  # a sentence when the last line was cut short, else None

    @property
    def training(self) -> list[dict[str, Any]]:
        """The lines of training steps: those with a `loss`."""
        return [line for line in self.lines if "loss" in line]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The lines of validations: those with a `val_loss`."""
        return [line for line in self.lines if "val_loss" in line]


def read_metrics(path: Path) -> Metrics:
    """Read what `MetricsWriter` wrote. A torn last line is left out, and `torn` says so.

    Raises:
        UserError: there is no such file, or a line that is not the last cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a run that `picotron-mini train` made")
    lines: list[dict[str, Any]] = []
    torn = None
    raw = path.read_bytes().rstrip().split(b"\n")
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except ValueError as error:  # of JSON and of UTF-8
            if number < len(raw):
                raise UserError(f"{path} line {number} is not a JSON object ({error}); remove that line") from error
            torn = f"line {number} was cut short and is left out: the run was killed while writing it"
        else:
            lines.append({k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()})
    return Metrics(lines, torn)


class Smoothed:
    """Exponential moving average over about `horizon` values, unbiased from the first one on.

        m_t = a m_{t-1} + (1 - a) x_t,    a = 1 - 1 / horizon,    shown: m_t / (1 - a^t)

    The division is Adam's bias correction (arXiv 1412.6980): without it the average would start near 0.
    Values that are not finite are left out, or one NaN would be shown for ever.
    """

    def __init__(self, horizon: float = 20.0) -> None:
        self._keep = 1 - 1 / horizon
        self._sum = self._weight = 0.0

    def update(self, value: float) -> float:
        """Take one value in and return the average; NaN as long as no value was finite."""
        if math.isfinite(value):
            self._sum = self._keep * self._sum + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight if self._weight else math.nan


def memory_bytes(device: torch.device | str) -> int:
    """The most memory that this process has used so far, in bytes.

    On CUDA what PyTorch's allocator handed out at its peak on that device (`max_memory_allocated`), and what ranks
    share beside it (`SymmetricMemory`); on CPU the peak resident set of the process, with the interpreter and PyTorch
    itself.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) + SymmetricMemory.bytes_held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
