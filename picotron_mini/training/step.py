"""The training step: one for every layout, also for one device.

    count targets -> pipeline (forward, backward; data parallelism sums meanwhile) -> finish the sums
    -> global norm -> clip -> optimizer -> round masters into weights

Gradient accumulation is the pipeline's schedule with one stage. Two small exchanges go with each step: the number of
targets over dp and cp (8 bytes) before, and three float64 over all ranks (loss, squared norm, "please stop") after,
with what a mixture of experts has counted.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from ..collectives import all_reduce
from ..data.loader import Batch
from ..memory.masters import SplitMasters, parts
from ..model.balancing import RoutingStats
from ..model.gpt import GPT, IGNORE
from ..model.moe import Pool
from ..parallel.actions import Route
from ..parallel.chunks import context_slice
from ..parallel.data import GradientBuckets
from ..parallel.deferred import additions
from ..parallel.parallelize import Parallel
from ..parallel.partial import sum_partial_gradients
from ..parallel.pipeline import Forward, run_forward, run_pipeline
from ..parallel.receives import Receives, receives_in_one_order
from ..parallel.replicas import sum_replicas
from ..parallel.schedules import find_schedule
from ..parallel.several import SeveralBuckets
from .optimizer import clip_factor


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float  # nats per target token of the global batch
    grad_norm: float  # of the global gradient, before clipping
    tokens: int  # target tokens of the global batch
    stop: bool  # some rank was asked to stop
    routing: RoutingStats | None = None  # of a mixture of experts; its auxiliary losses are not in `loss`


def compute_gradients(parallel: Parallel, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Fill `parallel.gradients` with the gradient of the mean loss over the *global* batch.

    Args:
        micro_batches: this data rank's share, on its device, in whole sequences; this rank's part of each is cut here.

    Returns:
        The summed loss of this rank's tokens (0 except on the last stage) divided by the global number of targets,
        and that number; both scalars on the device.
    """
    if parallel.recorded is None:
        return _fill(parallel, micro_batches)
    return parallel.recorded(partial(_fill, parallel), micro_batches)


def _fill(parallel: Parallel, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    train, mesh = parallel.run.train, parallel.mesh
    micro_batches = [context_slice(batch, mesh["cp"], train.context) for batch in micro_batches]
    targets = sum((batch.targets != IGNORE).sum() for batch in micro_batches)
    tokens = all_reduce(torch.as_tensor(targets, device=parallel.device), mesh["dp_cp"])
    pp, route, split = mesh["pp"], parallel.route, parallel.deferred is not None
    schedule, receives = find_schedule(train.schedule, route.chunks), None
    if pp.size > 1:
        receives = _receives(train.schedule, route, len(micro_batches))[pp.index]
    gradients = parallel.gradients
    pools = None if parallel.routers is None else parallel.routers.pools(True, len(micro_batches))
    gradients.reset()
    # gradients become final at different times; else all do in the last backward, or (ZeRO 3) each backward reduces its
    counted = split or (route.chunks > 1 and train.zero < 3)
    after = None if isinstance(gradients, GradientBuckets | SeveralBuckets) else gradients.after_backward
    if counted and train.zero < 3:  # they are started by being counted alone
        after = None
    if counted:
        each = sum((additions(chunk, split) for chunk in parallel.chunks), Counter[nn.Parameter]())
        rounds = 1 if train.zero > 1 else len(micro_batches)  # ZeRO 2 and 3 reduce in each micro-batch
        gradients.arm({parameter: n * rounds for parameter, n in each.items()})
    loss = run_pipeline(
        schedule(pp.index, pp.size, len(micro_batches)),
        forward=_stage(parallel, micro_batches, tokens, pools),
        axis=pp,
        gradient_axis=mesh["pp.backward"],
        shape=parallel.border_shape,
        dtype=parallel.dtype,
        device=parallel.device,
        before_last_backward=None if counted else gradients.arm,
        after_backward=after,
        route=route,
        receives=receives,
        deferred=parallel.deferred,
    )
    gradients.finish()
    sum_partial_gradients(gradients_of(parallel), parallel.layout, mesh)
    sum_replicas(gradients_of(parallel), parallel.layout, mesh)
    return loss, tokens


def _stage(
    parallel: Parallel, batches: Sequence[Batch], tokens: Tensor | int, pools: Sequence[Pool] | None
) -> Forward | list[Forward]:
    """What the pipeline's executor calls for a micro-batch: one function, or one for each chunk of this stage."""
    with_documents = parallel.run.train.document_mask

    def of(chunk: GPT) -> Forward:
        def forward(m: int, hidden: Tensor | None) -> Tensor:
            batch = batches[m]
            documents = batch.documents if with_documents else None
            pool = None if pools is None else pools[m]
            out = chunk(batch.tokens if hidden is None else hidden, batch.positions, documents, pool=pool)
            return out if chunk.head is None else chunk.loss(out, batch.targets) / tokens

        return forward

    forwards = [of(chunk) for chunk in parallel.chunks]
    return forwards if len(forwards) > 1 else forwards[0]


@cache
def _receives(name: str, route: Route, micro_batches: int) -> list[Receives]:
    """When each stage starts which receive: the same in every step."""
    schedule = find_schedule(name, route.chunks)
    return receives_in_one_order([schedule(s, route.stages, micro_batches) for s in range(route.stages)], route)


def gradients_of(parallel: Parallel) -> dict[str, Tensor]:
    """This rank's part of each gradient by global name; parameters without one are missing."""
    found = {name: parallel.gradients.gradient(p) for name, p in parallel.parameters.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def squared_norm(parallel: Parallel, gradients: dict[str, Tensor]) -> Tensor:
    """This rank's share of the squared global norm, float64: each element counts on one rank only."""
    layout, index = parallel.layout, parallel.index
    counted = [layout[name].once(g, index) for name, g in gradients.items() if layout[name].counts(index)]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=parallel.device)
    return torch.nn.utils.get_total_norm(counted).double() ** 2


def apply_gradients(
    parallel: Parallel, optimizer: torch.optim.Optimizer, loss: Tensor, tokens: Tensor, stop: bool = False
) -> StepResult:
    """Clip the gradients that `compute_gradients` left by their global norm, and update the weights."""
    sums = update(parallel, optimizer, loss, stop).cpu()  # the one point where the host waits for the GPU
    routing = None if parallel.routers is None else parallel.routers.finish(sums[3:])
    total_loss, squared, asked_sum = sums[:3].tolist()
    return StepResult(total_loss, math.sqrt(squared), int(tokens), asked_sum > 0, routing)


def update(parallel: Parallel, optimizer: torch.optim.Optimizer, loss: Tensor, stop: bool = False) -> Tensor:
    """All of `apply_gradients` but its waiting.

    Returns:
        Sums over all ranks, float64, on the device: loss, squared norm before clipping, ranks asked to stop; and with
        experts what their routers count.
    """
    train, mesh = parallel.run.train, parallel.mesh
    gradients = gradients_of(parallel)
    mine = loss.double() if mesh["tp"].index == 0 else torch.zeros_like(loss, dtype=torch.float64)
    asked = torch.full_like(mine, float(stop))
    parts = [torch.stack([mine, squared_norm(parallel, gradients), asked])]
    if parallel.routers is not None:
        parts.append(parallel.routers.numbers())
    sums = all_reduce(torch.cat(parts), mesh["world"])
    if train.clip_norm and gradients:
        held = list(gradients.values())
        torch._foreach_mul_(held, clip_factor(sums[1].sqrt(), train.clip_norm).to(held[0].dtype))
    update_masters(parallel, optimizer, gradients)
    update_weights(parallel)
    return sums


def settle() -> None:
    """Let Python's garbage collector pass over all that lives now; to be called once, after the first steps.

    Model, process groups and compiled code stay to the end. The collector looks through them again and again while the
    GPU waits for the next kernel: 7 % of forward and backward, where layers are so small that Python takes the time.
    """
    gc.collect()
    gc.freeze()


def train_step(
    parallel: Parallel, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Batch], stop: bool = False
) -> StepResult:
    """One step over the global batch. Every rank must call it.

    Args:
        micro_batches: this data rank's share of the global batch.
        stop: this rank was asked to stop; after the step all ranks know.
    """
    loss, tokens = compute_gradients(parallel, micro_batches)
    return apply_gradients(parallel, optimizer, loss, tokens, stop)


