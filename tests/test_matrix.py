"""Which configurations are verified: none is forgotten, a cover covers; and the cover and a sample, verified."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from picotron_mini import verify_all as runner
from picotron_mini.cli import main
from picotron_mini.config import AXES, MeshShape, MoEConfig, RunConfig
from picotron_mini.flags import Verify, parse
from picotron_mini.launch import RankError, launch
from picotron_mini.legality import resolve
from picotron_mini.matrix import (
    CHOICES,
    combinations,
    default_matrix,
    expert_combinations,
    flags,
    legal,
    meshes,
    optimizers_of,
    pairwise,
    sample,
    technique,
)
from picotron_mini.parity import Difference, Report
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, _jobs_on_rank, verify_together

ALL = combinations()


# --- which there are --------------------------------------------------------------------------------------


def test_all_meshes_and_all_choices_are_among_the_combinations() -> None:
    assert {run.mesh for run in ALL} == set(meshes(8))
    assert len(meshes(8)) == 63  # the ways to write 1 to 8 as a product of four
    assert len({flags(run) for run in ALL}) == len(ALL) > 600
    chosen = {name: {getattr(run.train, name) for run in ALL} for name in CHOICES}
    assert chosen == {
        "zero": {0, 1, 2, 3},
        "context": {"ring", "ulysses"},
        "sequence_parallel": {False, True},
        "tensor_overlap": {1, 2},
        "schedule": {"1f1b", "afab", "interleaved", "zb-h1", "zb-v"},
        "dispatch": {"alltoall"},  # the other is for experts
    }


def test_on_four_ranks_they_are_those_that_a_plain_count_gives() -> None:
    """dp=2,pp=2: 5 schedules with zero 0 to 3; and so on."""
    count = {mesh: sum(run.mesh == mesh for run in ALL) for mesh in meshes(4)}
    assert count[MeshShape(dp=2, pp=2)] == 5 * 4
    assert count[MeshShape(cp=2, pp=2)] == 2 * 5
    assert count[MeshShape(dp=2, cp=2)] == 4 * 2
    assert count[MeshShape(dp=2, tp=2)] == 4 * 2 * 2
    assert count[MeshShape(tp=2, pp=2)] == 2 * (5 + 3)  # overlap does not split a backward: no zb-h1, no zb-v
    assert [count[MeshShape(**{axis: 3})] for axis in ("dp", "cp", "tp", "pp")] == [4, 2, 4, 5]
    assert count[MeshShape()] == 1


def test_legality_decides() -> None:
    for run in ALL:
        assert resolve(run) == run
    assert legal(MeshShape(tp=2, pp=2), {"tensor_overlap": 2, "schedule": "zb-v"}) is None
    assert legal(MeshShape(dp=2), {"zero": 1, "zero_group": 3}) is None
    assert legal(MeshShape(tp=7), {}) is not None  # the model is one that 7 ranks can share


def test_a_flag_without_its_axis_is_no_other_combination() -> None:
    for run in ALL:
        for name, axis in CHOICES.items():
            if getattr(run.mesh, axis) == 1:
                assert getattr(run.train, name) == getattr(TRAIN, name)


def test_the_flags_ask_for_the_very_run() -> None:
    """So a line of a log is a command."""
    mixtures = random.Random(0).sample(expert_combinations(), 20) + sample(20, 1, experts=True)
    for run in random.Random(0).sample(ALL, 40) + sample(10, 1) + mixtures:
        default = RunConfig(layout="dp=2,tp=2", model=MODEL, train=TRAIN)
        asked = parse(Verify, "verify", shlex.split(flags(run)), default).run
        if asked.mesh.ep > 1 and not asked.model.moe:
            asked = replace(asked, model=replace(asked.model, moe=EXPERTS))  # as verify does
        asked = resolve(replace(asked, train=replace(asked.train, batch_size=0, steps=run.train.steps)))
        assert asked == run, flags(run)


def test_technique_shows_no_sizes() -> None:
    (run,) = [run for run in ALL if technique(run) == "dp=2,pp=2 --zero 2 --schedule zb-v"]
    assert flags(run) == "dp=2,pp=2 --num-layers 5 --schedule zb-v --zero 2"


# --- cover and sample -------------------------------------------------------------------------------------


def pairs(runs: Sequence[RunConfig]) -> set[Any]:
    """Every two settings that meet, written as plainly as can be."""
    found = set()
    for run in runs:
        values = {axis: min(getattr(run.mesh, axis), 3) for axis in AXES}  # 3: or more
        values |= {name: getattr(run.train, name) for name in CHOICES}
        for one, other in itertools.combinations(sorted(values), 2):
            found.add((one, values[one], other, values[other]))
    return found


def test_the_cover_has_every_pair_and_is_small() -> None:
    cover = pairwise(ALL)
    assert pairs(cover) == pairs(ALL)
    assert pairs(cover[:-1]) != pairs(ALL)
    assert ("schedule", "zb-v", "zero", 2) in pairs(cover)
    assert len(cover) < len(ALL) / 10 and all(run in ALL for run in cover)
    assert pairwise(ALL) == cover  # the same each time


@pytest.mark.parametrize("seed", range(5))
def test_any_set_is_covered(seed: int) -> None:
    some = random.Random(seed).sample(ALL, 40)
    assert pairs(pairwise(some)) == pairs(some)


def test_a_sample_depends_on_its_seed_alone() -> None:
    first = sample(12, 7)
    assert first == sample(12, 7) != sample(12, 8)
    assert len({flags(run) for run in first}) == 12
    for run in first:
        assert resolve(run) == run and 1 < run.mesh.world_size <= 8
    many = sample(60, 0)
    for name in ("vocab_size", "num_heads", "head_dim", "tie_embeddings", "qk_norm"):
        assert len({getattr(run.model, name) for run in many}) > 1
    assert {run.mesh.ep for run in many} == {1}
    for name in (
        *({*CHOICES} - {"dispatch"}),
        "micro_batches",
        "micro_batch_size",
        "seq_len",
        "freeze",
        "recompute",
        "document_mask",
    ):
        assert len({getattr(run.train, name) for run in many}) > 1, name


def test_a_sample_with_experts_draws_their_settings_too() -> None:
    many = sample(120, 0, experts=True)
    assert many == sample(120, 0, experts=True) and {run.mesh.ep for run in many} > {1, 2, 3, 4}
    for name in vars(MoEConfig()):
        assert len({getattr(run.model.moe, name) for run in many}) > 1 or name in ("aux_weight", "bias_rate"), name
    for name in ("dispatch", "dispatch_parts", "place_every", "expert_replicas"):
        assert len({getattr(run.train, name) for run in many}) > 1, name
    for axis in ("tp", "pp", "cp"):  # biases meet ep with every other axis
        assert any(run.mesh.ep > 1 and getattr(run.mesh, axis) > 1 and run.model.moe.balance == "bias" for run in many)  # type: ignore[union-attr]


def test_the_default_matrix_has_every_technique_alone_and_some_together() -> None:
    runs = default_matrix()
    alone = [technique(run) for run in runs if run.mesh.world_size == 2]
    assert sorted(alone) == sorted([
        "dp=2", "dp=2 --zero 1", "dp=2 --zero 2", "dp=2 --zero 3", "cp=2", "cp=2 --context ulysses",
        "tp=2", "tp=2 --sequence-parallel", "tp=2 --tensor-overlap 2",
        "pp=2", *(f"pp=2 --schedule {name}" for name in ("afab", "interleaved", "zb-h1", "zb-v")),
    ])  # fmt: skip
    together = [run for run in runs if run.mesh.world_size > 2]
    assert len(together) == 12 and max(run.mesh.world_size for run in together) == 8
    assert {axis for run in together for axis in AXES if getattr(run.mesh, axis) > 1} == set(AXES)


# --- running them -----------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """No rank is started: the techniques of each launch are noted, and all is equal but what `WRONG` names."""
    launches: list[list[str]] = []

    def verify(jobs: Sequence[Sequence[RunConfig]]) -> list[Report]:
        launches.append([technique(runs[0]) for runs in jobs])
        assert len({runs[0].mesh.world_size for runs in jobs}) == 1
        assert all([run.train.optimizer for run in runs] == ["sgd", "adamw"] for runs in jobs)
        if any("zb-v" in each for each in launches[-1]):
            raise RankError(1, "rank 1 of 2 failed:\nTraceback\nValueError: planted")
        out = []
        for runs in jobs:
            wrong = technique(runs[0]) == "dp=2 --zero 2"
            error = float("inf") if wrong else 1e-14
            differences = [Difference("loss", error, "step 0", 1e-9)]
            out.append(
                Report(
                    runs[0].layout, differences, {"dp x": 8}, {"dp x": 8}, first_divergence=wrong * "planted" or None
                )
            )
        return out

    monkeypatch.setattr(runner, "verify_together", verify)
    yield launches


def test_a_rank_that_fails_spoils_only_its_own_configuration(pretended: list[list[str]]) -> None:
    runs = [run for run in ALL if run.mesh.world_size == 2]
    found = list(runner.results(runs))
    assert [result["technique"] for result in found] == [technique(run) for run in runs]
    wrong = {result["technique"]: result for result in found if not result["ok"]}
    assert set(wrong) == {"dp=2 --zero 2", "pp=2 --schedule zb-v"}
    assert wrong["pp=2 --schedule zb-v"]["error"] == "rank 1 of 2 failed: ValueError: planted"
    assert max(map(len, pretended)) == runner.AT_ONCE and ["pp=2 --schedule zb-v"] in pretended
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_all_are_run_once_and_the_log_has_a_line_for_each(
    pretended: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, state = tmp_path / "all.log", tmp_path / "deep" / "state.jsonl"
    runs = combinations(2) + expert_combinations(2)
    assert runner.verify_all(log, state, first=5, max_ranks=2) is True
    assert not log.exists()  # not all were run
    assert len(state.read_text().splitlines()) == 5
    out = capsys.readouterr().out
    assert f"{len(runs)} combinations, 0 done" in out and "min left" in out
    pretended.clear()
    assert runner.verify_all(log, state, max_ranks=2) is False
    again = [each for launched in pretended for each in launched]
    assert set(again) == {technique(run) for run in runs[5:]}  # those of a launch that failed once more, alone
    text = log.read_text().splitlines()
    assert [line for line in text if not line.startswith("#")] == [
        line for run in runs for line in text if line.split(" bytes  ")[-1].split("  WRONG")[0] == flags(run)
    ]
    assert sum(line.startswith("ok ") for line in text) == len(runs) - 2
    assert any(line.startswith("WRONG") and line.endswith("WRONG: planted") for line in text)
    assert f"# {len(runs)} combinations, 2 wrong, largest error no number" in text
    pretended.clear()
    assert runner.verify_all(log, state, max_ranks=2) is False  # only what was wrong is run again
    assert [each for launched in pretended for each in launched] == ["dp=2 --zero 2", "pp=2 --schedule zb-v"] * 2


def test_another_library_begins_anew(
    pretended: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.jsonl"
    runner.verify_all(tmp_path / "log", state, max_ranks=1)
    monkeypatch.setattr(runner, "library_digest", lambda: "other")
    pretended.clear()
    assert runner.verify_all(tmp_path / "log", state, max_ranks=1) is True
    assert pretended == [["dp=1"]]


def test_the_digest_changes_with_the_library_and_not_with_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("verify_all.py", "parallel/data.py", "course/chapter.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "verify_all.py"))
    before = runner.library_digest()
    (tmp_path / "course" / "chapter.py").write_text("two")
    assert runner.library_digest() == before
    (tmp_path / "parallel" / "data.py").write_text("two")
    assert runner.library_digest() != before


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_without_flags_runs_the_default_matrix(
    as_json: bool, pretended: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", *(["--json"] if as_json else [])])
    assert end.value.code == 1
    out, err = capfd.readouterr()
    assert err == ""
    if as_json:
        found = [json.loads(line) for line in out.splitlines()]
        assert [result["technique"] for result in found] == [technique(run) for run in default_matrix()]
        assert all(
            result["bytes_predicted"] == result["bytes_counted"] == 8 for result in found if "error" not in result
        )
    else:
        assert "are NOT equal to one device" in out and "WRONG: planted" in " ".join(out.split())
        assert "dp=2 --zero 1" in out and "1.0e-14" in out


def test_it_succeeds_only_if_all_are_equal(
    pretended: list[list[str]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from picotron_mini import matrix

    monkeypatch.setattr(matrix, "default_matrix", lambda: combinations(1))
    with pytest.raises(SystemExit) as end:
        main(["verify"])
    assert end.value.code == 0 and "all 1 are equal" in capfd.readouterr().out


# --- verified ---------------------------------------------------------------------------------------------


def expect_all_equal(runs: Sequence[RunConfig]) -> None:
    wrong = [runner.line_of(result) for result in runner.results(runs) if not result["ok"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_pair_of_techniques_equals_one_device() -> None:
    expect_all_equal(sorted(pairwise(ALL), key=lambda run: run.mesh.world_size))


@pytest.mark.slow
def test_every_pair_of_techniques_equals_one_device_with_experts_on_several_ranks() -> None:
    runs = expert_combinations()
    assert {run.mesh.ep for run in runs} == set(range(2, 9))
    assert all(run.model.moe and run.model.moe.num_experts % run.mesh.ep == 0 for run in runs)
    assert {run.train.dispatch for run in runs} == {"alltoall", "allgather"}
    expect_all_equal(sorted(pairwise(runs), key=lambda run: run.mesh.world_size))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_a_random_sample_equals_one_device(experts: bool) -> None:
    seed = int(os.environ.get("SAMPLE_SEED", random.SystemRandom().randrange(1000_000)))
    print(f"SAMPLE_SEED={seed}")  # pytest shows it if the test fails
    expect_all_equal(sorted(sample(10, seed, experts=experts), key=lambda run: run.mesh.world_size))


@pytest.mark.slow
def test_meshes_that_share_a_launch_do_not_disturb_each_other() -> None:
    runs = [run for run in ALL if run.mesh.world_size == 4 and run.train.schedule in ("1f1b", "zb-v")][::9]
    together = [report.to_dict() for report in verify_together([optimizers_of(run) for run in runs])]
    alone = [verify_together([optimizers_of(run)])[0].to_dict() for run in (runs[0], runs[-1])]
    assert [together[0], together[-1]] == alone


@pytest.mark.slow
def test_a_layout_that_is_trained_twice_gives_the_same_bits() -> None:
    """Loss, gradients, norm and weights of all steps on all ranks, in two launches."""
    wanted = (
        "dp=4", "dp=2,tp=2 --zero 1 --sequence-parallel --tensor-overlap 2", "dp=4 --zero 3", "cp=4",
        "cp=2,tp=2 --context ulysses", "dp=2,pp=2 --zero 2 --schedule zb-v", "tp=2,pp=2 --schedule interleaved",
        "dp=2,pp=2", "cp=2,pp=2 --schedule zb-h1", "dp=2,pp=2 --zero 1 --schedule afab", "dp=4,ep=4",
        "dp=2,cp=2,ep=2 --zero 3 --dispatch allgather",
    )  # fmt: skip
    runs = [run for run in ALL + expert_combinations(4) if technique(run) in wanted]
    assert len(runs) == len(wanted)
    for dtype in ("float32", "bfloat16"):  # where another order of additions would be seen
        jobs = [optimizers_of(replace(run, train=replace(run.train, dtype=dtype))) for run in runs]  # type: ignore[arg-type]
        first, second = (launch(_jobs_on_rank, jobs, None, world_size=4, output="hide") for _ in range(2))
        for rank, (mine, other) in enumerate(zip(first, second, strict=True)):
            for run, one, two in zip(runs, mine, other, strict=True):
                for (snapshots, sent, *_), (again, sent_again, *_) in zip(one, two, strict=True):
                    assert sent == sent_again
                    for a, b in zip(snapshots, again, strict=True):
                        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
                        for x, y in ((a.gradients, b.gradients), (a.weights, b.weights)):
                            assert x.keys() == y.keys()
                            for name in x:
                                assert torch.equal(x[name], y[name]), f"{technique(run)}, rank {rank}, {name}"
