"""What chapter 01 shows: the memory of a training step as it is watched, and its drawing."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from picotron_mini.config import Dtype, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.exhibits.chapter_01 import rope_in_bf16
from picotron_mini.course.instruments.live_bytes import KINDS, STATE, LiveBytes, draw_memory, watch_step
from picotron_mini.course.museum import kill
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.model import costs, gpt
from picotron_mini.model.gpt import GPT

MODEL = ModelConfig(vocab_size=200, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)


def settled(dtype: Dtype, sequences: int = 4) -> RunConfig:
    train = TrainConfig(seq_len=16, micro_batch_size=sequences, dtype=dtype, device="cpu")
    return resolve(RunConfig(layout="dp=1", model=MODEL, train=train))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_what_the_formulas_say(dtype: Dtype) -> None:
    run, width, tokens = settled(dtype), 2 if dtype == "bfloat16" else 4, 4 * 16
    history = watch_step(run)
    assert [phase for phase, _ in dict.fromkeys((m.phase, 0) for m in history)] == ["forward", "backward", "optimizer"]
    # a flag and a counter for each parameter tensor come with the state
    tensors = len(gpt.parameter_shapes(run.model))
    state = costs.state_bytes(run.model, width)
    state["gradients"] += 4 * tensors
    state["moments"] += 4 * tensors
    assert {kind: history[0].live[kind] for kind in STATE} == state
    assert all({kind: m.live[kind] for kind in STATE} == state for m in history)
    full = [m for m in history if m.phase == "forward"][-1].live
    saved = tokens * costs.activation_bytes(run.model, width)
    assert 0 <= full["activations"] + full["logits"] - saved < 64  # a few scalars
    peak = max(history, key=lambda m: m.total)
    assert peak.phase == "backward"
    assert 0 <= peak.total - sum(history[0].live.values()) - saved - tokens * 2 * 4 * run.model.vocab_size < 64
    assert history[-1].total - history[0].total < 256  # all is given back but what the step returns


def test_memory_that_is_shared_or_given_back_counts_once() -> None:
    x = torch.zeros(10)
    with LiveBytes({"weights": [x, x.view(2, 5)]}, vocab_size=7) as live:
        y = x + 1
        y.view(2, 5).add_(1)
        logits = torch.zeros(3, 7)
        del logits
        x * 2
    said = [m.live for m in live.history]
    assert said[0] == {**dict.fromkeys(KINDS, 0), "weights": 40}
    assert [(s["activations"], s["logits"]) for s in said[1:]] == [(40, 0), (40, 84), (80, 0)]
    live._note()
    assert live.history[-1].live["activations"] == 40  # y lives
    assert y.shape == (10,)


def test_the_drawing_of_a_step() -> None:
    history = watch_step(settled("bfloat16", 1))
    drawn = draw_memory(history, "one step")
    svg = drawn._repr_svg_()
    ElementTree.fromstring(svg)
    assert repr(drawn) == "one step"
    assert all(f">{word}<" in svg for word in ("forward", "backward", "optimizer", "masters", "activations"))
    assert ">batch<" not in svg  # less than a hundredth
    assert len(svg) < 120_000
    assert svg == draw_memory(history, "one step")._repr_svg_()


def the_head_is_the_embedding(mesh: Mesh) -> None:
    with torch.device("meta"):
        model = GPT(replace(MODEL, head_dim=8))
    model.to_empty(device="cpu")
    assert model.head is not None and model.embed is not None
    assert model.head.weight is model.embed.weight


def the_model_on_the_cpu_is_tied(mesh: Mesh) -> None:
    model = GPT(replace(MODEL, head_dim=8)).double()
    assert model.head is not None and model.embed is not None
    assert model.head.weight is model.embed.weight


def test_a_lost_tie_is_seen_by_those_who_leave_the_meta_device() -> None:
    assert kill("01.tie_lost", the_head_is_the_embedding, record=False).passed
    assert kill("01.tie_lost", the_model_on_the_cpu_is_tied, record=False).status == "failed"


def test_positions_that_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(MODEL, head_dim=8)
    positions = torch.tensor([[255, 256, 257, 4095, 4096]])
    right = gpt.rope(config, positions, torch.float32)[0][0, 0]
    assert len(right.unique(dim=0)) == 5
    monkeypatch.setattr(gpt, "rope", gpt.rope)  # put back afterwards
    rope_in_bf16()
    wrong = gpt.rope(config, positions, torch.float32)[0][0, 0]
    assert torch.equal(wrong[1], wrong[2]) and torch.equal(wrong[3], wrong[4])
    assert not torch.equal(wrong[0], wrong[1])
