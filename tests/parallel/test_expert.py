"""Experts on several ranks: who holds which, over which ranks gradients are summed, and that all equals one device."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from picotron_mini.config import ConfigError, DataConfig, MeshShape, ModelConfig, MoEConfig, RunConfig, TrainConfig
from picotron_mini.layout import to_json
from picotron_mini.legality import notices, resolve
from picotron_mini.mesh import Mesh, coordinates, data_axis_of, expert_axis_of
from picotron_mini.model.gpt import initial_weight
from picotron_mini.parallel.describe import describe
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.gather import gather
from picotron_mini.parallel.parallelize import Parallel, layout_of, parallelize
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.verify import EXPERTS, MODEL, TRAIN, verify

MOE = replace(MODEL, num_layers=2, moe=EXPERTS)
TWO_STEPS = replace(TRAIN, steps=2)


def ready(layout: str, model: ModelConfig = MOE, **train: object) -> RunConfig:
    return resolve(RunConfig(layout=layout, model=model, train=replace(TRAIN, **train)))  # type: ignore[arg-type]


# --- the sparse view --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(dp=4, ep=2),
        MeshShape(dp=2, cp=2, ep=2),
        MeshShape(dp=2, cp=2, ep=4),
        MeshShape(pp=2, dp=2, tp=2, ep=2),
        MeshShape(dp=6, ep=3),
    ],
    ids=str,
)
def test_ep_and_edp_deal_out_the_data_ranks(shape: MeshShape) -> None:
    for rank in range(shape.world_size):
        ep, edp = (expert_axis_of(shape, rank, name) for name in ("ep", "edp"))
        assert ep.ranks[ep.index] == edp.ranks[edp.index] == rank
        assert (ep.size, edp.size) == (shape.ep, shape.edp)
        assert set(ep.ranks) & set(edp.ranks) == {rank}
        met = {other for member in ep.ranks for other in expert_axis_of(shape, member, "edp").ranks}
        assert met == set(data_axis_of(shape, rank).ranks)
        index = coordinates(shape, rank)
        assert (index["ep"], index["edp"]) == (ep.index, edp.index)
        assert Mesh(shape, rank)["ep"] == ep and Mesh(shape, rank)["edp"] == edp


def test_the_picture_in_the_docstring() -> None:
    shape = MeshShape.parse("dp=4,ep=2")
    assert [coordinates(shape, r)["ep"] for r in range(4)] == [0, 1, 0, 1]
    assert [coordinates(shape, r)["edp"] for r in range(4)] == [0, 0, 1, 1]
    assert expert_axis_of(shape, 2, "ep").ranks == (2, 3) and expert_axis_of(shape, 2, "edp").ranks == (0, 2)
    assert shape.world_size == 4 and str(shape) == "dp=4,ep=2"
    assert "ep" not in coordinates(MeshShape(dp=4), 1)


def test_without_ep_nothing_is_new_in_a_layout_file() -> None:
    run = ready("dp=2", MODEL)
    assert to_json(layout_of(run), run.mesh)["axes"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 1}
    run = ready("dp=2,ep=2")
    assert to_json(layout_of(run), run.mesh)["axes"]["ep"] == 2


# --- the layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("layout", ["dp=4,ep=2", "dp=2,tp=2,ep=2", "dp=2,cp=2,ep=2", "dp=2,ep=2", "dp=2,pp=2,ep=2"])
def test_every_element_counts_once(layout: str, zero: int) -> None:
    run = ready(layout, zero=zero, seq_len=16)
    for name, place in layout_of(run).items():
        counted = torch.zeros(place.shape, dtype=torch.int64)
        for rank in range(run.mesh.world_size):
            index = coordinates(run.mesh, rank)
            if place.holds(index) and place.counts(index):
                counted[place.slices(index)] += 1
        assert counted.eq(1).all(), name


@pytest.mark.parametrize(
    ("layout", "group", "owners"),
    [("dp=4,ep=2", 2, 1), ("dp=8,ep=2", 4, 2), ("dp=4,cp=2,ep=2", 2, 2), ("dp=4,ep=4", 4, 1)],
)
@pytest.mark.parametrize("zero", [1, 3])
def test_every_group_owns_every_row_of_experts_once(layout: str, group: int, owners: int, zero: int) -> None:
    run = ready(layout, zero=zero, zero_group=group, seq_len=16)
    whole_mesh, groups = run.mesh, run.mesh.dp // group
    assert whole_mesh.edp_inside(group) == owners
    for name, place in layout_of(run).items():
        counted = torch.zeros(place.shape, dtype=torch.int64)
        held = torch.zeros(groups, *place.shape, dtype=torch.int64)
        for rank in range(whole_mesh.world_size):
            index = coordinates(whole_mesh, rank)
            counted[place.slices(index)] += place.counts(index)
            held[(index["dp"] // group, *place.slices(index))] += 1
        assert counted.eq(1).all(), f"{name}: the norm would be wrong"
        assert held.eq(1 if ".experts." in name else whole_mesh.cp).all(), name


def test_where_experts_live() -> None:
    places = layout_of(ready("dp=4,ep=2", zero=1))
    gate, router = places["layers.1.mlp.experts.gate"], places["layers.1.mlp.router.weight"]
    assert gate.sum_axes == ("edp",) and router.sum_axes == ("dp", "tp")
    assert [shard.axis for shard in gate.shards] == ["ep", "edp"]
    held = [gate.slices(coordinates(MeshShape(dp=4, ep=2), rank))[0] for rank in range(4)]
    assert held == [slice(0, 2), slice(4, 6), slice(2, 4), slice(6, 8)]
    both = layout_of(ready("dp=2,tp=2,ep=2"))["layers.1.mlp.experts.down"]
    assert [(shard.axis, shard.dim) for shard in both.shards] == [("ep", 0), ("tp", 2)]
    assert layout_of(ready("dp=4"))["layers.1.mlp.experts.gate"].sum_axes == ("dp",)


def test_a_rank_keeps_a_share_of_the_experts() -> None:
    whole, spread = (
        footprint(run, layout_of(run), coordinates(run.mesh, 0)) for run in map(ready, ("dp=4", "dp=4,ep=4"))
    )
    experts = 8 * 3 * 32 * 16  # of the one sparse layer
    assert whole.weights - spread.weights == 8 * experts * 3 // 4


@pytest.mark.parametrize(
    ("layout", "model", "train", "said"),
    [
        ("ep=2", MOE, {}, "ep=2 does not divide dp*cp=1, and experts are spread over those ranks; ep could be 1"),
        ("dp=4,ep=3", MOE, {}, "ep=3 does not divide dp*cp=4"),
        ("dp=6,ep=3", MOE, {}, "ep=3 does not divide num_experts=8; ep could be 1 or 2, or num_experts=6 or 9"),
        ("dp=2,ep=2", MODEL, {}, "ep=2 spreads experts, and this model has none"),
        (
            "dp=4,ep=4",
            MOE,
            {"zero": 1, "zero_group": 2},
            "zero_group=2 ranks of a group are no multiple of the ep=4 that hold all experts between them; zero_group "
            "could be 4",
        ),
        ("dp=4,cp=2,ep=8", MOE, {"zero": 1, "zero_group": 2, "seq_len": 16}, "zero_group*cp=4 ranks of a group are no"),
        (
            "dp=4,ep=2",
            MOE,
            {"zero": 1, "zero_group": 2, "place_every": 1},
            "place_every=1 trades rows of experts between the ranks that own them, and with zero_group=2",
        ),
        (
            "dp=4,ep=2",
            MOE,
            {"zero": 1, "zero_group": 2, "expert_replicas": 1},
            "expert_replicas=1 trades rows of experts between the ranks that own them, and with zero_group=2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    layout: str, model: ModelConfig, train: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ready(layout, model, **train)


FEW = "zero=1 deals out whole experts, and {} of each layer: who gets one saves {}; only tp cuts an expert itself"


@pytest.mark.parametrize(
    ("layout", "experts", "train", "said"),
    [
        ("dp=4,ep=2", 2, {}, ("2 ranks hold the same expert", "nothing on it, and 1 goes without")),
        ("dp=2,cp=2,ep=2", 2, {}, ("2 ranks hold the same expert", "nothing on it, and 1 goes without")),
        ("dp=8,ep=2", 4, {}, ("4 ranks hold the same 2", "no more than among 2 ranks, and 2 go without")),
        ("dp=4", 3, {}, ("4 ranks hold the same 3", "no more than among 3 ranks, and 1 goes without")),
        ("dp=8,ep=2", 6, {"expert_replicas": 1}, None),  # 4 slots on 4 ranks
        ("dp=8,ep=2", 6, {}, ("4 ranks hold the same 3", "no more than among 3 ranks, and 1 goes without")),
        ("dp=8,ep=2", 4, {"zero_group": 4}, None),  # each half of the ranks has 2 copies
        ("dp=8,ep=2", 4, {"zero": 0}, None),
        ("dp=4,ep=4", 4, {}, None),  # no copies, nothing to share out
        ("dp=4,ep=2", 4, {}, None),
        ("dp=8", 0, {}, None),  # a dense model
    ],
)
def test_too_few_experts_for_zero_are_noticed(
    layout: str, experts: int, train: dict[str, object], said: tuple[str, str] | None
) -> None:
    moe = replace(EXPERTS, num_experts=experts, top_k=1, groups=1, limit_groups=1, normalize=False) if experts else None
    run = ready(layout, replace(MOE, moe=moe), **{"zero": 1, "seq_len": 16, **train})
    assert notices(run) == ([FEW.format(*said)] if said else [])


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("experts", "among"), [(2, "dp=2,ep=2"), (4, "dp=4,ep=2")])
def test_what_is_noticed_about_zero_is_so(zero: int, experts: int, among: str) -> None:
    """The rank that keeps most keeps as much as with so many ranks as there are experts; some keep nothing."""
    moe = replace(EXPERTS, num_experts=experts, top_k=1, groups=1, limit_groups=1, normalize=False)

    def kept(layout: str, zero: int) -> list[int]:
        run = ready(layout, replace(MOE, moe=moe), zero=zero)
        found = {name: place for name, place in layout_of(run).items() if ".experts." in name}
        return [footprint(run, found, coordinates(run.mesh, rank)).total for rank in range(run.mesh.world_size)]

    assert notices(ready("dp=8,ep=2", replace(MOE, moe=moe), zero=zero))
    assert max(kept("dp=8,ep=2", zero)) >= max(kept(among, zero if experts > 2 else 0))
    assert max(kept("dp=8,ep=2", 2)) > min(kept("dp=8,ep=2", 2))


def test_describe_says_that_there_are_too_few_experts_for_zero() -> None:
    for experts, words in ((2, True), (4, False)):
        moe = replace(EXPERTS, num_experts=experts, top_k=1, groups=1, limit_groups=1, normalize=False)
        out = io.StringIO()
        Console(width=300, file=out).print(describe(ready("dp=4,ep=2", replace(MOE, moe=moe), zero=2)))
        assert ("note: zero=2 deals out whole experts, and 2 ranks hold the same expert" in out.getvalue()) is words


def test_describe_says_where_experts_are_and_when_tokens_travel() -> None:
    out = io.StringIO()
    Console(width=220, file=out).print(describe(ready("dp=4,ep=2", zero=1)))
    text = out.getvalue()
    assert re.search(r"experts\.gate +│ \[8, 16, 32\].*dim 0 over ep: 4\+4; dim 0 over edp: 2\+2 +│ edp", text), text
    assert re.search(r"ep +│ all_to_all +│ tokens to their experts and back", text)
    assert "float8" not in text
    assert re.search(r"ep +│ counts", text) and re.search(r"edp +│ reduce_scatter +│ gradients of experts", text)


def test_describe_says_in_what_form_tokens_travel() -> None:
    out = io.StringIO()
    Console(width=250, file=out).print(describe(ready("dp=4,ep=2", dispatch_payload="fp8")))
    assert "tokens to their experts and back, forward and backward" in out.getvalue()
    assert "; there in float8, back in bf16" in out.getvalue()


def test_bytes_by_hand() -> None:
    """dp=2, ep=2: experts are on one rank each, so only the tokens travel."""
    run = ready("dp=2,ep=2", replace(MOE, num_layers=1, moe=replace(EXPERTS, dense_layers=0)))
    rows = {0: (10, 20)}  # sent and received
    found = predict_step(run, layout_of(run), coordinates(run.mesh, 0), rows)
    row, beside = 32 * 8, 2 * 3 * 8
    assert found["ep", "all_to_all"] == (10 * (row + beside) + 20 * row) + (10 * row + 20 * (row + beside))
    assert found["ep", "counts"] == 3 * 2 * 2 * 8
    assert ("edp", "all_reduce") not in found
    frozen = replace(run, train=replace(run.train, freeze=("embed", "layers", "norm")))
    assert predict_step(frozen, layout_of(run), coordinates(run.mesh, 0), rows)["ep", "all_to_all"] == (
        10 * (row + beside) + 20 * row
    )


# --- parity -----------------------------------------------------------------------------------------------


def all_but(part: str) -> tuple[str, ...]:
    """Freeze everything in a model of two layers but this part of the mixtures."""
    mixture = [f"mlp.{other}" for other in ("router", "experts", "shared") if other != part]
    inside = ["attention", "attention_norm", "mlp_norm", *mixture]
    return ("embed", "norm", *(f"layers.{layer}.{name}" for layer in range(2) for name in inside))


CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "alone": ("dp=2,ep=2", {}, {}),
    "two copies": ("dp=4,ep=2", {}, {}),
    "an expert each": ("dp=4,ep=4", {"num_experts": 4}, {"micro_batch_size": 1}),
    "with tensor": ("dp=2,tp=2,ep=2", {}, {"sequence_parallel": True}),
    "with context": ("dp=2,cp=2,ep=4", {"capacity": 0.5}, {"seq_len": 16, "document_mask": True}),
    "context only": ("cp=2,ep=2", {"choice": "expert", "balance": "none"}, {"seq_len": 16, "context": "ulysses"}),
    "in stages": ("dp=2,pp=2,ep=2", {"balance": "bias", "score": "sigmoid", "dense_layers": 0}, {}),
    "in a V, halves of the backward apart": ("dp=2,pp=2,ep=2", {}, {"schedule": "zb-v", "micro_batches": 4}),
    "eight ranks, all axes": ("dp=2,tp=2,pp=2,ep=2", {}, {"recompute": "full"}),
    "eight ranks, three copies less one": ("dp=8,ep=4", {"aux_scope": "sequence"}, {"recompute": "selective"}),
    "zero 1": ("dp=4,ep=2", {}, {"zero": 1}),
    "zero 2, context": ("dp=2,cp=2,ep=2", {}, {"zero": 2, "seq_len": 16}),
    "zero 3, recomputed": ("dp=4,ep=2", {}, {"zero": 3, "recompute": "full"}),
    "zero 3, one copy of the experts": ("dp=2,ep=2", {}, {"zero": 3}),
    "zero 3, an expert for two owners": ("dp=4,ep=2", {"num_experts": 2, "top_k": 2}, {"zero": 3}),
    "zero 1, groups with one copy of the experts": ("dp=4,ep=2", {}, {"zero": 1, "zero_group": 2}),
    "zero 2, two owners in each of two groups": ("dp=8,ep=2", {}, {"zero": 2, "zero_group": 4}),
    "zero 3, groups with one copy of the experts": ("dp=4,ep=2", {}, {"zero": 3, "zero_group": 2}),
    "zero 3, two owners in each of two groups, context": (
        "dp=4,cp=2,ep=2",
        {},
        {"zero": 3, "zero_group": 2, "seq_len": 16, "recompute": "full"},
    ),
    "zero 3, groups, an owner without experts": (
        "dp=8,ep=2",
        {"num_experts": 2, "top_k": 2},
        {"zero": 3, "zero_group": 4},
    ),
    "only the routers trained": ("dp=2,ep=2", {"dense_layers": 0}, {"freeze": all_but("router")}),
    "only the experts trained": ("dp=4,ep=2", {"dense_layers": 0}, {"freeze": all_but("experts")}),
    "experts frozen": ("dp=4,ep=2", {}, {"freeze": ("layers.1.mlp.experts",), "zero": 1}),
}


@pytest.mark.parametrize("case", [c if c == "alone" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_parity(case: str) -> None:
    layout, moe, train = CASES[case]
    layers = 4 if train.get("schedule") == "zb-v" else MeshShape.parse(layout).pp + 1
    model = replace(MODEL, num_layers=layers, moe=replace(EXPERTS, **moe))  # type: ignore[arg-type]
    report = verify(layout, model, replace(TWO_STEPS, **train))  # type: ignore[arg-type]
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"{report.layout}: first {report.first_divergence}; {found}; {report.bytes_problems}"
    assert report.bytes_counted["ep all_to_all"] > 0


def groups_apart() -> None:
    """A mutant: the gradients of experts are summed inside each group only."""
    from picotron_mini.collectives import Done, all_reduce_async
    from picotron_mini.parallel import zero

    zero.all_reduce_async = lambda x, axis: Done() if axis.name == "edp" else all_reduce_async(x, axis)  # type: ignore[assignment]


def test_groups_that_are_not_summed_are_noticed() -> None:
    train = replace(TWO_STEPS, zero=1, zero_group=2)
    report = verify("dp=4,ep=2", MOE, train, optimizers=["sgd"], patch=groups_apart)
    assert max(d.error for d in report.differences if d.quantity == "gradients") > 1e-3
    assert "experts" in str(report.first_divergence) and any("edp" in each for each in report.bytes_problems)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes_are_as_exact_as_one_device_in_them(dtype: str) -> None:
    report = verify("dp=4,ep=2", MOE, replace(TWO_STEPS, dtype=dtype))
    assert report.ok, report.to_dict()
    assert report.max_rel_err > 1e-9


def test_a_dense_model_is_given_experts_by_verify() -> None:
    report = verify("dp=2,ep=2", replace(MODEL, num_layers=2), replace(TWO_STEPS, steps=1), optimizers=["sgd"])
    assert report.ok and report.bytes_predicted["ep all_to_all"] == report.bytes_counted["ep all_to_all"] > 0


# --- compiled ---------------------------------------------------------------------------------------------


def steps_of(compiled: bool, run: RunConfig) -> tuple[list[float], list[int]]:
    """On a rank: losses of three steps, and how many graphs the compiler has made after each."""
    import warnings

    from torch._dynamo.utils import counters

    from picotron_mini.data.loader import Batch
    from picotron_mini.training.optimizer import make_optimizer
    from picotron_mini.training.step import train_step

    warnings.simplefilter("ignore")  # the compiler makes some of its own
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]  # traces, no C++ compiler
    mesh = Mesh.build(run.mesh)
    run = replace(run, train=replace(run.train, compile=compiled))
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    generator = torch.Generator().manual_seed(mesh["dp"].index)
    losses, graphs = [], []
    for _ in range(3):
        batches = []
        for _ in range(run.train.micro_batches):
            shape = (run.train.micro_batch_size, run.train.seq_len)
            tokens, targets = (torch.randint(run.model.vocab_size, shape, generator=generator) for _ in range(2))
            positions = torch.arange(shape[1]).expand(shape).contiguous()
            batches.append(Batch(tokens, targets, positions, torch.zeros_like(tokens)))
        losses.append(train_step(parallel, optimizer, batches).loss)
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "moe", "train"),
    [
        ("dp=2,ep=2", {"shared_size": 8, "dense_layers": 0, "z_weight": 0.1}, {}),
        ("dp=2,ep=2", {"shared_size": 8, "dense_layers": 0}, {"dispatch": "allgather"}),
        ("dp=2", {"balance": "bias", "score": "sigmoid", "capacity": 1.0, "dense_layers": 1}, {}),
    ],
)
def test_layers_share_what_is_compiled_and_rows_are_any_number(
    ranks, layout: str, moe: dict[str, object], train: dict[str, object]
) -> None:
    """Three layers make as many graphs as two, and after the first step there are no new ones."""
    graphs = []
    for layers in (2, 3):
        model = replace(MODEL, num_layers=layers, moe=replace(EXPERTS, **moe))  # type: ignore[arg-type]
        run = ready(layout, model, micro_batches=2, **train)
        losses, made = ranks(steps_of, True, run, world_size=2)[0]
        assert made[0] == made[-1] > 0, f"compiled again for other numbers of rows: {made}"
        graphs.append(made[-1])
    assert graphs[0] == graphs[1], f"layers are compiled one by one: {graphs}"
    eager, none = ranks(steps_of, False, run, world_size=2)[0]
    assert losses == pytest.approx(eager, rel=1e-12) and not any(none)


# --- weights put together, and a whole run ------------------------------------------------------------------


def whole(parallel: Parallel) -> dict[str, torch.Tensor]:
    out = {}
    for name, place in parallel.layout.items():
        tensor = gather(parallel.masters.get(name), place, parallel.mesh, torch.float64, parallel.device)
        if tensor is not None:
            out[name] = tensor
    return out


def gathered(run: RunConfig) -> dict[str, torch.Tensor]:
    return whole(parallelize(run, Mesh.build(run.mesh), torch.device("cpu")))


@pytest.mark.parametrize(
    ("layout", "zero", "group"),
    [("dp=4,ep=2", 0, 0), ("dp=4,ep=2", 3, 0), ("dp=2,tp=2,ep=2", 1, 0), ("dp=4,ep=2", 1, 2), ("dp=8,ep=2", 3, 4)],
)
def test_weights_come_together_whole_and_start_as_on_one_device(ranks, layout: str, zero: int, group: int) -> None:
    run = ready(layout, zero=zero, zero_group=group)
    found = ranks(gathered, run, world_size=run.mesh.world_size)[0]
    for name, place in layout_of(run).items():
        assert torch.equal(found[name], initial_weight(run.model, name, place.shape, run.train.seed).double()), name


@pytest.mark.slow
def test_a_run_trains_validates_saves_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from picotron_mini.train import train
    from picotron_mini.write import Wish, write

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(600)))
    model = ModelConfig(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2,
        moe=MoEConfig(num_experts=4, expert_size=8),
    )  # fmt: skip
    settings = TrainConfig(
        steps=3,
        seq_len=16,
        batch_size=8,
        micro_batch_size=2,
        eval_every=2,
        eval_batches=1,
        warmup_steps=0,
        device="cpu",
    )
    losses = []
    for name, layout in (("one", "dp=1"), ("ep", "dp=4,ep=2")):
        micro = settings.micro_batch_size if layout != "dp=1" else 8  # so that pools of tokens are the same
        run = RunConfig(
            layout=layout, name=name, out=str(tmp_path), model=model, data=DataConfig(text=(str(text),)),
            train=replace(settings, micro_batch_size=micro),
        )  # fmt: skip
        losses.append(train(run)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    rows = json.loads((tmp_path / "ep" / "traffic.json").read_text())["per_step"]
    assert all(row["predicted"] == row["counted"] for row in rows)
    assert {(row["axis"], row["op"]) for row in rows} >= {("ep", "all_to_all"), ("edp", "all_reduce")}
    capfd.readouterr()
    written = []
    for layout in ("dp=1", "dp=2,ep=2"):
        write(str(tmp_path / "ep"), Wish("7 times", 12, seed=1), "cpu", layout)
        written.append(capfd.readouterr().out)
    assert written[0].startswith("7 times") and written[0].strip() in written[1]
