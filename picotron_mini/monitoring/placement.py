"""A picture of where each parameter lives: a row a parameter, a column a rank, a square the tensor.

    parameter                     rank 0   rank 1
    layers.0.attention.q.weight    [##]     [  ]      tp splits dim 0: rank 0 has the upper half of the rows
                                   [  ]     [##]
    layers.0.attention.o.weight    [# ]     [ #]      tp splits dim 1: rank 0 has the left half of the columns
    norm.weight                    [##]     [##]      every rank has all of it

Input is `layout.json`: the mesh, the ranks with their coordinates, and for each parameter its global shape,
its stages, its shards (axis, dim, index range per coordinate) and the axes that sum its gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import groupby, product
from typing import Any

from picotron_mini.monitoring.page import escape
from picotron_mini.monitoring.units import count_text

SIDE = 20  # of the square that stands for a tensor
MOST_RANKS = 16  # columns; of more ranks, those that hold the same are shown once

Json = dict[str, Any]

_LAYER = re.compile(r"^layers\.(\d+)\.")


def held(parameter: Json, coordinates: dict[str, int]) -> list[tuple[int, int]] | None:
    """The index range, per dim, that the rank at these coordinates holds; None where it holds nothing."""
    if coordinates.get("pp", 0) not in parameter["stages"]:
        return None
    ranges = [(0, size) for size in parameter["shape"]]
    for shard in parameter["shards"]:
        start, end = shard["ranges"][coordinates[shard["axis"]]]
        low, high = ranges[shard["dim"]]
        ranges[shard["dim"]] = (max(low, start), min(high, end))
    return ranges if all(low < high for low, high in ranges) else None


def placement_section(layout: Json) -> str:
    """The HTML of the whole section: the mesh with what each rank holds, then the parameters."""
    parameters, ranks = layout["parameters"], layout["ranks"]
    shown = _shown(layout)
    hidden = len(ranks) - len(shown)
    note = " A dashed outline is held by other stages." if layout["axes"]["pp"] > 1 else ""
    note += f" {hidden} more ranks hold copies of what these hold." if hidden else ""
    out = [
        "<p>Each square is a parameter, rows downwards and columns across; the filled part is what that rank "
        f"holds.{note} Point at a square to read its index ranges. The last column names the axes over which the "
        "gradient is summed.</p>",
        _mesh(layout),
        '<div class="wide">',
    ]
    for place, (title, members) in enumerate(_groups(parameters)):
        opened = " open" if place < 2 else ""
        size = sum(math.prod(p["shape"]) for p in members)
        out.append(
            f"<details{opened}><summary>{escape(title)} <small>{len(members)} parameters, "
            f"{count_text(size)} numbers</small></summary>{_matrix(members, shown)}</details>"
        )
    return "".join([*out, "</div>"])


def _shown(layout: Json) -> list[Json]:
    """All ranks, or one of each set of copies where there are too many for a table."""
    ranks: list[Json] = layout["ranks"]
    if len(ranks) <= MOST_RANKS:
        return ranks
    split = {shard["axis"] for p in layout["parameters"] for shard in p["shards"]} | {"pp"}
    return [r for r in ranks if all(index == 0 for axis, index in r["coordinates"].items() if axis not in split)]


def _groups(parameters: Iterable[Json]) -> list[tuple[str, list[Json]]]:
    """What stands outside the layers, then runs of layers that are placed alike, each under one title."""
    outside: list[Json] = []
    layers: dict[int, list[Json]] = {}
    for parameter in parameters:
        match = _LAYER.match(parameter["name"])
        if match:
            layers.setdefault(int(match[1]), []).append(parameter)
        else:
            outside.append(parameter)
    groups = [("Outside the layers", outside)] if outside else []

    def alike(layer: int) -> list[Json]:
        return [p | {"name": _LAYER.sub("", p["name"])} for p in layers[layer]]

    for _, run in groupby(sorted(layers), key=alike):
        numbers = list(run)
        first, last = numbers[0], numbers[-1]
        title = f"Layer {first}" if first == last else f"Layers {first} to {last}, all like layer {first}"
        groups.append((title, layers[first]))
    return groups


def _matrix(parameters: list[Json], ranks: list[Json]) -> str:
    head = "".join(
        f'<th scope="col" class="rank" title="{escape(_coordinates(r))}">{"rank " if n == 0 else ""}{r["rank"]}</th>'
        for n, r in enumerate(ranks)
    )
    rows = []
    for p in parameters:
        cells = "".join(f'<td class="rank">{_slice(p, r)}</td>' for r in ranks)
        rows.append(
            f'<tr><th scope="row" class="name">{_name(p)}</th>'
            f'<td class="shape">{escape(_shape(p))}</td>{cells}'
            f'<td class="sum">{escape(", ".join(p["sum_axes"]) or "none")}</td></tr>'
        )
    return (
        '<table class="placement"><thead><tr><th scope="col" class="name">parameter</th>'
        f'<th scope="col" class="shape">shape</th>{head}<th scope="col" class="sum">gradient sum</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _slice(parameter: Json, rank: Json) -> str:
    ranges = held(parameter, rank["coordinates"])
    shape = parameter["shape"]
    wide = SIDE if len(shape) > 1 else SIDE / 3  # a vector is a narrow bar
    left = (SIDE - wide) / 2
    if ranges is None:
        text = f"{_coordinates(rank)} holds nothing of {parameter['name']}"
        inside = f'<rect class="absent" x="{left + 0.5:g}" y=".5" width="{wide - 1:g}" height="{SIDE - 1}"/>'
    else:
        part = math.prod(high - low for low, high in ranges) / math.prod(shape)
        index = ", ".join(f"{low}:{high}" for low, high in ranges)
        text = f"{_coordinates(rank)} holds {parameter['name']}[{index}] of {_shape(parameter)}: {100 * part:.3g} %"
        (top, bottom), (west, east) = ranges[0], ranges[1] if len(shape) > 1 else (0, 1)
        high, across = SIDE / shape[0], wide / (shape[1] if len(shape) > 1 else 1)
        inside = (
            f'<rect class="whole" x="{left:g}" width="{wide:g}" height="{SIDE}"/>'
            f'<rect class="held" x="{left + west * across:.4g}" y="{top * high:.4g}" '
            f'width="{(east - west) * across:.4g}" height="{(bottom - top) * high:.4g}"/>'
        )
    return f'<svg class="slice" role="img" viewBox="0 0 {SIDE} {SIDE}"><title>{escape(text)}</title>{inside}</svg>'


def _mesh(layout: Json) -> str:
    """A table a pipeline stage: copies (data- and context-parallel) downwards, tensor-parallel ranks across."""
    axes, total = layout["axes"], sum(math.prod(p["shape"]) for p in layout["parameters"])
    contexts = axes.get("cp", 1)
    out = []
    for stage in range(axes["pp"]):
        rows = []
        for copy, part in product(range(axes["dp"]), range(contexts)):
            cells = []
            for rank in layout["ranks"]:
                at = rank["coordinates"]
                if (at["pp"], at["dp"], at.get("cp", 0)) == (stage, copy, part):
                    ranges = [held(p, at) for p in layout["parameters"]]
                    size = sum(math.prod(high - low for low, high in r) for r in ranges if r is not None)
                    share = f"{count_text(size)}, {100 * size / max(total, 1):.0f} %"
                    cells.append(f"<td>rank {rank['rank']}<small>{share}</small></td>")
            row = f"dp {copy}, cp {part}" if contexts > 1 else f"dp {copy}"
            rows.append(f'<tr><th scope="row">{row}</th>{"".join(cells)}</tr>')
        head = "".join(f'<th scope="col">tp {i}</th>' for i in range(axes["tp"]))
        caption = f"Stage {stage} (pp {stage})" if axes["pp"] > 1 else "One pipeline stage"
        out.append(
            f"<table><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    return f'<div class="wide"><div class="stages">{"".join(out)}</div></div>'


def _coordinates(rank: Json) -> str:
    return f"rank {rank['rank']} ({', '.join(f'{axis} {index}' for axis, index in rank['coordinates'].items())})"


def _name(parameter: Json) -> str:
    """The name without the layer, which stands in the title, and breakable at its dots."""
    name = _LAYER.sub("", parameter["name"])
    return f"<code>{escape(name).replace('.', '.<wbr>')}</code>"


def _shape(parameter: Json) -> str:
    return "[" + ", ".join(str(size) for size in parameter["shape"]) + "]"
