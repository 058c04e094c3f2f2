"""A Llama-style decoder in plain PyTorch, for one device.

Nothing here knows of ranks. Parallelism is applied from outside, through six seams: head counts come from
the weights' shapes; `layers` is keyed by the global layer index and may be a subset; `embed` and `head` may
be absent; positions and documents are inputs; `attend` and `cross_entropy` are attributes that can be replaced.

    tokens [B, T] -> embed -> x [B, T, D] -+-> norm -> attention -> (+) -+-> norm -> MLP -> (+) ... norm -> head
                                           +-----------------------> ^   +----------------> ^
                                           +------------- one Block, L in a row -------------+

With h = RMSNorm(x), one block computes

    q, k, v = h Wq, h Wk, h Wv;   q, k = RoPE(q, positions), RoPE(k, positions)
    x = x + softmax(q kT / sqrt(Dh) + mask) v Wo            H query heads share Hkv key-value heads
    x = x + (silu(RMSNorm(x) Wgate) * RMSNorm(x) Wup) Wdown          or a mixture of such MLPs, see moe.py

Cost of a block for each token, forward: 2 flops for each weight, and 4 T H Dh for the two attention products
(see costs.py).

Papers: Llama 2 arXiv 2307.09288, Llama 3 2407.21783, RMSNorm 1910.07467, RoPE 2104.09864, grouped-query attention
2305.13245, SwiGLU 2002.05202, norm on queries and keys 2302.05442 (Qwen3 2505.09388).

Legend: B batch, T tokens, D width, H query heads, Hkv key-value heads, Dh width of a head, F inner width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_mini.config import ConfigError, ModelConfig
from picotron_mini.model.legality import model_problems
from picotron_mini.model.moe import MoE, Pool, check_causal

if TYPE_CHECKING:
    from picotron_mini.model.generate import KeyValueCache, LayerCache

IGNORE = -100  # the target of a position that has nothing to predict


def at_least_float32(x: Tensor) -> Tensor:
    """Widen bf16 and fp16 to float32; float32 and float64 pass unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal softmax attention. The queries belong to the last Tq of the Tk positions that have keys.

    Args:
        q: [B, H, Tq, Dh]; Tq is less than Tk when earlier keys come from a cache.
        k, v: [B, Hkv, Tk, Dh]; H is a multiple of Hkv, and keys are shared, not repeated.
        documents: [B, Tk] int64, the document of each position: a token sees its own document only. None: one document.

    Returns:
        [B, H, Tq, Dh], in the dtype of q.
    """
    new, all_ = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if documents is None and new in (1, all_):
        # the fused kernels skip the masked half; one query sees every key
        return F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=gqa)
    index = torch.arange(all_, device=q.device)
    mask = index <= index[all_ - new :, None]  # [Tq, Tk]
    if documents is not None:
        mask = mask & (documents[:, None, all_ - new :, None] == documents[:, None, None, :])  # [B, 1, Tq, Tk]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over the targets that are not -100, in float32 or wider.

    Args:
        logits: [B, T, V].
        targets: [B, T] int64.
    """
    return F.cross_entropy(
        at_least_float32(logits).flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORE
    )


