"""Pictures and sums of chapter 07: who works with whom, what crosses hosts, where memory and time of a layout go.

Everything is drawn from what the library says of a layout (`mesh.axis_of`, `predict`), for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from ...config import AXES, MeshShape
from ...monitoring.units import bytes_text
from ...parallel.predict import Prediction
from .picture import GREY, INK, PALE, Picture, drawing, figure, picture

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "buffers")
AXIS_COLOURS = {"tp": PALE[0], "cp": PALE[1], "dp": PALE[2], "pp": PALE[4]}
_LEGEND: dict[str, Any] = {
    "fontsize": 8, "loc": "lower left", "bbox_to_anchor": (0, 1), "handlelength": 1, "columnspacing": 1
}  # fmt: skip


def groups(shape: MeshShape, axis: str, order: Sequence[str] = AXES) -> list[tuple[int, ...]]:
    """The groups of an axis, if ranks are numbered with the last axis of `order` fastest.

    Args:
        axis: one of the mesh, "dp_cp" (ranks that differ in dp or cp) or "world".
    """
    moving = {"dp_cp": ("dp", "cp"), "world": AXES}.get(axis, (axis,))
    stride = {name: prod(getattr(shape, faster) for faster in order[n + 1 :]) for n, name in enumerate(order)}

    def offsets(names: Sequence[str]) -> list[int]:
        return sorted(
            sum(index * stride[name] for index, name in zip(place, names, strict=True))
            for place in product(*(range(getattr(shape, name)) for name in names))
        )

    along = offsets(moving)
    return [tuple(base + step for step in along) for base in offsets([name for name in AXES if name not in moving])]


def crosses(shape: MeshShape, axis: str, ranks_per_host: int, order: Sequence[str] = AXES) -> bool:
    """Whether some group of an axis has ranks on more than one host, when hosts are filled rank by rank."""
    return any(len({rank // ranks_per_host for rank in group}) > 1 for group in groups(shape, axis, order))


def bytes_between_hosts(
    traffic: Mapping[tuple[str, str], int], shape: MeshShape, ranks_per_host: int, order: Sequence[str] = AXES
) -> int:
    """Payload of one rank on those axes that cross hosts.

    Args:
        traffic: bytes by (axis, operation), as `predict_step` and the ledger give them.
    """
    return sum(n for (axis, _), n in traffic.items() if crosses(shape, axis, ranks_per_host, order))


def draw_mesh(shape: MeshShape, ranks_per_host: int, order: Sequence[str] = AXES) -> Picture:
    """All ranks in their hosts, once for each axis; ranks of one colour are a group of that axis."""
    from matplotlib.patches import Rectangle

    axes = [axis for axis in reversed(order) if getattr(shape, axis) > 1]
    hosts = -(-shape.world_size // ranks_per_host)
    said = []
    with drawing():
        fig = figure(1.5 + 2.1 * len(axes), 0.7 + 0.62 * hosts)
        for ax, axis in zip(fig.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
            for colour, group in enumerate(groups(shape, axis, order)):
                for rank in group:
                    row, column = divmod(rank, ranks_per_host)
                    ax.add_patch(
                        Rectangle((column, row), 0.9, 0.72, facecolor=PALE[colour % len(PALE)], edgecolor=GREY)
                    )
                    ax.text(column + 0.45, row + 0.36, str(rank), ha="center", va="center", color=INK)
            for row in range(hosts):
                ax.add_patch(
                    Rectangle(
                        (-0.12, row - 0.1), ranks_per_host + 0.14, 0.92, fill=False, edgecolor=GREY, linewidth=0.8
                    )
                )
            where = "between hosts" if crosses(shape, axis, ranks_per_host, order) else "inside a host"
            ax.set_title(f"{axis}: {where}", fontsize=9, loc="left")
            ax.set(xlim=(-0.2, ranks_per_host + 0.1), ylim=(hosts - 0.1, -0.2))
            ax.axis("off")
            some = ", ".join("-".join(map(str, group)) for group in groups(shape, axis, order)[:2])
            said.append(f"{axis} {where}, groups {some} and so on")
    return picture(
        fig,
        f"{shape.world_size} ranks in {hosts} hosts of {ranks_per_host}, drawn once for each axis; ranks of one colour "
        f"work together. {'; '.join(said)}.",
    )


def draw_memory(predictions: Mapping[str, Prediction], limit: float) -> Picture:
    """Memory of the fullest rank by what it is for, one bar a layout, and a line at what there is.

    Args:
        limit: bytes of a device.
    """
    with drawing():
        fig = figure(6.8, 0.9 + 0.3 * len(predictions))
        ax = fig.subplots()
        for row, found in enumerate(predictions.values()):
            left = 0.0
            for kind, colour in zip(KINDS, PALE, strict=False):
                size = found.memory.get(kind, 0) / GIB
                ax.barh(row, size, left=left, color=colour, edgecolor=GREY, linewidth=0.4, label=None if row else kind)
                left += size
        ax.axvline(limit / GIB, color=GREY, linestyle=":")
        ax.set_yticks(range(len(predictions)), predictions)
        ax.invert_yaxis()
        ax.set_xlabel("GiB; the dotted line is one device")
        ax.legend(
            fontsize=8, ncols=len(KINDS), loc="lower left", bbox_to_anchor=(0, 1), handlelength=1, columnspacing=1
        )
    rows = "; ".join(
        f"{name}: {bytes_text(found.memory_bytes)}, most of it {max(found.memory, key=lambda k: found.memory[k])}"
        for name, found in predictions.items()
    )
    return picture(fig, f"Bars of the predicted memory of the fullest rank, against {bytes_text(limit)}. {rows}.")


def draw_time(ranked: Sequence[Prediction]) -> Picture:
    """Where the predicted step time goes, one bar a layout, in units of the first one's whole."""
    unit = ranked[0].seconds
    names = list(dict.fromkeys(name for found in ranked for name in found.parts if name != "scalars"))
    names.sort(key=lambda name: name != "computing")
    colours = {"computing": PALE[0], "bubble": "#e0e0e0", **dict(zip(names[1:], PALE[1:], strict=False))}
    with drawing():
        fig = figure(6.8, 0.9 + 0.3 * len(ranked))
        ax = fig.subplots()
        for name in names:
            lefts = [sum(found.parts.get(other, 0) for other in names[: names.index(name)]) / unit for found in ranked]
            sizes = [found.parts.get(name, 0) / unit for found in ranked]
            ax.barh(
                range(len(ranked)), sizes, left=lefts, color=colours[name], edgecolor=GREY, linewidth=0.4, label=name
            )
        ax.set_yticks(range(len(ranked)), [found.run.layout for found in ranked])
        ax.invert_yaxis()
        ax.set_xlabel("predicted time of a step, of the best layout's")
        ax.legend(
            fontsize=8, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), handlelength=1, columnspacing=1
        )
    said = "; ".join(
        f"{found.run.layout} {found.seconds / unit:.2f}, {found.parts['computing'] / found.seconds:.0%} computing"
        for found in ranked
    )
    return picture(fig, f"Bars of the predicted step time, in units of the best layout's. {said}.")


