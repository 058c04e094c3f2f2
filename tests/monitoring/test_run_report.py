"""The page that a run leaves behind: what it says, that it is safe and whole, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from picotron_mini.config import RunConfig, UserError, to_dict
from picotron_mini.monitoring.environment import write_environment
from picotron_mini.monitoring.metrics import MetricsWriter
from picotron_mini.monitoring.placement import held, placement_section
from picotron_mini.monitoring.plots import Series, line_plot, log_ticks, ticks
from picotron_mini.monitoring.report import write_report


def make_layout(pp: int, dp: int, tp: int, layers: int = 4, width: int = 192, vocabulary: int = 2048) -> dict[str, Any]:
    """layout.json of a small model: tensor parallel by heads, one stage after the other."""
    ranks = [
        {"rank": (p * dp + d) * tp + t, "coordinates": {"pp": p, "dp": d, "tp": t}}
        for p in range(pp)
        for d in range(dp)
        for t in range(tp)
    ]

    def parameter(name: str, shape: list[int], stages: list[int], dim: int | None) -> dict[str, Any]:
        cut = [] if dim is None else [[i * shape[dim] // tp, (i + 1) * shape[dim] // tp] for i in range(tp)]
        shards = [{"axis": "tp", "dim": dim, "ranges": cut}] if dim is not None and tp > 1 else []
        return {"name": name, "shape": shape, "stages": stages, "shards": shards, "sum_axes": ["dp"] if dp > 1 else []}

    kv, inner = width // 3, 512
    found = [parameter("embed.weight", [vocabulary, width], sorted({0, pp - 1}), 0)]
    for i in range(layers):
        at = [i * pp // layers]
        for name, shape, dim in (
            ("attention_norm", [width], None),
            ("attention.q", [width, width], 0),
            ("attention.k", [kv, width], 0),
            ("attention.v", [kv, width], 0),
            ("attention.o", [width, width], 1),
            ("mlp_norm", [width], None),
            ("mlp.gate", [inner, width], 0),
            ("mlp.up", [inner, width], 0),
            ("mlp.down", [width, inner], 1),
        ):
            found.append(parameter(f"layers.{i}.{name}.weight", shape, at, dim))
    found.append(parameter("norm.weight", [width], [pp - 1], None))
    return {"axes": {"pp": pp, "dp": dp, "tp": tp}, "ranks": ranks, "parameters": found}


def make_run(folder: Path, steps: int = 300, done: int | None = None, mesh: tuple[int, int, int] = (1, 2, 2)) -> Path:
    """A run folder as train.py leaves it, with made-up numbers of a plausible shape."""
    done = steps if done is None else done
    folder.mkdir(parents=True)
    dice = random.Random(0)
    layout = ",".join(f"{axis}={size}" for axis, size in zip(("pp", "dp", "tp"), mesh, strict=True) if size > 1)
    (folder / "config.json").write_text(json.dumps(to_dict(RunConfig(layout=layout or "dp=1", name=folder.name))))
    write_environment(folder)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        for step in range(1, done + 1):
            curve = 2.75 + 4.9 * math.exp(-step / 22) + 1.3 * math.exp(-step / 130)
            if step % 50 == 0:
                metrics.write(step=step, val_loss=curve + 0.1, val_bits_per_byte=(curve + 0.1) * 0.46)
            metrics.write(
                step=step,
                loss=curve + dice.gauss(0, 0.07),
                lr=3e-3 * min(step / 20, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))),
                grad_norm=0.35 + 3 * math.exp(-step / 15) + abs(dice.gauss(0, 0.12)) + (4 if step == 140 else 0),
                tokens=step * 8192,
                tokens_per_second=21_000 + dice.gauss(0, 500) - (9000 if step == 1 else 0),
                memory_bytes=640 << 20,
            )
    parameters = make_layout(*mesh)
    (folder / "layout.json").write_text(json.dumps(parameters))
    per_step = [
        {"axis": axis, "op": op, "predicted": size, "counted": size}
        for axis, op, size in (
            ("dp", "all_reduce", 3_841_536),
            ("tp", "all_reduce", 12_582_912),
            ("tp", "all_gather", 98_304),
            ("pp", "send", 3_145_728),
        )
        if mesh[("pp", "dp", "tp").index(axis)] > 1
    ]
    (folder / "traffic.json").write_text(json.dumps({"per_step": per_step, "steps": done}))
    summary = {
        "steps_done": done,
        "steps": steps,
        "stopped": None if done == steps else "SIGINT",
        "final_loss": 2.9,
        "val_loss": 3.0,
        "val_bits_per_byte": 1.38,
        "bigram_bits_per_byte": 1.94,
        "unigram_bits_per_byte": 2.71,
        "bits_per_byte_per_nat": 0.46,
        "tokens": done * 8192,
        "seconds": 117.4,
        "parameters": sum(math.prod(p["shape"]) for p in parameters["parameters"]),
        "mfu": None,
        "sample": {
            "prompt": "The list of",
            "text": " values is returned by the function.\n\n   .. versionadded:: 3.4\n\n<script>alert('x')</script>"
            " & <b>more</b>\n    def __init__(self, name):\n        self.name = name\x1b[0m",
        },
        "data": {"description": "documentation and source of CPython", "digest": "sha256:4f0c", "bytes": 12_345_678},
        "peak_memory_bytes": 640 << 20,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Collects what a test asks about, and refuses tags that do not nest."""

    VOID = frozenset({"meta", "link", "wbr"})  # without an end tag; shapes of SVG close themselves

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_finished_run_is_told_whole(tmp_path: Path) -> None:
    got = page(make_run(tmp_path / "laptop"))
    for expected in (
        "Finished 300 of 300 steps",
        "layout dp=2,tp=2",
        "validation; a bigram model: 1.940",
        "bigram, 1.94 bits per byte",
        "Prediction and count agree to the byte.",
        "12,582,912",
        "Layers 0 to 3, all like layer 0",
        "versionadded:: 3.4",
        "sha256:4f0c",
        "torch_threads",
        "min_lr_ratio",
    ):
        assert expected in got.text, expected
    assert "is missing" not in got.text
    images = [attrs for tag, attrs in got.tags if tag == "svg" and "role" in attrs]
    assert len([a for a in images if a.get("aria-label")]) == 4 + 3  # loss and three rates; three bars


