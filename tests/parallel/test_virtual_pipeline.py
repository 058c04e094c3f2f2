"""Virtual stages and split backwards, as a run has them: settings, places, bytes, and parity on ranks."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from picotron_mini.cli import main
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.course.instruments.in_order import messages_in_order
from picotron_mini.launch import RankError, launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.model.generate import KeyValueCache
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.parallel.actions import Route
from picotron_mini.parallel.describe import describe
from picotron_mini.parallel.generate import load_parallel, next_logits
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.parallel.pipeline import run_pipeline
from picotron_mini.parallel.receives import receives_in_one_order, receives_in_own_order
from picotron_mini.parallel.schedules import find_schedule
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.training.step import evaluate
from picotron_mini.verify import MODEL, TRAIN, make_batches, verify

pytestmark = pytest.mark.slow  # waits for what would wait for ever

CPU = torch.device("cpu")


def resolved(layout: str, schedule: str, model: ModelConfig = MODEL, **train: Any) -> RunConfig:
    train = {"micro_batches": 4} | train
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, schedule=schedule, **train)))  # type: ignore[arg-type]


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "train", "said"),
    [
        ("pp=3", {"schedule": "interleaved", "micro_batches": 4},
         "schedule=interleaved runs micro-batches in groups of pp=3, and micro_batches=4 is no multiple of it; "
         "it could be 3 or 6"),
        ("pp=4", {"schedule": "interleaved", "micro_batches": 1},
         "micro_batches=1 is no multiple of it; it could be 4"),
        ("pp=5", {"schedule": "zb-v"},
         "schedule=zb-v cuts the model into 2 * pp=5 parts, more than num_layers=9; use pp<=4"),
        ("pp=2", {"schedule": "interleaved", "virtual_stages": 5, "micro_batches": 4},
         "cuts the model into 5 * pp=2 parts, more than num_layers=9; use num_layers>=10"),
        ("pp=2", {"schedule": "interleaved", "virtual_stages": 1}, "virtual_stages=1 must be at least 2"),
        ("pp=2", {"virtual_stages": 3}, "virtual_stages=3 is for schedule=interleaved; schedule=1f1b has 1 a stage"),
        ("dp=2", {"schedule": "zb-v"}, "schedule=zb-v needs a pipeline, and pp=1 is none; use pp>=2, or schedule=1f1b"),
        ("pp=2", {"schedule": "zb-h1", "compile": True},
         "schedule=zb-h1 splits each backward, and compile=True makes it one; use compile=False"),
        ("pp=2", {"schedule": "zb-v", "recompute": "full"}, "recompute=full makes it one; use recompute=none"),
        ("pp=2", {"schedule": "zb-v", "loss_chunks": 2}, "loss_chunks=2 makes it one; use loss_chunks=1"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_what_could(layout: str, train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(RunConfig(layout=layout, model=MODEL, train=replace(TRAIN, **train)))
    assert said in str(error.value)


def test_what_is_offered_works() -> None:
    for layout, train in [
        ("pp=3", {"schedule": "interleaved", "micro_batches": 6}), ("pp=4", {"schedule": "zb-v"}),
        ("pp=4", {"schedule": "interleaved", "micro_batches": 8}), ("dp=2", {"schedule": "zb-h1"}),
        ("pp=3", {"schedule": "interleaved", "virtual_stages": 3}),
    ]:  # fmt: skip
        resolve(RunConfig(layout=layout, model=MODEL, train=replace(TRAIN, **train)))  # type: ignore[arg-type]


# --- places and bytes -----------------------------------------------------------------------------------------


def stages_of(run: RunConfig) -> list[int]:
    layout = layout_of(run)
    return [layout[f"layers.{i}.mlp.up.weight"].stages[0] for i in range(run.model.num_layers)]


def test_places() -> None:
    deep = replace(MODEL, num_layers=8)
    assert stages_of(resolved("pp=2", "zb-h1", deep)) == stages_of(resolved("pp=2", "1f1b", deep))
    assert stages_of(resolved("pp=4", "interleaved", deep)) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert stages_of(resolved("pp=4", "zb-v", deep)) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert stages_of(resolved("pp=2", "interleaved", deep, virtual_stages=4)) == [0, 1] * 4
    untied = replace(deep, tie_embeddings=False)
    for schedule, last in (("interleaved", 3), ("zb-v", 0), ("zb-h1", 3)):
        layout = layout_of(resolved("pp=4", schedule, untied))
        ends = [layout[name].stages for name in ("embed.weight", "norm.weight", "head.weight")]
        assert ends == [(0,), (last,), (last,)]
        tied = layout_of(resolved("pp=4", schedule, deep))["embed.weight"]
        assert tied.stages == tuple(dict.fromkeys((0, last)))
        assert ("pp" in tied.sum_axes) == (last != 0)


def test_the_heavy_head_leaves_its_virtual_stage_fewer_layers() -> None:
    heavy = replace(MODEL, num_layers=12, vocab_size=1000)
    assert stages_of(resolved("pp=2", "zb-v", heavy)).count(0) < 6
    assert stages_of(resolved("pp=2", "zb-v", heavy))[-2:] == [1, 0]


def sent(run: RunConfig, key: tuple[str, str] = ("pp", "send")) -> list[int]:
    layout = layout_of(run)
    return [predict_step(run, layout, coordinates(run.mesh, r))[key] for r in range(run.mesh.world_size)]


def test_bytes_between_stages() -> None:
    message = 4 * 2 * 12 * 32 * 8  # 4 micro-batches of [2, 12, 32] in float64
    tied = 101 * 32 * 8
    untied = replace(MODEL, tie_embeddings=False)
    assert sent(resolved("pp=4", "zb-h1", untied)) == sent(resolved("pp=4", "1f1b", untied))
    assert sent(resolved("pp=4", "zb-h1", untied)) == [message * n for n in (1, 2, 2, 1)]
    assert sent(resolved("pp=4", "interleaved", untied)) == [message * n for n in (3, 4, 4, 3)]
    assert sent(resolved("pp=2", "interleaved", untied, virtual_stages=3)) == [message * 5, message * 5]
    assert sent(resolved("pp=4", "zb-v", untied)) == [message * n for n in (2, 4, 4, 2)]
    assert sent(resolved("pp=4", "interleaved")) == [message * 3 + tied, message * 4, message * 4, message * 3 + tied]
    assert sent(resolved("pp=4", "zb-v")) == [message * n for n in (2, 4, 4, 2)]  # tied, and on one stage


def test_gradients_of_a_frozen_start_stop_in_its_chunk() -> None:
    """Below the first trained parameter no entry sums; the second chunk's input always has a gradient."""
    untied = replace(MODEL, tie_embeddings=False)
    frozen = tuple(f"layers.{i}." for i in (0, 1, 2, 3, 7, 8))
    run = resolved("pp=2,tp=2", "zb-v", untied, freeze=("embed", *frozen))
    whole = sent(resolved("pp=2,tp=2", "zb-v", untied), ("tp", "all_reduce"))
    saved = [a - b for a, b in zip(whole, sent(run, ("tp", "all_reduce")), strict=True)]
    first_chunk = stages_of(run).index(1)
    assert first_chunk < 4
    assert saved == [4 * 2 * 12 * 32 * 8 * 2 * first_chunk] * 2 + [0] * 2


