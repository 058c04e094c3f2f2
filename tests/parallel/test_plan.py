"""The planner: what it predicts against what was measured, what it lists, and what a machine is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_mini import calibrate as calibration
from picotron_mini import planner
from picotron_mini.calibrate import BOUNDS, MISSED, calibrate, calibrated, fit, solve, with_bucket
from picotron_mini.config import (
    ConfigError,
    MeshShape,
    ModelConfig,
    MoEConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
    UserError,
)
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.moe.dispatch import ExpertDispatch, SlotDispatch
from picotron_mini.moe.gather_dispatch import GatherDispatch
from picotron_mini.parallel import expert_costs
from picotron_mini.parallel.activations import activations, layer_bytes, share_of
from picotron_mini.parallel.expert import mixtures
from picotron_mini.parallel.expert_costs import flow, skew_of_loads
from picotron_mini.parallel.machine import MACHINES, Link, Machine, exposed, find_machine, from_json, to_json
from picotron_mini.parallel.messages import _tail, best_bucket, crosses_hosts
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.parallel.plan import Plan, by_axis, meshes, plan, spreads, to_dict
from picotron_mini.parallel.plan_table import table
from picotron_mini.parallel.predict import most_live, predict
from picotron_mini.parallel.schedules import find_schedule
from picotron_mini.parallel.work import forward_work
from picotron_mini.presets import preset
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step
from picotron_mini.verify import make_batches

H100 = MACHINES["h100"]
MODEL = ModelConfig(vocab_size=300, hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4, num_kv_heads=2)
TRAIN = TrainConfig(seq_len=64, batch_size=8, micro_batch_size=2, device="cpu")


EXPERTS = MoEConfig(num_experts=8, top_k=2, expert_size=88)


def resolved(layout: str, model: ModelConfig = MODEL, **train: Any) -> RunConfig:
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **train)), gpus=10**6)


# --- against measurements ---------------------------------------------------------------------------------


def measured_on_one_h100() -> list[tuple[int, int, dict[str, Any], float, float]]:
    """Micro-batch, number of them, settings, tokens a second and GiB of each row of the log."""
    log = Path(__file__).parents[2] / "summary" / "01_model_and_its_costs_gpu.log"
    row = re.compile(r"^bench dp=1 (\d+) x (\d+) \{(.*)\}: ([\d,]+) tokens/s per GPU, .* peak ([\d.]+) GiB", re.M)
    out = []
    for size, number, words, speed, peak in row.findall(log.read_text(encoding="utf-8", errors="replace")):
        pairs = dict(re.findall(r"'(\w+)': '?(\w+)'?", words))
        kw = {name: int(value) if value.isdigit() else value for name, value in pairs.items()}
        out.append((int(size), int(number), kw, float(speed.replace(",", "")), float(peak)))
    assert len(out) >= 8
    return out


@pytest.mark.parametrize("row", measured_on_one_h100(), ids=str)
def test_the_preset_meets_the_rows_that_it_was_made_from(row: tuple[int, int, dict[str, Any], float, float]) -> None:
    size, number, kw, speed, peak = row
    run = preset("bench")
    run = replace(run, train=replace(run.train, micro_batch_size=size, micro_batches=number, **kw))
    found = predict(resolve(run, gpus=1), H100)
    assert found.tokens_per_second == pytest.approx(speed, rel=0.05)
    assert found.memory_bytes / 2**30 == pytest.approx(peak, rel=0.05)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def peak_of_real_steps(run: RunConfig) -> int:
    """What the allocator had handed out at most, from building the model to the end of the second step."""
    batch = make_batches(replace(run, train=replace(run.train, steps=1)))[0]
    size = run.train.micro_batch_size
    fields = (batch.tokens, batch.targets, batch.positions, batch.documents)
    parts = [type(batch)(*(x[i : i + size] for x in fields)) for i in range(0, run.train.batch_size, size)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        parallel = parallelize(run, Mesh(MeshShape(), 0), torch.device("cpu"))
        optimizer = make_optimizer(parallel.trained, run.train)
        for _ in range(2):
            train_step(parallel, optimizer, parts)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    "train",
    [
        {}, {"micro_batch_size": 4}, {"recompute": "full"}, {"recompute": "selective"}, {"loss_chunks": 4},
        {"micro_batch_size": 8, "recompute": "full", "loss_chunks": 8}, {"optimizer": "sgd"},
    ],
    ids=str,
)  # fmt: skip
def test_memory_of_a_real_step(train: dict[str, Any]) -> None:
    run = resolved("dp=1", **train)
    assert predict(run, H100).memory_bytes == pytest.approx(peak_of_real_steps(run), rel=0.1)


def test_memory_of_a_real_step_with_a_large_vocabulary_of_its_own_head() -> None:
    run = resolved("dp=1", replace(MODEL, vocab_size=4000, tie_embeddings=False))
    assert predict(run, H100).memory_bytes == pytest.approx(peak_of_real_steps(run), rel=0.1)


# --- formulas ---------------------------------------------------------------------------------------------


def test_the_rates_behind_times_are_found() -> None:
    rates = [2e-12, 5e-11, 3e-10]
    rows = [[1e9 * a, 1e7 * b, c] for a in (1, 4) for b in (1, 9) for c in (1, 3e6)]
    times = [sum(r * x for r, x in zip(rates, row, strict=True)) for row in rows]
    assert solve(rows, times) == pytest.approx(rates)


def test_no_rate_is_below_zero() -> None:
    """The second column would help if it could be taken off."""
    found = solve([[1, 1], [2, 3], [3, 5]], [1.0, 1.9, 2.8])
    assert found[0] > 0 and found[1] == 0


TRUE = [1 / 600e12, 1 / 400e12, 1 / 2e12, 20e-6]  # seconds a flop, a flop, a byte, a layer: a GPU's
ALONE = [
    1 / 700e12,
    1 / 400e12,
    1 / 2.6e12,
    60e-6,
]  # measured by itself: a large square product, ...


def passes_of(kinds: list[tuple[float, float, float, float]]) -> tuple[list[list[float]], list[float]]:
    rows = [list(kind) for kind in kinds]
    return rows, [sum(r * x for r, x in zip(TRUE, row, strict=True)) for row in rows]


def test_rates_that_the_passes_determine_are_found() -> None:
    kinds = ((1, 1, 1, 2), (2, 1, 3, 2), (1, 4, 2, 2), (0.1, 0.1, 0.1, 900))
    rows, times = passes_of([(a * 4e12, b * 1e12, c * 6e9, d) for a, b, c, d in kinds])
    found, missed = fit(rows, times, ALONE)
    assert found == pytest.approx(TRUE, rel=0.03) and missed < 0.01


def test_rates_that_the_passes_leave_open_stay_near_what_was_measured_alone() -> None:
    """Layers of one shape at three micro-batches: all columns but the last grow together.

    Least squares alone gave one of them everything, and the others an infinite rate.
    """
    rows, times = passes_of([(n * 4e12, n * 1e12, n * 6e9, 2.0) for n in (1, 2, 4)])
    free = solve(rows, times)
    assert 0.0 in free[:3]  # as it was: one of them costs nothing
    found, missed = fit(rows, times, ALONE)
    assert missed < 0.02
    for each, true, alone, (least, most) in zip(found, TRUE, ALONE, BOUNDS, strict=True):
        assert least * alone * 0.999 <= each <= most * alone * 1.001
        assert each == pytest.approx(true, rel=0.4, abs=50e-6)
    assert fit(rows, times, TRUE)[0] == pytest.approx(TRUE, rel=1e-6)  # nothing in the passes moves it away
    # and another mix of work, a narrower layer, is predicted
    other, (time_,) = passes_of([(2e12, 0.5e12, 5e9, 2.0)])
    assert sum(r * x for r, x in zip(found, other[0], strict=True)) == pytest.approx(time_, rel=0.1)


def test_a_rate_is_never_better_than_the_machine() -> None:
    """Passes that were timed wrongly fast: no product gets faster than what the machine does at best."""
    rows, times = passes_of([(n * 4e12, n * 1e12, n * 6e9, 2.0) for n in (1, 2, 4)])
    found, missed = fit(rows, [t / 5 for t in times], ALONE)
    assert 1 / found[0] <= 1.12 * 700e12 and missed > MISSED


def test_a_fit_that_misses_its_own_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, times = passes_of([(n * 4e12, n * 1e12, n * 6e9, 2.0) for n in (1, 2, 4)])
    assert fit(rows, times, ALONE)[1] < MISSED < fit(rows, [*times[:2], 3 * times[2]], ALONE)[1]  # one was disturbed
    run = RunConfig(model=MODEL, train=TRAIN)
    monkeypatch.setattr(planner, "calibrated", lambda run, ranks, anew: replace(H100, missed=0.4))
    with pytest.raises(UserError, match=r"miss a pass that they were made from by 40%, more than 25%.* --measure"):
        planner.choose_machine(run, PlanConfig(), 1)
    monkeypatch.setattr(planner, "calibrated", lambda run, ranks, anew: replace(H100, missed=0.2))
    assert planner.choose_machine(run, PlanConfig(), 1).missed == 0.2


@pytest.mark.parametrize(("load", "told"), [(0.9, True), (0.4, False)])
def test_whoever_measures_beside_other_programs_is_told(
    load: float, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda run, ranks: H100)
    monkeypatch.setattr(calibration.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(calibration.os, "cpu_count", lambda: 2)
    run = replace(resolved("dp=1"), out=str(tmp_path))
    found = calibrated(run, 2)
    assert found == (replace(H100, source=f"{H100.source}, at a load of 0.9") if told else H100)
    assert ("a load of 0.9 on 2 cores" in capsys.readouterr().err) == told
    assert calibrated(run, 2) == found and capsys.readouterr().err == ""  # from its file


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MoEConfig(expert_size=88)], ids=["dense", "experts"])
def test_this_machine_has_possible_rates(moe: MoEConfig | None) -> None:
    """No time is asserted, only that no rate is absurd."""
    machine = calibrate(resolved("dp=1", replace(MODEL, hidden_size=128, moe=moe), batch_size=2), 1)
    for rate in (machine.product_flops, machine.attention_flops, machine.activation_bandwidth):
        assert 1e6 < rate < 1e14
    assert 0 <= machine.launch < 1 and machine.backward > 0


@pytest.mark.parametrize(
    ("operation", "wire"), [("all_reduce", 150), ("reduce_scatter", 75), ("all_gather", 300), ("send", 100)]
)
def test_what_a_ring_of_four_carries(operation: str, wire: float) -> None:
    machine = replace(H100, inside={"": Link(1.0, 10.0)}, across={"": Link(3.0, 1.0)})
    assert machine.seconds(operation, 100, 4, across=False, messages=5) == 5 * 2 * 1.0 + wire / 10
    assert machine.seconds(operation, 100, 4, across=True) == 2 * 3.0 + wire
    assert machine.seconds(operation, 100, 1, across=False) == 0


def test_what_hides() -> None:
    assert exposed(10, cover=4, overlap=1) == 6
    assert exposed(10, cover=40, overlap=0.75) == 2.5
    assert exposed(10, cover=40, overlap=0) == 10


def test_nvlink_meets_the_measured_bandwidths() -> None:
    for size, bus in ((2**20, 16e9), (25 * 2**20, 175e9), (2**28, 284e9), (2**30, 325e9)):
        assert size / H100.seconds("all_reduce", size, 2, across=False) == pytest.approx(bus, rel=0.16)


def test_which_axes_cross_hosts() -> None:
    mesh = MeshShape(pp=2, dp=4, cp=1, tp=4)
    assert [axis for axis in ("tp", "cp", "dp", "pp", "world") if crosses_hosts(mesh, axis, H100)] == [
        "dp", "pp", "world",
    ]  # fmt: skip
    assert not crosses_hosts(mesh, "dp", H100, group=2)


def test_a_share_of_one_is_the_whole_layer() -> None:
    from picotron_mini.model.costs import layer_activation_bytes

    run = resolved("dp=1")
    for width in (2, 4, 8):
        whole = layer_activation_bytes(run.model, width)
        assert layer_bytes(share_of(run.model, 1), width, False, 7, 7) == 7 * whole
        assert layer_bytes(share_of(run.model, 2), width, False, 7, 7) < 7 * whole


def test_most_live() -> None:
    assert [most_live(find_schedule("1f1b")(s, 4, 8)) for s in range(4)] == [4, 3, 2, 1]
    assert most_live(find_schedule("afab")(2, 4, 8)) == 8


def test_the_clock_is_the_quick_estimate_where_stages_are_equal() -> None:
    model = replace(MODEL, num_layers=8, vocab_size=2, tie_embeddings=False)
    machine = replace(H100, inside={"": Link(0.0, 1e18)})
    for schedule in ("1f1b", "afab", "interleaved", "zb-h1"):
        run = resolved("pp=2", model, micro_batch_size=1, schedule=schedule)
        assert predict(run, machine, clock=False).seconds == pytest.approx(predict(run, machine).seconds, rel=0.1)


def test_a_layout_that_saves_memory_is_predicted_to() -> None:
    plain = predict(resolved("dp=4", optimizer="adamw", micro_batch_size=1), H100)
    for stage in (1, 2, 3):
        found = predict(resolved("dp=4", micro_batch_size=1, zero=stage), H100)
        assert found.memory["optimizer"] < 0.3 * plain.memory["optimizer"]
        assert (found.memory["weights"] < 0.3 * plain.memory["weights"]) == (stage == 3)
    again = predict(resolved("dp=4", micro_batch_size=1, recompute="full"), H100)
    assert again.memory["activations"] < plain.memory["activations"] and again.seconds > plain.seconds


# --- the list ---------------------------------------------------------------------------------------------


def test_every_mesh_once() -> None:
    assert len(meshes(8)) == len(set(meshes(8))) == 20  # 2^3 into four factors
    assert all(mesh.world_size == 12 for mesh in meshes(12))


def test_the_list_is_ranked_legal_and_at_the_same_work() -> None:
    result = plan(RunConfig(model=MODEL, train=TRAIN), 4, H100)
    seconds = [found.seconds for found in result.ranked]
    assert seconds == sorted(seconds) and len(seconds) > 20
    for found in result.ranked:
        assert found.run == resolve(found.run, gpus=4)
        assert found.run.mesh.world_size == 4 and found.run.train.batch_size == 8
    assert {"dp=4", "tp=2,pp=2", "dp=2,cp=2", "dp=2,tp=2"} <= {found.run.layout for found in result.ranked}
    assert all(found.run.train.recompute == "none" for found in result.ranked)  # nothing forces it


@pytest.mark.slow
def test_memory_is_saved_only_where_it_must_be() -> None:
    bench = preset("bench")
    run = replace(bench, train=replace(bench.train, batch_size=64, micro_batch_size=0, micro_batches=0))
    roomy, tight = plan(run, 8, H100), plan(run, 8, replace(H100, memory=9 * 2**30))
    assert {found.run.train.zero for found in roomy.ranked} <= {0, 1}
    assert all(found.memory_bytes <= 9 * 2**30 for found in tight.ranked)
    assert any(found.run.train.zero > 1 or found.run.train.recompute != "none" for found in tight.ranked)
    assert tight.ranked[0].seconds > roomy.ranked[0].seconds
    nothing = plan(run, 8, replace(H100, memory=2**20))
    assert not nothing.ranked and nothing.smallest is not None and not nothing.smallest.fits


def test_slow_links_change_the_order() -> None:
    run = RunConfig(model=replace(MODEL, num_heads=8, num_kv_heads=8), train=TRAIN)
    fast = replace(H100, inside={"": Link(0.0, 1e15)}, overlap=0.0)
    slow = replace(H100, inside={"": Link(0.0, 1e6)}, overlap=0.0)

    def of(machine: Machine, layout: str) -> int:
        return next(i for i, found in enumerate(plan(run, 2, machine).ranked) if found.run.layout == layout)

    assert of(fast, "tp=2") < of(fast, "pp=2")  # no bubble
    assert of(slow, "tp=2") > of(slow, "pp=2")  # four messages a layer against one a stage


def test_sums_inside_hosts_first_spare_the_links_between_them() -> None:
    """Over the slow links each rank then hands a part of the gradient; inside, links that take no time."""
    hosts = replace(H100, ranks_per_host=2, inside={"": Link(0.0, 1e15)}, across={"": Link(0.0, 1e6)}, overlap=0.0)

    def waited(**train: Any) -> float:
        return predict(resolved("dp=8", micro_batch_size=1, **train), hosts).parts["gradients and weights"]

    # a ring's wire: 2 (n-1)/n of what is handed over, and that is half of it over four hosts instead of eight ranks
    expected = (2 * 3 / 4 / 2) / (2 * 7 / 8)
    assert waited(reduce_group=2) / waited() == pytest.approx(expected, rel=0.01)
    asked = RunConfig(model=MODEL, train=replace(TRAIN, reduce_group=2))
    for found in plan(asked, 8, hosts).ranked:
        whole = found.run.train.zero == 0 and found.run.mesh.dp * found.run.mesh.cp % 2 == 0
        assert found.run.train.reduce_group == (2 if whole else 0)


def test_no_layer_talks_across_hosts() -> None:
    result = plan(
        RunConfig(model=replace(MODEL, num_heads=8, num_kv_heads=8), train=TRAIN), 4, replace(H100, ranks_per_host=2)
    )
    assert max(found.run.mesh.tp * found.run.mesh.cp for found in result.ranked) == 2


@pytest.mark.slow
def test_a_thousand_ranks_are_planned() -> None:
    model = ModelConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
        tie_embeddings=False,
    )  # fmt: skip
    train = TrainConfig(seq_len=8192, batch_size=1024, dtype="bfloat16", compile=True, device="cuda")
    result = plan(RunConfig(model=model, train=train), 1024, MACHINES["h100-cluster"])
    assert result.considered > 500 and result.ranked


def test_memory_is_read_inside_hosts_only() -> None:
    """What is planned with symmetric memory must run: its ranks are on one host."""
    run = RunConfig(model=MODEL, train=replace(TRAIN, symmetric_memory=True, batch_size=8))
    one_host = plan(run, 4, replace(H100, ranks_per_host=4)).ranked
    assert {found.run.train.symmetric_memory for found in one_host if found.run.train.zero} == {True}
    two_hosts = plan(run, 4, replace(H100, ranks_per_host=2)).ranked
    assert all(found.run.mesh.dp * found.run.mesh.cp * found.run.mesh.tp <= 2
               for found in two_hosts if found.run.train.symmetric_memory)  # fmt: skip
    assert any(found.run.train.zero and not found.run.train.symmetric_memory for found in two_hosts)


def test_says_why_nothing_is_legal() -> None:
    with pytest.raises(ConfigError, match=r"--ranks 6 or 8 would. With dp=7: batch_size=8 does not split over dp=7"):
        plan(RunConfig(model=MODEL, train=TRAIN), 7, H100)
    for ranks in (6, 8):
        assert plan(RunConfig(model=MODEL, train=TRAIN), ranks, H100).considered
    with pytest.raises(ConfigError, match="another --batch-size might"):
        plan(RunConfig(model=MODEL, train=TRAIN), 2001, H100)


# --- what is shown ----------------------------------------------------------------------------------------


def shown(renderable: Any, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_plain_data_and_table_agree() -> None:
    result = plan(RunConfig(model=MODEL, train=TRAIN), 2, H100)
    best = to_dict(result.ranked[0])
    assert best["memory_bytes"] == sum(best["memory"].values())
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert {axis: n for axis, n in best["bytes"].items() if n} == by_axis(result.ranked[0])
    text = shown(table(result, rows=3), 120)
    assert "the 3 fastest, by predicted step time" in text
    lines = [line for line in text.splitlines() if re.match(r" ?[dtcp]+=\d", line)]
    assert len(lines) == 3 and lines[0].split()[0] == best["layout"]
    assert f"{best['step_seconds']:.3g}" in lines[0].split()


def test_all_layouts_have_the_same_keys() -> None:
    def keys(value: Any) -> Any:
        return {name: keys(each) for name, each in value.items()} if isinstance(value, dict) else None

    every = [to_dict(predict(resolved(layout, **train), H100)) for layout, train in LAYOUTS.items()]
    assert all(keys(each) == keys(every[0]) for each in every)
    assert all(sum(each["seconds"].values()) == pytest.approx(each["step_seconds"]) for each in every)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp=1": {}, "dp=4": {"zero": 3, "micro_batch_size": 1}, "tp=2,pp=2": {}, "dp=2,cp=2": {"recompute": "full"},
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_width(width: int) -> None:
    """The widest there is: every setting, long layouts, experts; nothing is cut short, and no line broken."""
    model = replace(MODEL, num_heads=8, num_kv_heads=8, num_layers=8, moe=EXPERTS)
    wide = [
        resolved("dp=2,cp=2,tp=2,pp=2,ep=4", model, schedule="interleaved", zero=1, recompute="full",
                 sequence_parallel=True, micro_batch_size=1),
        resolved("dp=8,ep=2", model, micro_batch_size=1),
    ]  # fmt: skip
    ranked = tuple(predict(run, H100, skew=1.5) for run in wide)
    plain = tuple(predict(resolved(layout), H100) for layout in ("dp=2", "tp=2"))
    for found in (ranked, plain):
        text = shown(table(Plan(H100, 16, 9, 1, found, None), width=width), width)
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        for each in found:
            seconds = f"{each.seconds:.3g}"
            words = next(line.split() for line in text.splitlines() if seconds in line.split())
            layout = str(replace(each.run.mesh, ep=1))
            assert layout.startswith(words[0]) if width == 80 else words[0] == layout
            if each.run.mesh.pp > 1:
                assert {"interleaved", "full", "yes", "4"} <= set(words)
    assert "NOTHING FITS" in shown(table(Plan(H100, 16, 9, 1, (), ranked[0]), width=width), width)


@pytest.mark.parametrize("width", [60, 120])
def test_no_two_rows_of_the_table_look_alike(width: int) -> None:
    """What tells two layouts apart is shown, however narrow the terminal; ZeRO 0 and 1 alone too."""
    for ranks in (2, 8):
        result = plan(RunConfig(model=MODEL, train=TRAIN), ranks, H100)
        columns = [column for column in table(result, 99, width).columns if str(column.header) in SETTINGS]
        rows = list(zip(*(column._cells for column in columns), strict=True))
        assert len(set(rows)) == len(rows) == min(99, len(result.ranked))
    two = tuple(found for found in result.ranked if found.run.layout == "dp=8" and found.run.train.recompute == "none")[
        :2
    ]
    assert {found.run.train.zero for found in two} == {0, 1}
    assert "zero" in [column.header for column in table(replace(result, ranked=two), 99, width).columns]


SETTINGS = ("layout", "micro-\nbatch", "zero", "seq.\npar.", "schedule", "recompute")


# --- experts ----------------------------------------------------------------------------------------------


def mixed(layout: str, moe: MoEConfig = EXPERTS, **train: Any) -> RunConfig:
    return resolved(layout, replace(MODEL, moe=moe), **train)


@pytest.mark.parametrize("w", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("moe", [{}, {"z_weight": 0.1, "shared_size": 16}, {"num_experts": 6, "top_k": 3}], ids=str)
def test_a_mixture_on_one_rank_is_the_whole_layer(moe: dict[str, Any], w: Any) -> None:
    """`costs.layer_activation_bytes` is checked against what autograd keeps; on one rank it must come out here."""
    from picotron_mini.model.costs import layer_activation_bytes

    run = mixed("dp=1", replace(EXPERTS, **moe), dtype=w)
    tokens = run.train.micro_batch_size * run.train.seq_len
    each = activations(run, experts=True)
    width = {"float64": 8, "float32": 4, "bfloat16": 2}[w]
    assert each.layer + each.routing == tokens * layer_activation_bytes(run.model, width)


@pytest.mark.parametrize(
    ("moe", "train"),
    [
        ({"dense_layers": 1}, {"micro_batch_size": 1}), ({}, {"dtype": "bfloat16"}),
        ({"shared_size": 32, "top_k": 4, "z_weight": 0.1}, {"recompute": "full"}),
    ],
    ids=str,
)  # fmt: skip
def test_memory_of_a_real_step_with_experts(moe: dict[str, Any], train: dict[str, Any]) -> None:
    run = resolved("dp=1", replace(MODEL, num_layers=2, moe=replace(EXPERTS, **moe)), batch_size=4, **train)
    assert predict(run, H100).memory_bytes == pytest.approx(peak_of_real_steps(run), rel=0.1)


def test_operators_of_layers_are_counted() -> None:
    """What `expert_costs` says of a dense layer, one with experts, and one whose experts are elsewhere."""
    views = ("view", "t.default", "transpose", "expand", "squeeze", "detach", "alias", "slice", "split", "unbind",
             "select", "permute", "as_strided", "unflatten", "empty")  # fmt: skip

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += not any(name in str(func) for name in views)
            return func(*args, **(kwargs or {}))

    def count(model: ModelConfig, away: SlotDispatch | None = None) -> int:
        whole = replace(model, num_layers=1, head_dim=16)
        part = GPT(whole, embed=False, head=False)
        init_weights(part, 0)
        if away is not None:
            (moe,) = mixtures(part)
            moe.dispatch = away  # type: ignore[assignment]
        x = torch.randn(2, 16, whole.hidden_size, requires_grad=True)
        with Count() as counted:
            part(x)
        return counted.number

    head = GPT(replace(MODEL, head_dim=16), layers=(), embed=False)
    init_weights(head, 0)
    x = torch.randn(2, 16, MODEL.hidden_size, requires_grad=True)
    with Count() as counted:
        head.loss(head(x), torch.zeros(2, 16, dtype=torch.int64))
    assert counted.number - 1 == expert_costs.HEAD  # one of them makes the targets
    assert count(MODEL) == expert_costs.DENSE
    assert count(replace(MODEL, moe=EXPERTS)) == expert_costs.operators(mixed("dp=2"))
    alone, plain = Axis("ep", 1, 0, (0,)), expert_costs.operators(mixed("dp=2"))
    for payload, more in expert_costs.PACKED.items():  # all experts are here, so only the exchange is more
        exchanged = count(replace(MODEL, moe=EXPERTS), ExpertDispatch(alone, EXPERTS.num_experts, payload=payload))
        assert exchanged == plain + expert_costs.EXCHANGE + more
    gathered = count(replace(MODEL, moe=EXPERTS), GatherDispatch(alone, EXPERTS.num_experts))
    collective = 1  # which an axis of one rank leaves out; the other two it makes copies
    assert gathered + collective == plain + expert_costs.GATHERED
    each = EXPERTS.num_experts * expert_costs.EACH
    model = replace(MODEL, moe=EXPERTS)
    packed = ExpertDispatch(alone, EXPERTS.num_experts, 3, payload="fp8")
    first, again = expert_costs.EXCHANGE + expert_costs.PACKED["fp8"], expert_costs.AGAIN["alltoall"]
    assert count(model, packed) == plain + first + 2 * (again + each + expert_costs.PACKED["fp8"])
    again = expert_costs.AGAIN["allgather"]
    assert count(model, GatherDispatch(alone, EXPERTS.num_experts, 4)) == gathered + 3 * (again + each)
    half = again + each // 2  # of each part after the first, with half of the experts elsewhere
    for parts in (1, 3):
        run = mixed("dp=2,ep=2", dispatch="allgather", dispatch_parts=parts)
        assert expert_costs.operators(run) == plain + expert_costs.GATHERED - each // 2 + (parts - 1) * half
    run = mixed("dp=2,ep=2", dispatch="allgather")
    assert expert_costs.operators(run) == plain + expert_costs.GATHERED - 4 * expert_costs.EACH  # 4 of 8 are elsewhere


def test_what_a_mixture_computes() -> None:
    """By hand: a token passes K of E experts, and the router, wherever the experts are."""
    run = mixed("dp=2,ep=2")
    tokens, width = run.train.micro_batch_size * run.train.seq_len, run.model.hidden_size
    attention = 2 * (4 + 2) * 16 * width
    active = attention + 8 * width + 2 * 3 * width * EXPERTS.expert_size
    assert forward_work(run, range(1), False).products == 2 * active * tokens
    twice = forward_work(run, range(1), False, skew=2.0).products
    assert twice - 2 * active * tokens == 2 * 2 * 3 * width * EXPERTS.expert_size * tokens  # its experts, once more


def test_experts_on_more_ranks_take_less_memory_and_messages() -> None:
    plain, spread = (predict(mixed(layout, micro_batch_size=1), H100) for layout in ("dp=4", "dp=4,ep=4"))
    experts = 4 * 8 * 3 * MODEL.hidden_size * EXPERTS.expert_size * 4  # bytes of their weights
    assert plain.memory["weights"] - spread.memory["weights"] == experts * 3 // 4
    assert "ep" in spread.parts and "ep" not in plain.parts
    busy = predict(mixed("dp=4,ep=4", micro_batch_size=1), H100, skew=2.0)
    assert busy.seconds > spread.seconds and busy.memory["activations"] > spread.memory["activations"]
    assert busy.traffic["ep", "all_to_all"] > spread.traffic["ep", "all_to_all"]
    assert busy.memory["weights"] == spread.memory["weights"]


def test_rows_that_travel_behind_products_are_not_waited_for() -> None:
    for product_flops, left in ((1e6, 1 / 4), (1e18, 1.0)):  # of four parts the first hides behind nothing
        machine = replace(H100, inside={"": Link(0.0, 1e8)}, overlap=1.0, product_flops=product_flops)
        whole, parts = (predict(mixed("dp=2,ep=2", dispatch_parts=n), machine).parts["ep"] for n in (1, 4))
        assert parts / whole == pytest.approx(left, rel=0.01)


def test_skew_has_bounds() -> None:
    assert flow(mixed("dp=2"), 3.0).routed == flow(mixed("dp=2")).routed  # a rank's own tokens are all it has
    capped = replace(EXPERTS, capacity=1.25)
    assert flow(mixed("dp=4,ep=4", capped), 3.0).routed == 1.25 * flow(mixed("dp=4,ep=4", capped)).routed
    run = mixed("dp=4,ep=4")
    assert flow(run, 4.0).received <= 4 * flow(run).tokens
    assert skew_of_loads([[0.25] * 4, [0.7, 0.1, 0.1, 0.1]], 2) == pytest.approx((1.0 + 1.6) / 2)
    assert skew_of_loads([[0.25] * 4, [0.7, 0.1, 0.1, 0.1]], 1) == pytest.approx(1.0)


def test_every_spread_of_experts_is_considered() -> None:
    assert {mesh.ep for mesh in spreads(MeshShape(dp=4, cp=3), replace(MODEL, moe=EXPERTS))} == {1, 2, 4}
    assert spreads(MeshShape(dp=4), MODEL) == [MeshShape(dp=4)]
    result = plan(RunConfig(model=replace(MODEL, moe=EXPERTS), train=TRAIN), 4, H100, lambda ep: 1.0 + (ep - 1) / 10)
    assert {found.run.mesh.ep for found in result.ranked} == {1, 2, 4}
    for found in result.ranked:
        assert found.run == resolve(found.run, gpus=4)
        assert found.skew == pytest.approx(1.0 + (found.run.mesh.ep - 1) / 10)
    columns = [str(column.header) for column in table(result, rows=99).columns]
    assert columns[:3] == ["layout", "ep", "skew"]


def test_what_experts_on_several_ranks_have_is_left_out_on_one() -> None:
    train = replace(TRAIN, dispatch_parts=2, dispatch_payload="fp8", place_every=5)
    ranked = plan(RunConfig(model=replace(MODEL, moe=EXPERTS), train=train), 4, H100).ranked
    for ep, has in ((1, (1, "same", 0)), (2, (2, "fp8", 5)), (4, (2, "fp8", 5))):
        trains = [found.run.train for found in ranked if found.run.mesh.ep == ep]
        assert {(each.dispatch_parts, each.dispatch_payload, each.place_every) for each in trains} == {has}


def test_what_is_illegal_is_refused_before_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "calibrated", None)
    with pytest.raises(ConfigError, match="tp=3 does not divide num_kv_heads"):
        planner.answer(RunConfig(layout="tp=3", model=MODEL, train=TRAIN), PlanConfig())
    with pytest.raises(ConfigError, match="zero_group=2 is not searched"):
        planner.answer(RunConfig(layout="auto", model=MODEL, train=replace(TRAIN, zero_group=2)), PlanConfig(ranks=2))


def test_a_machine_is_measured_without_what_several_ranks_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank would refuse all of it."""
    asked: list[TrainConfig] = []

    def measured(run: RunConfig, ranks: int, anew: bool = False) -> Machine:
        asked.append(run.train)
        return H100

    monkeypatch.setattr(planner, "calibrated", measured)
    monkeypatch.setattr(calibration, "calibrated", measured)
    train = replace(TRAIN, dispatch_parts=2, dispatch_payload="fp8", place_every=5)
    run = RunConfig(layout="dp=2,ep=2", model=replace(MODEL, moe=EXPERTS), train=train)
    gathered = replace(train, dispatch="allgather", dispatch_parts=1, dispatch_payload="same")
    planner.choose_machine(replace(run, train=gathered), PlanConfig(), 2)
    planner.choose_machine(run, PlanConfig(), 2)
    with_bucket(replace(run, train=replace(train, bucket_mb=0)), gpus=0)
    grouped = replace(train, place_every=0, zero=1, zero_group=2)
    planner.choose_machine(replace(run, layout="dp=4,ep=2", train=grouped), PlanConfig(), 2)
    settings = {(each.dispatch, each.dispatch_payload, each.dispatch_parts) for each in asked}
    assert len(asked) == 4 and settings == {("alltoall", "same", 1)}


