"""The ranks as a grid: which ranks work together along each axis.

`pp * dp * cp * tp` ranks are numbered with `tp` fastest, because tensor parallelism talks most and neighbouring
ranks have the fastest links. With pp=2, dp=2, tp=2 (and cp=1):

                 tp=0  tp=1
    pp=0  dp=0     0     1        the tp axis of rank 5: ranks 4, 5
          dp=1     2     3        the dp axis of rank 5: ranks 5, 7
    pp=1  dp=0     4     5        the pp axis of rank 5: ranks 1, 5
          dp=1     6     7

So   rank = ((pp_index * dp + dp_index) * cp + cp_index) * tp + tp_index,   and an axis is the set of ranks that
differ in that one index only. One axis is made of two: `mesh["dp_cp"]`, the ranks that differ in dp or cp. They hold
the same weights and see other tokens, so gradients are summed over it. A technique is handed one `Axis` and never the
whole mesh.

**The sparse view.** Experts cut the same ranks anew. The dp * cp ranks of a stage and tp slice, in their order along
`mesh["dp_cp"]`, are dealt out as `ep` neighbours that share the experts, edp = dp * cp / ep times. With dp=4, ep=2:

    place along dp_cp     0  1  2  3        ranks 0, 1 hold all experts between them, and so do 2, 3
    ep index              0  1  0  1        mesh["ep"]: who trades tokens
    edp index             0  0  1  1        mesh["edp"]: who holds the same experts, and sums their gradients
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from .config import AXES, MeshShape

# Process groups by key. Collectives name their group by this string, because a custom operator (and so
# torch.compile) takes strings and not process groups.
GROUPS: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Axis:
    """The ranks that one rank works with along one axis."""

    name: str
    size: int
    index: int  # this rank's coordinate
    ranks: tuple[int, ...]  # global ranks, in coordinate order

    @property
    def key(self) -> str:
        """Name of the axis' process group in `GROUPS`."""
        return f"{self.name}:{','.join(map(str, self.ranks))}"

    @property
    def group(self) -> dist.ProcessGroup:
        return GROUPS[self.key]


def coordinates(shape: MeshShape, rank: int) -> dict[str, int]:
    """The index of a rank on every axis, as `{"pp": 1, "dp": 0, "cp": 0, "tp": 1}`; with ep > 1 also "ep", "edp"."""
    out = {}
    for axis in reversed(AXES):
        rank, out[axis] = divmod(rank, getattr(shape, axis))
    dense = {axis: out[axis] for axis in AXES}
    if shape.ep == 1:
        return dense
    edp, ep = divmod(out["dp"] * shape.cp + out["cp"], shape.ep)
    return dense | {"ep": ep, "edp": edp}


def axis_of(shape: MeshShape, rank: int, name: str) -> Axis:
    """The axis `name` through `rank`; needs no process."""
    here, stride = coordinates(shape, rank)[name], 1
    for faster in AXES[AXES.index(name) + 1 :]:
        stride *= getattr(shape, faster)
    first, size = rank - here * stride, getattr(shape, name)
    return Axis(name, size, here, tuple(range(first, first + size * stride, stride)))


def data_axis_of(shape: MeshShape, rank: int) -> Axis:
    """The ranks that differ from `rank` in dp or cp only, cp fastest. Named "dp" when cp is 1, else "dp_cp"."""
    if shape.cp == 1:
        return axis_of(shape, rank, "dp")
    here, size = coordinates(shape, rank), shape.dp * shape.cp  # neighbours among the axes: one stride for both
    index = here["dp"] * shape.cp + here["cp"]
    first = rank - index * shape.tp
    return Axis("dp_cp", size, index, tuple(range(first, first + size * shape.tp, shape.tp)))


