"""How long a step of a layout will take, how much memory, how many bytes: from formulas, before anything is launched.

    run, machine -> predict -> Prediction(seconds, memory by kind, bytes by axis)

Nothing here is new: it puts together what other files know.

    work of a stage      `work.py`, over the machine's rates
    bytes of a rank      `traffic.py`, over the links of each axis (`messages.py`)
    order of the work    the schedule on its clock (`simulate.py`), with these times as costs
    what stays           `footprint.py`;  what comes and goes: `activations.py`, with as many micro-batches as are live

A step is, for the slowest stage,

    pipeline (bubble included)  +  data parallel messages that no backward hides  +  update  +  the world's scalars

What a mixture of experts costs is what its busiest rank does (`expert_costs.py`): pass its skew, 1 is perfect balance.

What hides what: gradients pass beside the last backward but for the last bucket (ZeRO 2 and 3: beside each), ZeRO 3's
weights beside the unit before, the ring's keys beside attention, of rows to experts what `dispatch_parts` hides. The
rest of those, exchanges of tensor parallelism and of Ulysses, and the updated weights of ZeRO 1 and 2 are waited for.

Where the host launches a micro-batch more slowly than the GPU runs it, it is the host's time that counts (`_paced`).

Left out, so that you know where it misses: ranks that are not equally fast, kernels that get slower beside a message,
uneven documents, the first steps' compiling, and what `tensor_overlap` hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ..config import RunConfig, TrainConfig
from ..layout import Layout
from .actions import Action, Route, route_of
from .activations import stage_peak
from .expert_costs import busy_rows
from .expert_traffic import Traffic
from .footprint import Footprint, footprint
from .machine import MACHINES, Machine
from .messages import Messages, messages_of
from .parallelize import layout_of, stage_layers
from .schedules import find_schedule
from .simulate import simulate
from .traffic import predict_step
from .work import backward_seconds, forward_work, host_seconds, kinds, moved_by_update


@dataclass(frozen=True)
class Prediction:
    """What `predict` says of a run."""

    run: RunConfig
    seconds: float  # of a step
    parts: dict[str, float]  # what of it is computing, waiting in the bubble, for messages, for the host; the update
    memory: dict[str, int]  # bytes of the rank that needs most, by what they are for
    traffic: Traffic  # bytes by (axis, operation) of the rank that sends most
    fits: bool
    skew: float = 1.0  # that was assumed

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.run.train.batch_size * self.run.train.seq_len / self.seconds


def _layout(run: RunConfig) -> Layout:
    """`layout_of`, once for all runs that it cannot tell apart."""
    train = run.train
    telling = TrainConfig(
        schedule=train.schedule, virtual_stages=train.virtual_stages, seq_len=train.seq_len, zero=min(train.zero, 1),
        zero_group=train.zero_group, sequence_parallel=train.sequence_parallel, expert_replicas=train.expert_replicas,
    )  # fmt: skip
    return _one_layout(RunConfig(layout=run.layout, model=run.model, train=telling))


@lru_cache(maxsize=64)
def _one_layout(run: RunConfig) -> Layout:
    return layout_of(run)


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage, or several that are alike."""

    chunks: tuple[tuple[range, bool], ...]  # layers of each, and whether the head is there
    forward: tuple[float, ...]  # computing of a micro-batch, seconds, of each chunk
    backward: tuple[float, ...]
    host: tuple[float, float]  # in which its host launches a micro-batch's forward and backward
    messages: Messages
    traffic: Traffic
    kept: Footprint
    elements: int  # that this rank's optimizer updates
    size: int  # elements of gradients that its backward makes


