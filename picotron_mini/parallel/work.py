"""What a rank computes in a micro-batch, counted: flops of products and of attention, bytes of activations, modules.

Four numbers, because a processor does four different things (`machine.py`): products run near its peak, attention at a
rate of its own, norms and SiLU as fast as memory is, and every module costs its start. A machine is four rates; time is
their scalar product. `calibrate.py` measures passes of known work and solves for the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RunConfig
from ..model.costs import head_flops, layer_matrix_parameters
from .activations import activations, share_of
from .machine import Machine


@dataclass(frozen=True)
class Work:
    """What a micro-batch costs a rank in one chunk, forward or backward: one row of `Machine`'s equation."""

    products: float  # flops
    attention: float  # flops, the masked half not counted
    activations: float  # bytes
    modules: float  # layers and heads

    def seconds(self, machine: Machine) -> float:
        """The time on a machine, of a forward."""
        return machine.turns * (
            self.products / machine.product_flops
            + self.attention / machine.attention_flops
            + self.activations / machine.activation_bandwidth
            + self.modules * machine.launch
        )

    def backward(self) -> Work:
        """Of this forward's backward: two products for one, five of attention for two, all else twice."""
        return Work(2 * self.products, 2.5 * self.attention, 2 * self.activations, 2 * self.modules)

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[float, ...]:
        """The four, in order."""
        return self.products, self.attention, self.activations, self.modules


def forward_work(run: RunConfig, layers: int, head: bool) -> Work:
    """The forward of a micro-batch through some layers, and the head, on one rank.

    A token's scores are counted with the keys that it sees, half of T on average, and all where documents are masked:
    such a mask is no triangle that a kernel could skip.
    """
    train, mesh, model = run.train, run.mesh, run.model
    tokens = train.micro_batch_size * train.seq_len // mesh.cp
    share = share_of(model, mesh.tp)
    each = activations(run)
    seen = train.seq_len * (1.0 if train.document_mask else 0.5)
    out = Work(
        products=layers * 2 * layer_matrix_parameters(share) * tokens,
        attention=layers * 4 * share.num_heads * share.head_dim * seen * tokens,
        activations=layers * (each.layer + each.layer_again),
        modules=layers,
    )
    if head:
        out += Work(head_flops(model) / mesh.tp * tokens, 0, each.loss + each.loss_backward, 1)
    return out


def recomputed_work(run: RunConfig, layers: int) -> Work:
    """What `recompute` runs once more in the backward: the layers, or their MLPs, or nothing."""
    train, share = run.train, share_of(run.model, run.mesh.tp)
    if train.recompute == "full":
        return forward_work(run, layers, False)
    if train.recompute == "none":
        return Work(0, 0, 0, 0)
    tokens = train.micro_batch_size * train.seq_len // run.mesh.cp
    flops = layers * 6 * share.hidden_size * share.intermediate_size * tokens
    return Work(flops, 0, layers * activations(run).layer_again, layers / 2)


def backward_seconds(run: RunConfig, layers: int, head: bool, machine: Machine) -> float:
    """The time of a micro-batch's backward through some layers, and the head, with what is computed again."""
    plain = forward_work(run, layers, head).backward().seconds(machine) * machine.backward
    return plain + recomputed_work(run, layers).seconds(machine)
