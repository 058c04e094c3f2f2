"""What a layout does, in words and numbers, before anything runs: hooks hide it, so it is printed.

describe(run)   ->   where each parameter lives, then what each rank sends in one step, when, and how many bytes
"""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table

from ..config import RunConfig
from ..layout import Placement
from ..legality import notices
from ..mesh import coordinates
from .actions import route_of
from .parallelize import layout_of, stage_layers
from .traffic import predict_step

WHEN = {
    ("dp", "all_reduce"): "gradients, while the last micro-batch's backward runs; the number of targets",
    ("tp", "all_reduce"): "exits of attention and MLP, their entries backward, the loss over the split vocabulary",
    ("tp", "all_gather"): "entries of attention, MLP and head; their exits backward: all tokens, from each rank's part",
    ("tp", "reduce_scatter"): "exits of attention, MLP and embedding; their entries backward: sums, cut by tokens",
    ("dp_cp", "all_reduce"): "gradients, while the last micro-batch's backward runs; the number of targets",
    ("cp", "send"): "keys and values round the ring, beside each layer's attention; backward again, with gradients",
    ("cp", "all_to_all"): "tokens against heads, before and after each layer's attention, forward and backward",
    ("cp", "all_gather"): "documents of the whole sequence, for each layer's attention",
    ("pp", "send"): "hidden states to the next stage, their gradients to the previous one; a tied embedding",
    ("ep", "all_to_all"): "tokens to their experts and back, forward and backward; as many as if chosen evenly",
    ("ep", "all_gather"): "tokens of all ranks to all experts; backward the gradients of what these made",
    ("ep", "reduce_scatter"): "what experts made, added up, to the tokens' ranks; backward the gradients of tokens",
    ("ep", "counts"): "how many tokens will come, before they do: control traffic",
    ("ep", "replicas"): "gradients of experts that have copies, after backward; as they are placed at the start",
    ("dp", "replicas"): "gradients of experts that have copies, after backward; as they are placed at the start",
    ("dp_cp", "replicas"): "gradients of experts that have copies, after backward; as they are placed at the start",
    ("edp", "all_reduce"): "gradients of experts, while the last micro-batch's backward runs",
    ("world", "all_reduce"): "loss, gradient norm and stop flag, at the end of the step",
}


ZERO = {  # ... and with zero=1, 2, 3
    ("dp", "all_reduce"): ["the number of targets; with zero_group, gradients over the groups"] * 3,
    ("dp_cp", "all_reduce"): ["the number of targets"] * 3,
    ("cp", "all_reduce"): ["gradients of the rows that a rank owns, after the last backward"] * 3,
    ("dp", "reduce_scatter"): [
        "gradients, while the last micro-batch's backward runs",
        "gradients, while each micro-batch's backward runs",
        "gradients of each unit, after its backward or each half of it, in each micro-batch",
    ],
    ("edp", "all_reduce"): ["gradients of experts over the groups, after the last backward"] * 3,
    ("edp", "reduce_scatter"): ["gradients of experts, as those of all else over dp"] * 3,
    ("edp", "all_gather"): ["weights of experts, as those of all else over dp"] * 3,
    ("dp", "all_gather"): [
        "the updated weights, after the optimizer",
        "the updated weights, after the optimizer",
        "weights of each unit, while the unit before it in its chunk runs forward, and the one above it backward",
    ],
}


GROUPED = {  # ... and with reduce_group
    "reduce_scatter": "gradients inside each group, while the last micro-batch's backward runs; a rank keeps a part",
    "all_reduce": "that part over the groups, behind it (on the CPU after backward); the number of targets",
    "all_gather": "all parts of the sum inside each group, behind that",
}


EXPERTS = {  # ... and what routers add
    ("dp", "all_reduce"): "rows of each expert, for the auxiliary loss, beside forward and backward",
    ("dp_cp", "all_reduce"): "rows of each expert, for the auxiliary loss, beside forward and backward",
    ("cp", "all_reduce"): "rows of each expert in each sequence, for the auxiliary loss, beside forward and backward",
    ("cp", "all_gather"): "what each token of the sequence chose, or its scores, in each layer with experts",
    ("world", "all_reduce"): "rows, drops and auxiliary losses of each layer with experts",
}


