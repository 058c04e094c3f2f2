"""What a mixture of experts costs a rank in one layer and micro-batch: rows, operations, and bytes that it keeps.

Of t tokens of a rank each chooses K of E experts, which lie on ep ranks, h = E/ep on each. If all are chosen evenly:

    ep = 1     M = t K rows for the experts                       nothing travels
    ep > 1     S = rows sent, R = S received, by `even_rows`      M = t K rows for the experts here, of others' tokens

With dispatch=allgather a rank gets all tokens, R = ep t, and sums of what experts made of them come back: S stands for
its own t. On a GPU there is memory for ep t min(K, h) rows, since no host knows M (`moe/gather_dispatch.py`).

Routers are not even. **Skew** is the load of the busiest rank of an ep group over the even one, 1 at best, ep at worst
(all tokens to one rank). Every exchange waits for the busiest rank, and memory must be there for it, so it stands for
all: M and R are multiplied by the skew. With ep = 1 a rank's own tokens are all it has, and no skew makes them more.

What a mixture keeps from forward to backward, in numbers of the compute's width unless said, tp-th of I on a rank:

    experts    M (2 D + 3 I)      each row's input and output, gate, up and their product
    routing    t E                scores, in float32 at least, as the next line; with a z-loss t (E + 1) more
               t (2 K + 2)        chosen scores, their sum, weights; with ep > 1 those of R rows, beside their experts
               32 t K             as int64: experts, and the way of rows there and back (`model/permute.py`)
      ep > 1   8 (t K + 2 ep t + 3 R K)      in place of it: the way to ranks (not with dispatch=allgather) and, of what
                                  came, to experts

`costs.layer_activation_bytes` is the case tp = ep = 1, to the byte. What backward makes beside it: twice the gradients
of the outputs (M D each); later, when those are gone, the gradients of experts' weights, of all experts at once.

Legend: t tokens of a rank, D width, E experts, h of them here, K a token, I inner width, M rows for experts, S sent, R
received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import RunConfig
from ..moe.placement import by_load, by_number, imbalance
from .expert_traffic import ITEMSIZE, Rows, even_rows, even_step, row_bytes

# Operators of a forward that do work, counted (a test counts them again): of a dense layer; of the head with the loss;
# of a layer with experts, what each expert adds where a loop runs them, and what their exchange adds.
DENSE, HEAD, MIXED, EACH, EXCHANGE = 47, 20, 73, 5, 37
PACKED = {"same": 0, "bf16": 4, "fp8": 13}  # ... and what packing and unpacking add (`moe/payload.py`)
GATHERED = 14  # ... and what is more with dispatch=allgather, in place of both
AGAIN = {"alltoall": 54, "allgather": 31}  # ... and each part of the tokens after the first, beside experts and packing


@dataclass(frozen=True)
class Flow:
    """Rows of one layer and micro-batch, on the busiest rank of its ep group."""

    tokens: int  # t
    sent: float  # S
    received: float  # R; with ep = 1 the tokens
    routed: float  # M
    kept: float  # rows that there is memory for: M, or as many as M could be
    columns: int  # K, as wide as choices are kept: with choice=expert E


def skew_of_loads(loads: Sequence[Sequence[float]], ep: int, replicas: int = 0, placed: bool = False) -> float:
    """The busiest rank's load over the even one, mean over the layers.

    Args:
        loads: [L, E], the share of each expert, as `moe_load` of a run's metrics.
        replicas: slots for copies on each rank.
        placed: experts are placed by this very load, in place of by number.
    """
    start = by_number(len(loads[0]), ep, replicas)
    orders = [by_load(load, ep, start) if placed else start for load in loads]
    return sum(imbalance(load, order, ep) for load, order in zip(loads, orders, strict=True)) / len(loads)


def flow(run: RunConfig, skew: float = 1.0) -> Flow:
    """The rows of a layer with experts.

    Args:
        run: resolved; its model has experts.
        skew: load of the busiest rank over the even one. A capacity bounds it, and choice=expert has none.
    """
    moe, ep = run.model.moe, run.mesh.ep
    assert moe is not None
    tokens = run.train.micro_batch_size * run.train.seq_len // run.mesh.cp
    columns = moe.top_k if moe.choice == "token" else moe.num_experts
    filled = moe.capacity or 1.0 if moe.choice == "expert" else 1.0
    most = 1.0 if ep == 1 or moe.choice == "expert" else min(skew, ep, moe.capacity or ep)
    routed = most * filled * tokens * moe.top_k
    if run.train.dispatch == "allgather":
        held = moe.num_experts // ep + run.train.expert_replicas
        kept = ep * tokens * min(columns, held) if grouped(run) else routed
        return Flow(tokens, tokens, ep * tokens, routed, kept, columns)
    sent = even_rows(moe, ep, tokens, run.train.expert_replicas) if ep > 1 else tokens
    received = min(most * sent, ep * tokens)
    return Flow(tokens, sent, received, routed, routed, columns)


def busy_rows(run: RunConfig, skew: float) -> Rows:
    """The rows of the busiest rank in a step, layer by layer, for `traffic.predict_step`."""
    sent, received = even_step(run)
    each = flow(run, skew)
    return dict.fromkeys(run.model.moe_layers, (sent, round(received * each.received / each.sent)))


@dataclass(frozen=True)
class Mixture:
    """Bytes of a mixture on a rank, in place of a dense layer's MLP, of one micro-batch."""

    experts: int  # kept, of rows and what experts make of them
    routing: int  # kept, of scores, weights and indices
    gradients: (
        int  # made and dropped in backward, beyond what is kept: of outputs, or of all weights before they add up
    )


