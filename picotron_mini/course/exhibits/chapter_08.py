"""Bug museum, room 08: mixtures of experts, where a gradient is lost and nobody misses it."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, assignment"
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...collectives import Done
from ...config import MoEConfig
from ...mesh import Axis
from ...model import balancing
from ...parallel import routers, tensor
from ..museum import MODEL, Exhibit

MIXTURE = replace(MODEL, moe=MoEConfig(num_experts=4, top_k=2, expert_size=12, aux_weight=0.1))


def router_gradient_lost() -> None:
    """The router is held whole by every tensor-parallel rank, so its gradient is taken to be whole as well."""
    tensor.ROUTERS = ()


def auxiliary_loss_of_nobody() -> None:
    """The auxiliary loss is computed in each layer, and noted, and never becomes part of what is differentiated."""

    def attach(y: Tensor, *loss: object) -> Tensor:
        return y

    balancing.attach = attach


def balance_of_each_rank() -> None:
    """The share of each expert is that of the rank's own tokens, as if every rank had tokens like them."""

    def own(counts: Tensor, axis: Axis) -> Done:
        counts.mul_(axis.size)
        return Done()

    routers.all_reduce_async = own


EXHIBITS = [
    Exhibit(
        id="08.router_gradient_lost",
        title="A part of the verdict",
        story="Tensor parallelism cuts every expert and leaves the small router whole, so its gradient looks like that "
        "of a norm: nothing to sum. But a router is judged by its experts' outputs, and a rank has only a part of "
        "each. Its gradient is the router's gradient for that part. Ranks update their copies differently, and after "
        "some steps send the same token to different experts.",
        symptom="the loss of the first step is right to the last digit; the copies of each router drift apart.",
        patch=router_gradient_lost,
        killed_on=("tp=2",),
        survives_on=("dp=2", "pp=2"),
        model=MIXTURE,
    ),
    Exhibit(
        id="08.auxiliary_loss_of_nobody",
        title="The auxiliary loss that nobody adds",
        story="A layer computes its auxiliary loss, stores it, and some other code is to add all of them to the loss. "
        "nanotron declared such a loss and never used it. In a pipeline there is more to forget: the loss is computed "
        "on the last stage, and the other stages' layers are not there.",
        symptom="the auxiliary loss is logged like any other number, and does not fall; experts die.",
        patch=auxiliary_loss_of_nobody,
        killed_on=("dp=1", "pp=2"),
        survives_on=(),
        model=MIXTURE,
    ),
    Exhibit(
        id="08.balance_of_each_rank",
        title="Balance on every rank",
        story="Each rank computes the auxiliary loss of its own tokens, and the gradients are summed: it looks like "
        "data parallelism. But the loss is a product of two means over the pool, and a mean of products is another "
        "thing. The more ranks, the smaller their pools, and the more each rank asks for balance among a few "
        "sequences, which may all be about one subject (arXiv 2501.11873).",
        symptom="trains well; the auxiliary loss depends on the number of ranks, and experts specialise less.",
        patch=balance_of_each_rank,
        killed_on=("dp=2", "cp=2"),
        survives_on=("tp=2", "pp=2"),
        model=MIXTURE,
    ),
]
