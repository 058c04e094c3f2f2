"""Mixture of experts: many MLPs in the place of one, of which each token passes a few.

    x [N, D] --router--> experts [N, K], weights [N, K]
       |
       +--permute--> rows, sorted by expert --> expert 0 | expert 1 | ... --un-permute, weigh, add--> y [N, D]
       |                                                                                               (+)
       +--> shared expert, if there is one -------------------------------------------------------------+

    y_t = scale * sum_{e chosen by t} w_te E_e(x_t) + S(x_t),       E_e(x) = Wdown_e (silu(Wgate_e x) * Wup_e x)

So a model has E experts' weights and computes with K of them for each token. The rows of an expert are put together,
since one product over many rows is what hardware is fast at; the number of rows of each expert is only known when the
router has decided.

Three seams. The experts are one tensor for each projection, expert first, and how many there are is read from the
weight: a rank may hold a slice of them. `MoE.dispatch` takes rows to experts and back, and can be replaced by one that
takes them to other ranks. `Pool` tells a router of tokens that are not here.

**One exit for auxiliary losses.** A balancing loss belongs to a layer, and the loss of the model is computed elsewhere,
in a pipeline on another rank. So it is not carried there: `Pool.observe` sees what each layer decided and may attach to
the layer's output a term whose gradient joins in when the output's gradient comes by (`balancing.py`).

Cost for a token: 2 E D flops for the router, 6 K D I for the experts; memory: K rows [D] in, K rows out.

Papers: Shazeer et al. (arXiv 1701.06538), Switch (arXiv 2101.03961), Mixtral (arXiv 2401.04088), DeepSeekMoE
(arXiv 2401.06066), Qwen3 (arXiv 2505.09388).
Legend: B batch, T tokens, N = B T, D width, E experts, K experts a token, I inner width of an expert, M rows routed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_mini.config import ConfigError, MoEConfig
from picotron_mini.model.permute import PLAIN, Passes, combine, gated, take
from picotron_mini.model.routing import (
    Routing,
    choose,
    choose_tokens,
    keep,
    noise,
    room,
    score,
    weigh,
    weigh_taken,
)

Dispatch = Callable[[Tensor, Tensor, Tensor, "Experts", nn.Module | None], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _unseen(layer: int, routing: Routing, y: Tensor) -> Tensor:
    return y


@dataclass
class Pool:
    """What a router must know of a micro-batch beside the values of the tokens that are here.

    Attributes:
        index: [B, T] int64, the number of each token in the global batch of the step; None: no jitter.
        seed, step: of the jitter: another one in each step.
        whole: [B, t, ...] of the tokens here -> [B, T, ...] of whole sequences, by position.
        part: [B, T, ...] -> [B, t, ...], its inverse.
        limit: whether the experts' capacity counts. Not while text is written token by token.
        observe: `observe(layer, routing, y)` sees what a layer decided, and returns its output y [N, D].
    """

    index: Tensor | None = None
    seed: int = 0
    step: int = 0
    whole: Callable[[Tensor], Tensor] = _same
    part: Callable[[Tensor], Tensor] = _same
    limit: bool = True
    observe: Callable[[int, Routing, Tensor], Tensor] = _unseen


class Router(nn.Module):
    """Logits [N, E] of the tokens [N, D], in at least float32 whatever the weight's dtype; and the bias, if any.

    No `nn.Linear`: those compute in the dtype of their input, and may put their weight's gradient off.
    """

    bias: Tensor | None

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        # added to the scores for the choice; moved once a step by rule, not by gradient
        self.register_buffer("bias", torch.zeros(config.num_experts) if config.balance == "bias" else None)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        exact = self.bias
        super()._apply(fn, recurse)
        if exact is not None and self.bias is not None and self.bias.itemsize < 4:
            self.bias = exact.to(self.bias.device)  # its small steps would be lost in bf16
        return self


def fits_grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether one grouped product (`torch._grouped_mm`) takes the rows of all experts, or a loop has to.

    It wants bf16 on CUDA, at least one row, and rows of a multiple of 16 bytes; how many rows an expert has is free.
    """
    return rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) > 0 and all(n % 8 == 0 for n in weight.shape[1:])