def draw_bytes(sent: Mapping[str, Mapping[str, int]]) -> Picture:
    """Payload of a rank by axis on a logarithmic scale, a group of bars for each layout.

    Args:
        sent: by layout, then by axis.
    """
    with drawing():
        fig = figure(6.8, 2.6)
        ax = fig.subplots()
        for n, (axis, colour) in enumerate(AXIS_COLOURS.items()):
            places = [row + 0.2 * (n - 1.5) for row, each in enumerate(sent.values()) if each.get(axis)]
            sizes = [each[axis] for each in sent.values() if each.get(axis)]
            ax.bar(places, sizes, 0.19, color=colour, edgecolor=GREY, linewidth=0.4, label=axis)
        ax.set_yscale("log")
        ax.set_ylim(bottom=min(n for each in sent.values() for n in each.values() if n) / 3)
        ax.set_xticks(range(len(sent)), sent)
        ax.set_ylabel("bytes of a rank in a step")
        ax.legend(ncols=4, **_LEGEND)
    said = "; ".join(
        f"{name}: " + ", ".join(f"{axis} {n:,}" for axis, n in each.items() if axis in AXIS_COLOURS)
        for name, each in sent.items()
    )
    return picture(fig, f"Bars of the bytes that one rank sends in a step, by axis. {said}.")
