"""The command line: what it accepts, in which order settings win, and the one message that a mistake gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from picotron_mini import bench as bench_module
from picotron_mini import train as train_module
from picotron_mini.cli import COMMANDS, main
from picotron_mini.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    UserError,
    from_dict,
    to_dict,
)
from picotron_mini.flags import read_config
from picotron_mini.presets import PRESETS

TINY = [
    "--hidden-size",
    "32",
    "--num-heads",
    "4",
    "--num-kv-heads",
    "2",
    "--num-layers",
    "2",
    "--intermediate-size",
    "64",
    "--seq-len",
    "32",
    "--steps",
    "4",
    "--batch-size",
    "4",
    "--tokenizer",
    "bytes",
]

# every setting, and none of them at its default
EVERYTHING = RunConfig(
    layout="dp=1,tp=3",
    name="mine",
    out="elsewhere",
    model=ModelConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=12, num_kv_heads=3, head_dim=8,
        rope_theta=5e5, rope_scaling=RopeScaling(4.0, 2.0, 8.0, 1024), norm_eps=1e-6, tie_embeddings=False,
        qk_norm=True, max_position=4096,
        moe=MoEConfig(
            num_experts=6, top_k=3, expert_size=9, shared_size=6, dense_layers=1, choice="expert", score="sigmoid",
            normalize=False, scale=2.0, groups=2, limit_groups=2, capacity=1.5, jitter=0.1, balance="bias",
            aux_weight=0.5, aux_scope="sequence", z_weight=0.1, bias_rate=0.01,
        ),
    ),
    data=DataConfig(text=("a.txt", "b"), tokenizer="other.json", tokenizer_size=999, val_fraction=0.25, val_seed=3),
    train=TrainConfig(
        steps=7, seq_len=33, batch_size=6, micro_batch_size=3, micro_batches=2, schedule="afab", optimizer="sgd",
        lr=0.5, min_lr_ratio=0.5, lr_schedule="wsd", warmup_steps=1, weight_decay=0.3, beta1=0.8, beta2=0.99,
        clip_norm=2.0, freeze=("embed", "norm"), bucket_mb=1.5, compress="topk",
        compress_keep=0.5, eval_every=3, eval_batches=2, seed=5,
        dtype="float64", device="cpu", compile=True, document_mask=True, virtual_stages=3, context="ulysses",
        sequence_parallel=True, masters="none", tensor_overlap=2, recompute="full", loss_chunks=3, zero=2, zero_group=2,
        symmetric_memory=True,
        dispatch="allgather", dispatch_parts=2, dispatch_payload="fp8", place_every=9, expert_replicas=2,
        reduce_group=4, cuda_graph=True,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """`main` takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """`taken("--steps", "3")` is the run that `picotron-mini train --steps 3` would start."""
    runs: list[RunConfig] = []
    monkeypatch.setattr(train_module, "train", lambda run: runs.append(run) or {"stopped": None})

    def take(*args: str) -> RunConfig:
        assert exit_code(*args) == 0
        return runs.pop()

    def exit_code(*args: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["train", *args])
        return int(end.value.code or 0)

    return take


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(2, "train", ...)` checks the exit status and that there is one message and no traceback; returns it."""

    def run(status: int, *args: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(args))
        out, err = capfd.readouterr()
        assert end.value.code == status, err
        assert out.strip() == ""
        assert err.startswith("error: ")
        assert err.count("error:") == 1 and "Traceback" not in err and "---" not in err
        return err

    return run


def python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, encoding="utf-8", timeout=120, **options
    )


# --- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([flag])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for name in (*COMMANDS, *PRESETS, "dp=2,tp=2,pp=2"):
        assert name in out


def test_without_a_command_the_usage_is_shown_and_it_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert capsys.readouterr().out.startswith("usage: picotron-mini COMMAND")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: picotron-mini {command}")
    if command in ("train", "verify", "describe", "plan", "bench"):  # they share the flags
        for flag in ("layout", "seq-len", "micro-batch-size", "micro-batches", "dtype", "compile", "device", "seed"):
            assert re.search(rf"^│? *--{flag} ", out, re.MULTILINE), flag
        assert "--preset" in out and "--config" in out


def test_the_installed_command_and_the_module_are_the_same_and_answer_without_torch() -> None:
    script = (
        "import sys; from picotron_mini.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    shown = python("-c", script).stdout
    assert shown.endswith("False\n")
    assert python("-m", "picotron_mini", "--help").stdout == shown.removesuffix("False\n")


# --- what settings mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [["dp=4"], ["--layout", "dp=4"], ["--layout=dp=4"], ["--steps", "3", "dp=4"], ["dp=4", "--seed", "1"],
     ["--text", "a", "b", "dp=4"], ["--compile", "dp=4"]],
)  # fmt: skip
def test_a_layout_is_bare_or_a_flag(args: list[str], taken: Callable[..., RunConfig]) -> None:
    assert taken(*args).layout == "dp=4"


def test_a_name_may_look_like_a_layout(taken: Callable[..., RunConfig]) -> None:
    run = taken("--name", "dp=2,tp=2", "tp=4", "--out", "lr=3")
    assert (run.name, run.layout, run.out) == ("dp=2,tp=2", "tp=4", "lr=3")


def test_flags_change_the_default_preset(taken: Callable[..., RunConfig]) -> None:
    run = taken("--steps", "3", "--text", "a.txt", "b", "--no-tie-embeddings", "--qk-norm", "--freeze", "embed", "norm")
    default = PRESETS["laptop"]
    assert run == replace(
        default,
        model=replace(default.model, tie_embeddings=False, qk_norm=True),
        data=replace(default.data, text=("a.txt", "b")),
        train=replace(default.train, steps=3, freeze=("embed", "norm")),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, taken: Callable[..., RunConfig]) -> None:
    assert taken("--preset", name) == taken(f"--preset={name}") == PRESETS[name]


@pytest.mark.parametrize("kind", ["toml", "yaml", "yml", "json"])
def test_a_file_holds_everything(kind: str, tmp_path: Path, taken: Callable[..., RunConfig]) -> None:
    path = tmp_path / f"run.{kind}"
    path.write_text(written(to_dict(EVERYTHING), kind))
    assert taken("--config", str(path)) == EVERYTHING
    for section, default in (("model", ModelConfig()), ("data", DataConfig()), ("train", TrainConfig())):
        for key, value in to_dict(default).items():
            assert to_dict(getattr(EVERYTHING, section))[key] != value, f"{section}.{key} is tested with its default"


def written(values: dict[str, Any], kind: str) -> str:
    if kind == "json":
        return json.dumps(values)
    if kind != "toml":
        return yaml.safe_dump(values)

    def table(values: dict[str, Any], name: str) -> list[str]:
        plain = [f"{k} = {json.dumps(v)}" for k, v in values.items() if not isinstance(v, dict)]
        groups = [line for k, v in values.items() if isinstance(v, dict) for line in table(v, f"{name}{k}.")]
        return ([f"[{name.rstrip('.')}]"] if name else []) + plain + groups

    return "\n".join(table(values, ""))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path, taken: Callable[..., RunConfig]) -> None:
    path = tmp_path / "run.toml"
    path.write_text('layout = "tp=2"\n[train]\nsteps = 11\nlr = 1\n[model]\nnum_layers = 2\n')
    run = taken("--preset", "h100", "--steps", "12", "--config", str(path))
    preset = PRESETS["h100"]
    assert run == replace(
        preset,
        layout="tp=2",
        model=replace(preset.model, num_layers=2),
        train=replace(preset.train, steps=12, lr=1.0),
    )


def test_the_configuration_of_a_run_can_be_given_back(tmp_path: Path, taken: Callable[..., RunConfig]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(EVERYTHING)))
    assert from_dict(RunConfig, read_config(path)) == EVERYTHING


def test_a_stopped_run_says_so_by_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "train", lambda run: {"stopped": "on request"})
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 130


# --- wrong use: exit 2 ------------------------------------------------------------------------------------

WRONG_USE: dict[str, tuple[list[str], list[str]]] = {
    "command": (["trian"], ["'trian'", "train, generate, verify"]),
    "flag": (["train", "--layers", "3"], ["--layers", "--num-layers"]),
    "flag of another command": (["generate", "runs/x", "--steps", "3"], ["--steps", "--help"]),
    "word": (["train", "quickly"], ["quickly"]),
    "value": (["train", "--steps", "many"], ["--steps", "'many'", "int"]),
    "no value": (["train", "--steps"], ["--steps"]),
    "choice": (["train", "--schedule", "zigzag"], ["'zigzag'", "1f1b", "afab"]),
    "dtype": (["verify", "--dtype", "float16"], ["float16", "float64", "bfloat16"]),
    "preset": (["train", "--preset", "gpu"], ["'gpu'", "laptop, moe-tiny, h100, h100x2, bench, bench-moe"]),
    "preset without a name": (["train", "--preset"], ["--preset needs a value"]),
    "config without a file": (["bench", "--config"], ["--config needs a value"]),
    "axis": (["train", "qp=2"], ["'qp'", "pp, dp, cp, tp"]),
    "axis twice": (["train", "dp=2,dp=2"], ["'dp'", "twice"]),
    "no size": (["train", "--layout", "dp"], ["'dp'", "dp=2,tp=2"]),
    "layout twice": (["train", "--layout", "dp=2", "--layout", "tp=2"], ["layout", "more than once"]),
    "layout bare and as a flag": (["bench", "dp=2", "--layout=tp=2"], ["layout", "more than once"]),
    "layout twice in generate": (["generate", "x", "--layout", "1", "--layout", "tp=2"], ["more than once"]),
    "negative warm-up": (["bench", "dp=1", "--warmup", "-1"], ["warmup=-1", "0 or above"]),
    "size zero": (["describe", "tp=0"], ["tp=0", "at least 1"]),
    "no folder": (["generate"], ["a run's folder"]),
    "device": (["generate", "x", "--device", "tpu"], ["'tpu'", "cuda"]),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use(case: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, words = WRONG_USE[case]
    message = fails(2, *args)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_wrong_flag_reads_the_same_in_any_terminal() -> None:
    said = set()
    for encoding, colour in (("ascii", ""), ("utf-8", ""), ("utf-8", "1")):
        env = os.environ | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": colour, "COLUMNS": "60"}
        done = python("-m", "picotron_mini", "generate", "x", "--steps", "3", env={k: v for k, v in env.items() if v})
        assert done.returncode == 2 and done.stdout == ""
        said.add(done.stderr)
    assert len(said) == 1
    assert "--steps" in said.pop()


WRONG_FILES: dict[str, tuple[str, str, list[str]]] = {
    "unknown setting": ("a.toml", "step = 3", ["'step'", "layout", "train"]),
    "unknown setting in a group": ("a.yaml", "train: {step: 3}", ["'train.step'", "steps"]),
    "setting in the wrong group": ("a.yaml", "model: {lr: 1}", ["'model.lr'", "hidden_size"]),
    "text for a number": ("a.toml", '[train]\nsteps = "3"', ["train.steps='3'", "int"]),
    "number for a switch": ("a.json", '{"train": {"compile": 1}}', ["train.compile=1", "bool"]),
    "fraction for a whole number": ("a.yaml", "train: {steps: 2.5}", ["train.steps=2.5", "int"]),
    "a number that YAML takes for text": ("a.yaml", "train: {lr: 3e-3}", ["train.lr='3e-3'", "3.0e-3"]),
    "word that is no choice": ("a.toml", '[train]\noptimizer = "adam"', ["'adam'", "adamw, sgd"]),
    "text that is no list": ("a.yaml", "data: {text: book.txt}", ["data.text='book.txt'", "list"]),
    "value for a group": ("a.yaml", "train: 3", ["train=3", "group"]),
    "a list": ("a.json", "[1, 2]", ["a.json", "no settings"]),
    "nothing": ("a.yaml", "", ["a.yaml", "no settings"]),
    "broken toml": ("a.toml", "steps = \n", ["a.toml", "line 1"]),
    "broken yaml": ("a.yaml", "a: [", ["a.yaml", "line 1"]),
    "broken json": ("a.json", "{", ["a.json", "line 1"]),
    "another kind": ("a.ini", "[train]", ["a.ini", ".toml, .yaml or .json"]),
    "not UTF-8": ("a.toml", "\udcff = 1", ["a.toml", "0xff"]),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    name, content, words = WRONG_FILES[case]
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    message = fails(2, "train", "--config", str(path))
    for word in words:
        assert word in message


def test_a_missing_file_and_a_folder(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.toml" in fails(2, "train", "--config", "nowhere.toml")
    (tmp_path / "d.toml").mkdir()
    assert "d.toml" in fails(2, "train", "--config", str(tmp_path / "d.toml"))


def test_debug_shows_the_traceback() -> None:
    done = python("-m", "picotron_mini", "describe", "tp=5", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "tp=5 does not divide" in done.stderr


# --- a run that cannot start: found before any process, and nothing is left --------------------------------

SMALL = "A text of some lines.\n" * 100
CANNOT_START: dict[str, tuple[str, list[str]]] = {
    "heads": ("tp=3", ["num_heads=4; tp could be 1 or 2\n", "num_kv_heads=2; tp could be 1 or 2\n"]),
    "key-value heads": ("tp=4", ["tp=4", "num_kv_heads=2", "tp could be"]),
    "the MLP": ("tp=2 --intermediate-size 63", ["intermediate_size=63"]),
    "layers": ("pp=3", ["pp=3", "num_layers=2", "pp<=2"]),
    "heads of odd width": ("--hidden-size 36", ["head_dim", "even"]),
    "hidden size": ("--hidden-size 33", ["hidden_size=33", "num_heads=4", "num_heads could be 1 or 3"]),
    "no layers": ("--num-layers 0", ["num_layers=0", "at least 1"]),
    "batch over data ranks": ("dp=3", ["batch_size=4", "dp=3", "try 3"]),
    "micro-batch size": ("--micro-batch-size 3", ["micro_batch_size=3", "try 2 or 4"]),
    "micro-batches": ("dp=2 --micro-batches 3", ["micro_batches=3", "2 sequences"]),
    "all three": ("--micro-batches 3 --micro-batch-size 2", ["3", "batch_size=4", "leave one"]),
    "no steps": ("--steps 0", ["steps=0", "at least 1"]),
    "learning rate": ("--lr 0", ["lr=0.0", "above 0"]),
    "share held out": ("--val-fraction 1.5", ["val_fraction=1.5", "between 0 and 1"]),
    "vocabulary of another tokenizer": ("--vocab-size 100", ["vocab_size=100", "257", "vocab_size>=257"]),
    "a vocabulary too small to split": ("tp=2 --vocab-size 1 --num-kv-heads 4", ["vocab_size=1"]),
    "size of the tokenizer": ("--tokenizer bpe --tokenizer-size 100", ["tokenizer_size=100", "257"]),
    "two problems": ("tp=3 --steps 0", ["tp=3", "steps=0"]),
    "everything frozen": ("--freeze embed layers norm", ["freeze=embed layers norm", "nothing to train"]),
    "frozen by a part of a word": ("--freeze layer", ["freeze='layer'", "layers.0.attention_norm.weight"]),
    "a long name": (f"--name {'n' * 300}", ["name='nnn", "300 bytes", "255"]),
    "a name that is no folder": ("--name a/b", ["name='a/b'", "--out"]),
    "a negative seed": ("--seed -1", ["seed=-1", "0 or above"]),
    "a huge seed": ("--seed 99999999999999999999", ["seed=99999999999999999999", "below 2**63"]),
}


@pytest.fixture
def refuses(fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refuses(status, ...)`: the tiny run with these flags does not start, starts no process and leaves no folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SMALL)

    def no_process(*args: Any, **options: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(train_module, "launch", no_process)

    def run(status: int, *args: str) -> str:
        layout = [] if any("=" in arg for arg in args) else ["dp=1"]
        message = fails(status, "train", *TINY, "--text", "text.txt", "--name", "new", *layout, *args)
        assert not Path("runs/new").exists()
        return message

    return run


@pytest.mark.parametrize("case", CANNOT_START)
def test_a_run_that_does_not_fit(case: str, refuses: Callable[..., str]) -> None:
    flags, words = CANNOT_START[case]
    message = refuses(2, *flags.split())
    for word in words:
        assert word in message


def test_more_gpus_than_there_are(refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module.torch.cuda, "device_count", lambda: 0)
    assert "torch sees no GPU; use device=cpu" in refuses(2, "--device", "cuda")
    monkeypatch.setattr(train_module.torch.cuda, "device_count", lambda: 2)
    assert "layout dp=4 needs 4 GPUs and there are 2" in refuses(2, "--device", "cuda", "dp=4")


def tokenizer_without_an_end(folder: Path) -> None:
    vocabulary = {"a": 0, "b": 5}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    (folder / "odd.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


TEXTS: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    "missing": (lambda p: None, "--text nowhere.txt", ["'nowhere.txt' does not exist"]),
    "one of two missing": (lambda p: None, "--text text.txt nowhere", ["'nowhere' does not exist"]),
    "empty": (lambda p: (p / "empty.txt").touch(), "--text empty.txt", ["empty.txt", "empty"]),
    "blank": (lambda p: (p / "blank.txt").write_text(" \n" * 99), "--text blank.txt", ["blank.txt", "blank"]),
    "empty folder": (lambda p: (p / "folder").mkdir(), "--text folder", ["'folder' has no text file", ".txt"]),
    "not UTF-8": (
        lambda p: (p / "latin.txt").write_bytes(b"caf\xe9 " * 500),
        "--text latin.txt",
        ["latin.txt is not UTF-8", "0xe9", "offset 3", "iconv"],
    ),
    "shorter than a batch": (
        lambda p: None,
        "--seq-len 4096",
        ["tokens", "batch_size=4", "seq_len=4096", "seq_len<=", "more text"],
    ),
    "missing tokenizer": (lambda p: None, "--tokenizer nowhere.json", ["'nowhere.json' does not exist", "'bpe'"]),
    "broken tokenizer": (
        lambda p: (p / "broken.json").write_text('{"version": 3'),
        "--tokenizer broken.json",
        ["'broken.json' cannot be read"],
    ),
    "a tokenizer that ends nothing": (tokenizer_without_an_end, "--tokenizer odd.json", ["odd.json", "eos_token"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_cannot_be_used(case: str, refuses: Callable[..., str], tmp_path: Path) -> None:
    prepare, flags, words = TEXTS[case]
    prepare(tmp_path)
    message = refuses(1, *flags.split())
    for word in words:
        assert word in message


def test_what_is_refused_before_the_text_is_read_leaves_nothing(refuses: Callable[..., str]) -> None:
    for flags in ("--freeze layers.99", "--freeze embed layers norm", "--text nowhere.txt", "tp=3", "--name .."):
        refuses(1 if "nowhere" in flags else 2, *flags.split())
        assert [path.name for path in Path().iterdir()] == ["text.txt"], flags


def test_a_run_folder_that_exists_is_not_touched(refuses: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("precious")
    message = refuses(1, "--name", "old")
    assert str(Path("runs/old")) in message and "--name" in message
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["old"]  # told before the text was prepared
    assert (folder / "summary.json").read_text() == "precious"


@pytest.mark.parametrize("out", ["text.txt", "text.txt/runs", "/dev/null/runs"])
def test_a_place_that_cannot_be_written(out: str, refuses: Callable[..., str]) -> None:
    message = refuses(1, "--out", out)
    assert f"cannot write to {out}" in message and "--out" in message
    assert Path("text.txt").read_text() == SMALL


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write to locked" in refuses(1, "--out", "locked/runs")
    (tmp_path / "hidden").mkdir(mode=0o000)
    assert "cannot write to hidden" in refuses(1, "--out", "hidden")


def planned(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *TINY, *args])
    return int(end.value.code or 0)


def test_plan_ranks_layouts(capfd: pytest.CaptureFixture[str]) -> None:
    assert planned("--ranks", "4", "--machine", "h100", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ranks"] == 4 and found["machine"] == "h100"
    seconds = [each["step_seconds"] for each in found["layouts"]]
    assert seconds == sorted(seconds) and found["layouts"][0]["fits"]
    assert planned("--ranks", "4", "--machine", "h100") == 0
    out = capfd.readouterr().out
    assert "4 ranks of h100, 78 GiB each" in out and "fastest, by predicted step time" in out
    assert planned("--ranks", "4", "--machine", "h100", "--memory-gib", "1e-5") == 1
    assert "NOTHING FITS" in capfd.readouterr().out


def test_plan_of_one_layout(capfd: pytest.CaptureFixture[str]) -> None:
    assert planned("dp=2,tp=2", "--machine", "h100") == 0
    out = capfd.readouterr().out
    assert "dp=2,tp=2" in out and "computing" in out and "fits into 78 GiB of h100" in out
    slow = []
    for speed in ("100", "0.001"):
        assert planned("tp=2", "--machine", "h100", "--link-gb-s", speed, "--json") == 0
        found = json.loads(capfd.readouterr().out)
        slow.append(found["layouts"][0]["step_seconds"])
    assert slow[1] > 2 * slow[0]
    assert planned("--ranks", "2", "--machine", "h100", "--json") == 0
    ranked = json.loads(capfd.readouterr().out)
    assert ranked.keys() == found.keys() and ranked["layouts"][0].keys() == found["layouts"][0].keys()
    assert ranked["sorted_by"] == "step_seconds"


EIGHT = ["--num-experts", "8", "--expert-size", "16"]


def test_plan_of_a_mixture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Flags of experts make the model a mixture; the busiest rank is told, or was measured by a run."""
    assert planned("--ranks", "4", "--machine", "h100", *EIGHT) == 0
    assert " ep " in capfd.readouterr().out
    loads = [[0.5, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "moe_load": loads}) + "\n")
    found = {}
    for skew in ("1", "1.3", str(tmp_path)):
        assert planned("dp=2,ep=2", "--machine", "h100", *EIGHT, "--skew", skew, "--json") == 0
        (found[skew],) = json.loads(capfd.readouterr().out)["layouts"]
    assert [round(each["skew"], 3) for each in found.values()] == [1.0, 1.3, 1.6]
    assert found["1"]["memory"]["activations"] < found["1.3"]["memory"]["activations"]
    assert found["1"]["memory"]["routing"] > 0 < found["1"]["bytes"]["ep"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--skew", "1.2"], "skew=1.2 is for a mixture of experts, and this model is dense"),
        ([*EIGHT, "--skew", "0.5"], "skew=0.5 must be between 1 (all ranks are equally busy) and num_experts=8"),
        ([*EIGHT, "--skew", "nan"], "skew=nan must be between 1"),
    ],
)
def test_plan_refuses_a_skew(args: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert planned("--ranks", "2", "--machine", "h100", *args) == 2
    assert words in capfd.readouterr().err


def test_a_skew_needs_a_run_with_such_experts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert planned("--ranks", "2", "--machine", "h100", *EIGHT, "--skew", str(tmp_path)) == 1
    assert "metrics.jsonl does not exist" in capfd.readouterr().err
    for line, words in (({"loss": 1.0}, "no load of experts"), ({"moe_load": [[0.5, 0.5]]}, "2 experts")):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert planned("--ranks", "2", "--machine", "h100", *EIGHT, "--skew", str(tmp_path)) == 2
        assert words in capfd.readouterr().err


TWO = ["--num-experts", "2", "--top-k", "1", "--no-normalize", "--expert-size", "16"]
NOTE = "note: zero=1 deals out whole experts, and 2 ranks hold the same expert of each layer"


def test_plan_notes_too_few_experts_for_zero(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    there = ["dp=4,ep=2", "--machine", "h100", "--zero", "1"]
    assert planned(*there, *TWO) == 0
    assert NOTE in capfd.readouterr().out
    assert planned(*there, *EIGHT) == 0
    assert "note" not in capfd.readouterr().out
    assert planned(*there, *TWO, "--json") == 0
    (layout,) = json.loads(capfd.readouterr().out)["layouts"]
    assert [f"note: {notice}".startswith(NOTE) for notice in layout["notices"]] == [True]
    assert planned("--ranks", "4", "--machine", "h100", *TWO) == 0  # on the first of those that are shown
    out = re.sub(r"\s+", " ", capfd.readouterr().out)
    assert re.search(r"note on dp=[\w,=]+: zero=1 deals out whole experts", out)


@pytest.mark.parametrize("command", ["train", "bench"])
def test_too_few_experts_for_zero_are_noted_before_a_process_starts(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SMALL)
    said = []

    def no_process(*args: Any, **options: Any) -> None:
        said.append("".join(capfd.readouterr()))
        raise UserError("no further")

    monkeypatch.setattr(train_module, "launch", no_process)
    monkeypatch.setattr(bench_module, "launch", no_process)
    for experts in (TWO, EIGHT):
        text = ["--text", "text.txt", "--name", str(len(said))] if command == "train" else []
        with pytest.raises(SystemExit):
            main([command, *TINY, "dp=4,ep=2", "--device", "cpu", "--zero", "1", *experts, *text])
    assert [NOTE in each for each in said] == [True, False]


def test_a_flag_of_experts_makes_a_mixture(taken: Callable[..., RunConfig]) -> None:
    assert taken().model.moe is None
    assert taken("--num-experts", "16").model.moe == MoEConfig(num_experts=16)
    assert taken("--top_k=4").model.moe == MoEConfig(top_k=4)
    assert taken("--preset", "moe-tiny", "--top-k", "4").model.moe == replace(PRESETS["moe-tiny"].model.moe, top_k=4)


def test_plan_rehearses_a_layout(capfd: pytest.CaptureFixture[str]) -> None:
    assert planned("dp=2,pp=2", "--dry-run", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ok"] and not found["problems"] and sorted(found["ranks"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dry-run"], "name it, as dp=16,tp=8,pp=8"),
        (["dp=2", "--ranks", "4"], "layout dp=2 has 2 ranks, and --ranks says 4"),
        (["--ranks", "2", "--machine", "h1000"], "neither a preset (h100, h100-cluster)"),
        (["--ranks", "2", "--machine", "h100", "--link-gb-s", "-3"], "link_gb_s=-3.0 must be a number above 0"),
        (["--ranks", "2", "--machine", "h100", "--memory-gib", "nan"], "memory_gib=nan must be a number above 0"),
        (["tp=2", "--machine", "h100", "--tensor-overlap", "2"], "plan does not predict what tensor_overlap=2 hides"),
        (["--ranks", "2", "--machine", "h100", "--measure"], "asks for another"),
        (
            ["tp=3", "--machine", "h100"],
            "num_heads=4; tp could be 1 or 2\ntp=3 does not divide num_kv_heads=2; tp could be 1 or 2",
        ),
        (
            ["--ranks", "3", "--machine", "h100"],
            "2 or 4 would. With dp=3: batch_size=4 does not split over dp=3",
        ),
    ],
)
def test_plan_refuses(args: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert planned(*args) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize("command", ["verify", "describe", "bench"])
def test_other_commands_refuse_too(command: str, fails: Callable[..., str]) -> None:
    assert "num_heads" in fails(2, command, "tp=5")
    assert "--nonsense" in fails(2, command, "--nonsense")
    assert "leaves nothing to train" in fails(2, command, "dp=2", "--freeze", "embed", "layers", "norm")
    assert "begins no parameter's name" in fails(2, command, "dp=2", "--freeze", "layers.99")
    for seed in ("-1", str(10**30)):
        assert f"seed={seed} must be 0 or above" in fails(2, command, "dp=2", "--seed", seed)
    assert "vocab_size=-5 must be" in fails(2, command, "dp=2", "--vocab-size", "-5")


# --- describe and verify ----------------------------------------------------------------------------------


def test_describe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as end:
        main(["describe", "dp=2,tp=2,pp=2"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "layers.*.attention.q.weight" in out and "bytes, stage 1" in out
    assert "memory of a rank at the worst moment" in out and "routing" not in out
    with pytest.raises(SystemExit):
        main(["describe", "dp=2,ep=2", "--preset", "moe-tiny"])
    out = capsys.readouterr().out
    assert re.search(r"routing +│ +[\d.]+ [KM]iB", out) and "equally busy" in out
    with pytest.raises(SystemExit):
        main(["describe", "dp=2,ep=2", "--preset", "moe-tiny", "--skew", "2"])
    busy = capsys.readouterr().out
    routing = [float(re.findall(r"routing +│ +([\d.]+) MiB", text)[0]) for text in (out, busy)]
    assert routing[1] > routing[0] and "of the busiest experts, skew 2.00" in " ".join(busy.split())
    for flags, words in (
        (("dp=2", "--skew", "2"), "skew=2 is for a mixture of experts"),
        (("dp=2", "--preset", "moe-tiny", "--skew", "2"), "with ep=1 each has all; leave it out"),
        (("dp=2,ep=2", "--preset", "moe-tiny", "--skew", "much"), "neither a number of 1 or above nor the folder"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["describe", *flags])
        assert end.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", PRESETS)
def test_describe_needs_no_gpu(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as end:
        main(["describe", "--preset", name])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "") and "where the parameters live" in out


@pytest.mark.slow
def test_train_prints_one_json_object(tmp_path: Path) -> None:
    """And nothing else to stdout, the ranks' progress included."""
    flags = "dp=2 --json --steps 2 --seq-len 16 --num-layers 1 --hidden-size 16 --intermediate-size 32 --num-heads 2"
    more = f"--num-kv-heads 1 --eval-batches 1 --batch-size 4 --out {tmp_path} --text {tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("a few words. " * 400)
    done = python("-m", "picotron_mini", "train", *flags.split(), *more.split())
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps_done"] == 2 and "report: " in done.stderr and "step" in done.stderr
    (folder,) = tmp_path.glob("*/summary.json")
    assert summary == json.loads(folder.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_verify_prints_one_json_object(
    wrong: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong:
        spoil_the_report(monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["verify", "dp=2", "--json", "--num-layers", "1"])
    assert end.value.code == (1 if wrong else 0)
    out, err = capfd.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["layout"] == "dp=2"
    assert report["ok"] is not wrong
    assert report["max_rel_err"] <= 1e-9
    assert report["bytes_predicted"] == report["bytes_counted"] != {}


def spoil_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from picotron_mini import verify

    real = verify.verify
    monkeypatch.setattr(verify, "verify", lambda *a, **k: replace(real(*a, **k), bytes_problems=("planted",)))


@pytest.mark.slow
def test_verify_prints_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", "tp=2", "--num-layers", "1"])
    assert end.value.code == 0
    out = capfd.readouterr().out
    for quantity in ("loss", "gradients", "gradient norm", "weights"):
        assert quantity in out


def test_verify_of_a_preset_is_in_float64_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--num-layers",
        "1",
        "--seq-len",
        "8",
        "--batch-size",
        "4",
        "--vocab-size",
        "33",
        "--device",
        "cpu",
        "--json",
    ]
    errors = []
    for more in ([], ["--dtype", "float32"]):
        with pytest.raises(SystemExit) as end:
            main(["verify", "dp=2", "--preset", "laptop", *small, *more])
        assert end.value.code == 0
        errors.append(json.loads(capsys.readouterr().out.splitlines()[-1])["max_rel_err"])
    assert errors[0] < 1e-11 < errors[1]


# --- under torchrun, and Ctrl-C ---------------------------------------------------------------------------


def under_torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    meet = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    return python("-m", "torch.distributed.run", *meet, "-m", "picotron_mini", *args, env=env)


@pytest.mark.slow
def test_bench_speaks_once_under_torchrun_and_counts_the_slowest_rank() -> None:
    flags = [*TINY[: TINY.index("--steps")], "--steps", "3", "--batch-size", "4", "--warmup", "0", "--device", "cpu"]
    done = under_torchrun("bench", "dp=2", "--json", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["layout"] == "dp=2" and len(result["step_seconds"]) == 3


@pytest.mark.slow
def test_generate_speaks_once_under_torchrun(tmp_path: Path) -> None:
    from picotron_mini.data.tokenizer import byte_tokenizer
    from picotron_mini.model.gpt import GPT, init_weights
    from picotron_mini.model.hf import save_hf

    config = ModelConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8)
    model = GPT(config)
    init_weights(model, 0)
    save_hf({name: weight.detach() for name, weight in model.named_parameters()}, config, tmp_path / "weights")
    byte_tokenizer().save(tmp_path / "weights")
    wanted = ("generate", str(tmp_path), "once upon", "--max-new-tokens", "9", "--device", "cpu", "--dtype", "float64")
    alone = python("-m", "picotron_mini", *wanted)
    done = under_torchrun(*wanted, "--layout", "tp=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout and done.stdout.count("once upon") == 1


@pytest.mark.slow
def test_a_mistake_is_told_once_under_torchrun() -> None:
    done = under_torchrun("bench", "tp=3", "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("error: tp=3 does not divide") == 1


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, 0.8, 1.5, 2.2, 3.0, 4.0])
def test_ctrl_c_while_it_starts(delay: float) -> None:
    """It reaches every process of the terminal: this one while it imports, the fork server, a rank that begins."""
    command = [sys.executable, "-m", "picotron_mini", "bench", "dp=2,tp=2", *TINY[: TINY.index("--steps")]]
    started = subprocess.Popen(
        [*command, "--steps", "1000000", "--batch-size", "4", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode in (130, -signal.SIGINT), err
    assert (out, err) == ("", "stopped\n")
    for _ in range(100):
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")