def predict(run: RunConfig, machine: Machine, clock: bool = True, skew: float = 1.0) -> Prediction:
    """Predict one step.

    Args:
        run: resolved, with the vocabulary's size filled.
        clock: put the schedule on its clock; else the bubble is taken as (p - 1) / v micro-batches of the slowest
            stage, which is what it is for equal stages, and quicker to say for hundreds of layouts.
        skew: load of the busiest of ep ranks over the even one (`expert_costs.py`): everyone waits for it.
    """
    train, mesh = run.train, run.mesh
    route = route_of(train.schedule, mesh.pp, train.chunks)
    stages = _stages(run, machine, route, skew)

    forward, backward = [0.0] * route.length, [0.0] * route.length
    for number, stage in enumerate(stages):
        ahead, back = _paced(run, stage)
        for chunk in range(route.chunks):
            n = route.position(number, chunk)
            forward[n] = (stage.forward[chunk] + stage.messages.forward / route.chunks) * ahead
            backward[n] = (stage.backward[chunk] + stage.messages.backward / route.chunks) * back
    send = max(stage.messages.send for stage in stages)
    busy = [train.micro_batches * sum(forward[n] + backward[n] for n in _own(route, s)) for s in range(mesh.pp)]
    if mesh.pp == 1:
        ends_at = busy
    elif clock:
        timeline = simulate(
            find_schedule(train.schedule, route.chunks),
            mesh.pp,
            train.micro_batches,
            forward,
            backward,
            send,
            route=route,
        )
        ends_at = [max(e.end for e in timeline.events if e.stage == s) for s in range(mesh.pp)]
    else:
        idle = {"zb-h1": 1 / 3, "zb-v": 1 / 3}.get(train.schedule, 1 / route.chunks)
        fill = max(busy) / train.micro_batches + 2 * send * route.chunks
        ends_at = [max(busy) + (mesh.pp - 1) * idle * fill] * mesh.pp
    slowest = max(range(mesh.pp), key=lambda s: ends_at[s] + stages[s].messages.gradients)
    stage = stages[slowest]
    update = max(s.elements for s in stages) * machine.update * moved_by_update(train) * machine.turns
    tail = stage.messages.gradients
    after = max(s.messages.weights for s in stages)
    computing = train.micro_batches * (sum(stage.forward) + sum(stage.backward))
    exchanged = {axis: train.micro_batches * each for axis, each in stage.messages.by_axis.items()}
    seconds = ends_at[slowest] + tail + update + after + stage.messages.scalars

    memory = max((_memory(run, s, n, route, skew) for n, s in enumerate(stages)), key=lambda each: sum(each.values()))
    split = {
        "computing": computing, "bubble": ends_at[slowest] - busy[slowest], **exchanged,
        "host": busy[slowest] - computing - sum(exchanged.values()),
        "gradients and weights": tail + after, "update": update, "scalars": stage.messages.scalars,
    }  # fmt: skip
    return Prediction(
        run, seconds, {name: value for name, value in split.items() if value > 1e-12}, memory,
        max((s.traffic for s in stages), key=lambda traffic: sum(traffic.values())),
        sum(memory.values()) <= machine.memory, skew,
    )  # fmt: skip


def memory_of_stages(run: RunConfig, skew: float = 1.0) -> list[dict[str, int]]:
    """Bytes of a rank of each pipeline stage at its worst moment, by what they are for.

    Args:
        run: resolved, with the vocabulary's size filled.
        skew: as of `predict`.
    """
    route = route_of(run.train.schedule, run.mesh.pp, run.train.chunks)
    stages = _stages(run, MACHINES["h100"], route, skew)  # whose rates say nothing about memory
    return [_memory(run, stage, number, route, skew) for number, stage in enumerate(stages)]


def _stages(run: RunConfig, machine: Machine, route: Route, skew: float) -> list[_Stage]:
    """Every stage; those that are alike are worked out once."""
    layout, train = _layout(run), run.train
    parts = stage_layers(run.model, route.length, train.seq_len)
    known: dict[object, _Stage] = {}
    stages = []
    for number in range(route.stages):
        chunks = tuple((parts[n], n == route.length - 1) for n in _own(route, number))
        ends = number in (route.stage(0), route.stage(route.length - 1))
        alike = tuple((tuple(kinds(run.model, layers)), head) for layers, head in chunks)
        key = number if ends or train.freeze else alike
        if key not in known:
            known[key] = _stage(run, machine, layout, number, chunks, skew)
        stages.append(known[key])
    return stages


