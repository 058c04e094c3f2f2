"""The main job as a user runs it: what it leaves, that no layout changes it, and how it ends when it is hindered."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from picotron_mini import train as train_module
from picotron_mini.cli import main
from picotron_mini.config import RunConfig, from_dict
from picotron_mini.data.loader import Loader, Prepared
from picotron_mini.layout import to_json
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.write import load

TINY = [
    *("--hidden-size", "32", "--num-heads", "4", "--num-kv-heads", "2", "--num-layers", "2"),
    *("--intermediate-size", "64", "--seq-len", "32", "--batch-size", "8", "--tokenizer", "bytes", "--lr", "0.01"),
    *("--warmup-steps", "2", "--eval-batches", "2"),
]
SECONDS = 60  # in which a command must have ended that is expected to end at once


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 150 kB in which the next words follow from several words before, which no bigram of bytes can see."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzäß", k=draw.randint(4, 9))) for _ in range(24)]
    lines = [" ".join(words[(start + i) % 24] for i in range(12)) + ".\n" for start in draw.choices(range(24), k=1800)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """`main` takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run_main(*args: str) -> int:
    """The exit status of `picotron-mini ARGS`, run in this process so that the fork server stays warm."""
    with pytest.raises(SystemExit) as end:
        main(list(args))
    return int(end.value.code or 0)