def test_described() -> None:
    out = io.StringIO()
    run = resolved("pp=2", "zb-v", replace(MODEL, num_layers=8))
    Console(file=out, width=200).print(describe(run))
    assert "0: layers 0-1 and 6-7; 1: layers 2-3 and 4-5" in out.getvalue()
    assert f"{sent(run)[0]:,}" in out.getvalue()


# --- on ranks -------------------------------------------------------------------------------------------------


def tied_once() -> tuple[int, bool, bool]:
    run = resolved("pp=2", "zb-v")
    parallel = parallelize(run, Mesh.build(run.mesh), CPU)
    first, last = parallel.chunks
    ends = first.embed is not None and last.head is not None
    assert parallel.deferred is not None
    with pytest.raises(ValueError):
        _ = parallel.model
    one = parallel.parameters.get("embed.weight")
    return len(parallel.chunks), ends, ends and last.head.weight is first.embed.weight is one  # type: ignore[union-attr]


def test_a_v_ties_embedding_and_head_on_its_first_stage() -> None:
    assert launch(tied_once, world_size=2) == [(2, True, True), (2, False, False)]


def validation(layout: str, schedules: tuple[str, ...], numbers: tuple[int, ...]) -> list[tuple[float, int, bool]]:
    out = []
    for schedule in schedules:
        run = resolved(layout, schedule, micro_batches=6)
        parallel = parallelize(run, Mesh.build(run.mesh), CPU)
        batch = make_batches(run)[0]
        fields = [getattr(batch, f).split(2) for f in ("tokens", "targets", "positions", "documents")]
        parts = [type(batch)(*part) for part in zip(*fields, strict=True)]
        out += [evaluate(parallel, parts[:number]) for number in numbers]
    return out