def test_nothing_in_a_run_becomes_markup_or_a_request(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=http://example.org/x onerror=alert(1)>"
    folder = make_run(tmp_path / "laptop")
    edit(folder / "config.json", name=hostile, layout=hostile)
    edit(
        folder / "summary.json",
        stopped=hostile,
        steps=hostile,
        sample={"prompt": hostile, "text": "x" + hostile + "\ud800"},
    )
    layout = make_layout(1, 1, 2)
    layout["parameters"][0] |= {"name": hostile, "sum_axes": [hostile]}
    edit(folder / "layout.json", **layout)
    edit(folder / "traffic.json", per_step=[{"axis": hostile, "op": hostile, "predicted": 2, "counted": 1}])
    edit(folder / "environment.json", **{hostile: hostile})
    got = page(folder)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in got.tags}
    assert got.text.count(hostile) >= 8
    for tag, attrs in got.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "action", "data"):
            assert attrs.get(name) in (None, "data:,"), (tag, attrs)
    assert ("meta", "Content-Security-Policy") in [(t, a.get("http-equiv")) for t, a in got.tags]


def test_a_run_without_training_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "none", done=0, mesh=(1, 1, 1))
    got = page(folder)
    assert "Stopped at step 0 of 300 (SIGINT)" in got.text
    assert "No training step was finished" in got.text
    assert "Nothing was sent" in got.text


