"""Balancing: what keeps a router from sending everything to a few experts.

An expert that gets more rows learns faster and is chosen more often, until a few do all the work. Three remedies:

**Auxiliary loss** (GShard arXiv 2006.16668, Switch arXiv 2101.03961). In a pool of n tokens let f_e be the share of the
n K choices that went to expert e, and P_e the mean of its probability. Then

    L = E sum_e f_e P_e                1 where all are equal, up to E / K where all tokens choose the same

f is a count and has no gradient; P has one, and it pushes down the probability of those that are chosen too often. What
is a pool? Each sequence ("sequence"), or a micro-batch of all data and context ranks ("global", arXiv 2501.11873). A
sequence about one subject wants few experts; only over many sequences it is right to ask for balance. The pool of one
rank, which comes by itself, is neither: its loss would depend on the number of ranks. So f is summed over ranks, E
integers a layer and micro-batch; P need not be, since the sum over ranks of f_e P_e(of the rank) is the whole.

**Router z-loss** (ST-MoE, arXiv 2202.08906): the mean of (log sum_e exp z_e)^2, which keeps logits small.

**Bias only** (arXiv 2408.15664): no loss. Each expert has a bias that is added to its score for the choice only; after
each step it moves by a small constant, up if the expert had less than the mean and down if more.

All through one exit. In a step of N tokens each pool's loss counts n / N, as the model's loss is a sum over all tokens
divided by their number. `attach` hangs the loss on the layer's output: the output is unchanged, and when its gradient
comes by in the backward, the gradient of the auxiliary loss joins in. So it crosses stages, accumulation and recompute
without being carried; and f, which other ranks add to, is needed in the backward only: the sum travels meanwhile.

Legend: N tokens of a step, n tokens of a pool, P pools, E experts, K experts a token, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from picotron_mini.config import MoEConfig
from picotron_mini.model.routing import Routing

EXTRA = ("dropped", "unserved", "not_finite", "aux", "z")  # what `Balance.numbers` has of a layer, behind E counts


class Sum(Protocol):
    """A sum over other devices' counts that is under way."""

    def wait(self) -> object: ...


class Tally(NamedTuple):
    """What balance needs of one layer's routing of a micro-batch: of the tokens that are here."""

    sums: Tensor  # [P, E], of probabilities; has a gradient
    z: Tensor  # scalar, of squared log-sum-exps; has a gradient if it has a weight
    counts: Tensor  # [P, E] int64, choices of each expert
    own: Tensor  # [E] int64, the same in all pools
    extra: Tensor  # [4] float64: dropped, unserved, not_finite, z


def tally(routing: Routing, pools: int, sigmoid: bool, with_z: bool) -> Tally:
    """Count and add up; all of one shape, so that it can be compiled.

    Args:
        pools: P.
        sigmoid: scores are not probabilities yet.
        with_z: z needs a gradient.
    """
    logits, probabilities = routing.logits, routing.scores
    if sigmoid:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    sums = probabilities.unflatten(0, (pools, -1)).sum(1)  # [P, E]
    z = (logits if with_z else logits.detach()).logsumexp(-1).square().sum()
    counts = routing.chosen.unflatten(0, (pools, -1)).sum(1)  # [P, E]
    none, own = routing.experts < 0, counts.sum(0)
    dropped = own.sum() - (~none).sum()
    odd = (~logits.detach().isfinite()).any(-1).sum()
    extra = torch.stack([x.double() for x in (dropped, none.all(-1).sum(), odd, z.detach())])
    return Tally(sums, z, counts, own, extra)


@dataclass
class _Layer:
    """One layer's routing of a micro-batch, as far as balance needs it."""

    own: Tensor  # [E] int64, rows chosen by the tokens that are here
    counts: Tensor  # [P, E] int64, of the whole pools once `sum` is waited for
    sum: Sum | None
    probabilities: Tensor  # [P, E], summed over the tokens that are here
    extra: Tensor  # [4], as in `Tally`

    def total(self) -> Tensor:
        """Counts [P, E] of the whole pools; waits for them if they are under way."""
        if self.sum is not None:
            self.sum.wait()
            self.sum = None
        return self.counts


