"""Tensor parallelism: each rank holds a slice of every large weight and computes a slice of every layer.

A pair of linear layers needs one exchange only. Cut the first weight by its *outputs* (column parallel) and the
second by its *inputs* (row parallel), and what lies between is computed without a word:

                     W1 = [A1 A2]          W2 = [B1]
                                                [B2]
    rank 0:  x ----> x A1 ----> f(x A1) ----> f(x A1) B1 --+
             |                                             (+) all_reduce ----> y = f(x A1) B1 + f(x A2) B2
    rank 1:  x ----> x A2 ----> f(x A2) ----> f(x A2) B2 --+

In attention the columns are whole heads: q, k, v are column parallel, o is row parallel. In the MLP gate and up
are column parallel, down is row parallel. Backward it is the mirror image: each rank only knows its slice's share
of dL/dx, so the entry of the pair sums the gradients (`copy_to`) where its exit sums the values (`reduce_from`).
Forget the entry and the layers still train, with gradients that miss the other ranks' part.

The vocabulary is cut too. The embedding looks up only its own rows and sums; the head yields a slice of the logits
[B, T, V/tp], and the loss is computed on the slices: with m the maximum over all ranks,

    -log p(target) = log sum_r sum_{v in r} exp(z_v - m)  -  (z_target - m)

so three numbers a token cross the wire instead of V logits.

**Sequence parallelism** (arXiv 2205.05198) goes on where this stops: between the pairs every rank holds all tokens
and does the same norms and additions. Let each keep 1/tp of the tokens there. The entry then gathers them
(`gather_from`), and the exit, which has to sum anyway, leaves each rank its own tokens of the sum (`scatter_to`):

    [B, T/tp, D] --all_gather--> [B, T, D] --pair--> partial sums [B, T, D] --reduce_scatter--> [B, T/tp, D]

Which tokens are whose? Norms and additions do not ask, so it is decided by what costs nothing: the B T tokens of a
micro-batch lie one behind the other in memory, and each rank has one run of them. So [B, T/tp, D] is a number of rows
in a handy shape, not a part of each sequence. With B = 4 sequences and tp = 2:

    sequence     0 0 0 0 0 0  1 1 1 1 1 1 | 2 2 2 2 2 2  3 3 3 3 3 3        a gather puts the runs one behind the other
                 --------- rank 0 --------|--------- rank 1 ---------

A part of each sequence would have to be put in order around every exchange: two transpositions, as copies.

An all_reduce is a reduce_scatter and an all_gather, so a ring carries as many bytes as before. Each norm now sees a
part of the tokens, and its gradient is a partial sum (`partial.py`). Positions, attention and the loss see all tokens.

Cost a step and micro-batch, in payload: 4 all_reduces of B*T*D a layer (2 forward, 2 backward), 1 for the
embedding forward, 1 for the head backward, and for the loss 3 float values a token. With sequence parallelism each of
them becomes a reduce_scatter of B*T*D on the one way and an all_gather of B*T*D/tp on the other. All of it is waited
for (but see `overlap.py`): it pays only where links are fast and D is large.

Paper: Megatron-LM (arXiv 1909.08053).
Legend: B batch, T tokens, D width, V vocabulary, Vr the rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import (
    SymmetricMemory,
    all_gather,
    all_reduce_max,
    copy_to,
    gather_from,
    reduce_from,
    scatter_to,
    shard_size,
)
from ..layout import split
from ..mesh import Axis
from ..model.gpt import GPT, IGNORE, at_least_float32
from ..model.moe import MoE
from .overlap import overlap

# The plan: which dim of which weight is cut. What is not here is held whole by every rank.
PLAN = {
    ("embed", "head", "q", "k", "v", "gate", "up"): 0,  # outputs: a Linear's weight is [out, in]
    ("o", "down"): 1,  # inputs
}
EXPERTS = {"gate": 1, "up": 1, "down": 2}  # tensors of `experts`, [E, out, in]: each expert is cut as an MLP is
# Which linear layers take the input of a pair, in the order in which it calls them, and which makes its output.
PAIRS = {"attention": (("q", "k", "v"), "o"), "mlp": (("gate", "up"), "down")}
# Norms are held whole. Those that see only this rank's heads, and with sequence parallelism those that see only its
# tokens, have partial gradients that must be summed.
HEAD_NORMS = ("q_norm", "k_norm")
ROUTERS = ("router",)  # held whole, and judged by the rank's part of every expert's output
TOKEN_NORMS = ("attention_norm", "mlp_norm", "norm")


def sharded_dim(name: str) -> int | None:
    """Which dim of the parameter `name` is cut over tp, or None if it is held whole."""
    module, weight = name.split(".")[-2:]
    if module == "experts":
        return EXPERTS[weight]
    return next((dim for modules, dim in PLAN.items() if module in modules), None)


def is_partial(name: str, sequence_parallel: bool = False) -> bool:
    """Whether each tp rank computes only a part of this whole parameter's gradient."""
    partial = HEAD_NORMS + ROUTERS + (TOKEN_NORMS if sequence_parallel else ())
    return name.split(".")[-2] in partial