def rope(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [B, 1, T, Dh / 2], in float32 or wider.

    Pair i of a head turns by positions * theta^(-2i / Dh). Llama 3's scaling slows the pairs that complete fewer than
    `low_freq_factor` turns within the original context by `factor`, leaves those of more than `high_freq_factor`
    turns, and blends in between.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequency = config.rope_theta ** (-pairs / config.head_dim)  # [Dh / 2], radians a position
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, fully scaled; 1: fast pair, untouched
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    angle = positions[:, None, :, None].to(dtype) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + Dh / 2), Hugging Face's pairing, of x [B, H, T, Dh]; its dtype is kept."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32 or wider, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. `attend` is the seam for other attentions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q = nn.Linear(width, config.num_heads * head_dim, bias=False)
        self.k = nn.Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.o = nn.Linear(config.num_heads * head_dim, width, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = attend

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        batch, tokens, _ = x.shape
        # -1: as many heads as this weight has, which is fewer than the model's under tensor parallelism
        q = self.q(x).view(batch, tokens, -1, self.head_dim)  # [B, T, H, Dh]
        k = self.k(x).view(batch, tokens, -1, self.head_dim)  # [B, T, Hkv, Dh]
        v = self.v(x).view(batch, tokens, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, Dh]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        out = self.attend(q, k, v, documents)  # [B, H, T, Dh]
        return self.o(out.transpose(1, 2).flatten(2))  # [B, T, H * Dh] -> [B, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # [B, T, F] -> [B, T, D]


class Block(nn.Module):
    """One layer: attention and MLP (or experts), each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        width, moe = config.hidden_size, config.moe
        self.mlp: MLP | MoE
        if moe is not None and index in config.moe_layers:
            self.mlp = MoE(moe, width, index, MLP(width, moe.shared_size) if moe.shared_size else None)
        else:
            self.mlp = MLP(width, config.intermediate_size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None, cache: LayerCache | None = None,
        pool: Pool | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, D] -> [B, T, D]; cos and sin as from `rope`, documents, cache and pool as in `GPT.forward`."""
        x, h = self.first_half(x, cos, sin, documents, cache)
        return x + (self.mlp(h, pool) if isinstance(self.mlp, MoE) else self.mlp(h))

    def first_half(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [B, T, D] with attention added, and the second half's input."""
        x = x + self.attention(self.attention_norm(x), cos, sin, documents, cache)
        return x, self.mlp_norm(x)


class GPT(nn.Module):
    """The decoder, or the part of it that a pipeline stage holds.

    Args:
        config: with `vocab_size` and `head_dim` filled (`legality.resolve` does it).
        layers: global indices of the layers to hold; None: all.
        embed: hold the token embedding; without it the input is hidden states.
        head: hold the final norm and the output head.

    Raises:
        ConfigError: the configuration is open or cannot be built.
    """

    def __init__(
        self, config: ModelConfig, *, layers: Iterable[int] | None = None, embed: bool = True, head: bool = True
    ) -> None:
        super().__init__()
        _check(config)
        self.config = config
        size = (config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(*size) if embed else None
        indices = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in indices})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if head else None
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if head else None
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
        self.tie()

    def tie(self) -> None:
        """Let the head use the embedding's weight, where both are here and the model is tied."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        # nn.Module converts each module's parameters apart: leaving the meta device would untie the head
        super()._apply(fn, recurse)
        self.tie()
        return self

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """Run the layers that are here, and the final norm if the head is here.

        Args:
            x: tokens [B, T] int64, or hidden states [B, T, D] when there is no embedding.
            positions: [B, T] int64; None: 0..T-1, after what the cache holds.
            documents: [B, T] int64 ids; a token attends inside its document only. None: plain causal attention.
            cache: the keys and values of earlier tokens; those of x are appended.
            pool: what routers must know beside x; None: x is all there is.

        Returns:
            Hidden states [B, T, D].

        Raises:
            ConfigError: a cache, and experts that choose their tokens among later ones too.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]  # [1, T]
        if cache is not None:
            documents = cache.extend(x.shape[1], documents)  # [B, Tk], of every key
            if self.config.moe is not None:
                check_causal(self.config.moe)
                pool = Pool(limit=False)  # a sequence that is not whole has no share to exceed
        if self.embed is not None:
            x = self.embed(x)
        cos, sin = rope(self.config, positions, x.dtype)
        for index, block in self.layers.items():
            x = block(x, cos, sin, documents, None if cache is None else cache.layer(index), pool)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [B, T, D] -> [B, T, V]."""
        if self.head is None:
            raise ConfigError("this part of the model has no head; build it with head=True")
        return self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """SUM of the cross-entropies (nats) of targets [B, T] that are not -100; divide by their global number."""
        return self.cross_entropy(self.logits(hidden), targets)


def _check(config: ModelConfig) -> None:
    problems = model_problems(config)
    for name in ("vocab_size", "head_dim"):
        if getattr(config, name) == 0:
            problems.append(f"{name}=0 is not filled; a model needs it to be at least 1")
    if problems:
        raise ConfigError("\n".join(problems))


def global_name(config: ModelConfig, name: str) -> str:
    """The name by which a parameter is known everywhere: a tied head is the embedding."""
    return "embed.weight" if config.tie_embeddings and name == "head.weight" else name


def router_bias_name(layer: int) -> str:
    """The global name of the bias that balances a layer's experts: a buffer, which no gradient moves."""
    return f"layers.{layer}.mlp.router.bias"


def bias_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of the biases that balance experts; none in a model that has no such."""
    if config.moe is None or config.moe.balance != "bias":
        return {}
    return {router_bias_name(layer): (config.moe.num_experts,) for layer in config.moe_layers}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name -> global shape of every parameter, in model order; a tied head is not listed."""
    return dict(_shapes(config))


@lru_cache(maxsize=8)  # a planner asks hundreds of times
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    _check(config)
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def initial_weight(
    config: ModelConfig, name: str, shape: Iterable[int], seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The first value of a parameter, float32, as a pure function of the seed and the parameter's global name.

    So every layout starts from the same weights, whichever rank holds them. Norms are ones, all else is normal with
    standard deviation 0.02; the two projections that write to the residual stream are scaled by 1 / sqrt(2 L), so that
    its variance does not grow with depth (GPT-2). CPU and CUDA draw different numbers from one seed.
    """
    name = global_name(config, name)
    if torch.device(device).type == "meta":  # a dry run wants shapes, and there is no generator without memory
        return torch.empty(*shape, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(*shape, device=device)
    std = 0.02
    if name.endswith((".o.weight", ".down.weight", ".experts.down")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()  # stable, unlike hash()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * std


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill a single-device model with `initial_weight`, in place and in its own dtype."""
    for name, weight in model.named_parameters():
        weight.copy_(initial_weight(model.config, name, weight.shape, seed, weight.device))
