"""How many bytes each rank hands to `torch.distributed` in one training step, from formulas alone.

Evaluated before anything is launched, and written without looking at `collectives`: the ledger there counts what
really passes, and the tests require the two to be equal, to the byte. With a = B T D itemsize (one micro-batch's
hidden states), m micro-batches, g bytes a gradient element (at least 4) and w bytes of a logit in float32 or wider:

    axis    operation     bytes                                 what for
    dp      all_reduce    g (elements + parameters) + 8         gradients and their flags; the number of targets
    tp      all_reduce    m a (2 + 2) a layer                   exits of attention and MLP; their entries, backward
            all_reduce    m a on the first stage, m a on the last    embedding; entry of the head, backward
            all_reduce    3 m B T w on the last stage           loss over the split vocabulary
            all_reduce    2 head_dim g a layer                  norms on queries and keys
    dp      (zero > 0)    instead of g (elements + parameters), with C the columns of rows.py, a dp-th and padded:
            reduce_scatter  dp g (C + parameters), times m with zero > 1    gradients and their flags
            all_gather    C itemsize                            zero < 3: the updated weights
            all_gather    m C itemsize for each use             zero 3: weights, before forward and before backward
            all_reduce    g (C + parameters)                    zero_group < dp, which then stands for dp here
    pp      send          m a from all but the last stage       activations
            send          m a from all but the first            their gradients
            send          g elements, from both ends            a tied embedding
    world   all_reduce    24                                    loss, squared norm, stop

An entry's backward exchange happens only if a gradient flows there: below the first trained parameter none does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..config import RunConfig
from ..layout import Layout, Placement

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
    trained = {name: place.local_size(index) for name, place in mine.items() if not name.startswith(train.freeze)}
    itemsize = ITEMSIZE[train.dtype]
    wide = max(itemsize, 4)
    tokens = train.micro_batch_size * train.seq_len
    hidden = tokens * run.model.hidden_size * itemsize
    first, last = index["pp"] == 0, index["pp"] == mesh.pp - 1

    out: Traffic = Counter()
    if mesh.dp > 1:
        out["dp", "all_reduce"] += 8
    if train.zero:
        out += _sharded(run, mine, set(trained), index)
    elif mesh.dp > 1:
        out["dp", "all_reduce"] += wide * (sum(trained.values()) + len(trained))
    if mesh.tp > 1:
        entries = _entries_with_gradient(list(mine), set(trained), flows=not first, head=last)
        exits = sum(name.endswith(("attention.o.weight", "mlp.down.weight")) for name in mine) + first
        out["tp", "all_reduce"] += train.micro_batches * hidden * (entries + exits)
        if last:
            out["tp", "all_reduce"] += train.micro_batches * 3 * tokens * wide
        out["tp", "all_reduce"] += wide * sum(n for name, n in trained.items() if "tp" in mine[name].sum_axes)
    if mesh.pp > 1:
        out["pp", "send"] += train.micro_batches * hidden * ((not last) + (not first))
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


def _entries_with_gradient(names: list[str], trained: set[str], flows: bool, head: bool) -> int:
    """How many tensor-parallel entries of a stage sum a gradient backward: those above a trained parameter.

    Args:
        names: the stage's parameters in model order.
        flows: whether the stage's input needs a gradient, as it does on all stages but the first.
    """
    count = 0
    for name in names:
        if name.endswith(("attention.q.weight", "mlp.gate.weight")):
            count += flows
        elif name == "head.weight":
            break  # training the head itself sends nothing below it
        flows = flows or name in trained
    return count + (flows and head)
