"""What a rank computes in a micro-batch, counted: flops of products and of attention, bytes of activations, modules.

Of a mixture of experts a token computes with K of E experts: the work is that of the rows that come to this rank, so of
the busiest one if routers are skewed (`expert_costs.py`).

Four numbers, because a processor does four different things (`machine.py`): products run near its peak, attention at a
rate of its own, norms and SiLU as fast as memory is, and every module costs its start. A machine is four rates; time is
their scalar product. `calibrate.py` measures passes of known work and solves for the rates.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..config import ModelConfig, RunConfig, TrainConfig
from ..model.costs import head_flops, layer_matrix_parameters, mlp_parameters
from .activations import activations, share_of
from .expert_costs import DENSE, HEAD, flow, operators
from .machine import Machine

# What is kept is written and read again by kernels that do nothing else where no compiler fuses them. On two H100s
# `dp=2 --zero 3` took 1,163 ms without compile (summary/07_3d_parallel.md); by these formulas, 3.3 times the bytes.
EAGER = 3.3


@dataclass(frozen=True)
class Work:
    """What a micro-batch costs a rank in one chunk, forward or backward: one row of `Machine`'s equation."""

    products: float  # flops
    attention: float  # flops, the masked half not counted
    activations: float  # bytes
    modules: float  # dense layers; a head, or a layer with experts, counts by its operators

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


def forward_work(run: RunConfig, layers: Collection[int], head: bool, skew: float = 1.0) -> Work:
    """The forward of a micro-batch through some layers, and the head, on one rank.

    A token's scores are counted with the keys that it sees, half of T on average, and all where documents are masked:
    such a mask is no triangle that a kernel could skip.

    Args:
        run: resolved.
        layers: their numbers.
        skew: of the busiest rank with experts; 1: all are equally busy.
    """
    train, mesh, model = run.train, run.mesh, run.model
    tokens = train.micro_batch_size * train.seq_len // mesh.cp
    share = share_of(model, mesh.tp)
    dense = replace(share, moe=None)
    attention = layer_matrix_parameters(dense) - mlp_parameters(dense)
    seen = train.seq_len * (1.0 if train.document_mask else 0.5)
    out = Work(0, len(layers) * 4 * share.num_heads * share.head_dim * seen * tokens, 0, 0)
    passes = EAGER if train.device == "cuda" and not train.compile else 1.0
    for number, experts in kinds(model, layers):
        each = activations(run, experts, skew)
        products = 2 * attention * tokens + mlp_flops(run, experts, skew)
        out += Work(number * products, 0, number * each.layer_whole * passes, number * _modules(run, experts))
    if head:
        each = activations(run)
        kept = (each.loss + each.loss_backward) * passes
        out += Work(head_flops(model) / mesh.tp * tokens, 0, kept, HEAD / DENSE)
    return out


def kinds(model: ModelConfig, layers: Collection[int]) -> list[tuple[int, bool]]:
    """How many of some layers are dense (False), and how many have experts (True); a kind without any is left out."""
    mixed = sum(layer in model.moe_layers for layer in layers)
    return [(number, experts) for number, experts in ((len(layers) - mixed, False), (mixed, True)) if number]


def mlp_flops(run: RunConfig, experts: bool, skew: float) -> float:
    """Of a forward of one layer's MLP, or of its router, the rows that come to its experts, and the shared expert."""
    share, tokens = share_of(run.model, run.mesh.tp), run.train.micro_batch_size * run.train.seq_len // run.mesh.cp
    if not experts:
        return 2.0 * mlp_parameters(replace(share, moe=None)) * tokens
    assert share.moe is not None
    beside = share.moe.num_experts + 3 * share.moe.shared_size
    return 2.0 * share.hidden_size * (beside * tokens + 3 * share.moe.expert_size * flow(run, skew).routed)


def _modules(run: RunConfig, experts: bool) -> float:
    return operators(run) / DENSE if experts else 1.0


def recomputed_work(run: RunConfig, layers: Collection[int], skew: float = 1.0) -> Work:
    """What `recompute` runs once more in the backward: the layers, or their MLPs, or nothing."""
    if run.train.recompute == "full":
        return forward_work(run, layers, False, skew)
    out = Work(0, 0, 0, 0)
    for number, experts in kinds(run.model, layers) if run.train.recompute == "selective" else ():
        again = activations(run, experts, skew).layer_again
        flops, modules = mlp_flops(run, experts, skew), _modules(run, experts) - 0.5
        out += Work(number * flops, 0, number * again, number * modules)
    return out


def backward_seconds(run: RunConfig, layers: Collection[int], head: bool, machine: Machine, skew: float = 1.0) -> float:
    """The time of a micro-batch's backward through some layers, and the head, with what is computed again."""
    plain = forward_work(run, layers, head, skew).backward().seconds(machine) * machine.backward
    return plain + recomputed_work(run, layers, skew).seconds(machine)


def host_seconds(
    run: RunConfig, layers: Collection[int], head: bool, messages: float, machine: Machine
) -> tuple[float, float]:
    """In which a host launches a micro-batch's forward and backward for its GPU; none if it has recorded them.

    Args:
        messages: of both passes.
    """
    if run.train.cuda_graph:
        return 0.0, 0.0
    forward = forward_work(run, layers, head).modules * machine.host
    again = recomputed_work(run, layers).modules * machine.host
    return forward + messages / 2 * machine.host_message, 3 * forward + again + messages / 2 * machine.host_message


def moved_by_update(train: TrainConfig) -> float:
    """What the update of an element moves, over what it moves of a float32 weight with AdamW (`Machine.update`).

    In bytes: norm 4, clipping 8, AdamW 16 read and 12 written: 40. SGD reads 8 and writes 4. With bf16 weights and
        masters=whole    rounding the masters into the weights, 6
        masters=split    putting halves together and taking them apart, 8 each; four times that if no kernel is fused
        masters=none     the gradient narrowed, 6, and an optimizer all of whose numbers have 2 bytes
    """
    optimizer = 28 if train.optimizer == "adamw" else 12
    beside = 0
    if train.dtype == "bfloat16":
        beside = {"whole": 6, "split": 16 * (1 if train.compile else 4), "none": 6}[train.masters]
        optimizer //= 2 if train.masters == "none" else 1
    return (12 + optimizer + beside) / 40
