"""The routers of a model that is spread over ranks: what they must hear of tokens that are elsewhere.

A router decides token by token, so a rank with other tokens needs nothing of this one, but for three things:

    of the same sequence (cp)           capacity and expert choice look at whole sequences: choices, or scores, are
                                        gathered over cp, and every rank decides the same
    of the same micro-batch (dp, cp)    the auxiliary loss: counts are summed, E integers a layer, while forward and
                                        backward go on (`model/balancing.py`)
    of the same step (all ranks)        biases and metrics: [L, E + 5] numbers ride in the sum that ends each step

Tensor-parallel ranks see the same tokens and decide the same, each with 1/tp of the auxiliary loss; a router's gradient
is the sum of theirs, since each has only its part of every expert's output to judge a weight by (`tensor.is_partial`).

Every rank hears of all layers, so every rank knows all biases, and rank 0 can save them.

Cost a micro-batch and layer: 8 E bytes over dp x cp (8 B E over cp if balance is wanted in each sequence); under cp
with a capacity 8 B t K bytes of choices, with expert choice B t E scores, again if the layer is recomputed. A step:
8 L (E + 5) bytes more over all ranks.

Legend: B sequences of a micro-batch, T tokens of a sequence, t = T/cp here, E experts, K a token, L layers with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..collectives import all_gather, all_reduce_async
from ..config import RunConfig
from ..data.loader import data_rows
from ..mesh import Axis, Mesh
from ..model.balancing import EXTRA, Balance, RoutingStats, move_bias, numbers, tally
from ..model.gpt import GPT, router_bias_name
from ..model.moe import MoE, Pool
from .chunks import chunks as context_chunks


class Routers:
    """The routers on this rank, and the biases of all.

    Every rank must make one and call `finish` in each step, whether it has routers or not.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, model: Sequence[GPT], device: torch.device) -> None:
        assert run.model.moe is not None
        self.run, self.mesh, self.config, self.device = run, mesh, run.model.moe, device
        self.layers = run.model.moe_layers
        self.here = {m.layer: m for chunk in model for m in chunk.modules() if isinstance(m, MoE)}
        wide = torch.promote_types(getattr(torch, run.train.dtype), torch.float32)
        self.biases = torch.zeros(len(self.layers), self.config.num_experts, dtype=wide, device=device)
        self.step = 0
        self.micro_batches: list[Balance] = []
        self.axis = mesh.apart("dp_cp" if self.config.aux_scope == "global" else "cp")
        self.tally = torch.compile(tally) if run.train.compile else tally
        if self.config.balance == "bias":
            for layer, module in self.here.items():
                module.router.bias = self.biases[layer - self.layers.start]  # a view: it follows

    def pools(self, training: bool, number: int) -> list[Pool]:
        """What the model is told with each of `number` micro-batches; if it trains, they make up a step."""
        train, cp = self.run.train, self.mesh["cp"]
        whole, part = partial(_whole, cp=cp, how=train.context), partial(_part, cp=cp, how=train.context)
        if not training:
            return [Pool(whole=whole, part=part)] * number
        size, length, dp = train.micro_batch_size, train.seq_len, self.mesh["dp"]
        every = train.batch_size * length
        each = self.config.aux_scope == "sequence"
        self.micro_batches, out = [], []
        for k in range(number):
            start = data_rows(train.batch_size, dp.size, dp.index, number, k).start * length
            index = torch.arange(start, start + size * length, device=self.device).view(size, length)
            balance = Balance(
                self.config, every, length if each else every // number, size if each else 1,
                1 / self.mesh.shape.tp, partial(all_reduce_async, axis=self.axis), self.tally,
            )  # fmt: skip
            self.micro_batches.append(balance)
            out.append(Pool(part(index), train.seed, self.step, whole, part, observe=balance.observe))
        return out

    def numbers(self) -> Tensor:
        """This rank's part of what is summed over all ranks at the end of a step: [L (E + 5)] float64."""
        width = self.config.num_experts + len(EXTRA)
        out = torch.zeros(len(self.layers), width, dtype=torch.float64, device=self.device)
        if self.mesh["tp"].index == 0 and self.here:
            for layer, row in zip(self.here, numbers(self.micro_batches, self.here), strict=True):
                out[layer - self.layers.start] = row
        return out.flatten()

    def finish(self, totals: Tensor) -> RoutingStats:
        """End a step: move the biases, and say how the routers did.

        Args:
            totals: the sum of all ranks' `numbers`.
        """
        totals = totals.view(len(self.layers), -1)
        if self.config.balance == "bias":
            counts = totals[:, : -len(EXTRA)].to(self.biases)
            self.biases.copy_(move_bias(self.biases, counts, self.config.bias_rate))
        self.step += 1
        train = self.run.train
        return RoutingStats(totals, train.batch_size * train.seq_len, self.config.top_k)

    def noted(self, stats: RoutingStats) -> dict[str, Tensor]:
        """A step's statistics and the biases after it, by the names that `verify` compares."""
        out = {}
        for row, layer in enumerate(self.layers):
            out[f"layer {layer}, rows"] = stats.counts[row]
            for name, ours in (("dropped", "dropped"), ("auxiliary loss", "aux"), ("z-loss", "z")):
                out[f"layer {layer}, {name}"] = stats.extra(ours)[row]
            if self.config.balance == "bias":
                out[f"layer {layer}, bias"] = self.biases[row].cpu().clone()
        return out

    def named_biases(self) -> dict[str, Tensor]:
        """The biases of all layers by global name; none where balance is kept otherwise."""
        rows = zip(self.layers, self.biases, strict=True) if self.config.balance == "bias" else ()
        return {router_bias_name(layer): row for layer, row in rows}

    def load(self, biases: dict[str, Tensor]) -> None:
        """Take over biases by global name."""
        if self.config.balance == "bias":
            self.biases.copy_(torch.stack([biases[router_bias_name(layer)] for layer in self.layers]))


def _positions(tokens: int, cp: int, how: str) -> Tensor:
    """The position of each token [T] in the order of the ranks."""
    ranges = [part for rank in range(cp) for part in context_chunks(tokens, cp, rank, how)]
    return torch.cat([torch.arange(part.start, part.stop) for part in ranges])


@cache  # sent to the device once: a copy from the host is waited for
def _order(tokens: int, cp: int, how: str, device: torch.device) -> Tensor:
    """Where each position [T] stands in the order of the ranks."""
    return _positions(tokens, cp, how).argsort().to(device)


def _whole(x: Tensor, cp: Axis, how: str) -> Tensor:
    """[B, t, ...] of the tokens here -> [B, T, ...] by position."""
    if cp.size == 1:
        return x
    together = all_gather(x, cp, 1)  # [B, T, ...] by rank
    return together[:, _order(together.shape[1], cp.size, how, x.device)]


def _part(x: Tensor, cp: Axis, how: str) -> Tensor:
    """[B, T, ...] by position -> [B, t, ...] of the tokens here."""
    if cp.size == 1:
        return x
    return torch.cat([x[:, part] for part in context_chunks(x.shape[1], cp.size, cp.index, how)], 1)