class Balance:
    """The auxiliary losses of one micro-batch; `observe` is what `Pool.observe` wants.

    Args:
        tokens: N, of the step, on all devices.
        pool: n, of a pool, on all devices.
        pools: P, which have tokens here, the same number each, one pool behind the other.
        share: what this device's loss counts: 1 / r where r devices compute the same one and add their gradients.
        start: start to add other devices' counts to these, in place; None: there are none.
        tally: `tally`, or what a compiler has made of it.
    """

    def __init__(
        self, config: MoEConfig, tokens: int, pool: int, pools: int = 1, share: float = 1.0,
        start: Callable[[Tensor], Sum] | None = None, tally: Callable[[Routing, int, bool, bool], Tally] = tally,
    ) -> None:  # fmt: skip
        self.config, self.tokens, self.pool, self.pools = config, tokens, pool, pools
        self.share, self.start, self.tally = share, start, tally
        self.layers: dict[int, _Layer] = {}

    def observe(self, layer: int, routing: Routing, y: Tensor) -> Tensor:
        """Note what a layer decided, and attach its losses to its output y [N, D].

        A layer that computes its forward again is noted once.
        """
        config = self.config
        with_loss = self._has_aux or config.z_weight > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and with_loss):  # else nothing is kept for it
            seen = self.tally(routing, self.pools, config.score == "sigmoid", config.z_weight > 0)
        if layer not in self.layers:
            under_way = self.start(seen.counts) if self.start is not None and self._has_aux else None
            self.layers[layer] = _Layer(seen.own, seen.counts, under_way, seen.sums.detach(), seen.extra)
        return attach(y, seen.sums, seen.z, lambda: self._gradients(layer)) if with_loss else y

    @property
    def _has_aux(self) -> bool:
        return self.config.balance == "aux" and self.config.aux_weight > 0

    def _factor(self) -> float:
        """Of counts * probability sums, in the auxiliary loss of a step: (n / N) E / (n K) / n."""
        return self.config.num_experts / (self.config.top_k * self.tokens * self.pool)

    def _gradients(self, layer: int) -> tuple[Tensor, float]:
        """Of the weighted losses by the probability sums [P, E], and by the sum of squares."""
        aux = self.config.aux_weight * self.share * self._factor() if self._has_aux else 0.0
        seen = self.layers[layer]
        return seen.total().to(seen.probabilities.dtype) * aux, self.config.z_weight * self.share / self.tokens

    def numbers(self, layer: int) -> Tensor:
        """[E + 5] float64, to be summed over micro-batches and devices: rows chosen of each expert, then `EXTRA`."""
        return numbers([self], [layer])[0]


def numbers(micro_batches: Sequence[Balance], layers: Iterable[int]) -> Tensor:
    """Of a step's micro-batches together, [layers, E + 5] float64: rows chosen of each expert, then `EXTRA`."""
    every = [[balance.layers[layer] for balance in micro_batches] for layer in layers]  # [L][m]
    one, flat = micro_batches[0], [seen for row in every for seen in row]
    counts = torch.stack([seen.total() for seen in flat]).double()  # [L m, P, E]
    aux = (counts * torch.stack([seen.probabilities for seen in flat])).sum((1, 2)) * (one._factor() * one._has_aux)
    extra = torch.stack([seen.extra for seen in flat])  # [L m, 4]
    own = torch.stack([seen.own for seen in flat]).double()  # [L m, E]
    each = torch.cat([own, extra[:, :3], aux[:, None], extra[:, 3:] / one.tokens], 1)
    return each.unflatten(0, (len(every), -1)).sum(1)


def attach(y: Tensor, sums: Tensor, z: Tensor, gradients: Callable[[], tuple[Tensor, float]]) -> Tensor:
    """y, with two quantities hung on it whose gradients are only known when the gradient of y is."""
    out: Tensor = _Attach.apply(y, sums, z, gradients)
    return out


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sums: Tensor, z: Tensor, gradients: Callable[[], tuple[Tensor, float]]) -> Tensor:
        ctx.gradients = gradients
        ctx.like = z.dtype, z.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        of_sums, of_z = ctx.gradients()
        dtype, device = ctx.like
        return (
            grad,
            of_sums,
            torch.full((), of_z, dtype=dtype, device=device) if ctx.needs_input_grad[2] else None,
            None,
        )


def move_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The biases [*, E] after a step in which the experts were chosen for `counts` [*, E] rows."""
    return bias + rate * (counts.mean(-1, keepdim=True) - counts).sign().to(bias.dtype)


@dataclass(frozen=True)
class RoutingStats:
    """How the routers of a model behaved in one step, over all tokens and ranks.

    Attributes:
        totals: [L, E + 5] float64, the sums of `Balance.numbers`.
        tokens: N.
        top_k: K.
    """

    totals: Tensor
    tokens: int
    top_k: int

    @property
    def counts(self) -> Tensor:
        """[L, E]: rows for which each expert was chosen, those included that it had no room for."""
        return self.totals[:, : -len(EXTRA)]

    def extra(self, name: str) -> Tensor:
        """[L]: one of `EXTRA`; aux and z as they are before their weights."""
        return self.totals[:, EXTRA.index(name) - len(EXTRA)]

    @property
    def load(self) -> Tensor:
        """[L, E]: the share of each expert; 1 / E in perfect balance."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """[L]: of the load, between 0 (one expert does all) and 1 (all are equal)."""
        load = self.load
        return -torch.special.xlogy(load, load).sum(-1) / torch.tensor(max(load.shape[-1], 2)).log()

    def metrics(self) -> dict[str, Any]:
        """Plain numbers for a line of metrics: means over the layers, the worst layer where that is what matters."""
        counts = self.counts
        return {
            "moe_load": [[round(x, 5) for x in row] for row in self.load.tolist()],
            "moe_entropy": float(self.entropy.mean()),
            "moe_max_load": float((self.load.amax(-1) * counts.shape[-1]).max()),  # over the even share
            "moe_dead_experts": int((counts == 0).sum()),  # of all layers
            "moe_drop_rate": float(self.extra("dropped").sum() / counts.sum().clamp(min=1)),
            "moe_unserved": float(self.extra("unserved").sum() / (self.tokens * len(counts))),
            "moe_aux": float(self.extra("aux").mean()),
            "moe_z": float(self.extra("z").mean()),
            "moe_not_finite": int(self.extra("not_finite").sum()),
        }
