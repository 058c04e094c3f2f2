"""Expert parallelism: the experts of each layer are spread over ranks that already share the work on the batch.

A mixture of experts has many weights and uses few of them for a token. Spread the experts over `ep` of the dp * cp
ranks, and each keeps E/ep of them instead of E; attention, norms and router it keeps as before:

    dp=4, ep=2, E=8      rank 0      rank 1      rank 2      rank 3
    all else             copy        copy        copy        copy         gradients summed over dp, 4 ranks
    experts              0 1 2 3     4 5 6 7     0 1 2 3     4 5 6 7      gradients summed over edp: 0, 2 and 1, 3
    tokens               own         own         own         own          to experts and back inside 0, 1 and 2, 3

The price is the journey of the tokens (`moe/dispatch.py`; with `--dispatch allgather` `moe/gather_dispatch.py`). An
expert sees the tokens of all ranks of its ep group, so its gradient is the sum over those already, by the way the
gradients of its outputs come in; only the copies in the other groups are missing, which is what edp is for. Reduce it
over dp instead, and the gradients of *different* experts are added up: shapes fit, nothing crashes.

Tensor parallelism cuts each expert's inner width as it does an MLP's (`tensor.py`); then each of the tp ranks sends
its tokens' rows to its own ep group, and partial sums come back.

Memory of a rank: E/ep experts in place of E, for weights, gradients, masters and optimizer state; R more with slots for
copies of hot experts (`replicas.py`).

Papers: GShard (arXiv 2006.16668), DeepSpeed-MoE (arXiv 2201.05596).
Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from ..layout import Shard, split
from ..mesh import Axis
from ..model.gpt import GPT
from ..model.moe import MoE
from ..moe.dispatch import ExpertDispatch, SlotDispatch
from ..moe.gather_dispatch import GatherDispatch
from ..moe.placement import by_number


def is_expert(name: str) -> bool:
    """Whether the parameter is one of experts, which are its dim 0."""
    return name.split(".")[-2] == "experts"


def expert_shard(slots: int, ep: int) -> Shard:
    """How a parameter of experts is cut over ep."""
    return Shard("ep", 0, split(slots, ep))


def mixtures(model: GPT) -> Iterator[MoE]:
    """The layers of a model, or of a part of it, that have experts."""
    for block in model.layers.values():
        if isinstance(mlp := block.get_submodule("mlp"), MoE):
            yield mlp


def expert_parallel(
    model: GPT, axis: Axis, parts: int = 1, replicas: int = 0, device: torch.device | None = None,
    payload: str = "same", dispatch: Literal["alltoall", "allgather"] = "alltoall",
) -> None:  # fmt: skip
    """Keep this rank's experts, in place, and send tokens to the others'; parameter names stay.

    Args:
        model: a whole model or a stage of one, on any device, the meta device included.
        axis: its size must divide the number of experts (`expert_legality.py`).
        parts: in how many the tokens are cut, to compute one while the next travels.
        replicas: slots for copies on each rank.
        device: where the tokens will be.
        payload: in what form they travel (`moe/payload.py`).
        dispatch: how: to the ranks that need them (`moe/dispatch.py`), or to all (`moe/gather_dispatch.py`, which
            takes no payload).
    """
    if axis.size == 1:
        return
    for moe in mixtures(model):
        number = moe.config.num_experts
        order = by_number(number, axis.size, replicas)
        start, stop = split(len(order), axis.size)[axis.index]
        for name, weight in list(moe.experts.named_parameters()):
            part = weight.detach()[list(order[start:stop])]
            setattr(moe.experts, name, nn.Parameter(part, requires_grad=weight.requires_grad))
        way: SlotDispatch = ExpertDispatch(axis, number, parts, moe.layer, payload)
        if dispatch == "allgather":
            way = GatherDispatch(axis, number, parts, moe.layer)
        moe.dispatch = way
        if replicas:
            way.place(order, device)


def of_one_shape(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Which functions of a layer see tensors of one shape, whatever a router decides: (module, name) to be compiled.

    Of a dense layer all is one of them. How many rows an expert gets is known when it runs, so of a layer with experts
    these are attention with both norms, the router, and the shared expert. Between them the passes over rows are
    compiled for any number (`permute.fused`), products are single kernels, and exchanges are not compiled.
    """
    if not isinstance(moe := block.get_submodule("mlp"), MoE):
        return [(block, "forward")]
    return [(block, "first_half"), (moe, "decide"), *([(moe.shared, "forward")] if moe.shared is not None else [])]