def expert_axis_of(shape: MeshShape, rank: int, name: str) -> Axis:
    """The sparse view: the axis "ep" or "edp" through `rank`; needs no process."""
    data = data_axis_of(shape, rank)
    edp, ep = divmod(data.index, shape.ep)
    if name == "ep":
        return Axis("ep", shape.ep, ep, data.ranks[edp * shape.ep : (edp + 1) * shape.ep])
    return Axis("edp", data.size // shape.ep, edp, data.ranks[ep :: shape.ep])


def axis_with_key(key: str) -> Axis:
    """This rank's axis whose `key` this is: for custom operators, which are handed strings."""
    name, _, members = key.partition(":")
    ranks = tuple(map(int, members.split(",")))
    return Axis(name, len(ranks), ranks.index(dist.get_rank()), ranks)


@dataclass(frozen=True)
class Mesh:
    """The grid as one rank sees it: `mesh["tp"]` is the axis of that name through this rank.

    `mesh["world"]` is all ranks, for the few scalars that everyone must agree on; `mesh["dp_cp"]` those that hold the
    same weights (`data_axis_of`); `mesh["ep"]` and `mesh["edp"]` are the sparse view.
    """

    shape: MeshShape
    rank: int

    @classmethod
    def build(cls, shape: MeshShape) -> Mesh:
        """Make the process groups. Every rank must call it, in the same order as the others.

        Raises:
            ValueError: the mesh has another number of ranks than `torch.distributed` was started with.
        """
        if dist.get_world_size() != shape.world_size:
            raise ValueError(f"the mesh {shape} has {shape.world_size} ranks, not {dist.get_world_size()}")
        mesh = cls(shape, dist.get_rank())
        # new_group is itself collective: all ranks make all groups, also those that they are not in. The
        # pipeline gets two: activations and gradients travel against each other, and NCCL runs the
        # messages of one group in order. For the same reason cp never shares a group: its ring must not queue behind
        # the gradients, nor do the tokens on their way to experts.
        more = [*(["dp_cp"] if shape.cp > 1 else []), *(["ep", "edp"] if shape.ep > 1 else [])]
        for name in ("world", *AXES, "pp.backward", *more):
            for rank in range(shape.world_size):
                axis = cls(shape, rank)[name]
                if axis.index == 0 and axis.size > 1:
                    everyone = axis.size == shape.world_size and name not in ("pp.backward", "cp", "ep")
                    group = dist.group.WORLD if everyone else dist.new_group(list(axis.ranks))
                    assert group is not None
                    GROUPS[axis.key] = group
        return mesh

    def __getitem__(self, name: str) -> Axis:
        if name == "world":
            return Axis("world", self.shape.world_size, self.rank, tuple(range(self.shape.world_size)))
        if name == "dp_cp":
            return data_axis_of(self.shape, self.rank)
        if name in ("ep", "edp"):
            return expert_axis_of(self.shape, self.rank, name)
        base = axis_of(self.shape, self.rank, name.removesuffix(".backward"))
        return Axis(name, base.size, base.index, base.ranks)

    def apart(self, name: str) -> Axis:
        """The axis with a process group of its own, for small messages that must not queue behind large ones.

        Makes the process groups that are missing, so every rank must call it. The ledger counts it as `name`.
        """
        axes = [Mesh(self.shape, rank)[name] for rank in range(self.shape.world_size)]
        axes = [replace(axis, name=f"{axis.name}.apart") for axis in axes]
        for axis in axes:
            if axis.size > 1 and axis.index == 0 and axis.key not in GROUPS:
                group = dist.new_group(list(axis.ranks))
                assert group is not None
                GROUPS[axis.key] = group
        return axes[self.rank]

    def halves(self, name: str, size: int) -> tuple[Axis, Axis]:
        """Cut an axis into groups of `size` neighbours: the group of this rank, and the ranks at its place in each.

        Makes the process groups that are missing, so every rank must call it. The ledger counts both as the axis.
        """
        axes = []
        for rank in range(self.shape.world_size):
            base = Mesh(self.shape, rank)[name]
            start = base.index - base.index % size
            axes += [
                (rank, Axis(base.name, size, base.index % size, base.ranks[start : start + size])),
                (rank, Axis(base.name, base.size // size, base.index // size, base.ranks[base.index % size :: size])),
            ]
        for _, axis in axes:
            if axis.size > 1 and axis.index == 0 and axis.key not in GROUPS:
                group = dist.new_group(list(axis.ranks))
                assert group is not None
                GROUPS[axis.key] = group
        inside, across = (axis for rank, axis in axes if rank == self.rank)
        return inside, across


def close_groups() -> None:
    """Take down the groups of the meshes that were built here, before another one is. Every rank must call it."""
    dist.barrier()  # a rank that goes ahead would break off what its peers have yet to receive
    mine = str(dist.get_rank())
    for key, group in GROUPS.items():
        if mine in key.partition(":")[2].split(",") and group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    GROUPS.clear()