def test_masters_cost_their_update() -> None:
    """Split masters are put together and taken apart, and a state of two bytes a number is moved in half the time."""
    whole, split, none = (
        predict(resolved("dp=1", dtype="bfloat16", masters=masters), H100).parts["update"]
        for masters in ("whole", "split", "none")
    )
    plain = predict(resolved("dp=1"), H100).parts["update"]
    assert none < plain < whole < split
    assert whole / plain == pytest.approx(46 / 40) and none / plain == pytest.approx(32 / 40)


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    machine = MACHINES["h100-cluster"]
    assert from_json(to_json(machine)) == machine
    path = tmp_path / "machine.json"
    path.write_text(to_json(machine))
    assert find_machine(str(path)) == machine
    path.write_text("{}")
    with pytest.raises(ConfigError, match="neither a preset"):
        find_machine(str(path))
    damaged = {
        "memory=-1.0 is not a number of 0 or above": replace(machine, memory=-1.0),
        "host=True is not a number": replace(machine, host=True),
        "ranks_per_host='8' is not a number": replace(machine, ranks_per_host="8"),  # type: ignore[arg-type]
        "product_flops=0 must be above 0": replace(machine, product_flops=0),
        'inside has no link ""': replace(machine, inside={}),
    }
    for says, wrong in damaged.items():
        path.write_text(to_json(wrong))
        with pytest.raises(ConfigError, match=says):
            find_machine(str(path))
    with pytest.raises(ConfigError, match="h100, h100-cluster"):
        find_machine("h1000")