def test_validation_is_the_same_for_any_number_of_batches() -> None:
    """Fewer than the stages, and not a multiple of them."""
    numbers = (1, 5)
    ((one, five),) = launch(validation, "dp=1", ("1f1b",), numbers, world_size=1)
    for results in launch(validation, "pp=3", ("zb-v", "interleaved"), numbers, world_size=3):
        for (loss, tokens, stop), want in zip(results, [one, five] * 2, strict=True):
            assert (tokens, stop) == (want[1], False)
            assert loss == pytest.approx(want[0], rel=1e-12)


def in_order_on_a_ring(own: bool) -> float:
    """Two stages of two chunks, each multiplying by its weight; sends and receives run in order, as on NCCL."""
    messages_in_order()
    mesh, route, m = Mesh.build(MeshShape(pp=2)), Route(2, 2), 4
    stage, weight = mesh["pp"].index, torch.ones(3, requires_grad=True)
    schedule = find_schedule("interleaved", 2)
    lists = [schedule(s, 2, m) for s in range(2)]
    receives = receives_in_own_order(lists[stage], route, stage) if own else receives_in_one_order(lists, route)[stage]

    def chunk(number: int) -> Any:
        def forward(n: int, hidden: Tensor | None) -> Tensor:
            x = weight * (n + 1.0 if hidden is None else hidden)
            return x.sum() if (stage, number) == (1, 1) else x

        return forward

    run_pipeline(
        lists[stage], forward=[chunk(0), chunk(1)], axis=mesh["pp"], gradient_axis=mesh["pp.backward"], shape=(3,),
        dtype=torch.float32, device=CPU, route=route, receives=receives,
    )  # fmt: skip
    assert weight.grad is not None
    return weight.grad.sum().item()


def test_one_order_goes_round_a_ring_where_own_orders_wait_for_ever(ranks: Any) -> None:
    assert ranks(in_order_on_a_ring, False, world_size=2) == [2 * 3 * 10.0] * 2  # two chunks, 1 + 2 + 3 + 4
    with pytest.raises(RankError, match=r"(?s)Still running: 2"):
        ranks(in_order_on_a_ring, True, world_size=2, timeout=8)


def spread() -> Tensor:
    run = resolved("pp=2", "zb-v")
    model = GPT(run.model)
    init_weights(model, 3)
    mesh = Mesh.build(run.mesh)
    parallel = load_parallel(run, run.model, dict(model.state_dict()), mesh, CPU)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        got = next_logits(parallel, tokens, KeyValueCache(tokens.shape[1]))
        return (got - model.double().logits(model(tokens))[:, -1]).abs().max()


def test_a_run_with_virtual_stages_can_write() -> None:
    assert max(difference.item() for difference in launch(spread, world_size=2)) < 1e-12


