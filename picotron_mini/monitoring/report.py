"""One page that says what a run did: `report.html`, self-contained, from the files in the run's folder.

    config.json                                                               (needed)
    metrics.jsonl  environment.json  summary.json  layout.json  traffic.json  (the page names what is missing)

It opens with no network and no script, in light or dark, on a phone or on paper. The page can be written again
at any time from the same files, also of a run that was stopped or killed.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from picotron_mini.config import UserError
from picotron_mini.monitoring.experts import experts_section
from picotron_mini.monitoring.metrics import NOT_FINITE, Metrics, read_metrics
from picotron_mini.monitoring.page import document, escape, settings_tables
from picotron_mini.monitoring.placement import placement_section
from picotron_mini.monitoring.plots import Series, legend, line_plot
from picotron_mini.monitoring.traffic_bars import traffic_section
from picotron_mini.monitoring.units import bytes_text, count_text, number_text, seconds_text

Json = dict[str, Any]

OPTIONAL = {
    "summary.json": "the result, the baselines and the sample",
    "layout.json": "where each parameter lives",
    "traffic.json": "the bytes each axis sent",
    "environment.json": "the machine and the versions",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` in the folder of a run and return its path.

    Raises:
        UserError: the folder has no config.json, or a line of metrics.jsonl that is not the last cannot be read.
    """
    config, problem = _read(run_dir / "config.json")
    if config is None:
        raise UserError(
            f"{run_dir / 'config.json'} {problem}; give the folder of a run that `picotron-mini train` made"
        )
    measured = run_dir / "metrics.jsonl"  # a rank may have failed before the first step: that deserves a page too
    metrics = read_metrics(measured) if measured.exists() else Metrics([], "is missing: no step was measured")
    found = {name: _read(run_dir / name) for name in OPTIONAL}
    summary = found["summary.json"][0] or {}
    layout, traffic, environment = (found[f"{n}.json"][0] for n in ("layout", "traffic", "environment"))
    missing = [
        f"{name} {problem}: {OPTIONAL[name]} cannot be shown." for name, (_, problem) in found.items() if problem
    ]
    missing += [f"metrics.jsonl {metrics.torn}."] if metrics.torn else []
    surroundings = {k: v for k, v in (("data", summary.get("data")), ("environment", environment)) if v}
    name = config.get("name") or run_dir.resolve().name
    body = [
        f"<header><h1>{escape(name)}</h1>{_status(config, metrics, summary)}</header>",
        _notice(missing),
        _facts(metrics, summary),
        f"<h2>Loss</h2>{_loss(metrics, summary)}",
        _rates(metrics),
        experts_section(metrics.training, summary.get("experts")),
        _sample(summary),
        f"<h2>Where each parameter lives</h2>{placement_section(layout)}" if layout else "",
        f"<h2>Bytes each axis sent</h2>{traffic_section(traffic, _done(metrics, summary))}" if traffic else "",
        f"<h2>Configuration</h2>{settings_tables(config)}",
        f"<h2>Data and environment</h2>{settings_tables(surroundings)}" if surroundings else "",
    ]
    path = run_dir / "report.html"
    # A generated sample may end inside a character; such halves cannot be encoded and become references.
    path.write_text(document(f"{name}: report", "\n".join(body)), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _read(path: Path) -> tuple[Json | None, str]:
    """The object in a JSON file and "", or None and what is wrong."""
    if not path.is_file():
        return None, "is missing"
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        return None, f"cannot be read ({error})"
    return (value, "") if isinstance(value, dict) else (None, "is not a JSON object")


def _number(value: Any) -> float | None:
    """A finite number, else None (absent, NaN, or NaN as a string)."""
    value = NOT_FINITE.get(value, value) if isinstance(value, str) else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _done(metrics: Metrics, summary: Json) -> int:
    return int(summary.get("steps_done", max((line["step"] for line in metrics.training), default=0)))


def _status(config: Json, metrics: Metrics, summary: Json) -> str:
    steps = summary.get("steps") or config.get("train", {}).get("steps", "?")
    done = _done(metrics, summary)
    if not summary:
        state = f"Stopped at step {done} of {steps}, or still running: it has left no summary"
    elif summary.get("stopped"):
        state = f"Stopped at step {done} of {steps} ({summary['stopped']})"
    else:
        state = f"Finished {done} of {steps} steps" if done == steps else f"Stopped at step {done} of {steps}"
    parts = [f"layout {config['layout']}"] if config.get("layout") else []
    if _number(summary.get("parameters")):
        parts.append(f"{count_text(summary['parameters'])} parameters")
    if _number(summary.get("tokens")):
        parts.append(f"{count_text(summary['tokens'])} tokens in {seconds_text(_number(summary.get('seconds')))}")
    return f'<p class="quiet">{escape(" · ".join([state, *parts]))}</p>'


def _notice(lines: list[str]) -> str:
    return f'<div class="notice">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""


def _facts(metrics: Metrics, summary: Json) -> str:
    """The few numbers one looks for first."""
    facts: list[tuple[str, str, str]] = []
    bits = {key: _number(summary.get(f"{key}_bits_per_byte")) for key in ("val", "bigram", "unigram")}
    if bits["val"] is not None:
        against = f"validation; a bigram model: {bits['bigram']:.3f}" if bits["bigram"] else "validation"
        facts.append(("Bits per byte", f"{bits['val']:.3f}", against))
    if (loss := _number(summary.get("final_loss"))) is not None:
        facts.append(("Final training loss", number_text(loss), "nats per token"))
    if speeds := [s for line in metrics.training if (s := _number(line.get("tokens_per_second"))) is not None]:
        facts.append(("Tokens per second", number_text(statistics.median(speeds)), "median step, all ranks"))
    if memory := _number(summary.get("peak_memory_bytes")):
        facts.append(("Peak memory", bytes_text(memory), ""))
    if (mfu := _number(summary.get("mfu"))) is not None:
        note = "of the peak; 6·parameters + 12·layers·width·sequence flops a token"
        facts.append(("Model flops utilisation", f"{100 * mfu:.1f} %", note))
    items = (f"<div><dt>{escape(t)}</dt><dd>{escape(v)}<small>{escape(n)}</small></dd></div>" for t, v, n in facts)
    return f'<dl class="facts">{"".join(items)}</dl>' if facts else ""


def _series(lines: list[Json], key: str) -> tuple[list[float], list[float]]:
    kept = [(float(line["step"]), value) for line in lines if isinstance(value := line.get(key), int | float)]
    return [x for x, _ in kept], [y for _, y in kept]


def _centred(values: list[float]) -> list[float]:
    """The mean over a window around each value, so that the curve does not lag; it widens from the first value on."""
    widest = len(values) // 40
    out = []
    for i in range(len(values)):
        half = min(widest, i)
        window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
        out.append(sum(window) / len(window) if window else math.nan)
    return out


def _loss(metrics: Metrics, summary: Json) -> str:
    x, y = _series(metrics.training, "loss")
    val_x, val_y = _series(metrics.validation, "val_loss")
    if not x and not val_x:
        return '<p class="quiet">No training step was finished, so there is nothing to draw.</p>'
    series = [
        Series("each step", x, y, "raw"),
        Series("smoothed", x, _centred(y), "main"),
        Series("validation", val_x, val_y, "second", dots=True),
    ]
    factor = _number(summary.get("bits_per_byte_per_nat"))
    guides = [
        (f"{kind}, {bits:.2f} bits per byte", bits / factor)
        for kind in ("unigram", "bigram")
        if factor and (bits := _number(summary.get(f"{kind}_bits_per_byte"))) is not None
    ]
    drawn = [s for s in series if s.x]
    plot = line_plot("Loss in nats per token against the step", drawn, guides=guides, height=320)
    wrong = [int(step) for step, value in zip(x, y, strict=True) if not math.isfinite(value)]
    warning = f"The loss was not finite in {len(wrong)} steps, first in step {wrong[0]}." if wrong else ""
    notice = f'<div class="notice bad"><p>{warning}</p></div>' if warning else ""
    counting = " The dashed lines are models that only count tokens (unigram) or pairs (bigram)." if guides else ""
    names = legend([(s.name, s.style) for s in drawn])
    return f"<p>Nats per token, lower is better.{counting}</p>{notice}<figure>{names}{plot}</figure>"


def _rates(metrics: Metrics) -> str:
    """Three small plots side by side; one that has no data is left out."""
    figures = []
    for title, key, log in (
        ("Tokens per second, all ranks", "tokens_per_second", False),
        ("Gradient norm, log scale", "grad_norm", True),
        ("Learning rate", "lr", False),
    ):
        x, y = _series(metrics.training, key)
        if x:
            plot = line_plot(f"{title}, against the step", [Series(title, x, y)], log=log, from_zero=not log)
            figures.append(f"<figure><h3>{title}</h3>{plot}</figure>")
    return f'<div class="three">{"".join(figures)}</div>' if figures else ""


def _sample(summary: Json) -> str:
    if not summary.get("sample"):
        return ""
    prompt, text = summary["sample"]["prompt"], summary["sample"]["text"]  # the text may begin with the prompt
    return (
        "<h2>What it writes</h2><p>The prompt is bold; the rest was generated from the final weights.</p>"
        f'<pre class="sample"><b>{escape(prompt)}</b>{escape(text.removeprefix(prompt))}</pre>'
    )
