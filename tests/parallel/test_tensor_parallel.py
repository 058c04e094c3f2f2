"""Tensor parallelism piece by piece: the plan, the split vocabulary, its loss, and the exchanges of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from picotron_mini import collectives
from picotron_mini.collectives import operators
from picotron_mini.config import MeshShape
from picotron_mini.launch import launch
from picotron_mini.mesh import Mesh
from picotron_mini.model.gpt import GPT, init_weights, parameter_shapes
from picotron_mini.parallel.tensor import (
    VocabParallelEmbedding,
    by_rows,
    gather_logits,
    is_partial,
    sharded_dim,
    tensor_parallel,
    vocab_parallel_cross_entropy,
)
from picotron_mini.verify import MODEL


def test_the_plan_names_every_matrix_and_no_norm() -> None:
    for name, shape in parameter_shapes(replace(MODEL, tie_embeddings=False, qk_norm=True)).items():
        assert (sharded_dim(name) is not None) == (len(shape) == 2), name
    assert sharded_dim("layers.0.attention.o.weight") == sharded_dim("layers.0.mlp.down.weight") == 1
    assert sharded_dim("layers.0.attention.q.weight") == sharded_dim("embed.weight") == 0
    assert is_partial("layers.0.attention.q_norm.weight") and not is_partial("layers.0.attention_norm.weight")


def split_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor, int]:
    axis = Mesh.build(MeshShape(tp=3))["tp"]
    step = -(-logits.shape[-1] // axis.size)
    start, stop = axis.index * step, min((axis.index + 1) * step, logits.shape[-1])
    mine = logits[..., start:stop].clone().requires_grad_()
    with collectives.ledger.recording() as sent:
        loss = vocab_parallel_cross_entropy(mine, targets, (start, stop), axis)
        loss.backward()
    assert mine.grad is not None
    return loss.item(), mine.grad, sent["tp", "all_reduce"]


@pytest.mark.parametrize("scale", [1.0, 1e4])  # 1e4: exp overflows without the shift by the maximum
def test_loss_over_a_split_vocabulary(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    targets = torch.randint(11, (2, 5), generator=generator)
    targets[0, :2] = -100
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    want.backward()
    assert logits.grad is not None
    results = launch(split_loss, logits.detach(), targets, world_size=3)
    for loss, _, sent in results:
        assert loss == pytest.approx(want.item(), rel=1e-12)
        assert sent == 3 * 2 * 5 * 8  # three float64 a token, and never the logits
    assert torch.allclose(torch.cat([grad for _, grad, _ in results], -1), logits.grad, rtol=0, atol=1e-12)


def test_bf16_logits_give_a_float32_loss() -> None:
    logits = torch.zeros(1, 2, 9, dtype=torch.bfloat16)
    for loss, grad, sent in launch(split_loss, logits, torch.tensor([[1, 8]]), world_size=3):
        assert loss == pytest.approx(2 * torch.log(torch.tensor(9.0)).item(), rel=1e-6)
        assert grad.dtype == torch.bfloat16 and sent == 3 * 2 * 4


def embed_and_gather(table: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    start, stop = (0, 4) if axis.index == 0 else (4, 7)

    def leave(x: torch.Tensor) -> torch.Tensor:
        return collectives.reduce_from(x, axis)

    embed = VocabParallelEmbedding(torch.nn.Parameter(table[start:stop].clone()), (start, stop), leave)
    out = embed(tokens)
    out.square().sum().backward()
    assert embed.weight.grad is not None
    return out.detach(), embed.weight.grad, gather_logits(table.T[:, start:stop], 7, axis)


def test_embedding_over_a_split_vocabulary_and_gathered_logits() -> None:
    table = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table[2, 0] = float("inf")  # a row that nobody asks for must not reach the sum
    tokens = torch.tensor([[0, 6, 4, 3, 3]])
    whole = table.clone().requires_grad_()
    want = F.embedding(tokens, whole)
    want.square().sum().backward()
    assert whole.grad is not None
    results = launch(embed_and_gather, table, tokens, world_size=2)
    for out, _, logits in results:
        assert torch.equal(out, want.detach())
        assert torch.equal(logits, table.T)
    assert torch.equal(torch.cat([grad for _, grad, _ in results]), whole.grad)


def one_block(compiled: bool, sequence_parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    config = replace(MODEL, num_layers=1)
    mesh = Mesh.build(MeshShape(tp=2))
    model = GPT(config).double()
    init_weights(model, 0)
    tensor_parallel(model, mesh["tp"], sequence_parallel)
    if compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True, backend="aot_eager")
    tokens = torch.arange(12).view(2, 6)
    with collectives.ledger.recording() as sent:
        hidden = model(tokens, torch.arange(6).expand(2, 6))
        model.loss(hidden, tokens).backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(sent.values())


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_compiled_block_computes_and_sends_the_same(sequence_parallel: bool) -> None:
    both = [launch(one_block, compiled, sequence_parallel, world_size=2) for compiled in (False, True)]
    for eager, compiled in zip(*both, strict=True):
        assert torch.allclose(eager[0], compiled[0], rtol=0, atol=1e-12)
        assert eager[1].keys() == compiled[1].keys() and len(eager[1]) == 11
        for name in eager[1]:
            assert torch.allclose(eager[1][name], compiled[1][name], rtol=1e-9, atol=1e-12), name
        assert eager[2] == compiled[2] > 0


def exchanged_in_order() -> list[bool]:
    seen: list[bool] = []
    for name in ("all_gather", "reduce_scatter"):
        real = getattr(operators, name)

        def noted(x: torch.Tensor, *rest: object, real: Callable[..., torch.Tensor] = real) -> torch.Tensor:
            seen.append(x.is_contiguous())
            return real(x, *rest)

        setattr(operators, name, noted)
    one_block(False, True)
    return seen


def test_what_sequence_parallelism_exchanges_lies_in_order() -> None:
    """Else each exchange would begin with a copy: the tokens are cut so that none is needed."""
    for seen in launch(exchanged_in_order, world_size=2):
        assert seen == [True] * 12  # two pairs, two each there and back; the embedding and the head: there and back


def whole_batch_on(rank_of_token: str) -> torch.Tensor:
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    tokens = torch.arange(24.0).view(4, 3, 2)  # [B, T, D]
    if rank_of_token == "mine":
        return by_rows(collectives.reduce_scatter, tokens[:, :2], axis)
    return by_rows(collectives.gather_from, tokens[:, :2] + 100 * axis.index, axis)


def test_a_rank_has_one_run_of_the_tokens_of_all_sequences() -> None:
    x = torch.arange(24.0).view(4, 3, 2)[:, :2]
    for rank, mine in enumerate(launch(whole_batch_on, "mine", world_size=2)):
        assert torch.equal(mine, 2 * x[2 * rank : 2 * rank + 2].reshape(4, 1, 2)), "two of four sequences"
    for whole in launch(whole_batch_on, "all", world_size=2):
        assert torch.equal(whole, torch.cat([x, x + 100]).reshape(4, 4, 2))