def train_in(folder: Path, text: Path, *args: str) -> Path:
    """Train a tiny model; returns the folder of its run."""
    assert run_main("train", *TINY, "--text", str(text), "--out", str(folder), "--name", "run", *args) == 0
    return folder / "run"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder) if "loss" in line]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- what a run leaves ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run as a user starts it, in a process of its own: its folder, and what it printed."""
    home = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "picotron_mini", "train", *TINY, "--text", str(text), "--name", "first"]
    command += ["--tokenizer", "bpe", "--tokenizer-size", "280", "--steps", "60", "--eval-every", "20"]
    command += ["--eval-batches", "3"]  # the last validation looks at ten times as many: at all there are
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return home / "runs" / "first", done.stdout


def test_what_a_run_leaves(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "config.json", "environment.json", "layout.json", "metrics.jsonl", "report.html", "summary.json",
        "traffic.json", "weights/config.json", "weights/model.safetensors", "weights/tokenizer.json",
        "weights/tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in folder.parent.iterdir()} == {".cache", "first"}


def test_the_settings_are_recorded_and_resolved(trained: tuple[Path, str], text: Path) -> None:
    run = from_dict(RunConfig, read(trained[0] / "config.json"))
    assert (run.layout, run.name) == ("dp=2,tp=2", "first")  # four CPU ranks, unless something else is asked for
    assert run.data.text == (str(text),)
    assert run.model.vocab_size == 280 and run.model.head_dim == 8
    assert (run.train.batch_size, run.train.micro_batch_size, run.train.micro_batches) == (8, 4, 1)
    assert run.train.device == "cpu"
    layout = layout_of(run)
    assert read(trained[0] / "layout.json") == json.loads(json.dumps(to_json(layout, run.mesh)))
    assert read(trained[0] / "environment.json")["torch"] == torch.__version__


def test_metrics_and_that_it_learned(trained: tuple[Path, str]) -> None:
    lines = lines_of(trained[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert steps[0]["loss"] == pytest.approx(math.log(280), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 2
    assert all(line["tokens"] == 8 * 32 and line["tokens_per_second"] > 0 for line in steps)
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [20, 40, 60]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]


def test_bytes_sent_are_those_predicted(trained: tuple[Path, str]) -> None:
    traffic = read(trained[0] / "traffic.json")
    assert {(row["axis"], row["op"]) for row in traffic["per_step"]} == {
        ("dp", "all_reduce"), ("tp", "all_reduce"), ("world", "all_reduce")
    }  # fmt: skip
    assert all(row["predicted"] == row["counted"] > 0 for row in traffic["per_step"])
    assert traffic["steps"] == 60


def test_the_summary_is_what_the_weights_give(trained: tuple[Path, str]) -> None:
    """The validation loss again, from the saved weights on one device, over the text that was held out."""
    folder, _ = trained
    summary = read(folder / "summary.json")
    assert (summary["steps_done"], summary["steps"], summary["stopped"]) == (60, 60, None)
    prepared = Prepared(**{k: summary["data"][k] for k in Prepared.__dataclass_fields__})
    model = load(folder)
    held_out = Loader(prepared, "val", 32, 8, shuffle=False)
    batches = [held_out.batch(n) for n in range(held_out.num_batches)]
    with torch.no_grad():
        total = sum(float(model.loss(model(b.tokens, b.positions, None), b.targets)) for b in batches)
    assert summary["val_tokens"] == prepared.val_tokens - 1  # all of them: each but the first is once a target
    assert summary["val_loss"] == pytest.approx(total / summary["val_tokens"], rel=1e-5)
    bits = total / math.log(2) / (prepared.val_bytes - first_bytes(prepared))
    assert summary["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def first_bytes(prepared: Prepared) -> int:
    """Bytes of the first token, which is never a target."""
    return int(prepared.load_tokenizer().token_bytes()[int(prepared.tokens("val")[0])])


def test_what_is_printed(trained: tuple[Path, str]) -> None:
    folder, out = trained
    summary = read(folder / "summary.json")
    assert "run folder: runs/first" in out
    assert re.search(r"step 1/60  loss 5\.\d+ .* tokens/s  memory \d+ MiB", out)
    assert "step 60/60" in out and "0:00 left" in out
    for name in ("val_bits_per_byte", "bigram_bits_per_byte", "unigram_bits_per_byte"):
        assert f"{summary[name]:.3f}" in out
    assert summary["bigram_bits_per_byte"] < summary["unigram_bits_per_byte"]
    assert "report: runs/first/report.html" in out
    assert 'picotron-mini generate runs/first "def "' in out
    assert "\x1b" not in out  # no cursor movements in a file


def test_the_report_needs_nothing_else(trained: tuple[Path, str]) -> None:
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            links.extend(value or "" for name, value in attributes if name in ("src", "href", "data", "xlink:href"))

    Links().feed(page)
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "@import" not in page and not re.search(r"url\((?!['\"]?(#|data:))", page)
    for words in ("loss", "Tokens per second", "bits per byte", "dp", "tp", "embed.weight"):
        assert words in page
    assert "<svg" in page or "data:image" in page


def test_transformers_reads_the_weights(trained: tuple[Path, str]) -> None:
    transformers = pytest.importorskip("transformers")
    weights = trained[0] / "weights"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    ours = load(trained[0])
    prompt = (trained[0] / "weights").parent.name + " wörd"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = theirs(ids).logits
        got = ours.logits(ours(ids))
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert tokenizer.decode(ids[0]) == prompt


@pytest.mark.slow
def test_it_beats_the_bigram_model_of_its_text(text: Path, tmp_path: Path) -> None:
    folder = train_in(tmp_path, text, "dp=1", "--steps", "250", "--eval-every", "0", "--seq-len", "64")
    summary = read(folder / "summary.json")
    assert summary["val_bits_per_byte"] < 0.7 * summary["bigram_bits_per_byte"]


# --- no layout changes what is learned --------------------------------------------------------------------

LAYOUTS = ["dp=1", "dp=2,tp=2", "tp=2,pp=2", "cp=2,pp=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_the_same_run_on_any_layout(dtype: str, tolerance: float, text: Path, tmp_path: Path) -> None:
    flags = ["--steps", "4", "--eval-every", "2", "--micro-batches", "2", "--dtype", dtype]
    first, *others = [train_in(tmp_path / layout, text, layout, *flags) for layout in LAYOUTS]
    reference = load_file(first / "weights" / "model.safetensors")
    assert len(losses(first)) == 4
    for other in others:
        assert losses(other) == pytest.approx(losses(first), rel=min(tolerance, 1e-5))
        for ours, theirs in zip(lines_of(other), lines_of(first), strict=True):
            for name in ("val_loss", "grad_norm", "lr", "tokens", "step"):
                assert (name in ours) == (name in theirs)
                assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=tolerance)
        weights = load_file(other / "weights" / "model.safetensors")
        assert weights.keys() == reference.keys()
        for name, expected in reference.items():
            assert weights[name].dtype == expected.dtype
            assert (weights[name] - expected).abs().max() <= tolerance * expected.abs().max(), name
        assert read(other / "summary.json")["sample"] == read(first / "summary.json")["sample"]


@pytest.mark.slow
def test_another_seed_is_another_run(text: Path, tmp_path: Path) -> None:
    one, same, other = (
        losses(train_in(tmp_path / name, text, "dp=1", "--steps", "2", "--seed", seed))
        for name, seed in (("one", "0"), ("same", "0"), ("other", "1"))
    )
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_with_documents_apart_the_summary_counts_what_is_predicted(tmp_path: Path) -> None:
    """The first token of a document is no target, for the model and for the bigram that it is compared with."""
    from picotron_mini.data.bigram import bigram_bits_per_byte

    draw = random.Random(0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        (texts / f"{n}.txt").write_text("".join(draw.choices("abcdef ", k=draw.randint(40, 300))))
    folder = train_in(tmp_path, texts, "dp=2", "--steps", "1", "--document-mask", "--val-fraction", "0.2")
    summary = read(folder / "summary.json")
    prepared = Prepared(**{k: summary["data"][k] for k in Prepared.__dataclass_fields__})
    val, end = prepared.tokens("val"), prepared.end
    assert prepared.val_documents > 1 and summary["val_tokens"] == len(val) - prepared.val_documents
    model, total, size = load(folder), 0.0, 0
    held_out = Loader(prepared, "val", 32, 8, shuffle=False)
    with torch.no_grad():
        for batch in (held_out.batch(n) for n in range(held_out.num_batches)):
            targets = torch.where(batch.tokens == end, -100, batch.targets)
            total += float(model.loss(model(batch.tokens, batch.positions, batch.documents), targets))
            size += int(((targets != -100) & (targets != end)).sum())  # tokens are bytes, and an end token has none
    assert summary["val_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    token_bytes = prepared.load_tokenizer().token_bytes()
    bigram = bigram_bits_per_byte(prepared.tokens("train"), val, 257, token_bytes, end)
    assert summary["bigram_bits_per_byte"] == pytest.approx(bigram)
    assert bigram != bigram_bits_per_byte(prepared.tokens("train"), val, 257, token_bytes)


def test_python_sees_the_same_batches_as_the_ranks(text: Path, tmp_path: Path) -> None:
    """The first loss of a run is the loss of the initial model on batch 0, here computed by hand."""
    from picotron_mini.model.gpt import GPT, init_weights

    folder = train_in(tmp_path, text, "dp=2", "--steps", "1", "--dtype", "float64")
    run = from_dict(RunConfig, read(folder / "config.json"))
    prepared = Prepared(**{k: read(folder / "summary.json")["data"][k] for k in Prepared.__dataclass_fields__})
    batch = Loader(prepared, "train", 32, 8, run.train.seed).batch(0)
    model = GPT(run.model)
    init_weights(model, run.train.seed)
    model.double()
    with torch.no_grad():
        loss = model.loss(model(batch.tokens, batch.positions, None), batch.targets) / batch.targets.numel()
    assert losses(folder) == [pytest.approx(float(loss), rel=1e-12)]
    assert np.load(Path(prepared.folder) / "train.npy").dtype == np.uint16


# --- ranks that fail --------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, int, str]]:
    """pid -> (parent, process group, command line) of all that run, without those that have ended."""
    listed = subprocess.run(
        ["ps", "-axwwo", "pid=,ppid=,pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 4) for line in listed.stdout.splitlines()]
    return {int(r[0]): (int(r[1]), int(r[2]), r[4]) for r in rows if len(r) == 5 and not r[3].startswith("Z")}


def gone(group: int, seconds: float = 15.0) -> bool:
    """Whether no process of the group is left, or none is after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(pgid == group for _, pgid, _ in processes().values()):
            return True
        time.sleep(0.1)
    return False