def _when(run: RunConfig, key: tuple[str, str]) -> str:
    text = ZERO[key][run.train.zero - 1] if run.train.zero and key in ZERO else WHEN.get(key, "")
    if run.train.reduce_group and key[0] in ("dp", "dp_cp"):
        text = GROUPED[key[1]]
    if key == ("ep", "all_to_all") and run.train.dispatch_payload != "same":
        text += "; " + {"bf16": "in bf16", "fp8": "there in float8, back in bf16"}[run.train.dispatch_payload]
    moe = run.model.moe
    if moe is None or key not in EXPERTS:
        return text
    axis, operation = key
    counted = moe.balance == "aux" and moe.aux_weight > 0
    asked = moe.choice == "expert" or moe.capacity is not None
    said = {
        "dp": counted and moe.aux_scope == "global",
        "cp": asked if operation == "all_gather" else counted and moe.aux_scope == "sequence",
    }
    if key == ("cp", "all_gather") and not (run.train.context == "ulysses" and run.train.document_mask):
        text = ""  # nobody asks for documents
    more = EXPERTS[key] if said.get(axis.removesuffix("_cp"), True) else ""
    return "; ".join(part for part in (text, more) if part)


def describe(run: RunConfig) -> RenderableType:
    """Tables for a terminal or a notebook (through `rich.print`).

    Args:
        run: resolved, with the vocabulary's size filled.
    """
    layout = layout_of(run)
    what = "masters and gradients" if run.train.zero in (1, 2) else "parameters"
    places = Table(title=f"where the {what} live: {run.layout}", title_justify="left")
    for column in ("parameter", "shape", "stages", "split", "gradient summed over"):
        places.add_column(column)
    route = route_of(run.train.schedule, run.mesh.pp, run.train.chunks)
    parts = stage_layers(run.model, route.length, run.train.seq_len)
    held = [[parts[route.position(s, chunk)] for chunk in range(route.chunks)] for s in range(route.stages)]
    seen: set[str] = set()
    for name, place in layout.items():
        short = re.sub(r"^layers\.\d+", "layers.*", name)
        if short in seen:
            continue
        seen.add(short)
        where = ", ".join(map(str, place.stages))
        if short != name:
            having = [n for n in range(run.model.num_layers) if short.replace("*", str(n), 1) in layout]
            held_here = [[range(max(r.start, having[0]), min(r.stop, having[-1] + 1)) for r in runs] for runs in held]
            ranges = [" and ".join(_span(r) for r in runs if r) for runs in held_here]
            where = "; ".join(f"{s}: layers {text}" for s, text in enumerate(ranges) if text)
        places.add_row(short, str(list(place.shape)), where, _split(place), ", ".join(_summed(run, place)) or "nothing")
    bytes_ = Table(
        title="what a rank hands to torch.distributed in one step; where the ranks of a stage differ, the most",
        title_justify="left",
    )
    for column in ("axis", "operation", "when"):
        bytes_.add_column(column)
    most: list[Counter[tuple[str, str]]] = [Counter() for _ in range(run.mesh.pp)]  # of a stage's ranks, by key
    for stage, traffic in enumerate(most):
        bytes_.add_column(f"bytes, stage {stage}", justify="right")
        for rank in range(run.mesh.world_size):
            if (index := coordinates(run.mesh, rank))["pp"] == stage:
                traffic |= predict_step(run, layout, index)  # the larger of both, key by key
    for axis, operation in sorted({key for traffic in most for key in traffic}):
        numbers = [f"{traffic[axis, operation]:,}" for traffic in most]
        bytes_.add_row(axis, operation, _when(run, (axis, operation)), *numbers)
    return Group(places, bytes_, *(f"note: {notice}" for notice in notices(run)))


def _span(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}"


def _split(place: Placement) -> str:
    return "; ".join(f"dim {s.dim} over {s.axis}: {_lengths(s.ranges)}" for s in place.shards) or "whole"


def _lengths(ranges: tuple[tuple[int, int], ...]) -> str:
    return "+".join(str(stop - start) for start, stop in ranges)


def _summed(run: RunConfig, place: Placement) -> list[str]:
    copies = ["ep, where it has copies"] if len(place.order) > place.shape[0] else []
    return [axis for axis in place.sum_axes if getattr(run.mesh, axis) > 1] + copies
