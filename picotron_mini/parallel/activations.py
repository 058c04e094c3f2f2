"""How much memory a step makes and drops again, on one rank: activations by formula, and the moment of its peak.

What a forward keeps for its backward grows with the tokens of a micro-batch, t = B T / cp on a rank. Of each token,
in numbers of the compute's width w unless said, with H, Hkv, F the rank's share (1/tp) of heads and inner width:

    a layer, eagerly     `costs.layer_activation_bytes` of a model that is as narrow as the rank's share
    a layer, compiled    4 D + (3 H + 2 Hkv) Dh + 3 F, and one float32 a head and norm: inputs of products and of
                         norms, q, k, v, attention's output in two orders; SiLU and norms are computed again
    recompute full       D, the layer's input
    recompute selective  the layer's, without the MLP's 4 F
    loss                 V float32 log-probabilities (compiled: V logits of w bytes; over a split vocabulary the
                         shifted logits and their exponentials, V/tp float32 each; compiled: one of the two), and the
                         final norm
    loss in chunks       D and, once for all tokens, V D float32: gradients that are known already
    with experts         a layer without its MLP, and what `expert_costs.py` says of the mixture in its place

Sequence parallelism cuts what lies between the pairs (the norms' inputs) by tp. A stage of a pipeline keeps as many
micro-batches as its schedule has live at once (`Timeline.peak_live`).

The peak comes at one of three moments, all of which have everything that is kept between steps (`footprint.py`) below:

    the loss's backward    all that is kept, and the gradients of log-probabilities and logits, V float32 each
                           (compiled: one, of w bytes; over a split vocabulary, eagerly, three)
    a layer's backward     all that is kept but the loss's, the layer's own gradients, with recompute the layer again
    the optimizer          nothing of the above; eagerly on a CPU AdamW makes one temporary as large as a moment

Legend: D width, H query heads, Hkv key-value heads, Dh width of a head, F inner width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import ModelConfig, RunConfig
from ..model.costs import layer_activation_bytes, layer_parameters
from .expert_costs import mixture
from .expert_traffic import ITEMSIZE
from .zero import UNDER_WAY


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    layer: int  # a layer, from its forward to its backward
    routing: int  # ... and what routers and dispatch of its mixture of experts keep beside it
    layer_again: int  # what recompute makes again in the layer's backward
    layer_gradients: int  # made and dropped inside a layer's backward
    loss: int  # the final norm, the head and the loss, from forward to backward
    loss_backward: int  # made and dropped inside the loss
    border: int  # hidden states between stages
    weights: int  # of a dense layer's largest gradient of a weight, before it is added to its sum

    @property
    def layer_whole(self) -> int:
        """What a layer makes in its forward."""
        return self.layer + self.routing + self.layer_again


def share_of(model: ModelConfig, tp: int) -> ModelConfig:
    """The model as one of tp ranks sees it: as wide outside the pairs, a tp-th of the heads and of the inner width."""
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    return replace(
        model, num_heads=model.num_heads // tp, num_kv_heads=max(1, model.num_kv_heads // tp), head_dim=head_dim,
        intermediate_size=model.intermediate_size // tp,
        moe=model.moe and replace(
            model.moe, expert_size=model.moe.expert_size // tp, shared_size=model.moe.shared_size // tp
        ),
    )  # fmt: skip


def activations(run: RunConfig, experts: bool = False, skew: float = 1.0) -> Activations:
    """What one micro-batch makes on a rank of this run.

    Args:
        run: resolved.
        experts: of layers with experts, not of dense ones.
        skew: see `expert_costs.py`.
    """
    train, mesh = run.train, run.mesh
    model, w = share_of(run.model, mesh.tp), ITEMSIZE[train.dtype]
    wide, width, inner = max(w, 4), run.model.hidden_size, model.intermediate_size
    tokens = train.micro_batch_size * train.seq_len // mesh.cp
    between = tokens // mesh.tp if train.sequence_parallel else tokens  # tokens outside the pairs
    vocabulary = -(-run.model.vocab_size // mesh.tp)
    whole = layer_bytes(replace(model, moe=None), w, train.compile, tokens, between)
    mlp = (3 if train.compile else 4) * inner * w * tokens
    routing, gradients = 0, (3 * inner + 2 * width) * w * tokens
    largest = width * max(inner, model.num_heads * model.head_dim) * w
    if experts:
        mixed = mixture(run, skew)
        whole, mlp, routing = whole - mlp + mixed.experts + mixed.routing, mixed.experts, mixed.routing
        gradients, largest = mixed.gradients, 0
    kept = {"none": whole - routing, "selective": whole - routing - mlp, "full": width * w * between}[train.recompute]
    routing = routing if train.recompute == "none" else 0
    norm = ((width * w + wide) if train.compile else (2 * width + 1) * wide) * between + width * w * tokens
    # in bytes for each of V: what is kept, and what the backward makes beside it
    if mesh.tp > 1:
        each, more = (wide, w) if train.compile else (2 * wide, 3 * wide)
    else:
        each, more = (w, w) if train.compile and w < wide else (wide, 2 * wide)
    loss, loss_backward = norm + each * vocabulary * tokens, more * vocabulary * tokens
    if train.loss_chunks > 1:
        loss_backward = -(-(loss + loss_backward - norm) // train.loss_chunks)
        loss = norm + width * w * tokens + vocabulary * width * wide
    return Activations(
        layer=kept,
        routing=routing,
        layer_again=whole - kept if train.recompute != "none" else 0,
        layer_gradients=gradients,
        loss=loss,
        loss_backward=loss_backward,
        border=width * w * between,
        weights=largest,
    )


def layer_bytes(model: ModelConfig, w: int, compiled: bool, tokens: int, between: int) -> int:
    """What one layer keeps of a micro-batch.

    Args:
        model: the rank's share of it.
        w: bytes of a number.
        tokens, between: inside the pairs, and outside of them (fewer with sequence parallelism).
    """
    width, head_dim, wide = model.hidden_size, model.head_dim, max(w, 4)
    if compiled:
        heads = (3 * model.num_heads + 2 * model.num_kv_heads) * head_dim
        inside = (2 * width + heads + 3 * model.intermediate_size) * w + model.num_heads * wide
        return inside * tokens + (2 * width * w + 2 * wide) * between
    norms = 2 * (2 * width + 1) * wide
    return (layer_activation_bytes(model, w) - norms) * tokens + norms * between


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what is kept between steps, at the worst moment."""

    activations: int
    routing: int  # of them what routers and dispatch keep
    buffers: int  # gradients under way, messages, temporaries of the optimizer

    @property
    def total(self) -> int:
        return self.activations + self.routing + self.buffers