def fail_at_step(ready: Any, how: str, at: int) -> Any:
    """What runs on each rank instead of the job: the job, with a train_step that fails on rank 1."""
    from picotron_mini import train

    real, done = train.train_step, 0

    def step(parallel: Any, *args: Any) -> Any:
        nonlocal done
        done += 1
        if parallel.mesh.rank == 1 and done == at:
            if how == "raise":
                raise ValueError("planted: the loss is purple")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(parallel, *args)

    train.train_step = step
    return train._on_rank(ready)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """`planted(how, step)`: rank 1 raises or is killed in that step of the next run."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # the ranks need not find this file
    yield lambda how, at: monkeypatch.setattr(train_module, "_on_rank", lambda ready: fail_at_step(ready, how, at))
    cloudpickle.unregister_pickle_by_value(here)


@pytest.mark.parametrize(
    ("how", "words"), [("raise", "ValueError: planted: the loss is purple"), ("kill", "killed by SIGKILL")]
)
@pytest.mark.parametrize("at", [1, 4])
def test_a_rank_that_fails(
    how: str, words: str, at: int, text: Path, tmp_path: Path, planted: Callable[[str, int], None],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    planted(how, at)
    flags = ["--text", str(text), "--out", str(tmp_path), "--name", "broken", "dp=2", "--steps", "1000"]
    assert run_main("train", *TINY, *flags) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: rank 1 of 2 failed: ") and words in err
    assert "Traceback" not in err and err.count("error:") == 1 and "--debug" in err
    servers = [pid for pid, (parent, _, args) in processes().items() if parent == os.getpid() and "forkserver" in args]
    assert len(servers) == 1
    assert [args for parent, _, args in processes().values() if parent == servers[0]] == []
    folder = tmp_path / "broken"
    assert (folder / "report.html").stat().st_size > 1000
    assert not (folder / "weights").exists() and not (folder / "summary.json").exists()
    assert len(losses(folder)) in (at - 1, at)


def test_debug_shows_the_traceback_of_the_rank(text: Path, tmp_path: Path, planted: Callable[[str, int], None]) -> None:
    planted("raise", 1)
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*fail_at_step.*the loss is purple"):
        main(["train", "--debug", *TINY, "--text", str(text), "--out", str(tmp_path), "dp=2"])


# --- signals ----------------------------------------------------------------------------------------------


@contextmanager
def running(text: Path, home: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A long run in a process group of its own, some steps into the work; whatever happens it is ended."""
    command = [sys.executable, "-m", "picotron_mini", "train", *TINY, "--text", str(text), "--name", "run"]
    command += ["dp=2", "--steps", "1000000", "--eval-every", "0", *args]
    with (home / "out").open("w") as out, (home / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=home, stdout=out, stderr=err, text=True, start_new_session=True)
    metrics = home / "runs" / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 2 * SECONDS
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, (home / "err").read_text()
            time.sleep(0.05)
        yield process
    finally:
        if not gone(process.pid, 0.1):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def expect_kept(home: Path) -> None:
    folder = home / "runs" / "run"
    summary = read(folder / "summary.json")
    assert summary["stopped"] and 3 <= summary["steps_done"] < 1_000_000
    assert summary["steps_done"] == len(losses(folder))
    assert (folder / "report.html").stat().st_size > 1000
    assert load(folder).config.hidden_size == 32
    assert "stopping: saving weights and report" in (home / "out").read_text()
    assert (home / "err").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143)],
    ids=["ctrl-c", "sigterm", "sigterm to all"],
)
def test_a_run_that_is_asked_to_stop(
    number: signal.Signals, to_group: bool, status: int, text: Path, tmp_path: Path
) -> None:
    with running(text, tmp_path) as process:
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait(SECONDS) == status
        assert gone(process.pid)
    expect_kept(tmp_path)