@pytest.mark.parametrize("text", [" values", "The list of values"])
def test_the_prompt_is_shown_once(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path / "laptop", steps=2)
    edit(folder / "summary.json", sample={"prompt": "The list of", "text": text})
    assert page(folder).text.count("The list of values") == 1


def test_a_killed_run_says_where_it_stopped_and_what_is_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "killed", done=41)
    for name in ("summary.json", "layout.json", "traffic.json"):
        (folder / name).unlink()
    (folder / "environment.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "lo')
    text = page(folder).text
    assert "Stopped at step 41 of 300, or still running" in text
    assert "traffic.json is missing: the bytes each axis sent cannot be shown." in text
    assert "layout.json is missing" in text and "summary.json is missing" in text
    assert "environment.json cannot be read" in text
    assert "cut short" in text
    assert "Where each parameter lives" not in text


def test_bytes_are_those_of_the_steps_that_were_done(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "stopped", done=10)
    rows = [{"axis": "dp", "op": "all_reduce", "predicted": 1024, "counted": 1024}]
    edit(folder / "traffic.json", per_step=rows, steps=300)
    assert "1 KiB, 10 KiB in the 10 steps of this run" in page(folder).text


def test_a_diverged_run_is_drawn_with_a_gap_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "diverged", done=30)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.write(step=31, loss=math.nan, grad_norm=math.inf, lr=0.003, tokens_per_second=1.0)
        metrics.write(step=32, loss=math.nan, grad_norm=0.0, lr=0.003, tokens_per_second=1.0)
    edit(folder / "summary.json", final_loss=math.nan, val_bits_per_byte="NaN")
    text = page(folder).text
    assert "The loss was not finite in 2 steps, first in step 31." in text
    assert "Final training loss" not in text
    everything = (folder / "report.html").read_text()
    assert not re.search(r"[\" >(](nan|inf)[%\" <]", everything)


def test_utilisation_comes_with_its_formula(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "laptop", steps=2)
    edit(folder / "summary.json", mfu=0.4104, val_loss=None, val_bits_per_byte=None, bits_per_byte_per_nat=None)
    text = page(folder).text
    assert "41.0 %" in text and "6·parameters + 12·layers·width·sequence" in text
    assert "unigram" not in text  # without the factor the baselines have no place on the axis


def test_needed_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "laptop", steps=2)
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").unlink()
    text = page(folder).text  # a rank failed before the first step: its error must not be replaced by another
    assert "metrics.jsonl is missing: no step was measured." in text and "Stopped at step 0 of 300" in text
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing; give the folder of a run"):
        write_report(folder)


def test_a_wrong_prediction_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "laptop", steps=3)
    rows = [{"axis": "dp", "op": "all_reduce", "predicted": 8, "counted": 9}]
    edit(folder / "traffic.json", per_step=[*rows, {"axis": "tp", "op": "all_gather", "predicted": 4, "counted": 4}])
    text = page(folder).text
    assert "Prediction and count differ for dp all_reduce." in text and "agree" not in text


def test_held_is_a_partition_of_every_parameter() -> None:
    layout = make_layout(2, 2, 3, vocabulary=100)
    for parameter in layout["parameters"]:
        copies = 2 * len(parameter["stages"]) * (1 if parameter["shards"] else 3)
        pieces = [held(parameter, rank["coordinates"]) for rank in layout["ranks"]]
        sizes = [math.prod(high - low for low, high in piece) for piece in pieces if piece is not None]
        assert sum(sizes) == copies * math.prod(parameter["shape"]), parameter["name"]
    embed = layout["parameters"][0]
    assert held(embed, {"pp": 0, "dp": 1, "tp": 1}) == [(33, 66), (0, 192)]
    assert held(layout["parameters"][-1], {"pp": 0, "dp": 0, "tp": 0}) is None  # norm is on the last stage


