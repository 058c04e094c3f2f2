"""How many bytes each rank hands to `torch.distributed` in one training step, from formulas alone.

Evaluated before anything is launched, and written without looking at `collectives`: the ledger there counts what
really passes, and the tests require the two to be equal, to the byte. With a = B T D itemsize (one micro-batch's
hidden states), m micro-batches, g bytes a gradient element (at least 4) and w bytes of a logit in float32 or wider:

    axis    operation     bytes                                 what for
    dp      all_reduce    g (elements + parameters) + 8         gradients and their flags; the number of targets;
                                                                the axis is dp_cp where cp > 1
            all_reduce    2 (elements + parameters)             compress=bf16: in place of g
            all_gather    g sum (2 k + 1)                       compress=topk: instead, k = ceil(keep elements)
            reduce_scatter  g M, M = elements + parameters, of each bucket rounded up to a multiple of reduce_group
            all_reduce      g M / reduce_group, over the groups (if there are several), in place of the first line's
            all_gather      g M / reduce_group
    tp      all_reduce    m a (2 + 2) a layer                   exits of attention and MLP; their entries, backward
            all_reduce    m a on the first stage, m a on the last    embedding; entry of the head, backward
            all_reduce    3 m B T w on the last stage           loss over the split vocabulary
            all_reduce    2 head_dim g a layer                  norms on queries and keys
      with sequence parallelism the first two lines become, an exit being an embedding's too and an entry a head's,
            reduce_scatter  m a an exit forward, an entry backward      sums, of which a rank keeps its tokens
            all_gather      m a / tp an entry forward, an exit backward
            all_reduce      also 2 D g a layer and D g for the last     norms that see a part of the tokens
    dp      (zero > 0)    instead of g (elements + parameters), with C the columns of rows.py, a dp-th and padded:
            reduce_scatter  dp g (C + parameters), times m with zero > 1    gradients and their flags
            all_gather    C itemsize                            zero < 3: the updated weights
            all_gather    m C itemsize for each use             zero 3: weights, before forward and before backward
            all_reduce    g (C + parameters)                    zero_group < dp, which then stands for dp here; over
                                                                cp as well
    pp      send          m a from all but the last stage       activations (m a / tp with sequence parallelism)
            send          m a from all but the first            their gradients
                          with virtual stages, both for each border of each chunk where the other side is elsewhere
            send          g elements, from both ends            a tied embedding, if the ends are on two stages
    cp      send          m (cp-1) (kv itemsize + 8 B T) a layer    ring: keys, values; documents where masked
            send          m kv ((cp-1) itemsize + cp g) a layer     backward: keys, values; their gradients
            all_to_all    2 m B T (2 H + 2 Hkv) Dh itemsize a layer    ulysses: into heads and back, forward, backward
            all_gather    8 m B T a layer                       ulysses: documents where masked
    world   all_reduce    24                                    loss, squared norm, stop
            all_reduce    8 L (E + 5)                           experts: rows, drops and losses of L layers
    dp      all_reduce    8 m E a layer with experts            auxiliary loss: rows of each; the axis as for gradients
    cp      all_reduce    8 m B E a layer with experts          in place of it, where each sequence is balanced
            all_gather    8 m B T K a layer with experts        capacity: what each token chose, as int64
            all_gather    m B T E w a layer with experts        expert choice: the scores
    tp      all_reduce    E D g a layer with experts            the router's gradient
    ep      all_to_all    S (D itemsize + 2 K w) + R D itemsize a layer with experts    rows S that a rank sends, R that
                          it receives in m micro-batches (`expert_traffic.py`); backward S D itemsize + R (the rest)
                          with dispatch_payload, D itemsize becomes 2 D (bf16), or D + 4 with S and 2 D with R (fp8)
            counts        16 m ep parts a layer with experts          control traffic: how many rows will come
      with dispatch=allgather, in place of both, whatever was decided:
            all_gather    m B T (2 D itemsize + 2 K w) a layer with experts    tokens, and what is beside them;
                          backward the gradients of what experts made
            reduce_scatter  ep as much                          what experts made; backward the gradients of the former
    edp     all_reduce    g (elements + parameters)             gradients of experts, which then are not in those of dp;
                          with zero as those of all else over dp, in groups of zero_group cp / ep
    ep      replicas      3 D I g (c - 1) for each of a rank's experts with c copies, a layer; I/tp with tp. With ZeRO
                          it is over dp (dp_cp), for those that the rank owns

T is a rank's share of the sequence, T / cp; kv = 2 B T Hkv Dh, where H, Hkv are a rank's share of the heads, / tp. With
`recompute=full` each layer in which or below which something is trained runs its exchanges of the forward again, but
for the auxiliary loss; with `recompute=selective` its experts gather again.

A backward exchange happens only if a gradient flows there: below the first trained parameter none does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from ..config import RunConfig
from ..layout import Layout, Placement
from .actions import route_of
from .buckets import last_first
from .expert_traffic import ITEMSIZE, Rows, Traffic, even_step, replica_bytes, row_bytes

# the first parameter of what is one tensor-parallel pair, and the last of its products
ENTRIES = ("attention.q.weight", "mlp.gate.weight", "mlp.router.weight")
EXITS = ("attention.o.weight", "mlp.down.weight", "mlp.experts.down")


def predict_step(run: RunConfig, layout: Layout, index: Mapping[str, int], rows: Rows | None = None) -> Traffic:
    """Bytes of one training step of the rank with coordinates `index`.

    Args:
        run: resolved.
        layout: of `parallelize.layout_of`; where experts have moved, with the order that they were in.
        rows: of this rank, that travel to experts and from them; None: as many as are to be expected if the experts
            are chosen evenly.
    """
    train, mesh = run.train, run.mesh
    mine = {name: place for name, place in layout.items() if place.holds(index)}
    trained = {name: place.local_size(index) for name, place in mine.items() if not train.freezes(name)}
    itemsize = ITEMSIZE[train.dtype]
    wide = max(itemsize, 4)
    tokens = train.micro_batch_size * train.seq_len // mesh.cp
    hidden = tokens * run.model.hidden_size * itemsize
    first, last = index["pp"] == layout["embed.weight"].stages[0], layout["norm.weight"].holds(index)

    out: Traffic = Counter()
    data = "dp" if mesh.cp == 1 else "dp_cp"
    if mesh.dp * mesh.cp > 1:
        out[data, "all_reduce"] += 8
    if train.zero:
        out += _sharded(run, mine, set(trained), index)
    else:
        for axis, names in _by_axis(mine, trained).items():
            axis, size = ("edp", mesh.edp) if axis == "edp" else (data, mesh.dp * mesh.cp)
            elements = [trained[name] for name in names]
            if size == 1:
                continue
            if train.compress == "topk":
                kept = (min(n, math.ceil(train.compress_keep * n)) for n in elements)
                out[axis, "all_gather"] += wide * sum(2 * k + 1 for k in kept)
            elif train.reduce_group:
                # in the order of forward: a tied head, which is named as the embedding, is the last of its stage
                forward = sorted(names, key=lambda name: name == "embed.weight" and not first)
                out += _in_groups(run, {name: trained[name] for name in forward}, axis)
            else:
                width = 2 if train.compress == "bf16" else wide
                out[axis, "all_reduce"] += width * (sum(elements) + len(elements))
    if mesh.tp > 1:
        pairs = sum(name.endswith(EXITS) for name in mine)
        entries, exits = _with_gradient(list(mine), set(trained), first, last)
        again = 2 * _recomputed(list(mine), set(trained), first) if train.recompute == "full" else 0
        if train.sequence_parallel:
            out["tp", "all_gather"] += train.micro_batches * hidden // mesh.tp * (pairs + last + exits + again)
            out["tp", "reduce_scatter"] += train.micro_batches * hidden * (pairs + first + entries + again)
        else:
            out["tp", "all_reduce"] += train.micro_batches * hidden * (pairs + first + entries + again)
        if last:
            out["tp", "all_reduce"] += train.micro_batches * 3 * tokens * wide
        out["tp", "all_reduce"] += wide * sum(n for name, n in trained.items() if "tp" in mine[name].sum_axes)
    if mesh.cp > 1:
        out += _context(run, list(mine), set(trained), tokens, flows=not first)
    if mesh.pp > 1:
        border = hidden // mesh.tp if train.sequence_parallel else hidden
        out["pp", "send"] += train.micro_batches * border * _borders(run, index["pp"])
        out["pp", "send"] += wide * sum(n for name, n in trained.items() if "pp" in mine[name].sum_axes)
    if mesh.world_size > 1:
        out["world", "all_reduce"] += 24
    if run.model.moe is not None:
        out += _routers(run, list(mine), set(trained), tokens, flows=not first)
    if run.model.moe is not None and mesh.ep > 1:
        rows = rows or dict.fromkeys(run.model.moe_layers, even_step(run))
        out += _dispatch(run, list(mine), set(trained), rows, flows=not first)
        out += replica_bytes(run, mine, index)
    return +out  # without zeros


def _by_axis(mine: Mapping[str, Placement], names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters by the axis over which copies of them are: edp for experts that are spread, else dp."""
    out: dict[str, list[str]] = {}
    for name in names:
        spread = any(shard.axis == "ep" for shard in mine[name].shards)
        out.setdefault("edp" if spread else "dp", []).append(name)
    return out


