"""Does a layout compute what one device computes? Asked of the real thing, and answered with a number.

    batches -> reference: the plain model on one device ----+
          \\-> the library on pp x dp x cp x tp ranks -------+--> compare loss, gradients, norm, weights

The reference (`reference.py`) imports the model and nothing else of this library; it is not the library with one rank.
Both train a few steps on batches made to be unkind: ragged documents, and targets missing unevenly, so that an average
of averages is not the average. In float64 all that a correct layout may change is the order of additions, so the
tolerance is 1e-9 of each tensor's largest value (`parity.py` measures). A scale that is off, a missing sum, two swapped
micro-batches: all are many powers of ten above it.

SGD is run beside AdamW because Adam divides by the gradient's own size and hides a wrong scale from the weights.

In a narrower dtype exactness is not to be had. There a float64 run on one device is the truth, the same dtype on one
device shows the error that is unavoidable, and a layout may have twice that (float32: at most 1e-5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .collectives import ledger
from .config import ConfigError, MeshShape, ModelConfig, MoEConfig, RunConfig, TrainConfig
from .data.loader import Batch, data_rows
from .launch import launch, under_torchrun
from .layout import Layout
from .legality import resolve
from .mesh import Mesh, close_groups, coordinates
from .model.gpt import IGNORE
from .moe.dispatch import recording
from .parallel.expert_traffic import Decided, Rows, Traffic, rows_of_step
from .parallel.parallelize import layout_of, parallelize
from .parallel.traffic import predict_step
from .parity import Difference, Errors, Report, named
from .reference import Snapshot, reference
from .training.migrate import Placer
from .training.optimizer import make_optimizer
from .training.step import apply_gradients, compute_gradients, gradients_of

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
OPTIMIZERS = ("sgd", "adamw")

# Small, and awkward on purpose: uneven layers per stage, an odd vocabulary, grouped-query heads, tied head.
MODEL = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_layers=9, num_heads=16, num_kv_heads=8, head_dim=4
)
# What a layout with ep gets in place of the MLPs: experts that divide by 2 and 4, one dense layer, a shared expert.
EXPERTS = MoEConfig(num_experts=8, top_k=3, expert_size=16, shared_size=8, dense_layers=1, z_weight=0.001)
TRAIN = TrainConfig(
    steps=3, seq_len=12, micro_batch_size=2, micro_batches=3, lr=0.01, lr_schedule="constant", warmup_steps=0,
    clip_norm=0.5, bucket_mb=0.01, dtype="float64", device="cpu",
)  # fmt: skip


def make_batches(run: RunConfig) -> list[Batch]:
    """Global batches [G, T] of random tokens with ragged documents; targets are missing unevenly over the sequences."""
    shape = (run.train.batch_size, run.train.seq_len)
    generator = torch.Generator().manual_seed(run.train.seed)
    out = []
    for _ in range(run.train.steps):
        tokens = torch.randint(run.model.vocab_size, shape, generator=generator)
        targets = torch.randint(run.model.vocab_size, shape, generator=generator)
        share = torch.rand(shape[0], 1, generator=generator)  # some sequences keep few targets, some nearly all
        targets[torch.rand(shape, generator=generator) < 0.8 * share] = IGNORE
        targets[:, 0] = tokens[:, -1]  # every micro-batch has one target at least
        documents = (torch.rand(shape, generator=generator) < 0.2).long().cumsum(1)
        # where no token with a target sees another one than itself, queries have gradients of rounding alone
        sees = (documents[:, 1:] == documents[:, :-1]) & (tokens[:, 1:] != tokens[:, :-1])
        alone = ~((targets[:, 1:] != IGNORE) & sees).any(1)
        targets[alone, -1], documents[alone, -1] = tokens[alone, 0], documents[alone, -2]
        tokens[alone, -1] = (tokens[alone, -2] + 1) % run.model.vocab_size
        positions = torch.arange(shape[1]).expand(shape).contiguous()
        out.append(Batch(tokens, targets, positions, documents))
    return out


def _jobs_on_rank(jobs: Sequence[Sequence[RunConfig]], patch: Callable[[], Any] | None) -> list[list[Any]]:
    """What one rank computes for each job."""
    if patch is not None:
        patch()
    out = []
    for runs in jobs:
        out.append(_on_rank(runs, make_batches(runs[0])))
        close_groups()  # the next job has a mesh of its own
    return out


def _on_rank(runs: Sequence[RunConfig], batches: Sequence[Batch]) -> list[Any]:
    """What one rank computes for each run.

    Returns:
        Its snapshots; of its last step the bytes, and what its routers decided; in which order it kept experts.
    """
    mesh = Mesh.build(runs[0].mesh)
    device = (
        torch.device("cuda", torch.cuda.current_device()) if runs[0].train.device == "cuda" else torch.device("cpu")
    )
    out = []
    for run in runs:
        train = run.train
        parallel = parallelize(run, mesh, device)
        optimizer = make_optimizer(parallel.trained, train)
        placer, snapshots, orders = Placer(parallel, optimizer), [], []
        for step, batch in enumerate(batches):
            mine = [
                _select(
                    batch,
                    data_rows(train.batch_size, mesh["dp"].size, mesh["dp"].index, train.micro_batches, k),
                    device,
                )
                for k in range(train.micro_batches)
            ]
            # a recorded step may not be read from; its bytes are the same whatever was decided
            with ledger.recording() as sent, recording(not train.cuda_graph) as decided:
                loss, tokens = compute_gradients(parallel, mine)
                gradients = {n: g.cpu().clone() for n, g in gradients_of(parallel).items()}
                result = apply_gradients(parallel, optimizer, loss, tokens)
            weights = {n: m.detach().cpu().clone() for n, m in parallel.masters.items()}
            routing = parallel.routers.noted(result.routing) if parallel.routers and result.routing else {}
            snapshots.append(Snapshot(result.loss, result.grad_norm, gradients, weights, routing))
            orders.append({name: place.order for name, place in parallel.layout.items()})
            placer.after(step + 1, result.routing)
        out.append((snapshots, dict(sent), decided, orders))
    return out


def _select(batch: Batch, rows: slice, device: torch.device) -> Batch:
    return Batch(batch.tokens[rows], batch.targets[rows], batch.positions[rows], batch.documents[rows]).to(device)


def verify(
    layout: str,
    model: ModelConfig = MODEL,
    train: TrainConfig = TRAIN,
    *,
    optimizers: Sequence[str] = OPTIMIZERS,
    patch: Callable[[], Any] | None = None,
    gpus: int = 0,
) -> Report:
    """Train on `layout` and on one device, and compare.

    Args:
        layout: as "dp=2,tp=2,pp=2". One with ep gives a dense model experts (`EXPERTS`): it needs some.
        model, train: the defaults are small and awkward on purpose.
        optimizers: which to try.
        patch: called in each rank before anything else; a mutant of the library, for testing this function.
        gpus: how many there are; needed with `train.device="cuda"`.

    Raises:
        ConfigError: the layout does not fit the model, or this is a rank of `torchrun`.
        RankError: a rank failed.
    """
    if under_torchrun():
        raise ConfigError("verify compares what all ranks return, so it starts them itself; run it without torchrun")
    if MeshShape.parse(layout).ep > 1 and model.moe is None:
        model = replace(model, moe=EXPERTS)
    runs = [
        resolve(RunConfig(layout=layout, model=model, train=replace(train, optimizer=o, batch_size=0)), gpus=gpus)  # type: ignore[arg-type]
        for o in optimizers
    ]
    return verify_together([runs], patch)[0]


def verify_together(jobs: Sequence[Sequence[RunConfig]], patch: Callable[[], Any] | None = None) -> list[Report]:
    """As `verify` of each job, with one launch for all.

    Args:
        jobs: each a resolved run, once for each optimizer to try; all on one device and on as many ranks.
        patch: see `verify`.
    """
    first = jobs[0][0]
    device, size = first.train.device, first.mesh.world_size  # resolved: "auto" is one of the two by now
    ranks = launch(_jobs_on_rank, jobs, patch, world_size=size, device=device, output="hide")
    return [_report(runs, [results[n] for results in ranks]) for n, runs in enumerate(jobs)]


def _report(runs: Sequence[RunConfig], per_rank: Sequence[list[Any]]) -> Report:
    """Compare what every rank has computed for the runs of one job with one device, and with the predicted bytes."""
    run, batches = runs[0], make_batches(runs[0])
    device = run.train.device
    whole = layout_of(run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    errors = Errors()
    noise = Errors()  # of one device in the same dtype, where that is not float64
    for number, each in enumerate(runs):
        truth = reference(each.model, each.train, batches, torch.float64, device)
        # AdamW turns rounding into steps of full size, so narrow weights are compared after SGD only
        with_weights = each.train.dtype == "float64" or each.train.optimizer == "sgd"
        if each.train.dtype != "float64":
            narrow = reference(each.model, each.train, batches, getattr(torch, each.train.dtype), device)
            noise.compare(narrow, truth, [layout_of(replace(each, layout="1"))], {}, 0, with_weights, each)
        for rank, results in enumerate(per_rank):
            index, (snapshots, *_, orders) = coordinates(run.mesh, rank), results[number]
            places = [{name: replace(place, order=kept[name]) for name, place in whole.items()} for kept in orders]
            errors.compare(snapshots, truth, places, index, rank, with_weights, each)

    torch.set_num_threads(threads)

    def tolerance(quantity: str) -> float:
        if run.train.dtype in TOLERANCE:
            return TOLERANCE[run.train.dtype]
        # a single number (loss, norm) may be exact by luck on one device, so it gets the dtype's own precision at least
        luck = 0.0 if quantity in ("gradients", "weights") else torch.finfo(getattr(torch, run.train.dtype)).eps
        return max(2 * noise.worst[quantity][0], luck)

    predicted = []
    for n, each in enumerate(runs):  # of the last step, with experts where they were then
        kept = [results[n][3][-1] for results in per_rank]
        last = [{name: replace(place, order=orders[name]) for name, place in whole.items()} for orders in kept]
        predicted.append(_predicted(each, last, [results[n][2] for results in per_rank]))
    report = Report(
        layout=str(run.mesh),
        differences=[Difference(q, e, where, tolerance(q)) for q, (e, where) in errors.worst.items()],
        bytes_predicted=named(predicted[-1][0]),
        bytes_counted=named(per_rank[0][-1][1]),
        lossy=" with ".join(
            f"{name}={getattr(run.train, name)}"
            for name, exact in (("compress", "none"), ("dispatch_payload", "same"))
            if getattr(run.train, name) != exact
        ),
    )
    report.first_divergence = errors.first(tolerance)
    for rank, results in enumerate(per_rank):
        for number, (_, counted, *_) in enumerate(results):
            mine = predicted[number][rank]
            if mine != Counter(counted):  # which takes what is not there for 0
                report.bytes_problems.append(f"rank {rank}: predicted {named(mine)}, counted {named(counted)}")
                break
    return report


def _predicted(run: RunConfig, layouts: Sequence[Layout], decided: Sequence[Decided]) -> list[Traffic]:
    """The bytes of each rank in a step in which its routers decided so, from what each knows of the layout."""
    rows: Sequence[Rows | None] = [None] * len(decided)
    if run.model.moe is not None and run.mesh.ep > 1:
        rows = rows_of_step(decided, run.mesh, run.model.moe, run.train.micro_batches, run.train.expert_replicas)
    return [
        predict_step(run, layout, coordinates(run.mesh, rank), each)
        for rank, (layout, each) in enumerate(zip(layouts, rows, strict=True))
    ]