# --- buckets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latency", "bandwidth", "size"), [(3e-4, 1e9, 25e6), (7e-5, 332e9, 7.25e9)])
def test_no_bucket_costs_less_than_the_best(latency: float, bandwidth: float, size: float) -> None:
    def cost(bucket: float) -> float:
        return latency * size / bucket + bucket / bandwidth

    best = best_bucket(size, Link(latency, bandwidth), 2)  # of 2 ranks a ring carries just the payload
    assert 1e6 < best < size
    assert cost(best) < min(cost(1.1 * best), cost(best / 1.1))


def test_small_gradients_are_one_bucket() -> None:
    assert best_bucket(1e4, Link(1e-3, 1e9), 4) == 1e4


@pytest.mark.slow
def test_the_bucket_is_chosen_from_this_machine(tmp_path: Path) -> None:
    run = RunConfig(
        layout="dp=2", out=str(tmp_path), model=MODEL, train=replace(TRAIN, micro_batch_size=4, bucket_mb=0)
    )
    chosen = with_bucket(run, gpus=0)
    size = 4 * 4 * 64 * 176  # bytes of more than one weight, less than all
    assert size / 2**20 / 10 < chosen.train.bucket_mb < 25
    assert replace(chosen, train=replace(chosen.train, bucket_mb=0)) == run  # and nothing else
    assert list((tmp_path / ".cache").iterdir())  # measured once
    assert with_bucket(run, gpus=0) == chosen
    assert with_bucket(chosen, gpus=0) is chosen


