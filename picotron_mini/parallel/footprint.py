"""What a rank keeps from step to step, from a layout alone: weights, gradients, masters, optimizer state.

With E elements of parameters on a rank (its stage, its tensor-parallel slices), w bytes a weight, g = max(w, 4) a
gradient element, N = dp (or zero_group); E/N stands for the rows that the rank owns, C for its padded columns:

                 weights     gradients                    masters if w < 4    AdamW
    zero 0       w E         g (E + P)                    4 E                 2 g E
    zero 1       w E         g (N (C + P) + (C + P))      4 E/N               2 g E/N
    zero 2       w E         g (C + P)                    4 E/N               2 g E/N
    zero 3       w C         g (C + P)                    4 E/N               2 g E/N

Experts that are spread over ep have their rows cut over edp in place of dp, which is then their N; with zero_group over
those of edp that are in one group.

That is with masters=whole. Split ones (memory/masters.py) take 2 in place of 4; with masters=none there are none, and
AdamW has w E twice (w E/N). Gradients and state are of trained parameters only, P of them. AdamW also has a step
counter of 4 bytes for each. Above this comes what a step makes and drops: activations, buckets under
way, and in zero 3 the weights of two units.

ZeRO (arXiv 1910.02054) calls this the model states. An estimate that is not checked against a run is a guess; the
tests count storages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import RunConfig
from ..layout import Layout
from .expert_traffic import ITEMSIZE


@dataclass(frozen=True)
class Footprint:
    """Bytes that a rank keeps from step to step."""

    weights: int  # that compute uses
    gradients: int
    masters: int  # 0 where the optimizer updates the weights themselves
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer


def footprint(run: RunConfig, layout: Layout, index: Mapping[str, int]) -> Footprint:
    """The model states of the rank with coordinates `index`.

    Args:
        run: resolved.
        layout: of `parallelize.layout_of`, with the run's `zero`.
    """
    train, itemsize = run.train, ITEMSIZE[run.train.dtype]
    wide = max(itemsize, 4)
    beside = {"whole": 4, "split": 2, "none": 0}[train.masters]  # bytes that a bf16 weight has beside it
    moment = itemsize if train.masters == "none" else wide
    mine = {name: place for name, place in layout.items() if place.holds(index)}
    trained = {name: place for name, place in mine.items() if not train.freezes(name)}
    owned = {name: place.local_size(index) for name, place in mine.items()}
    whole = sum(place.without("dp", "edp").local_size(index) for place in mine.values())
    state = sum(owned[name] for name in trained)
    if train.zero:
        columns = {name: place.rows_size(index) for name, place in mine.items()}
        spread = [name for name, place in trained.items() if any(shard.axis == "ep" for shard in place.shards)]
        experts = sum(columns[name] for name in spread) + len(spread)
        rest = sum(columns[name] for name in trained) + len(trained) - experts
        whole_too = (train.zero_group or run.mesh.dp, run.mesh.edp_inside(train.zero_group))
        whole_too = whole_too if train.zero == 1 else (0, 0)
        gradients = wide * (rest * (1 + whole_too[0]) + experts * (1 + whole_too[1]))
        weights = itemsize * (sum(columns.values()) if train.zero == 3 else whole)
    else:
        owed = state if train.compress == "topk" else 0  # what error feedback has not sent yet
        gradients, weights = wide * (state + owed + len(trained)), itemsize * whole
    return Footprint(
        weights=weights,
        gradients=gradients,
        masters=beside * sum(owned.values()) if itemsize < 4 else 0,
        optimizer=2 * moment * state + 4 * len(trained) if train.optimizer == "adamw" else 0,
    )
