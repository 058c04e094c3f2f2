"""How long a rank waits for messages in a step: the bytes of traffic.py, over the machine's links, less what hides.

    in each forward and backward    tp: all of it. cp: ulysses all, the ring what attention does not hide.
                                    zero 2: gradients that a backward does not hide. zero 3: those and weights
                                    ep: rows to experts and back, and the numbers before them, less what the
                                    experts' products hide where `dispatch_parts` cuts the tokens; with
                                    dispatch=allgather all tokens, and the sums of what comes back
    once, after the last backward   zero 0, 1: gradients that this backward does not hide, the last bucket at least
    once, after the update          zero 1, 2: the updated weights
    on the way between stages       pp: one message of hidden states each way (`simulate` puts them on its clock)

How many messages carry the bytes follows from the size of each: hidden states, a bucket, a unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from ..config import AXES, MeshShape, RunConfig
from .activations import activations
from .expert_traffic import ITEMSIZE, Traffic
from .machine import Link, Machine, exposed, wire_bytes
from .work import forward_work, kinds, mlp_flops


@dataclass(frozen=True)
class Messages:
    """Seconds that a rank waits."""

    forward: float  # in each forward of a micro-batch
    backward: float
    send: float  # that a message between stages takes
    gradients: float  # once, after the last backward
    weights: float  # once, after the update
    scalars: float  # once
    by_axis: dict[str, float]  # what of forward and backward together each axis takes
    number: float  # of messages within the layers, in a forward and backward: what a host has to launch


def crosses_hosts(mesh: MeshShape, axis: str, machine: Machine, group: int = 0) -> bool:
    """Whether the ranks of an axis lie on several hosts, when hosts are filled rank by rank.

    Args:
        axis: one of the mesh, or "dp_cp", or "world", or one of the sparse view: ep neighbours of dp and cp, and edp.
        group: ranks of neighbours on the axis that are meant, not all of it.
    """
    if axis == "ep":
        return mesh.ep * mesh.tp > machine.ranks_per_host
    outer = {"dp_cp": "dp", "edp": "dp", "world": "pp"}.get(axis, axis)
    span = group or getattr(mesh, outer)
    for faster in AXES[AXES.index(outer) + 1 :]:
        span *= getattr(mesh, faster)
    return span > machine.ranks_per_host


def messages_of(
    run: RunConfig, machine: Machine, traffic: Traffic, layers: Collection[int], forward: float, backward: float,
    skew: float = 1.0,
) -> Messages:  # fmt: skip
    """The waiting of a stage's rank.

    Args:
        run: resolved.
        traffic: of the rank, as `predict_step` says.
        layers: of the stage, their numbers.
        skew: see `expert_costs.py`.
        forward, backward: seconds that it computes in a micro-batch.
    """
    mesh, links = run.mesh, _Links(run, machine, traffic)
    data = _data(links, layers, forward, backward)
    inside = {"tp": _tensor(links), "cp": _context(links, layers), "ep": _experts(links, layers, skew),
              "dp": (data.forward, data.backward)}  # fmt: skip
    mixed = sum(number for number, experts in kinds(run.model, layers) if experts)
    gradients = data.gradients
    for axis, ranks in (("ep", mesh.ep), (data.axis, mesh.dp * mesh.cp)):  # of copies of experts, one a projection
        gradients += links.time(axis, "replicas", traffic[axis, "replicas"] / max(1, 3 * mixed), ranks)
    # between stages, and a tied embedding at both ends
    border = activations(run).border
    send = machine.seconds("send", border, 2, crosses_hosts(mesh, "pp", machine)) if mesh.pp > 1 else 0.0
    scalars = machine.seconds("all_reduce", 24, mesh.world_size, crosses_hosts(mesh, "world", machine))
    scalars += machine.seconds("all_reduce", 8, mesh.dp * mesh.cp, crosses_hosts(mesh, data.axis, machine))
    passes = [sum(each[i] for each in inside.values()) for i in (0, 1)]
    by_axis = {axis: sum(each) for axis, each in inside.items() if sum(each)}
    return Messages(
        passes[0], passes[1], send, gradients, data.weights, scalars, by_axis,
        sum(links.number[axis] for axis in ("tp", "cp", "ep")) / run.train.micro_batches,
    )  # fmt: skip


class _Links:
    """A rank's bytes over a machine's links; counts the messages of each axis."""

    def __init__(self, run: RunConfig, machine: Machine, traffic: Traffic) -> None:
        self.run, self.machine, self.traffic = run, machine, traffic
        self.number: Counter[str] = Counter()
        # in forward, of what both passes exchange
        self.share = 1 / 3 if run.train.recompute == "full" else 1 / 2

    def time(
        self, axis: str, operation: str, size: float, ranks: int, payload: float | None = None, group: int = 0
    ) -> float:
        """Seconds for a step's payload of an operation, or for this one, in messages of `size` bytes."""
        whole = self.traffic[axis, operation] if payload is None else payload
        count = max(1.0, whole / size) if whole else 0.0
        self.number[axis] += count  # type: ignore[assignment]
        across = crosses_hosts(self.run.mesh, axis, self.machine, group)
        return self.machine.seconds(operation, whole, ranks, across, count)