def _paced(run: RunConfig, stage: _Stage) -> tuple[float, float]:
    """By what the host makes a stage's forward and backward longer.

    A host that runs ahead is slower or is not: of both passes the longer time counts. Where experts' ranks ask each
    other how many rows come, the host waits for the GPU in each layer's forward and then the GPU for the host, so both
    times add up.
    """
    device = sum(stage.forward) + stage.messages.forward, sum(stage.backward) + stage.messages.backward
    if run.mesh.ep > 1 and run.train.dispatch == "alltoall" and not run.train.cuda_graph:
        return 1 + stage.host[0] / device[0], max(1.0, stage.host[1] / device[1])
    slower = max(1.0, sum(stage.host) / sum(device))
    return slower, slower


def _own(route: Route, stage: int) -> list[int]:
    return [route.position(stage, chunk) for chunk in range(route.chunks)]


def _stage(
    run: RunConfig,
    machine: Machine,
    layout: Layout,
    number: int,
    chunks: tuple[tuple[range, bool], ...],
    skew: float,
) -> _Stage:
    """Computing, messages and memory of one pipeline stage, of its first rank."""
    train, index = run.train, {"pp": number, "dp": 0, "cp": 0, "tp": 0, "ep": 0, "edp": 0}
    mine = {name: place for name, place in layout.items() if place.holds(index)}
    trained = [place for name, place in mine.items() if not train.freezes(name)]
    size = sum(place.without("dp", "edp").local_size(index) for place in trained)
    adding = size * machine.accumulate * machine.turns / len(chunks)
    forward = tuple(forward_work(run, *chunk, skew).seconds(machine) for chunk in chunks)
    backward = tuple(backward_seconds(run, *chunk, machine, skew) + adding for chunk in chunks)
    traffic = predict_step(run, layout, index, busy_rows(run, skew) if run.mesh.ep > 1 else None)
    layers = [layer for held, _ in chunks for layer in held]
    messages = messages_of(run, machine, traffic, layers, sum(forward), sum(backward), skew)
    host = host_seconds(run, layers, any(head for _, head in chunks), messages.number, machine)
    elements = sum(place.local_size(index) for place in trained)
    kept = footprint(run, layout, index)
    return _Stage(chunks, forward, backward, host, messages, traffic, kept, elements, size)


def _memory(run: RunConfig, stage: _Stage, number: int, route: Route, skew: float) -> dict[str, int]:
    """Bytes of a stage's rank at its worst moment."""
    schedule = find_schedule(run.train.schedule, route.chunks)
    live = most_live(schedule(number, route.stages, run.train.micro_batches))
    layers = [layer for held, _ in stage.chunks for layer in held]
    mixed = sum(layer in run.model.moe_layers for layer in layers)
    a_chunk = -(-(len(layers) - mixed) // route.chunks), -(-mixed // route.chunks)
    last = any(head for _, head in stage.chunks)
    peak = stage_peak(run, a_chunk, live, last=last, size=stage.size, elements=stage.elements, skew=skew)
    kept = stage.kept
    return {
        "weights": kept.weights, "gradients": kept.gradients, "optimizer": kept.masters + kept.optimizer,
        "activations": peak.activations, **({"routing": peak.routing} if mixed else {}), "buffers": peak.buffers,
    }  # fmt: skip


def most_live(actions: list[Action]) -> int:
    """The most micro-batches, over all chunks, whose activations a stage holds at once: from F to B, or to W."""
    steps = {"forward": 1, "backward": -1, "backward_input": 0, "backward_weight": -1}
    return max(accumulate(steps[action.kind] for action in actions))
