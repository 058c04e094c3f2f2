"""The live display: what it shows in a terminal and in a log file, and that the terminal is given back."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from picotron_mini.monitoring import progress as module
from picotron_mini.monitoring.progress import Progress, sparkline

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """Time that moves only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, _environ={})


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_everything(clock: Clock) -> None:
    console = terminal()
    with Progress(300, console) as progress:
        for step in range(1, 121):
            clock.now += 0.5
            progress.step(step, 3.0 if step > 60 else 6.0, 21_302.4, 612 << 20)
        progress.validation(3.402, 1.712)
    shown = ESCAPES.sub("", output(console))
    last = shown[shown.rindex("step 120/300") :]
    assert "40 %" in last and "1:30 left" in last  # 180 steps of half a second
    assert "validation 3.402 (1.712 bits per byte)" in last
    assert "21,302 tokens/s" in last and "memory 612 MiB" in last
    assert "█" in last and "▁" in last
    assert re.search(r"loss 3\.\d\d\d", last)  # smoothed: near 3 after 60 steps at 3


def test_a_narrow_terminal_keeps_its_lines_inside(clock: Clock) -> None:
    console = terminal(width=36)
    with Progress(10, console) as progress:
        progress.step(1, 3.0, 21_302.4, 612 << 20)
    assert max(len(line) for line in re.split(r"[\r\n]", ESCAPES.sub("", output(console)))) <= 36


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_the_terminal_is_given_back(clock: Clock, error: type[BaseException] | None) -> None:
    console = terminal()
    try:
        with Progress(10, console) as progress:
            progress.step(1, 2.0, 100.0, 1)
            hidden = output(console).rfind("\x1b[?25l")
            assert output(console).rfind("\x1b[?25h") > hidden  # a killed rank leaves no hidden cursor
            assert console._live_stack or console._live  # type: ignore[attr-defined]
            if error:
                raise error("stop")
    except (KeyboardInterrupt, RuntimeError) as raised:
        assert type(raised) is error
    else:
        assert error is None
    written = output(console)
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    assert written.endswith(("\n", "\x1b[?25h"))
    assert "step 1/10" in ESCAPES.sub("", written)
    with Progress(10, console) as again:  # a display that was not stopped would refuse a second one
        again.step(1, 2.0, 100.0, 1)


def test_redraws_are_limited(clock: Clock) -> None:
    console = terminal()
    with Progress(1000, console) as progress:
        for step in range(1, 501):
            clock.now += 0.001
            progress.step(step, 2.0, 100.0, 1)
        drawn = output(console).count("tokens/s")
    assert drawn <= 8  # half a second: one at the start and ten a second


def test_a_file_gets_plain_lines(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=40, _environ={})
    with Progress(300, console) as progress:
        progress.say("[bold] is not markup here")
        for step in range(1, 301):
            clock.now += 0.25
            progress.step(step, 4.0, 21_302.4, 612 << 20)
            if step == 200:
                progress.validation(3.402, 1.712)
        progress.validation(3.3)
    lines = output(console).splitlines()
    assert "\x1b" not in output(console)
    assert lines[0] == "[bold] is not markup here"
    assert lines[1] == "step 1/300  loss 4.000  21,302 tokens/s  memory 612 MiB  ? left"
    assert lines[2] == "step 41/300  loss 4.000  21,302 tokens/s  memory 612 MiB  1:05 left"
    assert [
        line for line in lines if line.startswith("step 201/300  loss 4.000  validation 3.402 (1.712 bits per byte)")
    ]
    assert lines[-1] == "step 300/300  loss 4.000  validation 3.300  21,302 tokens/s  memory 612 MiB  0:00 left"
    assert 8 <= len(lines) <= 11  # 75 seconds, a line every ten, and after the validation


def test_the_last_line_is_not_said_twice_nor_without_a_step(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, _environ={})
    with Progress(1, console) as progress:
        progress.step(1, 4.0, 1.0, 1)
    assert output(console).count("step 1/1") == 1
    console = Console(file=io.StringIO(), force_terminal=False, _environ={})
    with pytest.raises(KeyboardInterrupt), Progress(1, console):
        raise KeyboardInterrupt
    assert output(console) == ""


def test_forced_colour_in_a_pipe_is_still_plain(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(2) as progress:
        progress.step(1, 4.0, 1.0, 1)
    written = capsys.readouterr().out
    assert "step 1/2" in written and "\x1b[2K" not in written and "\x1b[?25l" not in written


def test_a_loss_that_is_not_finite_is_shown_and_passes(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, _environ={})
    with Progress(3, console) as progress:
        progress.step(1, 4.0, 1.0, 1)
        clock.now += 60
        progress.step(2, math.nan, 1.0, 1)
        clock.now += 60
        progress.step(3, 4.0, 1.0, 1)
    first, second, third = output(console).splitlines()
    assert "loss nan" in second and "loss 4.000" in first and "loss 4.000" in third


def test_a_long_run_keeps_a_short_history(clock: Clock) -> None:
    progress = Progress(5000, Console(file=io.StringIO(), force_terminal=False, _environ={}))
    for step in range(1, 5001):
        progress.step(step, 5000.0 - step, 1.0, 1)
    assert len(progress._history) < module.HISTORY
    assert progress._history == sorted(progress._history, reverse=True)
    assert sparkline(progress._history, 8) == "█▇▆▅▄▃▂▁"


def test_sparkline() -> None:
    assert sparkline([], 8) == ""
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([0.0, 7.0, math.nan, 3.0], 8) == "▁█x▄"
    assert sparkline([0.0, 1.0], 8, ascii_only=True) == "_@"
    assert sparkline([1.0, math.inf, 0.0, 0.0], 2) == "x▁"
    assert len(sparkline([float(i) for i in range(100)], 32)) == 32
