"""The run as it happens: a few lines that redraw themselves, or plain lines where nothing can be redrawn.

    step 120/300  ━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━   40 %  2:01 left
    loss 3.214  validation 3.402 (1.712 bits per byte)
    █▆▅▄▃▃▂▂▂▁▁   21,302 tokens/s  memory 612 MiB

Rank 0 alone shows it. No collective is called here, so no other rank has to take part. Nothing runs in a
thread: the display is drawn by the step that calls it, at most ten times a second.

Into a file or a pipe goes one line every `PLAIN_SECONDS`, and always one for the first and the last step.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from time import monotonic
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from picotron_mini.monitoring.metrics import Smoothed
from picotron_mini.monitoring.units import bytes_text, number_text, seconds_text

PLAIN_SECONDS = 10.0
REDRAW_SECONDS = 0.1
HISTORY = 512  # points kept for the sparkline; beyond that neighbours are averaged


class Progress:
    """Show a run of `total` steps; a context manager that gives the terminal back however it is left.

    Args:
        total: steps of the whole run.
        console: where to draw; by default standard output.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        # rich takes FORCE_COLOR for a terminal; in a log file colours may be wanted, but never cursor movements.
        self._console = console or Console(force_interactive=None if sys.stdout.isatty() else False)
        self._total = total
        self._step = 0
        self._loss = math.nan
        self._smoothed = Smoothed()
        self._smooth = math.nan
        self._history: list[float] = []  # each the mean of `_stride` losses
        self._pending: list[float] = []
        self._stride = 1
        self._validation = ""
        self._speed = 0.0
        self._memory = 0
        self._first: tuple[int, float] | None = None  # the first step seen and when it ended
        self._drawn = -math.inf
        self._printed = False  # whether the last plain line still says everything
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._render)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
            # A rank that is killed cannot give a hidden cursor back, so it is never hidden.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.refresh()
            self._live.stop()
        elif self._step and not self._printed:
            self._print_line()

    def step(self, step: int, loss: float, tokens_per_second: float, memory_bytes: int) -> None:
        """Take in one finished training step, counted from 1."""
        now = monotonic()
        self._step, self._loss, self._speed, self._memory = step, loss, tokens_per_second, memory_bytes
        self._smooth = self._smoothed.update(loss)
        self._printed = False
        self._remember(loss)
        self._first = self._first or (step, now)
        if now - self._drawn >= (REDRAW_SECONDS if self._live else PLAIN_SECONDS):
            self._drawn = now
            if self._live:
                self._live.refresh()
            else:
                self._print_line()

    def validation(self, loss: float, bits_per_byte: float | None = None) -> None:
        """Take in the result of a validation; it is shown until the next one."""
        self._validation = number_text(loss)
        if bits_per_byte is not None:
            self._validation += f" ({bits_per_byte:.3f} bits per byte)"
        if self._live:
            self._live.refresh()
        else:
            self._drawn, self._printed = -math.inf, False  # worth a line at the next step

    def say(self, text: str) -> None:
        """Print a line above the display."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """From the mean time of the steps after the first, which also warms up; None before the second step."""
        if self._step >= self._total:
            return 0.0
        if self._first is None or self._step <= self._first[0]:
            return None
        return (self._total - self._step) * (monotonic() - self._first[1]) / (self._step - self._first[0])

    def _remember(self, loss: float) -> None:
        self._pending.append(loss)
        if len(self._pending) < self._stride:
            return
        self._history.append(
            math.fsum(self._pending) / self._stride if all(map(math.isfinite, self._pending)) else loss
        )
        self._pending.clear()
        if len(self._history) == HISTORY:
            self._history = [(a + b) / 2 for a, b in zip(self._history[::2], self._history[1::2], strict=True)]
            self._stride *= 2

    def _facts(self) -> list[str]:
        if not self._step:
            return ["waiting for the first step"]
        shown = self._smooth if math.isfinite(self._loss) else self._loss
        return [f"loss {number_text(shown)}"] + ([f"validation {self._validation}"] if self._validation else [])

    def _rates(self) -> list[str]:
        return [f"{self._speed:,.0f} tokens/s", f"memory {bytes_text(self._memory)}"]

    def _print_line(self) -> None:
        left = f"{seconds_text(self.seconds_left())} left"
        self.say("  ".join([f"step {self._step}/{self._total}", *self._facts(), *self._rates(), left]))
        self._printed = True

    def _render(self) -> RenderableType:
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            f"{100 * self._step / max(self._total, 1):3.0f} %",
            f"{seconds_text(self.seconds_left())} left",
        )
        facts = Text("  ".join(self._facts()), style="" if math.isfinite(self._loss) or not self._step else "bold red")
        ascii_only = self._console.options.ascii_only
        rates = Text.assemble((sparkline(self._history, 32, ascii_only), "cyan"), "  ", "  ".join(self._rates()))
        return Group(bar, facts, rates)


def sparkline(values: list[float], width: int, ascii_only: bool = False) -> str:
    """At most `width` characters whose height follows the values; `x` where one is not finite."""
    levels = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    edges = [i * len(values) // max(count, 1) for i in range(count + 1)]
    parts = [values[start:end] for start, end in pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]  # NaN and inf spread to the mean
    finite = [m for m in means if math.isfinite(m)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return "".join(
        "x" if not math.isfinite(m) else levels[round((m - low) / span * (len(levels) - 1))] if span else levels[0]
        for m in means
    )