def test_ranks_that_share_sequences_are_rows_of_their_own() -> None:
    layout = make_layout(1, 2, 2)
    layout["axes"] = {"pp": 1, "dp": 1, "cp": 2, "tp": 2}
    for rank in layout["ranks"]:
        rank["coordinates"] = {"pp": 0, "dp": 0, "cp": rank["coordinates"]["dp"], "tp": rank["coordinates"]["tp"]}
    rows = re.findall(r'<tr><th scope="row">(dp [^<]*)</th>(.*?)</tr>', placement_section(layout))
    assert [(name, re.findall(r"rank (\d)", cells)) for name, cells in rows] == [
        ("dp 0, cp 0", ["0", "1"]),
        ("dp 0, cp 1", ["2", "3"]),
    ]


def test_a_square_shows_the_slice_and_its_ranges(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "laptop", steps=2)
    text = write_report(folder).read_text()
    down = re.search(
        r"<title>rank 1 \(pp 0, dp 0, tp 1\) holds layers.0.mlp.down.weight\[([^<]*)</title>(.*?)</svg>", text
    )
    assert down and down[1] == "0:192, 256:512] of [192, 512]: 50 %"
    assert 'class="held" x="10" y="0" width="10" height="20"' in down[2]


def test_many_ranks_show_copies_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "wide", steps=2, mesh=(1, 16, 2))
    got = page(folder)
    assert "30 more ranks hold copies" in got.text
    assert len([1 for tag, a in got.tags if tag == "svg" and a.get("class") == "slice"]) == 2 * (2 + 9)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.7, 8.9, [2, 4, 6, 8, 10]), (1e-4, 3e-3, [0, 0.001, 0.002, 0.003])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_flat_or_wide_range() -> None:
    assert min(ticks(5, 5)) <= 5 <= max(ticks(5, 5)) and len(ticks(0, 0)) > 1
    assert log_ticks(0.3, 6) == pytest.approx([0.5, 1, 2, 5])
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10, 100, 1000])
    assert len(log_ticks(1e-20, 1e20)) <= 7


def test_a_plot_puts_points_where_they_belong() -> None:
    svg = line_plot("t", [Series("s", [0, 5, 10], [0.0, math.nan, 1.0])], from_zero=True)
    [curve] = re.findall(r' d="([^"]*)"', svg)
    assert curve == "M0.0 1000.0M1000.0 38.5"  # up is down in SVG; 4 % of room above; the NaN is a gap
    assert "Nothing to draw" in line_plot("t", [Series("s", [1], [math.nan])])
    assert "<circle" in line_plot("t", [Series("s", [1], [2.0])])  # a line of one point would be invisible


def test_a_long_curve_keeps_its_spikes() -> None:
    y = [1.0] * 100_000
    y[54_321] = 100.0
    svg = line_plot("t", [Series("s", list(range(100_000)), y)], from_zero=True)
    assert len(svg) < 60_000
    assert " 38.5" in svg


@pytest.fixture(scope="module")
def browser() -> Any:
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs a browser: install chromium")
        pytest.skip("NOT RUN: no chromium on this machine, so the report was not looked at in a browser")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(tmp_path: Path, browser: Any, scheme: str, width: int) -> None:
    path = write_report(make_run(tmp_path / "eight", done=120, mesh=(2, 2, 2)))
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(path.as_uri())
    assert said == [] and requests == [path.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = (
        [int(c) for c in re.findall(r"\d+", view.evaluate(f"getComputedStyle(document.body).{of}"))[:3]]
        for of in ("backgroundColor", "color")
    )
    assert (sum(paper) < sum(ink)) == (scheme == "dark")
    sizes = view.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert sizes and min(sizes) >= 11
    curve = view.evaluate("document.querySelector('path.line.main').getBoundingClientRect().width")
    assert curve > 0.6 * min(width, 992)
    # no label of the loss plot leaves the page
    ends = view.evaluate(
        "[...document.querySelectorAll('svg text')].flatMap(t => {"
        "const b = t.getBoundingClientRect(); return [b.left, b.right]})"
    )
    assert min(ends) >= 0 and max(ends) <= width
    view.close()