FAST = [("pp=2", "zb-h1", {}), ("pp=2", "zb-v", {}), ("pp=2", "interleaved", {"micro_batches": 4})]
SLOW: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("pp=4", "zb-h1", {"micro_batches": 5}, {}),
    ("pp=4", "zb-v", {"micro_batches": 5}, {}),  # fewer than 2 pp - 1: gaps in the pattern
    ("pp=4", "zb-v", {"micro_batches": 8, "micro_batch_size": 1}, {"tie_embeddings": False}),
    ("pp=4", "interleaved", {"micro_batches": 8, "micro_batch_size": 1}, {}),
    ("pp=2", "interleaved", {"micro_batches": 4, "virtual_stages": 3}, {"tie_embeddings": False}),
    ("dp=2,pp=2,tp=2", "zb-h1", {}, {"qk_norm": True}),
    ("dp=2,pp=2,tp=2", "zb-v", {}, {}),
    ("dp=2,pp=2,tp=2", "interleaved", {"micro_batches": 2}, {}),
    ("dp=2,pp=4", "zb-v", {"micro_batches": 7, "micro_batch_size": 1}, {}),
    ("dp=2,pp=2", "zb-v", {"freeze": ("embed",)}, {}),
    ("tp=2,pp=2", "zb-v", {"freeze": ("embed", "layers.0", "layers.1", "layers.2")}, {"tie_embeddings": False}),
    ("tp=2,pp=2", "interleaved", {"micro_batches": 4, "freeze": ("embed", "layers.0")}, {"tie_embeddings": False}),
    ("dp=2,pp=2", "zb-h1", {"freeze": ("embed", "layers", "norm")}, {"tie_embeddings": False}),
    ("tp=2,pp=2", "zb-v", {"sequence_parallel": True, "document_mask": True}, {}),
    ("dp=2", "zb-h1", {}, {}),
    ("tp=2,pp=2", "interleaved", {"micro_batches": 2, "recompute": "full", "loss_chunks": 3}, {}),
    ("cp=2,pp=2", "zb-v", {}, {}),
    ("cp=2,pp=2", "interleaved", {"micro_batches": 2, "context": "ulysses"}, {}),
]


def expect_equal(layout: str, schedule: str, train: dict[str, Any], model: dict[str, Any], optimizers: Any) -> None:
    settings = replace(TRAIN, steps=2, schedule=schedule, **train)  # type: ignore[arg-type]
    report = verify(layout, replace(MODEL, **model), settings, optimizers=optimizers)
    assert report.ok, f"first {report.first_divergence}; {report.bytes_problems}"
    assert len(report.differences) == 4


@pytest.mark.parametrize(("layout", "schedule", "train"), FAST)
def test_parity(layout: str, schedule: str, train: dict[str, Any]) -> None:
    expect_equal(layout, schedule, train, {}, ("sgd", "adamw"))


@pytest.mark.parametrize(("layout", "schedule", "train", "model"), SLOW)
def test_parity_with_all_else(layout: str, schedule: str, train: dict[str, Any], model: dict[str, Any]) -> None:
    expect_equal(layout, schedule, train, model, ("sgd",))


def test_narrow_dtypes() -> None:
    for schedule in ("zb-v", "interleaved"):
        train = replace(TRAIN, steps=2, dtype="bfloat16", micro_batches=2, schedule=schedule)  # type: ignore[arg-type]
        report = verify("dp=2,pp=2", MODEL, train)
        assert report.ok and report.max_rel_err > 1e-9, report.to_dict()


def test_train_and_bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n\n" * 400)
    sizes = "--hidden-size 32 --num-heads 4 --num-kv-heads 2 --num-layers 5 --intermediate-size 64 --seq-len 16"
    sizes += " --batch-size 8 --micro-batches 4 --steps 3 --device cpu --dtype float64"
    runs = []
    for schedule in ("1f1b", "zb-v", "interleaved"):
        train = (
            f"train pp=2 {sizes} --schedule {schedule} --text {tmp_path / 'text.txt'} --out {tmp_path} --eval-every 2"
        )
        with pytest.raises(SystemExit) as end:
            main([*train.split(), "--name", schedule])
        assert not end.value.code, capfd.readouterr().err
        folder = tmp_path / schedule
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs.append([{k: v for k, v in line.items() if k in ("loss", "grad_norm", "val_loss")} for line in lines])
        traffic = json.loads((folder / "traffic.json").read_text())["per_step"]
        assert traffic and all(row["predicted"] == row["counted"] for row in traffic)
        runs[-1].append({"sample": json.loads((folder / "summary.json").read_text())["sample"]["text"]})
    for other in runs[1:]:
        assert other[-1] == runs[0][-1]  # so the weights that were gathered are the same
        for mine, theirs in zip(other[:-1], runs[0][:-1], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*f"bench pp=2 {sizes} --vocab-size 50 --schedule zb-v --warmup 1 --json".split()])
    result = json.loads(capfd.readouterr().out)
    assert not end.value.code and result["tokens_per_second_per_rank"] > 0
    run = resolved("pp=2", "zb-v", ModelConfig(vocab_size=50, hidden_size=32, num_heads=4, num_kv_heads=2, num_layers=5,
                   intermediate_size=64), seq_len=16, micro_batch_size=2)  # fmt: skip
    assert Counter(result["bytes_per_step"])["pp send"] == sent(run)[0]