def mixture(run: RunConfig, skew: float = 1.0) -> Mixture:
    """What a layer with experts keeps and makes.

    Args:
        run: resolved; its model has experts.
    """
    moe, mesh, train, rows = run.model.moe, run.mesh, run.train, flow(run, skew)
    assert moe is not None
    w = ITEMSIZE[train.dtype]
    wide, width, inner = max(w, 4), run.model.hidden_size, moe.expert_size // mesh.tp
    experts: float = rows.kept * (2 * width + 3 * inner) * w + 4 * moe.shared_size // mesh.tp * rows.tokens * w
    if w < 4 and not train.compile:  # the router keeps its input widened; only a shared expert keeps it as it was
        experts += rows.tokens * width * (4 if moe.shared_size else 4 - w)
    scores = moe.num_experts + (moe.num_experts + 1 if moe.z_weight else 0) + rows.columns + 2
    routing: float = rows.tokens * (scores * wide + 8 * rows.columns)
    if mesh.ep == 1:
        routing += rows.tokens * rows.columns * (wide + 24)
    else:
        routing += rows.received * rows.columns * (2 * wide + 24)
        routing += 16 * mesh.ep * rows.tokens if train.dispatch == "alltoall" else 0
    held = moe.num_experts // mesh.ep + train.expert_replicas
    one = held * width * inner * w  # the gradient of one projection of all experts here
    made = rows.kept * width * (w + wide + (wide if w < 4 else 0))  # of outputs
    if grouped(run):  # all experts' SwiGLU at once
        made = max(made, 3 * rows.kept * inner * w)
    else:  # a loop makes the weights' gradients of each expert, then puts them together: what experts kept is gone
        made = max(made, rows.kept * width * w + 4 * one - experts)
    # of the layer's output, twice; where rows travel, their gradients as they leave and as they come
    passing = (2 * rows.tokens + (rows.sent + rows.received if mesh.ep > 1 else 0)) * width * w
    if train.dispatch_payload != "same":  # and the messages that they are packed in
        passing += (rows.sent + rows.received) * row_bytes(run)[0]
    return Mixture(int(experts), int(routing), int(passing + made))


def grouped(run: RunConfig) -> bool:
    """Whether one product takes the rows of all experts, or a loop does (`model.moe.fits_grouped`)."""
    return run.train.device == "cuda" and run.train.dtype == "bfloat16"


def operators(run: RunConfig) -> int:
    """What a layer with experts runs in a forward, where a dense one runs `DENSE`."""
    moe = run.model.moe
    assert moe is not None
    train, held = run.train, moe.num_experts // run.mesh.ep + run.train.expert_replicas
    experts = EACH * (1 if grouped(run) else held)
    if run.mesh.ep == 1:
        return MIXED + experts
    packing = PACKED[train.dispatch_payload]
    exchange = GATHERED if train.dispatch == "allgather" else EXCHANGE + packing
    return MIXED + exchange + experts + (train.dispatch_parts - 1) * (AGAIN[train.dispatch] + experts + packing)
