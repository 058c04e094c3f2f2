"""Where every parameter lives: the one fact that all techniques share.

    layout: global name -> Placement(shape, stages, shards, sum_axes)

    "layers.3.mlp.down.weight" -> shape [192, 512], on stage 1, dim 1 split over tp as (0,256) (256,512),
                                  its gradient summed over dp

Gradient clipping, checkpoints, the byte prediction, `describe` and the parity test read it, and nothing else needs
to know which technique put a parameter where. A layout is computed before any process exists.

The convention for uneven shards, written once: `split` cuts as `torch.chunk` and DTensor do. Every shard has the
ceiling of total / parts but the last ones, which may be short or even empty: 5 by 4 gives 2, 2, 1, 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from .config import AXES, MeshShape
from .mesh import coordinates


@dataclass(frozen=True)
class Shard:
    """One tensor dim cut over one mesh axis: the rank with index i holds `ranges[i]`.

    Where an earlier shard of the same placement has cut this dim already, the ranges are inside that part. Parts may
    be uneven; the ranges are then those of the longest part (the first), and what lies beyond a shorter part's end is
    not there. So all ranks pad to the same size. Ranges that come again are copies: (0, 4) (4, 8) (0, 4) (4, 8).
    """

    axis: str
    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Placement:
    """Where one parameter lives and how its gradient becomes whole."""

    shape: tuple[int, ...]  # global
    stages: tuple[int, ...]  # pipeline stages that hold it: more than one for a tied embedding
    shards: tuple[Shard, ...] = ()
    sum_axes: tuple[str, ...] = ("dp",)  # axes over which the ranks' gradients add up; with cp ranks ("dp", "cp")
    # dim 0 is kept in this order, order[i] of the global tensor at i; (): as it is. What comes again is a copy
    order: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of all that is kept, which `shards` cut: the global one, with as many rows as `order` has."""
        return (len(self.order), *self.shape[1:]) if self.order else self.shape

    def holds(self, index: Mapping[str, int]) -> bool:
        """Whether the rank with these coordinates has a part of it."""
        return index["pp"] in self.stages

    def slices(self, index: Mapping[str, int]) -> tuple[slice, ...]:
        """Which part of the global tensor, in the order in which it is kept, the rank with these coordinates holds."""
        out = [slice(0, n) for n in self.kept]
        for shard in self.shards:
            outer, (start, stop) = out[shard.dim], shard.ranges[index[shard.axis]]
            out[shard.dim] = slice(min(outer.start + start, outer.stop), min(outer.start + stop, outer.stop))
        return tuple(out)

    def local_shape(self, index: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.slices(index))

    def local_size(self, index: Mapping[str, int]) -> int:
        """Elements that the rank with these coordinates holds."""
        size = 1
        for length in self.local_shape(index):
            size *= length
        return size

    def without(self, *axes: str) -> Placement:
        """The same without the cut over `axes`: what their ranks have once they have put their parts together."""
        return replace(self, shards=tuple(shard for shard in self.shards if shard.axis not in axes))

    def part(self, whole: Any, index: Mapping[str, int]) -> Any:
        """What the rank with these coordinates holds of the global tensor."""
        return (whole[list(self.order)] if self.order else whole)[self.slices(index)]

    def once(self, part: Any, index: Mapping[str, int]) -> Any:
        """Of this rank's part the rows that a sum over all ranks should count: of copies the first in `order`."""
        if len({*self.order}) == len(self.order):
            return part
        rows = self.slices(index)[0]
        return part[[n - rows.start for n in range(rows.start, rows.stop) if self.order.index(self.order[n]) == n]]

    def padded_size(self, axis: str, index: Mapping[str, int]) -> int:
        """Elements that each rank of `axis` has in a buffer of equal parts: as many as the first, which has most."""
        (shard,) = (shard for shard in self.shards if shard.axis == axis)
        lengths = list(self.local_shape(index))
        lengths[shard.dim] = shard.ranges[0][1] - shard.ranges[0][0]
        return prod(lengths)

    def rows_size(self, index: Mapping[str, int]) -> int:
        """Elements of it in a buffer in which each rank has the rows that it owns (ZeRO)."""
        axis = self.shards[-1].axis if self.shards else ""
        return self.padded_size(axis, index) if axis in ("dp", "edp") else self.local_size(index)

    def counts(self, index: Mapping[str, int]) -> bool:
        """Whether this rank is the one, of those with the same copy, that a sum over all ranks should count."""
        sharded = {shard.axis for shard in self.shards}
        # the data ranks have two views: a parameter that is spread over ep has copies along edp, all else along dp, cp
        other_view = {"dp", "cp"} if sharded & {"ep", "edp"} else {"ep", "edp"}
        if any(shard.ranges.index(shard.ranges[i := index[shard.axis]]) != i for shard in self.shards):
            return False  # a rank before has the same range
        return index["pp"] == self.stages[0] and all(
            i == 0 for a, i in index.items() if a not in sharded | other_view | {"pp"}
        )


Layout = dict[str, Placement]


@lru_cache(maxsize=1024)  # a plan of a thousand ranks asks for a few of them a million times
def split(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut `total` into `parts` ranges by the convention above."""
    step = -(-total // parts)
    return tuple((min(i * step, total), min((i + 1) * step, total)) for i in range(parts))


def to_json(layout: Layout, mesh: MeshShape) -> dict[str, Any]:
    """The layout as plain data, as `layout.json` of a run holds it."""
    return {
        "axes": {axis: getattr(mesh, axis) for axis in (*AXES, *(["ep"] if mesh.ep > 1 else []))},
        "ranks": [{"rank": r, "coordinates": coordinates(mesh, r)} for r in range(mesh.world_size)],
        "parameters": [
            {
                "name": name,
                "shape": list(p.kept),
                "stages": list(p.stages),
                "shards": [{"axis": s.axis, "dim": s.dim, "ranges": [list(r) for r in s.ranges]} for s in p.shards],
                "sum_axes": list(p.sum_axes),
            }
            for name, p in layout.items()
        ],
    }