def _tensor(links: _Links) -> tuple[float, float]:
    """Tensor parallelism, in a forward and a backward of a micro-batch; and the two small messages of the loss."""
    run = links.run
    border = activations(run).border  # of this rank: a tp-th with sequence parallelism
    hidden = border * run.mesh.tp if run.train.sequence_parallel else border
    sizes = {"all_reduce": hidden, "all_gather": border, "reduce_scatter": hidden}
    whole = sum(links.time("tp", op, size, run.mesh.tp) for op, size in sizes.items()) / run.train.micro_batches
    return whole * links.share, whole * (1 - links.share)


def _context(links: _Links, layers: Collection[int]) -> tuple[float, float]:
    """Context parallelism: Ulysses is waited for, the ring where attention does not hide it."""
    run, machine = links.run, links.machine
    train, cp, m = run.train, run.mesh.cp, run.train.micro_batches
    if cp == 1:
        return 0.0, 0.0
    if train.context == "ulysses":
        whole = links.time("cp", "all_to_all", links.traffic["cp", "all_to_all"] / (m * len(layers) * 8), cp) / m
        return whole * links.share, whole * (1 - links.share)
    hops = len(layers) * ((cp - 1) * (3 if train.recompute == "full" else 2) + cp)
    ring = links.time("cp", "send", max(1.0, links.traffic["cp", "send"] / (m * hops)), cp) / m
    wide = max(ITEMSIZE[train.dtype], 4) / ITEMSIZE[train.dtype]
    share = (cp - 1) / ((cp - 1) / links.share + cp * wide)
    attention = forward_work(run, layers, False).attention / machine.attention_flops * machine.turns
    return (
        exposed(ring * share, attention, machine.overlap),
        exposed(ring * (1 - share), 2.5 * attention, machine.overlap),
    )


def _experts(links: _Links, layers: Collection[int], skew: float) -> tuple[float, float]:
    """Rows to experts, what is beside them, and the way back, of each part; the first part hides behind nothing."""
    run, machine = links.run, links.machine
    train, ep, m, traffic = run.train, run.mesh.ep, run.train.micro_batches, links.traffic
    mixed = sum(number for number, experts in kinds(run.model, layers) if experts)
    if ep == 1 or not mixed:
        return 0.0, 0.0
    passes, parts = 2 + (train.recompute != "none"), train.dispatch_parts
    # with dispatch=allgather a gather and a scatter each way, and of what is beside all parts one of either
    even, total = 1 + 0.5 / parts, passes * parts * mixed * m
    legs = {"all_to_all": 3.0, "all_gather": even, "reduce_scatter": even}
    trips = sum(links.time("ep", op, traffic["ep", op] / (n * total), ep) for op, n in legs.items()) / m
    numbers = links.time("ep", "counts", traffic["ep", "counts"] / ((passes - 1) * mixed * m), ep) / m / (passes - 1)
    later = trips / passes * (parts - 1) / parts
    cover = mixed * mlp_flops(run, True, skew) / machine.product_flops * machine.turns * (parts - 1) / parts
    forward = numbers + trips / passes / parts + exposed(later, cover, machine.overlap)
    return forward, (passes - 2) * forward + trips / passes / parts + exposed(later, 2 * cover, machine.overlap)


@dataclass(frozen=True)
class _Data:
    axis: str  # "dp", or "dp_cp"
    forward: float  # in each forward of a micro-batch
    backward: float
    gradients: float  # once, after the last backward
    weights: float  # once, after the update


