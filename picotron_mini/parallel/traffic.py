"""How many bytes each rank hands to `torch.distributed` in one training step, from formulas alone.

Evaluated before anything is launched, and written without looking at `collectives`: the ledger there counts what
really passes, and the tests require the two to be equal, to the byte. With a = B T D itemsize (one micro-batch's
hidden states), m micro-batches, g bytes a gradient element (at least 4) and w bytes of a logit in float32 or wider:

    axis    operation     bytes                                 what for
    dp      all_reduce    g (elements + parameters) + 8         gradients and their flags; the number of targets;
                                                                the axis is dp_cp where cp > 1
            all_reduce    2 (elements + parameters)             compress=bf16: in place of g
            all_gather    g sum (2 k + 1)                       compress=topk: instead, k = ceil(keep elements)
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

T is a rank's share of the sequence, T / cp; kv = 2 B T Hkv Dh, where H, Hkv are a rank's share of the heads, / tp. With
`recompute=full` each layer in which or below which something is trained runs its exchanges of the forward again.

A backward exchange happens only if a gradient flows there: below the first trained parameter none does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from ..config import RunConfig
from ..layout import Layout, Placement
from .actions import route_of

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
Traffic = Counter[tuple[str, str]]  # (axis, operation) -> bytes


def predict_step(run: RunConfig, layout: Layout, index: Mapping[str, int]) -> Traffic:
    """Bytes of one training step of the rank with coordinates `index`.

    Args:
        run: resolved.
        layout: of `parallelize.layout_of`.
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
    elif mesh.dp * mesh.cp > 1:
        if train.compress == "topk":
            kept = (min(n, math.ceil(train.compress_keep * n)) for n in trained.values())
            out[data, "all_gather"] += wide * sum(2 * k + 1 for k in kept)
        else:
            width = 2 if train.compress == "bf16" else wide
            out[data, "all_reduce"] += width * (sum(trained.values()) + len(trained))
    if mesh.tp > 1:
        pairs = sum(name.endswith(("attention.o.weight", "mlp.down.weight")) for name in mine)
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
    return +out  # without zeros


def _sharded(run: RunConfig, mine: Mapping[str, Placement], trained: set[str], index: Mapping[str, int]) -> Traffic:
    """What ZeRO sends. Each parameter takes as many columns of a buffer as the longest of its parts has elements."""
    train, mesh, itemsize = run.train, run.mesh, ITEMSIZE[run.train.dtype]
    columns = {name: place.padded_size("dp", index) for name, place in mine.items()}
    room = sum(columns[name] for name in trained) + len(trained)
    out: Traffic = Counter()
    group = train.zero_group or mesh.dp
    if group < mesh.dp:
        out["dp", "all_reduce"] = max(itemsize, 4) * room  # over the groups
    if mesh.cp > 1:
        out["cp", "all_reduce"] = max(itemsize, 4) * room
    out["dp", "reduce_scatter"] = group * max(itemsize, 4) * room * (1 if train.zero == 1 else train.micro_batches)
    if train.zero < 3:
        out["dp", "all_gather"] = itemsize * sum(columns[name] for name in trained)
        return out
    uses: dict[str, list[str]] = {}  # the parameters of each unit, in the order of the forward
    for name in mine:
        uses.setdefault(".".join(name.split(".")[:2]), []).append(name)
    if run.model.tie_embeddings and mesh.pp == 1:
        uses["head"] = uses["embed.weight"]  # used twice
    flows = index["pp"] > 0  # a gradient comes by if a trained parameter is in the unit, or below it
    for names in uses.values():
        flows = flows or not trained.isdisjoint(names)
        out["dp", "all_gather"] += train.micro_batches * itemsize * sum(columns[name] for name in names) * (1 + flows)
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
    for layer in dict.fromkeys(name.split(".")[1] for name in names if name.startswith("layers.")):
        own = [name for name in trained if name.startswith(f"layers.{layer}.")]
        above = ("attention.o.weight", "mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight")
        flows = flows or int(layer) in _later_chunks(names)
        reached = flows or "embed.weight" in trained or any(not name.endswith(above) for name in own)
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
        if name.endswith(("attention.q.weight", "mlp.gate.weight")):
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