def stage_peak(
    run: RunConfig, layers: tuple[int, int], live: int, *, last: bool, size: int, elements: int, skew: float = 1.0
) -> Peak:
    """The peak of a pipeline stage.

    Args:
        run: resolved.
        layers: that the stage holds in one chunk: dense ones, and those with experts.
        live: micro-batches of a chunk whose activations it holds at once.
        last: whether the head is here.
        size: elements of all gradients that backward makes here.
        elements: that the optimizer of this rank updates.
        skew: see `expert_costs.py`.
    """
    train, mesh = run.train, run.mesh
    kinds = [(n, mix, activations(run, mix, skew)) for n, mix in zip(layers, (False, True), strict=True) if n]
    each = activations(run)
    w, wide = ITEMSIZE[train.dtype], max(ITEMSIZE[train.dtype], 4)
    vocabulary = -(-run.model.vocab_size // mesh.tp) * run.model.hidden_size
    messages = each.border * (live + 4) if mesh.pp > 1 else 0
    kept = live * sum(n * one.layer for n, _, one in kinds)
    routing = live * sum(n * one.routing for n, _, one in kinds)
    loss = last * live * each.loss
    rest = kept + loss - last * each.loss  # when the first backward has left the loss
    # gradients under way: one of a layer's weights before it is added to its sum; of a table that is tied and used
    # twice here, from the loss to the end of the backward; and what ZeRO 2 and 3 reduce
    tied = vocabulary * w if last and run.model.tie_embeddings and mesh.pp == 1 else 0
    going = _under_way(run, wide * size) if train.zero == 2 else 0.0
    reduced = [going] * 2
    if train.zero == 3:
        unit = max(_unit(run, False), vocabulary)
        reduced[False] = min(unit * (4 * w + 3 * wide), size * (2 * w + 2 * wide))
        reduced[True] = 2 * w * _unit(run, True)  # worst in the last layer, before anything is reduced
    # in the loss's backward the reductions of the micro-batch before are still under way
    still = int(going * 2 / 3) if train.zero == 2 and train.micro_batches > 1 else 0
    moments = [
        Peak(kept + loss + last * each.loss_backward, routing, messages + still),
        Peak(
            kept + loss - last * each.loss + last * each.loss_backward // 2, routing, messages + vocabulary * w * last
        ),
    ]
    moments += [
        Peak(rest + one.layer_again + one.layer_gradients, routing, int(messages + one.weights + tied + reduced[mix]))
        for _, mix, one in kinds
    ]
    if train.device == "cpu":  # fused kernels need no temporary
        moments.append(Peak(0, 0, elements * wide))
    return max(moments, key=lambda peak: peak.total)


def _under_way(run: RunConfig, gradients: float) -> float:
    """Bytes of what ZeRO 2 reduces at once, of so many bytes of gradients.

    Each bucket once, and with several micro-batches its sum (which is then added to another), and one that fills again.
    """
    train, going = run.train, min(gradients, UNDER_WAY)
    if train.micro_batches == 1:
        return going
    group = train.zero_group or run.mesh.dp
    return going * (1 + 1 / group) + min(gradients, train.bucket_mb * 2**20)


def _unit(run: RunConfig, experts: bool) -> int:
    """Elements of a layer's parameters on a rank; where ep spreads experts, of those here."""
    share, moe = share_of(run.model, run.mesh.tp), run.model.moe
    if moe is None or not experts:
        return layer_parameters(replace(share, moe=None))
    held = moe.num_experts // run.mesh.ep + run.train.expert_replicas
    here = replace(moe, num_experts=held, expert_size=moe.expert_size // run.mesh.tp)
    return layer_parameters(replace(share, moe=replace(here, dense_layers=0)))