def _in_groups(run: RunConfig, sizes: Mapping[str, int], axis: str) -> Traffic:
    """Gradients summed inside groups, across, and inside again; the sizes are in the order of forward."""
    train, group, wide = run.train, run.train.reduce_group, max(ITEMSIZE[run.train.dtype], 4)
    out: Traffic = Counter()
    for names in last_first(sizes, wide, train.bucket_mb * 2**20):
        part = -(-(sum(sizes[name] for name in names) + len(names)) // group)  # elements and flags, padded
        out[axis, "reduce_scatter"] += wide * part * group
        out[axis, "all_gather"] += wide * part
        if group < run.mesh.dp * run.mesh.cp:
            out[axis, "all_reduce"] += wide * part
    return out


def _dispatch(run: RunConfig, names: list[str], trained: set[str], rows: Rows, flows: bool) -> Traffic:
    """What tokens on their way to experts and back weigh; the first arguments and the last are those of `_context`."""
    moe, train, out = run.model.moe, run.train, Counter[tuple[str, str]]()
    assert moe is not None
    tokens = train.micro_batches * train.micro_batch_size * train.seq_len // run.mesh.cp
    choices = moe.top_k if moe.choice == "token" else moe.num_experts
    there, home = row_bytes(run)
    beside = 2 * choices * max(ITEMSIZE[train.dtype], 4)  # the weights, and which experts they are for
    for layer in dict.fromkeys(name.split(".")[1] for name in names if name.startswith("layers.")):
        own = [name for name in trained if name.startswith(f"layers.{layer}.")]
        experts = [name for name in own if ".experts." in name]
        router = [name for name in own if ".router." in name]
        below = [name for name in own if ".mlp." not in name]
        # whether the rows, the weights beside them, and what the experts make of them have a gradient
        flows = flows or int(layer) in _later_chunks(names) or "embed.weight" in trained or bool(below)
        weighed = flows or bool(router)
        made = weighed or bool(experts)
        if int(layer) in run.model.moe_layers:
            forwards = 1 + ((flows or bool(own)) and train.recompute != "none")
            if train.dispatch == "allgather":
                summed = forwards * home + flows * there + weighed * beside
                out["ep", "all_gather"] += tokens * (forwards * (there + beside) + made * home)
                out["ep", "reduce_scatter"] += tokens * run.mesh.ep * summed
            else:
                sent, received = rows[int(layer)]
                out["ep", "all_to_all"] += forwards * (sent * (there + beside) + received * home)
                out["ep", "all_to_all"] += made * sent * there + flows * received * home + weighed * received * beside
                out["ep", "counts"] += forwards * train.micro_batches * train.dispatch_parts * 16 * run.mesh.ep
        flows = flows or bool(own)
    return out


def _routers(run: RunConfig, names: list[str], trained: set[str], tokens: int, flows: bool) -> Traffic:
    """What routers tell each other; the arguments are those of `_context`."""
    moe, mesh, train = run.model.moe, run.mesh, run.train
    assert moe is not None
    out: Traffic = Counter()
    for layer in dict.fromkeys(name.split(".")[1] for name in names if name.startswith("layers.")):
        flows = flows or int(layer) in _later_chunks(names) or "embed.weight" in trained
        flows = flows or any(name.startswith(f"layers.{layer}.") for name in trained)
        if int(layer) not in run.model.moe_layers:
            continue
        if moe.balance == "aux" and moe.aux_weight > 0 and moe.aux_scope == "global" and mesh.dp * mesh.cp > 1:
            out["dp" if mesh.cp == 1 else "dp_cp", "all_reduce"] += train.micro_batches * 8 * moe.num_experts
        elif moe.balance == "aux" and moe.aux_weight > 0 and mesh.cp > 1:
            pools = train.micro_batch_size
            out["cp", "all_reduce"] += train.micro_batches * 8 * pools * moe.num_experts
        forwards = 1 + (flows and train.recompute != "none")
        if mesh.cp > 1 and moe.choice == "expert":
            wide = max(ITEMSIZE[train.dtype], 4)
            out["cp", "all_gather"] += train.micro_batches * tokens * moe.num_experts * wide * forwards
        elif mesh.cp > 1 and moe.capacity is not None:
            out["cp", "all_gather"] += train.micro_batches * tokens * moe.top_k * 8 * forwards
    if mesh.world_size > 1:
        out["world", "all_reduce"] += 8 * len(run.model.moe_layers) * (moe.num_experts + 5)
    return out


def _sharded(run: RunConfig, mine: Mapping[str, Placement], trained: set[str], index: Mapping[str, int]) -> Traffic:
    """What ZeRO sends. Each parameter takes as many columns of a buffer as the longest of its parts has elements."""
    train, mesh, itemsize = run.train, run.mesh, ITEMSIZE[run.train.dtype]
    columns = {name: place.rows_size(index) for name, place in mine.items()}
    out: Traffic = Counter()
    group, inside = train.zero_group or mesh.dp, mesh.edp_inside(train.zero_group)
    for axis, names in _by_axis(mine, trained).items():
        room = sum(columns[name] for name in names) + len(names)
        size, ranks = (group, mesh.dp) if axis == "dp" else (inside, mesh.edp)
        if size < ranks:
            out[axis, "all_reduce"] = max(itemsize, 4) * room  # over the groups
        if axis == "dp" and mesh.cp > 1:
            out["cp", "all_reduce"] = max(itemsize, 4) * room
        if size == 1:
            continue
        times = 1 if train.zero == 1 else train.micro_batches
        out[axis, "reduce_scatter"] = size * max(itemsize, 4) * room * times
        if train.zero < 3:
            out[axis, "all_gather"] = itemsize * sum(columns[name] for name in names)
    if train.zero < 3:
        return out
    uses: dict[str, list[str]] = {}  # the parameters of each unit, in the order of the forward
    for name in mine:
        uses.setdefault(".".join(name.split(".")[:2]), []).append(name)
    here = mine.get("embed.weight")
    if run.model.tie_embeddings and here and len(here.stages) == 1 and "norm.weight" in mine:
        uses["head"] = uses["embed.weight"]  # used twice
    flows = index["pp"] > 0  # a gradient comes by if a trained parameter is in the unit, or below it
    for unit in uses.values():
        flows = flows or not trained.isdisjoint(unit) or _layer(unit[0]) in _later_chunks(list(mine))
        for axis, names in _by_axis(mine, unit).items():
            if axis == "dp" or inside > 1:
                number = sum(columns[name] for name in names)
                out[axis, "all_gather"] += train.micro_batches * itemsize * number * (1 + flows)
    return out


def _context(run: RunConfig, names: list[str], trained: set[str], tokens: int, flows: bool) -> Traffic:
    """What attention over a split sequence sends: of each layer forward, and backward where a gradient reaches it.

    Args:
        names: the stage's parameters in model order.
        trained: those of them that are not frozen.
        flows: whether the stage's input gets a gradient.
        tokens: of a micro-batch, on this rank.
    """
    model, mesh, train = run.model, run.mesh, run.train
    itemsize = ITEMSIZE[train.dtype]
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    kv = 2 * tokens * model.num_kv_heads // mesh.tp * head_dim
    trade = (2 * tokens * model.num_heads // mesh.tp * head_dim + kv) * itemsize
    documents = 8 * tokens * train.document_mask
    out: Traffic = Counter()
    if mesh.cp == 1:
        return out
    for layer in dict.fromkeys(name.split(".")[1] for name in names if name.startswith("layers.")):
        own = [name for name in trained if name.startswith(f"layers.{layer}.")]
        flows = flows or int(layer) in _later_chunks(names)
        below = [
            name for name in own if not (name.endswith(("attention.o.weight", "mlp_norm.weight")) or ".mlp." in name)
        ]
        reached = flows or "embed.weight" in trained or bool(below)
        flows = reached or bool(own)
        forwards = 1 + (flows and train.recompute == "full")
        if train.context == "ring":
            hops = (mesh.cp - 1) * (kv * itemsize * (forwards + reached) + documents * forwards)
            out["cp", "send"] += train.micro_batches * (hops + reached * mesh.cp * kv * max(itemsize, 4))
        else:
            out["cp", "all_to_all"] += train.micro_batches * trade * (forwards + reached)
            out["cp", "all_gather"] += train.micro_batches * documents * forwards
    return out


def _borders(run: RunConfig, stage: int) -> int:
    """How many neighbours on other stages the chunks of a stage have: each is sent one message a micro-batch."""
    route = route_of(run.train.schedule, run.mesh.pp, run.train.chunks)
    mine = [route.position(stage, chunk) for chunk in range(route.chunks)]
    others = [other for n in mine for other in (n - 1, n + 1) if 0 <= other < route.length]
    return sum(route.stage(other) != stage for other in others)


def _with_gradient(names: list[str], trained: set[str], first: bool, last: bool) -> tuple[int, int]:
    """How many tensor-parallel entries, and how many exits, of a stage are passed by a gradient backward.

    An entry is passed if something below it is trained, an exit also if something of its own pair is.

    Args:
        names: the stage's parameters in model order.
        trained: those of them that are not frozen.
    """
    flows = not first  # the input of a later stage always gets a gradient
    entries, exits = 0, int(first and "embed.weight" in trained)
    for name in names:
        flows = flows or _layer(name) in _later_chunks(names)
        if name.endswith(ENTRIES):
            pair = name.rsplit(".", 2)[0] + "."
            entries += flows
            exits += flows or any(other.startswith(pair) for other in trained)
        elif name == "head.weight":
            break  # training the head itself sends nothing below it
        flows = flows or name in trained
    return entries + (flows and last), exits


def _recomputed(names: list[str], trained: set[str], first: bool) -> int:
    """How many layers of a stage backward passes, and so recomputes: those that hold or lie above a trained weight."""
    flows, layers = not first, dict[str, bool]()
    for name in names:
        flows = flows or name in trained or _layer(name) in _later_chunks(names)
        if name.startswith("layers."):
            layers[name.split(".")[1]] = flows
    return sum(layers.values())


def _layer(name: str) -> int:
    """The number of a parameter's layer; -1 if it is in none."""
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


def _later_chunks(names: list[str]) -> set[int]:
    """The layers that begin a later chunk of a stage: what is below is elsewhere, so their input has a gradient."""
    layers = {_layer(name) for name in names}
    return {layer for layer in layers if layer > 0 and layer - 1 not in layers}