@torch.no_grad()
def update_masters(parallel: Parallel, optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor]) -> None:
    """Let the optimizer step, over all masters at once or, where whole ones would take memory, over parts of them."""
    masters = parallel.masters
    at_once = parallel.run.train.masters == "whole"
    for names in [list(masters)] if at_once else parts({n: p.numel() for n, p in parallel.parameters.items()}):
        held = masters.put_together(names) if isinstance(masters, SplitMasters) else {n: masters[n] for n in names}
        for name, master in held.items():
            gradient = gradients.get(name)
            master.grad = gradient if gradient is None else gradient.to(master.dtype)
        optimizer.step()  # of those that have a gradient now
        if not at_once:
            for master in held.values():
                master.grad = None
        if isinstance(masters, SplitMasters):
            masters.take_apart(names)


@torch.no_grad()
def update_weights(parallel: Parallel) -> None:
    """Round the masters into the weights that compute uses, where those are narrower, or others'."""
    halves = isinstance(parallel.masters, SplitMasters)  # a half of each master is the weight
    if not isinstance(parallel.gradients, GradientBuckets | SeveralBuckets):
        own = parallel.gradients.own
        parallel.gradients.publish(
            {p: own(p) if halves else parallel.masters[n] for n, p in parallel.parameters.items()}
        )
        return
    if halves:
        return
    pairs = [(p, parallel.masters[n]) for n, p in parallel.parameters.items() if parallel.masters[n] is not p]
    if pairs:
        torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def evaluate(parallel: Parallel, batches: Sequence[Batch], stop: bool = False) -> tuple[float, int, bool]:
    """The mean loss (nats per token) over this and all other data ranks' batches, their target tokens, and "stop".

    Args:
        batches: this data rank's share; as many on every rank.
        stop: this rank was asked to stop; the third value says whether any was.
    """
    mesh, route = parallel.mesh, parallel.route
    pools = None if parallel.routers is None else parallel.routers.pools(False, len(batches))
    batches = [context_slice(batch, mesh["cp"], parallel.run.train.context) for batch in batches]
    loss = run_forward(
        len(batches),
        forward=_stage(parallel, batches, 1, pools),
        axis=mesh["pp"],
        gradient_axis=mesh["pp.backward"],
        route=route,
        shape=parallel.border_shape,
        dtype=parallel.dtype,
        device=parallel.device,
    ).double()
    first = mesh["tp"].index == 0 and mesh["pp"].index == route.stage(route.length - 1)
    tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    asked = torch.full_like(loss, float(stop))
    mine = torch.stack([loss * first, torch.full_like(loss, float(tokens * first)), asked])
    total, count, asked_sum = all_reduce(mine, mesh["world"]).tolist()
    return total / max(count, 1.0), int(count), asked_sum > 0