def test_ranks_of_torchrun_do_not_each_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match="give it a number"):
        with_bucket(RunConfig(layout="dp=2", model=MODEL, train=replace(TRAIN, bucket_mb=0)), gpus=0)


@pytest.mark.parametrize(
    ("moe", "train", "said"),
    [
        (EXPERTS, {"expert_replicas": 7}, "expert_replicas=7 must be 0 to 6"),
        (EXPERTS, {"expert_replicas": -3}, "expert_replicas=-3 must be 0 to 6"),
        (EXPERTS, {"dispatch_payload": "bf16", "dtype": "bfloat16"}, "dispatch_payload=bf16 narrows nothing"),
        (EXPERTS, {"zero": 1, "zero_group": 2}, "zero_group=2 is not searched"),
        (None, {"expert_replicas": 2}, "expert_replicas=2 is for experts on several ranks, and ep=1; use .*=0$"),
    ],
)
def test_a_search_does_not_pass_over_settings_that_no_layout_may_have(
    moe: MoEConfig | None, train: dict[str, Any], said: str
) -> None:
    run = RunConfig(layout="auto", model=replace(MODEL, moe=moe), train=replace(TRAIN, **train))
    with pytest.raises(ConfigError, match=said):
        planner.answer(run, PlanConfig(ranks=4, machine="h100"))


def test_the_first_gather_of_each_chunk_is_waited_for() -> None:
    """ZeRO 3 gathers nothing ahead for another chunk: of ten messages in two chunks two hide behind nothing."""
    hides_all = replace(MACHINES["h100"], overlap=1.0)
    assert _tail(10.0, 10, 100.0, hides_all) == 1.0
    assert _tail(10.0, 10, 100.0, hides_all, 2) == 2.0
    assert _tail(10.0, 1, 100.0, hides_all, 2) == 10.0