def tensor_parallel(
    model: GPT, axis: Axis, sequence_parallel: bool = False, parts: int = 1, memory: SymmetricMemory | None = None
) -> None:
    """Cut the model's weights in place and add the exchanges; parameter names stay.

    Args:
        model: a whole model or a stage of one, on any device, the meta device included.
        axis: its size must divide heads, key-value heads and the inner widths (`legality.layout_problems`).
        sequence_parallel: hidden states between the layers are [B, T/tp, D], this rank's run of the tokens of all
            sequences; tp must divide T.
        parts: in which the layers' exchanges travel behind their products (`overlap`); 1: each is waited for.
        memory: of the axis, through which they travel then.
    """
    if axis.size == 1:
        return

    def enter(x: Tensor) -> Tensor:
        return by_rows(gather_from, x, axis, parts) if sequence_parallel else copy_to(x, axis)

    def leave(x: Tensor) -> Tensor:
        return by_rows(scatter_to, x, axis, parts, axis.size) if sequence_parallel else reduce_from(x, axis)

    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        dim = sharded_dim(name)
        if dim is not None:
            start, stop = split(weight.shape[dim], axis.size)[axis.index]
            module, _, own_name = name.rpartition(".")
            part = weight.detach().narrow(dim, start, stop - start).clone()
            setattr(model.get_submodule(module), own_name, nn.Parameter(part, requires_grad=weight.requires_grad))
    for block in model.layers.values():
        for pair, linears in ((block.get_submodule(name), linears) for name, linears in PAIRS.items()):
            if parts > 1 and not isinstance(pair, MoE):  # a router wants all tokens before it starts
                overlap(pair, *linears, axis, parts, sequence_parallel, memory)
                continue
            pair.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0]), *inputs[1:]))
            pair.register_forward_hook(lambda _, inputs, output: leave(output))
    vocabulary = split(model.config.vocab_size, axis.size)[axis.index]
    if model.embed is not None:
        model.register_module("embed", VocabParallelEmbedding(model.embed.get_parameter("weight"), vocabulary, leave))
    if model.norm is not None:
        # the entry of the head, behind the norm: whatever takes the loss apart finds all tokens
        model.norm.register_forward_hook(lambda _, inputs, output: enter(output))
        model.cross_entropy = lambda logits, targets: vocab_parallel_cross_entropy(logits, targets, vocabulary, axis)
    model.tie()


def by_rows(
    exchange: Callable[[Tensor, Axis, int], Tensor], x: Tensor, axis: Axis, parts: int = 1, ranks: int = 1
) -> Tensor:
    """An exchange along the rows [B T, D] of x [B, T, D], where nothing has to be put in order for it.

    Args:
        exchange: `gather_from` or `scatter_to`.
        parts: of the flattened tokens, of each of which a rank has a run (`overlap`).
        ranks: of how many x holds the rows: one to gather, all to scatter.
    """
    rows = x.flatten(0, 1)
    if parts == 1:  # without `cat`, and `split`, whose gradient is one: both copy
        moved = exchange(rows, axis, 0)
    else:
        part = ranks * shard_size(len(rows) // ranks, parts)
        moved = torch.cat([exchange(each, axis, 0) for each in rows.split(part)])
    return moved.unflatten(0, (len(x), -1))


class VocabParallelEmbedding(nn.Module):
    """Rows [start, stop) of an embedding; tokens that belong to other ranks give zeros before the sum in `leave`."""

    def __init__(self, weight: nn.Parameter, vocabulary: tuple[int, int], leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = weight  # [Vr, D]
        self.vocabulary, self.leave = vocabulary, leave

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] int64 -> [B, T, D], whole on every rank; [B, T/tp, D] with sequence parallelism."""
        local, mine = _local(tokens, self.vocabulary)
        rows = F.embedding(local, self.weight).masked_fill(~mine[..., None], 0.0)  # [B, T, D]
        return self.leave(rows)


def _local(tokens: Tensor, vocabulary: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Index within this rank's rows (0 where it is another's token), and whether it is this rank's."""
    start, stop = vocabulary
    mine = (tokens >= start) & (tokens < stop)
    return torch.where(mine, tokens - start, 0), mine


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
    """Sum of the cross-entropies of targets that are not -100, the same on every rank of the axis.

    Args:
        logits: [B, T, Vr], this rank's slice of the vocabulary.
        targets: [B, T] int64, global token ids.
        vocabulary: the range of ids that the slice stands for.

    Returns:
        A scalar of float32 or wider (nats).
    """
    z = at_least_float32(logits)  # [B, T, Vr]
    z = z - all_reduce_max(z.detach().amax(-1), axis)[..., None]  # the shift cancels, so it needs no gradient
    local, mine = _local(targets, vocabulary)
    target = z.gather(-1, local[..., None]).squeeze(-1).masked_fill(~mine, 0.0)  # [B, T]
    exp_sum, target = reduce_from(torch.stack([z.exp().sum(-1), target]), axis).unbind()  # [B, T] each
    return (exp_sum.log() - target).masked_fill(targets == IGNORE, 0.0).sum()


def gather_logits(logits: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    """The whole logits [B, T, V] from the slices [B, T, Vr]; for generation, which needs them all."""
    return all_gather(logits, axis, -1, vocab_size)
