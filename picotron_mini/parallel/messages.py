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
    train, mesh, m = run.train, run.mesh, run.train.micro_batches
    border = activations(run).border  # of this rank: a tp-th with sequence parallelism
    hidden = border * mesh.tp if train.sequence_parallel else border
    again = 1 / 3 if train.recompute == "full" else 1 / 2  # the forward's share of what both passes exchange

    def time(axis: str, operation: str, size: float, ranks: int, payload: float | None = None, group: int = 0) -> float:
        whole = traffic[axis, operation] if payload is None else payload
        count = max(1.0, whole / size) if whole else 0.0
        return machine.seconds(operation, whole, ranks, crosses_hosts(mesh, axis, machine, group), count)

    # tensor parallelism, and the two small messages of the loss
    tp = (
        sum(
            time("tp", op, border if op == "all_gather" else hidden, mesh.tp)
            for op in ("all_reduce", "all_gather", "reduce_scatter")
        )
        / m
    )
    # context parallelism
    cp_forward = cp_backward = 0.0
    if mesh.cp > 1 and train.context == "ring":
        hops = len(layers) * ((mesh.cp - 1) * (2 if again == 1 / 2 else 3) + mesh.cp)
        ring = time("cp", "send", max(1.0, traffic["cp", "send"] / (m * hops)), mesh.cp) / m
        wide = max(ITEMSIZE[train.dtype], 4) / ITEMSIZE[train.dtype]
        share = (mesh.cp - 1) / ((mesh.cp - 1) / again + mesh.cp * wide)
        attention = forward_work(run, layers, False).attention / machine.attention_flops * machine.turns
        cp_forward = exposed(ring * share, attention, machine.overlap)
        cp_backward = exposed(ring * (1 - share), 2.5 * attention, machine.overlap)
    elif mesh.cp > 1:
        trades = time("cp", "all_to_all", traffic["cp", "all_to_all"] / (m * len(layers) * 8), mesh.cp) / m
        cp_forward, cp_backward = trades * again, trades * (1 - again)
    # expert parallelism: rows, what is beside them, and the way back, of each part; the first part hides behind nothing
    ep_forward = ep_backward = 0.0
    mixed = sum(number for number, experts in kinds(run.model, layers) if experts)
    if mesh.ep > 1 and mixed:
        passes, parts = 2 + (train.recompute != "none"), train.dispatch_parts
        # with dispatch=allgather a gather and a scatter each way, and of what is beside all parts one of either
        even, total = 1 + 0.5 / parts, passes * parts * mixed * m
        legs = {"all_to_all": 3.0, "all_gather": even, "reduce_scatter": even}
        trips = sum(time("ep", op, traffic["ep", op] / (n * total), mesh.ep) for op, n in legs.items()) / m
        numbers = time("ep", "counts", traffic["ep", "counts"] / ((passes - 1) * mixed * m), mesh.ep) / m / (passes - 1)
        later = trips / passes * (parts - 1) / parts
        cover = mixed * mlp_flops(run, True, skew) / machine.product_flops * machine.turns * (parts - 1) / parts
        ep_forward = numbers + trips / passes / parts + exposed(later, cover, machine.overlap)
        ep_backward = (passes - 2) * ep_forward + trips / passes / parts + exposed(later, 2 * cover, machine.overlap)
    # data parallelism
    data = "dp" if mesh.cp == 1 else "dp_cp"
    replicas, group, inside = mesh.dp * mesh.cp, train.zero_group or mesh.dp, mesh.edp_inside(train.zero_group)
    size = train.bucket_mb * 2**20
    gradients = weights = in_forward = in_backward = 0.0
    if train.reduce_group:
        near, far = train.reduce_group * mesh.tp > machine.ranks_per_host, crosses_hosts(mesh, data, machine)
        operations = (("reduce_scatter", train.reduce_group, near), ("all_gather", train.reduce_group, near),
                      ("all_reduce", replicas // train.reduce_group, far))  # fmt: skip
        number = max(1.0, traffic[data, "reduce_scatter"] / size)
        whole = sum(machine.seconds(op, traffic[data, op], n, across, number) for op, n, across in operations)
        gradients = _tail(whole, number, backward, machine)
    elif not train.zero:
        whole = time(data, "all_reduce", size, replicas) + time("edp", "all_reduce", size, mesh.edp)
        number = (traffic[data, "all_reduce"] + traffic["edp", "all_reduce"]) / size
        gradients = _tail(whole, number, backward, machine)
    else:
        rounds = 1 if train.zero == 1 else m
        size = size if train.zero < 3 else traffic["dp", "reduce_scatter"] / (m * (len(layers) + 2))
        each = traffic["dp", "reduce_scatter"] / rounds
        reduce = time("dp", "reduce_scatter", size, group, each, group)
        reduce += time("edp", "reduce_scatter", size, inside, traffic["edp", "reduce_scatter"] / rounds, group)
        waited = _tail(reduce, each / size, backward, machine)
        gathered, spread = traffic["dp", "all_gather"], traffic["edp", "all_gather"]
        if train.zero == 3:
            gather = time("dp", "all_gather", gathered / (2 * m * (len(layers) + 2)), group, gathered / (2 * m), group)
            gather += time("edp", "all_gather", spread / (2 * m * max(1, mixed)), inside, spread / (2 * m), group)
            in_forward = _tail(gather, len(layers) + 2, forward, machine)
            in_backward = waited + _tail(gather, len(layers) + 2, backward, machine)
        else:
            weights = time("dp", "all_gather", size / group, group, gathered, group)
            weights += time("edp", "all_gather", size / inside, inside, spread, group)
            gradients, in_backward = (waited, 0.0) if train.zero == 1 else (0.0, waited)
        if group < mesh.dp:
            gradients += time("dp", "all_reduce", size, mesh.dp // group)
            gradients += time("edp", "all_reduce", size, mesh.edp // inside)
        gradients += time("cp", "all_reduce", size, mesh.cp)
    for axis, ranks in (("ep", mesh.ep), (data, replicas)):  # gradients of copies of experts, a message a projection
        gradients += time(axis, "replicas", traffic[axis, "replicas"] / max(1, 3 * mixed), ranks)
    # between stages, and a tied embedding at both ends
    send = machine.seconds("send", border, 2, crosses_hosts(mesh, "pp", machine)) if mesh.pp > 1 else 0.0
    scalars = machine.seconds("all_reduce", 24, mesh.world_size, crosses_hosts(mesh, "world", machine))
    scalars += machine.seconds("all_reduce", 8, replicas, crosses_hosts(mesh, data, machine))
    by_axis = {"tp": tp, "cp": cp_forward + cp_backward, "ep": ep_forward + ep_backward, "dp": in_forward + in_backward}
    return Messages(
        tp * again + cp_forward + ep_forward + in_forward,
        tp * (1 - again) + cp_backward + ep_backward + in_backward, send, gradients, weights, scalars,
        {axis: seconds for axis, seconds in by_axis.items() if seconds},
    )  # fmt: skip


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


def _tail(whole: float, messages: float, cover: float, machine: Machine) -> float:
    """What is left of messages that start one by one while a pass runs: the last can hide behind nothing."""
    last = whole / max(1, math.ceil(messages))
    return last + exposed(whole - last, cover, machine.overlap)
