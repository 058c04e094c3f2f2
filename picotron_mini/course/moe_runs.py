"""A mixture of experts small enough to train in seconds, on a text made of four subjects.

Every row of the text is about one subject: sums, the alphabet, small sentences, or sequences of numbers. So there is
something for experts to specialise in, and a single sequence has no reason to use all of them. The text is made, not
read: it is the same everywhere.

The loop is the plainest one: a model, AdamW, and of the mixture two seams. `Pool.observe` attaches the balancing losses
and notes what the router decided; biases, if there are any, move after the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig, MoEConfig
from ..model.balancing import Balance, RoutingStats, move_bias
from ..model.gpt import GPT, init_weights
from ..model.moe import MoE, Pool
from ..model.routing import Routing
from ..monitoring.experts import information

SUBJECTS = ("sums", "alphabet", "sentences", "sequences")
TOKENS, ROWS, WIDTH, LAYER = 32, 16, 32, 1  # of a sequence, of a step; the layer that has experts
_PEOPLE = ("anna", "bert", "cara", "dave", "emil", "fred", "gina", "hans")
_VERBS = ("sees", "likes", "calls", "meets", "finds", "helps")
_THINGS = ("the cat", "a red house", "the old man", "two birds", "a boat", "the sea")


def make_rows(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of text in bytes [number, TOKENS + 1], and the subject of each [number]: number r has subject r % 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    def piece(subject: int) -> str:
        if subject == 0:
            a, b = draw(50), draw(50)
            return f"{a}+{b}={a + b};"
        if subject == 1:
            start = draw(26)
            return "".join(chr(ord("A") + (start + i) % 26) for i in range(3 + draw(6))) + "."
        if subject == 2:
            return f"{_PEOPLE[draw(8)]} {_VERBS[draw(6)]} {_THINGS[draw(6)]}.\n"
        start, step = draw(10), 1 + draw(3)
        return ",".join(str(start + step * i) for i in range(6)) + "\n"

    rows = []
    for row in range(number):
        text = ""
        while len(text) <= TOKENS:
            text += piece(row % 4)
        rows.append(list(text[: TOKENS + 1].encode()))
    return torch.tensor(rows), torch.arange(number) % 4


@dataclass
class Run:
    """What became of a run.

    Attributes:
        load: [steps, E] the share of each expert; empty for a dense model.
        loss: of each step, nats a token.
        held_out: the loss on text that it was not trained on.
        bits: how much the chosen expert tells of the subject, on the same text.
        model: as it is at the end.
    """

    load: Tensor
    loss: list[float]
    held_out: float
    bits: float
    model: GPT

    @property
    def late_load(self) -> Tensor:
        """[E]: the mean over the last 20 steps, in units of the even share."""
        return self.load[-20:].mean(0) * self.load.shape[1]


def small(moe: MoEConfig | None, intermediate_size: int = 64) -> ModelConfig:
    """Two layers of width 32; the second has the experts, if there are any."""
    return ModelConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=intermediate_size, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, moe=moe,
    )  # fmt: skip


def train(config: ModelConfig, steps: int = 150, seed: int = 0) -> Run:
    """Train on one device in float32. The same seed gives the same start and the same batches, whatever the mixture."""
    model, moe = GPT(config), config.moe
    init_weights(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    rows, _ = make_rows(600, seed=0)
    generator = torch.Generator().manual_seed(seed)
    routers = [block.mlp.router for block in model.layers.values() if isinstance(block.mlp, MoE)]
    loads, losses = [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, (step + 1) / 20)
        batch = rows[torch.randint(len(rows), (ROWS,), generator=generator)]  # [ROWS, TOKENS + 1]
        every, pool = ROWS * TOKENS, None
        if moe is not None:
            pools = ROWS if moe.aux_scope == "sequence" else 1
            balance = Balance(moe, every, every // pools, pools)
            pool = Pool(observe=balance.observe)
        loss = model.loss(model(batch[:, :-1], pool=pool), batch[:, 1:]) / every
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if moe is not None:
            stats = RoutingStats(balance.numbers(LAYER)[None], every, moe.top_k)
            loads.append(stats.load[0])
            if moe.balance == "bias":
                for router in routers:
                    assert router.bias is not None
                    router.bias = move_bias(router.bias, stats.counts[0], moe.bias_rate)
    held_out, bits = judge(model)
    return Run(torch.stack(loads) if loads else torch.zeros(0, 0), losses, held_out, bits, model)


@torch.no_grad()
def judge(model: GPT) -> tuple[float, float]:
    """On held-out rows the loss in nats a token, and the information in bits that an expert gives of the subject."""
    rows, subjects = make_rows(128, seed=1)
    seen: list[Routing] = []
    loss = model.loss(model(rows[:, :-1], pool=Pool(observe=_noting(seen))), rows[:, 1:]) / rows[:, 1:].numel()
    if not seen:
        return loss.item(), 0.0
    chosen = seen[0].chosen.unflatten(0, (len(rows), -1)).sum(1)  # [rows, E]
    table = torch.stack([chosen[subjects == subject].sum(0) for subject in range(len(SUBJECTS))])
    return loss.item(), information(table)


@torch.no_grad()
def routes(model: GPT, text: str) -> Tensor:
    """The expert that each byte of a text is sent to first, [T] int64."""
    seen: list[Routing] = []
    model(torch.tensor([list(text.encode())]), pool=Pool(observe=_noting(seen)))
    return seen[0].experts[:, 0]


def _noting(seen: list[Routing]):  # type: ignore[no-untyped-def]
    def observe(layer: int, routing: Routing, y: Tensor) -> Tensor:
        seen.append(routing)
        return y

    return observe