@pytest.mark.slow
def test_ranks_leave_with_a_parent_that_is_killed(text: Path, tmp_path: Path) -> None:
    with running(text, tmp_path) as process:
        process.kill()
        process.wait(SECONDS)
        assert gone(process.pid)


DEAF = """
import signal, sys, time
from pathlib import Path
from picotron_mini import train
from picotron_mini.cli import main

def deaf(ready):
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with (ready.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss": 1.0}\\n')
    while True:
        time.sleep(1)

train._on_rank = deaf
main()
"""


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEAF, "train", *TINY, "--text", str(text), "--name", "run", "dp=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 2 * SECONDS
        while not (metrics.exists() and metrics.read_text().count("\n") == 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # ranks that do not listen get time to finish
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=SECONDS / 2)[1]
        assert process.returncode == 130
        assert err == "stopped\n"
        assert gone(process.pid)
    finally:
        if not gone(process.pid, 0.1):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / "runs" / "run" / "report.html").exists()


# --- under torchrun ---------------------------------------------------------------------------------------


def torchrun(text: Path, home: Path, options: list[str], *args: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "picotron_mini", "train", *TINY]
    command += ["--text", str(text), "--steps", "4", *args]
    return subprocess.Popen(
        command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def meeting(nodes: int, ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return ["--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", port]


@pytest.mark.slow
def test_under_torchrun(text: Path, tmp_path: Path) -> None:
    with torchrun(text, tmp_path, meeting(1, 2), "dp=2", "--name", "run") as agent:
        out, err = agent.communicate(timeout=2 * SECONDS)
    assert agent.returncode == 0, err
    assert err == ""
    assert out.count("million parameters") == out.count("run folder:") == out.count("report:") == 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {".cache", "run"}
    here = train_in(tmp_path / "here", text, "dp=2", "--steps", "4")
    assert losses(tmp_path / "runs" / "run") == losses(here)


@pytest.mark.slow
def test_two_agents_as_two_machines(text: Path, tmp_path: Path) -> None:
    """Each agent has a working directory of its own, as two machines have."""
    options = meeting(2, 1)
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    with (
        torchrun(text, homes[0], [*options, "--node-rank", "0"], "tp=2") as first,
        torchrun(text, homes[1], [*options, "--node-rank", "1"], "tp=2") as second,
    ):
        outputs = [agent.communicate(timeout=2 * SECONDS) for agent in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[0][0].count("report:") == 1 and outputs[1][0].strip() == ""
    runs = [[path for path in (home / "runs").iterdir() if path.name != ".cache"] for home in homes]
    assert [len(found) for found in runs] == [1, 0]
    assert (runs[0][0] / "weights" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_layout_that_torchrun_does_not_fit(text: Path, tmp_path: Path) -> None:
    with torchrun(text, tmp_path, meeting(1, 2), "dp=4", "--name", "run") as agent:
        _, err = agent.communicate(timeout=2 * SECONDS)
    assert agent.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said == ["error: layout dp=4 needs 4 ranks and torchrun started 2; set --layout or --nproc-per-node"]
    assert "picotron_mini/train.py" not in err  # torchrun adds a traceback of its own, and nothing of ours
    assert not (tmp_path / "runs" / "run").exists()
