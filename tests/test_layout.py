"""Where parameters live: every element somewhere, and counted once."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from picotron_mini.config import MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.layout import Layout, Placement, Shard, split, to_json
from picotron_mini.legality import layout_problems
from picotron_mini.mesh import coordinates
from picotron_mini.model.gpt import parameter_shapes
from picotron_mini.parallel.parallelize import layout_of

SHAPES = [MeshShape(*sizes) for sizes in itertools.product(range(1, 9), repeat=4) if MeshShape(*sizes).world_size <= 8]
# 8 heads of 2, so that tp=8 is legal; 37 tokens, so that the vocabulary is uneven; 9 layers for pp=8
MODEL = ModelConfig(
    vocab_size=37, hidden_size=16, intermediate_size=840, num_layers=9, num_heads=840, num_kv_heads=840, head_dim=2
)  # 840 = 8 * 7 * 5 * 3: every tp up to 8 divides it
MODELS = {
    "tied": MODEL,
    "untied": replace(MODEL, tie_embeddings=False),
    "qk_norm": replace(MODEL, qk_norm=True),
}


def placed(model: ModelConfig, mesh: MeshShape, **train: Any) -> Layout:
    return layout_of(RunConfig(layout=str(mesh), model=model, train=TrainConfig(seq_len=8, **train)))


@pytest.mark.parametrize("parts", range(1, 10))
def test_split_is_torch_chunk(parts: int) -> None:
    for total in range(1, 40):
        pieces = [list(range(*part)) for part in split(total, parts)]
        chunks = [chunk.tolist() for chunk in torch.arange(total).chunk(parts)]
        assert len(pieces) == parts  # chunk gives fewer pieces where the last would be empty
        assert pieces == chunks + [[]] * (parts - len(chunks))


def test_five_by_four() -> None:
    assert split(5, 4) == ((0, 2), (2, 4), (4, 5), (5, 5))


def test_slices_of_two_shards() -> None:
    place = Placement((6, 5), stages=(0,), shards=(Shard("tp", 0, split(6, 2)), Shard("dp", 1, split(5, 2))))
    assert place.slices({"pp": 0, "dp": 1, "tp": 0}) == (slice(0, 3), slice(3, 5))
    assert place.local_shape({"pp": 0, "dp": 1, "tp": 0}) == (3, 2)
    assert place.local_size({"pp": 0, "dp": 0, "tp": 1}) == 9


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_element_lives_somewhere_and_counts_once(model: ModelConfig) -> None:
    shapes = parameter_shapes(model)
    assert ("head.weight" in shapes) == (not model.tie_embeddings)
    for mesh in SHAPES:
        assert not layout_problems(model, mesh)
        layout = placed(model, mesh)
        assert list(layout) == list(shapes)
        every = [coordinates(mesh, rank) for rank in range(mesh.world_size)]
        for name, place in layout.items():
            assert place.shape == shapes[name]
            held = torch.zeros(place.shape, dtype=torch.uint8)
            counted = torch.zeros(place.shape, dtype=torch.uint8)
            for index in every:
                if place.holds(index):
                    held[place.slices(index)] += 1
                    assert held[place.slices(index)].shape == place.local_shape(index)
                    assert held[place.slices(index)].numel() == place.local_size(index)
                if place.counts(index):
                    assert place.holds(index)
                    counted[place.slices(index)] += 1
            assert bool((counted == 1).all()), f"{name} on {mesh}"
            # the same number of copies of every element: one for each stage and rank that does not cut it
            copies = len(place.stages) * mesh.dp * mesh.cp * (1 if place.shards else mesh.tp)
            assert bool((held == copies).all()), f"{name} on {mesh}"


def test_a_tied_embedding_lives_on_both_ends_and_is_summed_over_them() -> None:
    place = placed(MODELS["tied"], MeshShape(pp=4))["embed.weight"]
    assert place.stages == (0, 3)
    assert place.sum_axes == ("dp", "pp")
    assert placed(MODELS["untied"], MeshShape(pp=4))["embed.weight"].stages == (0,)


def test_gradients_are_summed_over_cp_where_there_is_one() -> None:
    for name, place in placed(MODELS["tied"], MeshShape(cp=2, pp=2)).items():
        assert place.sum_axes == (("dp", "cp", "pp") if name == "embed.weight" else ("dp", "cp"))
    assert placed(MODEL, MeshShape(dp=2))["norm.weight"].sum_axes == ("dp",)


def test_norms_of_queries_and_keys_are_summed_over_tp() -> None:
    layout = placed(MODELS["qk_norm"], MeshShape(tp=2))
    partial = {name for name, place in layout.items() if "tp" in place.sum_axes}
    assert partial == {f"layers.{i}.attention.{n}.weight" for i in range(9) for n in ("q_norm", "k_norm")}


def test_with_sequence_parallelism_every_norm_is_summed_over_tp() -> None:
    layout = placed(MODELS["qk_norm"], MeshShape(tp=2), sequence_parallel=True)
    assert {name for name, place in layout.items() if "tp" in place.sum_axes} == {n for n in layout if "norm" in n}


def test_plain_data() -> None:
    mesh = MeshShape(dp=2, tp=2)
    data = json.loads(json.dumps(to_json(placed(MODEL, mesh), mesh)))
    assert data["axes"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    assert data["ranks"][3] == {"rank": 3, "coordinates": {"pp": 0, "dp": 1, "cp": 0, "tp": 1}}
    embed = data["parameters"][0]
    assert embed["name"] == "embed.weight"
    assert embed["shards"] == [{"axis": "tp", "dim": 0, "ranges": [[0, 19], [19, 37]]}]