def _data(links: _Links, layers: Collection[int], forward: float, backward: float) -> _Data:
    """Data parallelism, of any `zero`; `forward` and `backward` are the seconds that a micro-batch computes."""
    run, machine, traffic = links.run, links.machine, links.traffic
    train, mesh, m, time = run.train, run.mesh, run.train.micro_batches, links.time
    mixed = sum(number for number, experts in kinds(run.model, layers) if experts)
    data = "dp" if mesh.cp == 1 else "dp_cp"
    replicas, group, inside = mesh.dp * mesh.cp, train.zero_group or mesh.dp, mesh.edp_inside(train.zero_group)
    size = train.bucket_mb * 2**20
    if train.reduce_group:
        near, far = train.reduce_group * mesh.tp > machine.ranks_per_host, crosses_hosts(mesh, data, machine)
        operations = (("reduce_scatter", train.reduce_group, near), ("all_gather", train.reduce_group, near),
                      ("all_reduce", replicas // train.reduce_group, far))  # fmt: skip
        number = max(1.0, traffic[data, "reduce_scatter"] / size)
        whole = sum(machine.seconds(op, traffic[data, op], n, across, number) for op, n, across in operations)
        return _Data(data, 0.0, 0.0, _tail(whole, number, backward, machine), 0.0)
    if not train.zero:
        whole = time(data, "all_reduce", size, replicas) + time("edp", "all_reduce", size, mesh.edp)
        number = (traffic[data, "all_reduce"] + traffic["edp", "all_reduce"]) / size
        return _Data(data, 0.0, 0.0, _tail(whole, number, backward, machine), 0.0)
    rounds = 1 if train.zero == 1 else m
    each = traffic["dp", "reduce_scatter"] / rounds
    size = size if train.zero < 3 else max(1.0, each / (len(layers) + 2))  # with all frozen nothing is scattered
    reduce = time("dp", "reduce_scatter", size, group, each, group)
    reduce += time("edp", "reduce_scatter", size, inside, traffic["edp", "reduce_scatter"] / rounds, group)
    waited = _tail(reduce, each / size, backward, machine)
    once = 0.0  # sums over the groups, after the last backward
    if group < mesh.dp:
        once += time("dp", "all_reduce", size, mesh.dp // group)
        once += time("edp", "all_reduce", size, mesh.edp // inside)
    once += time("cp", "all_reduce", size, mesh.cp)
    gathered, spread = traffic["dp", "all_gather"], traffic["edp", "all_gather"]
    if train.zero == 3:
        gather = time("dp", "all_gather", gathered / (2 * m * (len(layers) + 2)), group, gathered / (2 * m), group)
        gather += time("edp", "all_gather", spread / (2 * m * max(1, mixed)), inside, spread / (2 * m), group)
        # the first unit of each chunk is waited for: nothing travels ahead for another chunk
        ahead = [_tail(gather, len(layers) + 2, cover, machine, train.chunks) for cover in (forward, backward)]
        return _Data(data, ahead[0], waited + ahead[1], once, 0.0)
    weights = time("dp", "all_gather", size / group, group, gathered, group)
    weights += time("edp", "all_gather", size / inside, inside, spread, group)
    return _Data(data, 0.0, waited * (train.zero == 2), once + waited * (train.zero == 1), weights)


def best_bucket(gradient_bytes: float, link: Link, ranks: int, operation: str = "all_reduce") -> float:
    """The bucket size, in bytes, that exposes least: large enough for the latency, small enough to overlap.

    G bytes of gradients in buckets of b bytes are G / b messages. Each pays the latency a (times log2 of the ranks),
    whether or not it hides; and the last bucket hides behind nothing, since backward is over when it is full: it shows
    b / B, with B the payload bytes a second. So what a bucket size costs is

        cost(b) = a G / b + b / B,        least where  a G / b^2 = 1 / B,  that is  b = sqrt(a B G)

    The latency's share of each message there is a / (a + b / B) = 1 / (1 + sqrt(G / (a B))): small as soon as the
    gradients are many times what the link carries in one latency; and G / b = sqrt(G / (a B)) buckets are there to
    overlap. With less than a B in all one bucket is best.
    """
    latency = link.latency * math.ceil(math.log2(ranks))
    payload_rate = link.bandwidth / wire_bytes(operation, 1.0, ranks)
    return min(gradient_bytes, math.sqrt(latency * payload_rate * gradient_bytes))


def _tail(whole: float, messages: float, cover: float, machine: Machine, alone: int = 1) -> float:
    """What is left of messages that start one by one while a pass runs: the last, or `alone`, hide behind nothing."""
    number = max(1, math.ceil(messages))
    shown = whole * min(alone, number) / number
    return shown + exposed(whole - shown, cover, machine.overlap)