class Experts(nn.Module):
    """The MLPs, as one tensor for each projection. How many there are, and how wide, is read from the weights.

    Attributes:
        passes: with which rows are moved and multiplied element by element, to the experts and in them.
    """

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        inner = (config.num_experts, config.expert_size, width)  # [E, I, D]
        self.gate = nn.Parameter(torch.empty(inner))
        self.up = nn.Parameter(torch.empty(inner))
        self.down = nn.Parameter(torch.empty(config.num_experts, width, config.expert_size))  # [E, D, I]
        self.passes: Passes = PLAIN

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            rows: [M, D], those of expert 0 first.
            counts: [E] int64, how many rows each expert has. Their sum is M, or less where one grouped product takes
                all: the rows behind pass no expert.

        Returns:
            [M, D]; what stands there for a row that passed no expert may be anything, NaN too.
        """
        if fits_grouped(rows, self.gate):
            ends = counts.cumsum(0).to(torch.int32)  # stays on the device: the host need not know it
            ends[-1:].clamp_(min=1)  # row 0, of which a choice of no expert takes 0 times, is always a number
            gate, up = (torch._grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (self.gate, self.up))
            return torch._grouped_mm(gated(gate, up, self.passes), self.down.transpose(1, 2), offs=ends)
        weights = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        # without values (on the meta device, where shapes are all that is asked for) nothing was counted
        sizes = counts.tolist() if not rows.is_meta else [len(rows), *[0] * (len(self.gate) - 1)]
        parts = [  # an expert without rows too: so each weight has a gradient, zeros
            F.linear(gated(F.linear(x, gate), F.linear(x, up), self.passes), down)
            for x, (gate, up, down) in zip(rows.split(sizes), weights, strict=True)
        ]
        return torch.cat(parts)


def local_dispatch(
    x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None = None,
    routed: int | None = None,
) -> Tensor:  # fmt: skip
    """Take the tokens to the experts of this device, and their outputs back.

    Args:
        x: [N, D].
        experts: [N, K] int64; -1: none.
        weights: [N, K].
        run: all experts.
        shared: the shared expert, which every token passes.
        routed: how many rows to make: as many as there are choices of an expert, or more, N K at most. Those too many
            count for nothing: a grouped product stops before them; in a loop, where they must be N K in all, they pass
            an expert. None: as few as there can be; a GPU is asked how many, and waited for.

    Returns:
        [N, D], zeros for a token without an expert, plus what the shared expert makes of it.
    """
    if routed is None:
        routed = int((experts >= 0).sum()) if not experts.is_meta else experts.numel()
    rest = routed == experts.numel() and not fits_grouped(x, run.gate)
    order, token, place, counts = run.passes.sort(experts, len(run.gate), rest)
    order, token = order[:routed], token[:routed]
    rows = take(x, token, place, run.passes)  # [M, D]
    y = combine(run(rows, counts), weights, order, token, place, run.passes)
    return y if shared is None else y + shared(x)


def dispatch_all(x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None = None) -> Tensor:
    """`local_dispatch` with N K rows, which is right whether choices were dropped or not, and waits for no GPU."""
    return local_dispatch(x, experts, weights, run, shared, routed=experts.numel())


class MoE(nn.Module):
    """Router, experts, and the shared expert if there is one. `dispatch` is the seam for experts that are elsewhere."""

    def __init__(self, config: MoEConfig, width: int, layer: int, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.router = Router(config, width)
        self.experts = Experts(config, width)
        self.shared = shared
        # of N E choices by experts most are none
        self.dispatch: Dispatch = local_dispatch if config.choice == "expert" else dispatch_all

    def forward(self, x: Tensor, pool: Pool | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        pool = pool or Pool()
        routing = self.route(x, pool)
        # the shared expert goes along: while rows travel there is time for it
        y = self.dispatch(x.flatten(0, 1), routing.experts, routing.weights, self.experts, self.shared)  # [N, D]
        return pool.observe(self.layer, routing, y).view_as(x)

    def route(self, x: Tensor, pool: Pool) -> Routing:
        """Decide for every token of x [B, t, D], which may be a part of whole sequences (see `Pool`)."""
        config, (batch, tokens, width) = self.config, x.shape
        flat = x.flatten(0, 1)  # [N, D]
        if config.jitter and pool.index is not None:
            wide = flat.to(torch.promote_types(x.dtype, torch.float32))
            key = ((pool.seed << 32) + pool.step << 16) + self.layer
            flat = wide * noise(config.jitter, key, pool.index.flatten(), width, wide.dtype)
        if config.choice == "expert":
            logits = self.router(flat)  # [N, E]
            scores = score(config, logits)
            whole = pool.whole(scores.detach().view(batch, tokens, -1))  # [B, T, E]
            taken = pool.part(choose_tokens(whole, room(config, whole.shape[1]))).flatten(0, 1)  # [N, E]
            number = torch.arange(config.num_experts, device=x.device)
            return Routing(torch.where(taken, number, -1), weigh_taken(config, scores, taken), logits, scores, taken)
        routing = self.decide(flat)
        if config.capacity is not None and pool.limit:
            whole = pool.whole(routing.experts.view(batch, tokens, -1))  # [B, T, K]
            kept = pool.part(keep(whole, config.num_experts, room(config, whole.shape[1]))).flatten(0, 1)
            return routing._replace(
                experts=routing.experts.masked_fill(~kept, -1), weights=routing.weights.masked_fill(~kept, 0.0)
            )
        return routing

    def decide(self, x: Tensor) -> Routing:
        """Let each token of x [N, D] choose by itself: what needs to hear of no other token, and is of one shape."""
        config, logits = self.config, self.router(x)
        scores = score(config, logits)
        experts = choose(config, scores, self.router.bias)  # [N, K]
        chosen = (experts[..., None] == torch.arange(config.num_experts, device=x.device)).any(1)
        return Routing(experts, weigh(config, scores, experts), logits, scores, chosen)


def check_causal(config: MoEConfig) -> None:
    """Refuse to write text with a router that looks ahead.

    Raises:
        ConfigError: experts choose tokens.
    """
    if config.choice == "expert":
        raise ConfigError(
            "choice=expert decides about a token by looking at later ones, so it cannot write text token by token; "
            "train with choice=token to generate"
        )
