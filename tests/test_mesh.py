"""The grid of ranks: who works with whom."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from picotron_mini import mesh as mesh_module
from picotron_mini.config import AXES, MeshShape
from picotron_mini.mesh import Mesh, axis_of, axis_with_key, coordinates, data_axis_of

SHAPES = [MeshShape(*sizes) for sizes in itertools.product(range(1, 9), repeat=4) if MeshShape(*sizes).world_size <= 8]


def test_the_picture_in_the_docstring() -> None:
    shape = MeshShape(pp=2, dp=2, tp=2)
    assert coordinates(shape, 5) == {"pp": 1, "dp": 0, "cp": 0, "tp": 1}
    assert [axis_of(shape, 5, name).ranks for name in ("tp", "dp", "pp")] == [(4, 5), (5, 7), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coordinates_number_the_grid_with_tp_fastest(shape: MeshShape) -> None:
    grid = list(
        itertools.product(range(shape.pp), range(shape.dp), range(shape.cp), range(shape.tp))
    )  # the last varies fastest
    assert [tuple(coordinates(shape, rank).values()) for rank in range(shape.world_size)] == grid
    assert list(coordinates(shape, 0)) == list(AXES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", AXES)
def test_an_axis_is_the_ranks_that_differ_in_one_coordinate(shape: MeshShape, name: str) -> None:
    seen = []
    for rank in range(shape.world_size):
        axis = axis_of(shape, rank, name)
        here = coordinates(shape, rank)
        assert axis.size == getattr(shape, name) == len(axis.ranks)
        assert axis.ranks[axis.index] == rank
        for index, other in enumerate(axis.ranks):
            assert coordinates(shape, other) == here | {name: index}
        seen.append(axis.ranks)
    # the axes cut the world into disjoint groups, and all members agree on theirs
    assert sorted(itertools.chain(*set(seen))) == list(range(shape.world_size))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dp_and_cp_together_are_one_axis(shape: MeshShape) -> None:
    """Ranks with the same weights, cp fastest; without cp it is the dp axis itself, name and group."""
    seen = set()
    for rank in range(shape.world_size):
        axis, here = data_axis_of(shape, rank), coordinates(shape, rank)
        assert Mesh(shape, rank)["dp_cp"] == axis
        assert axis.name == ("dp" if shape.cp == 1 else "dp_cp")
        assert axis.ranks[axis.index] == rank
        assert axis.index == here["dp"] * shape.cp + here["cp"]
        others = [coordinates(shape, r) for r in axis.ranks]
        assert others == [here | {"dp": d, "cp": c} for d in range(shape.dp) for c in range(shape.cp)]
        seen.add(axis.ranks)
    assert sorted(itertools.chain(*seen)) == list(range(shape.world_size))


def test_a_mesh_gives_the_same_axes_and_the_world() -> None:
    mesh = Mesh(MeshShape(pp=2, dp=2, tp=2), rank=5)
    assert mesh["dp"] == axis_of(mesh.shape, 5, "dp")
    world = mesh["world"]
    assert (world.size, world.index, world.ranks) == (8, 5, tuple(range(8)))
    assert mesh["pp.backward"].ranks == mesh["pp"].ranks
    assert mesh["pp.backward"].key != mesh["pp"].key


def groups_of_one_rank(shape: MeshShape) -> dict[str, list[int]]:
    mesh = Mesh.build(shape)
    sums = {}
    for name in ("world", *AXES, "pp.backward", "dp_cp"):
        axis = mesh[name]
        if axis.size > 1:
            assert axis_with_key(axis.key) == axis
            members = torch.zeros(shape.world_size)
            members[mesh.rank] = 1
            dist.all_reduce(members, group=axis.group)  # through the very group that is kept under the axis' key
            sums[name] = members.nonzero().flatten().tolist()
            assert dist.get_group_rank(axis.group, mesh.rank) == axis.index
    if shape.cp > 1:  # the ring never waits behind what other axes send
        assert sum(group is mesh["cp"].group for group in mesh_module.GROUPS.values()) == 1
    # an axis that spans the world needs no group of its own
    if shape.world_size in (shape.dp, shape.tp):
        assert set(mesh_module.GROUPS.values()) == {dist.group.WORLD}
    return sums


@pytest.mark.parametrize(
    "shape",
    [MeshShape(dp=3), MeshShape(pp=2, tp=2), MeshShape(pp=2, dp=2), MeshShape(cp=3), MeshShape(dp=2, cp=2)],
    ids=str,
)
def test_groups_hold_the_axis_ranks(ranks, shape: MeshShape) -> None:
    for rank, sums in enumerate(ranks(groups_of_one_rank, shape, world_size=shape.world_size)):
        mesh = Mesh(shape, rank)
        names = [n for n in ("world", *AXES, "pp.backward", "dp_cp") if mesh[n].size > 1]
        assert sums == {name: list(mesh[name].ranks) for name in names}


def mesh_of_another_size() -> str:
    try:
        Mesh.build(MeshShape(dp=3))
    except ValueError as error:
        return str(error)
    return ""


def test_a_mesh_of_another_size_is_refused(ranks) -> None:
    assert ranks(mesh_of_another_size, world_size=2) == ["the mesh dp=3 has 3 ranks, not 2"] * 2
