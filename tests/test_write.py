"""`picotron-mini generate`: a trained model continues a prompt, from anywhere, and a mistake gets one message."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from picotron_mini import write as write_module
from picotron_mini.cli import main
from picotron_mini.config import ModelConfig, MoEConfig, UserError
from picotron_mini.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from picotron_mini.model.generate import generate
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.hf import save_hf
from picotron_mini.write import Wish, load, write

MODEL = ModelConfig(
    vocab_size=257, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def run_folder(folder: Path, tokenizer: Tokenizer, scale: float = 8.0) -> Path:
    """What a run leaves that `generate` needs. Larger weights than usual make the random model choosy."""
    config = ModelConfig(**{**MODEL.__dict__, "vocab_size": tokenizer.vocab_size})
    model = GPT(config)
    init_weights(model, 0)
    state = {name: p.detach() * (scale if p.ndim > 1 else 1.0) for name, p in model.named_parameters()}
    save_hf(state, config, folder / "weights")
    tokenizer.save(folder / "weights")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"), byte_tokenizer())


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit status, stdout and stderr of `picotron-mini generate ARGS`."""

    def run(*args: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["generate", *map(str, args)])
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_continues_the_prompt(folder: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = said(folder, "once upon", "--max-new-tokens", "30", "--seed", "3")
    assert (status, err) == (0, "")
    assert out.startswith("once upon") and len(out.strip()) > len("once upon")
    tokenizer = load_tokenizer(folder / "weights")
    tokens = torch.tensor([tokenizer.encode("once upon")])
    expected = generate(load(folder), tokens, 30, seed=3, stop_token=tokenizer.end)[0].tolist()
    assert out == tokenizer.decode([t for t in expected if t != tokenizer.end]) + "\n"


def test_the_seed_decides(folder: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    length = ("--max-new-tokens", "40")
    texts = [said(folder, "x", *length, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = [said(folder, "x", *length, "--temperature", "0", "--seed", seed)[1] for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2", "pp=2", "dp=2", "cp=2", "cp=3", "tp=2,pp=2"])
def test_a_model_that_is_spread_over_ranks_writes_the_same(
    layout: str, folder: Path, said: Callable[..., tuple[int, str, str]]
) -> None:
    flags = (folder, "once upon", "--max-new-tokens", "25", "--dtype", "float64")
    assert said(*flags, "--layout", layout) == said(*flags)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("tp=4", "tp=4 does not divide num_kv_heads=2; tp could be 1 or 2"),
        ("pp=3", "pp=3 is more than num_layers=2"),
        ("tp2", "'tp2' is not AXIS=SIZE"),
    ],
)
def test_a_layout_that_does_not_fit_the_model(
    layout: str, words: str, folder: Path, said: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = said(folder, "x", "--layout", layout)
    assert (status, out) == (2, "") and words in err


def test_from_another_folder_and_from_the_weights_themselves(
    folder: Path, said: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(folder, "x", "--max-new-tokens", "20")
    monkeypatch.chdir(tmp_path)
    assert said(folder, "x", "--max-new-tokens", "20") == expected
    monkeypatch.chdir(folder.parent)
    for other in (folder.name, folder / "weights"):
        assert said(other, "x", "--max-new-tokens", "20") == expected


def test_the_prompt_may_be_left_out_or_empty(folder: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    assert said(folder, "--max-new-tokens", "5")[1].startswith("def ")
    status, out, err = said(folder, "", "--max-new-tokens", "5")
    assert (status, err) == (0, "")
    assert "<|endoftext|>" not in out


def test_each_piece_is_printed_as_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character of several bytes is held back until it is whole; nothing that was printed changes."""
    text = "aäß€😀z"
    tokenizer = byte_tokenizer()
    shown: list[tuple[str, bool]] = []
    ids = [*tokenizer.encode(text), tokenizer.end, 65]
    monkeypatch.setattr(write_module, "stream", lambda *a, **k: (torch.tensor([t]) for t in ids))
    monkeypatch.setattr("builtins.print", lambda *a, end="\n", flush=False: shown.append(("".join(a) + end, flush)))
    write(str(folder), Wish("<", 99, 1.0, 0), "cpu")
    assert [piece for piece, _ in shown] == ["<a", *text[1:], "\n"]
    assert all(flush for _, flush in shown[:-1])


def test_text_that_ends_within_a_character_is_not_lost(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "stream", lambda *a, **k: (torch.tensor([t]) for t in b"ab\xe2"))
    write(str(folder), Wish("<", 3, 1.0, 0), "cpu")
    assert capsys.readouterr().out == "<ab\ufffd\n"


def test_with_a_bpe(tmp_path: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    folder = run_folder(tmp_path / "run", train_bpe(["the cat sat on the mat and the dog ate the cat " * 20], 280))
    status, out, err = said(folder, "the cat", "--max-new-tokens", "20")
    assert (status, err) == (0, "")
    assert out.startswith("the cat")


# --- what cannot work -------------------------------------------------------------------------------------


def broken_weights(folder: Path) -> None:
    (folder / "weights" / "model.safetensors").write_bytes(b"not weights")


def no_tokenizer(folder: Path) -> None:
    (folder / "weights" / "tokenizer.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "weights" / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "weights" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken_weights, "model.safetensors"),
        (no_tokenizer, "tokenizer.json"),
        (broken_config, "config.json"),
        (no_weights, "holds no weights"),
    ],
)
def test_a_damaged_folder(
    spoil: Callable[[Path], None], words: str, tmp_path: Path, said: Callable[..., tuple[int, str, str]]
) -> None:
    spoil(run_folder(tmp_path / "run", byte_tokenizer()))
    status, out, err = said(tmp_path / "run")
    assert status == 1
    assert out == ""
    assert err.startswith("error: ") and words in err and "Traceback" not in err and err.count("error:") == 1


def test_not_a_run(tmp_path: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "empty").mkdir()
    status, out, err = said(tmp_path / "empty")
    assert (status, out) == (1, "")
    assert err == f"error: {tmp_path / 'empty'} holds no weights; give the folder of a finished run, as runs/my-run\n"


@pytest.mark.parametrize("layout", ["1", "tp=2"])
def test_weights_that_are_not_finite_write_nothing(
    layout: str, tmp_path: Path, said: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 0 the most likely of NaN is token 0: text that means nothing."""
    config = replace(MODEL, moe=MoEConfig(num_experts=4, expert_size=16))
    model = GPT(config)
    init_weights(model, 0)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    state["layers.1.mlp.router.weight"][2] = float("nan")
    state["norm.weight"][0] = float("inf")
    save_hf(state, config, tmp_path / "weights")
    byte_tokenizer().save(tmp_path / "weights")
    monkeypatch.setattr(write_module, "launch", None)  # no process is started
    status, out, err = said(tmp_path, "x", "--temperature", "0", "--layout", layout)
    assert (status, out) == (1, "")
    assert "layers.1.mlp.router.weight and 1 more of" in err and "train again with a lower --lr" in err


@pytest.mark.parametrize("name", ["nowhere", "file", "no/where"])
def test_no_folder(name: str, tmp_path: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "file").write_text("text")
    status, out, err = said(tmp_path / name)
    assert (status, out) == (1, "")
    assert err == f"error: there is no folder {tmp_path / name}; `picotron-mini train` makes one\n"


def test_a_mistyped_folder_is_told_its_neighbours(tmp_path: Path, said: Callable[..., tuple[int, str, str]]) -> None:
    run_folder(tmp_path / "mine", byte_tokenizer())
    status, _, err = said(tmp_path / "min")
    assert status == 1
    assert err == f"error: there is no folder {tmp_path / 'min'}; {tmp_path} has mine\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--temperature -1", "temperature=-1.0 must be a number, 0 (always the most likely token) or above"),
        ("--temperature nan", "temperature=nan must be a number"),
        ("--temperature inf", "temperature=inf must be a number"),
        ("--top-k -1", "top_k=-1 cannot be negative"),
        ("--max-new-tokens -1", "max_new_tokens=-1 cannot be negative"),
        ("--max-new-tokens 1000000000000", "of the model's max_position=8192 the prompt leaves 8191"),
        ("--seed -1", "seed=-1 must be 0 or above"),
        ("--seed 99999999999999999999999", "seed=99999999999999999999999 must be 0 or above, and below 2**63"),
    ],
)
@pytest.mark.parametrize("layout", ["1", "tp=2"])
def test_numbers_out_of_range(
    flags: str, words: str, layout: str, folder: Path, said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(write_module, "launch", None)  # no process is started
    status, out, err = said(folder, "x", "--layout", layout, *flags.split())
    assert (status, out) == (2, "")
    assert words in err and err.count("error:") == 1 and "Traceback" not in err


def test_a_gpu_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda, and torch sees no GPU; use --device cpu"):
        write(str(folder), Wish("x"), "cuda")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m picotron_mini generate {folder} xxxxx --max-new-tokens 2000 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "xxxxx"
    assert done.stderr == ""


def test_the_model_is_that_of_the_weights(folder: Path) -> None:
    config = json.loads((folder / "weights" / "config.json").read_text())
    assert config["model_type"] == "llama"
    model = load(folder)
    assert model.config.hidden_size == config["hidden_size"] == 32
    assert not model.training
