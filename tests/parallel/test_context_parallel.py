"""Sequences shared between ranks: who holds what, that attention is that of one device, and what it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.collectives import ledger
from picotron_mini.config import MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.instruments.largest import Largest
from picotron_mini.course.instruments.witness import Witness
from picotron_mini.data.loader import Batch, data_rows
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import GPT, IGNORE, attend, init_weights
from picotron_mini.parallel import context
from picotron_mini.parallel.chunks import calls, chunks, context_slice, masked_calls, work
from picotron_mini.parallel.context import context_parallel, ring_attention
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.parallel.ulysses import ulysses_attention
from picotron_mini.training.step import compute_gradients, evaluate
from picotron_mini.verify import MODEL, TRAIN, make_batches, verify

Ranks = Callable[..., list[Any]]
HOW = ("ring", "ulysses")


def axis_of_size(cp: int, index: int) -> Axis:
    return Axis("cp", cp, index, tuple(range(cp)))


# --- who holds which tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cp", range(1, 9))
def test_the_ranks_parts_are_the_whole_sequence(cp: int, how: str) -> None:
    tokens = torch.arange(2 * 6 * cp).view(1, -1).repeat(3, 1)
    batch = Batch(tokens, tokens + 1000, tokens + 2000, tokens + 3000)
    parts = [context_slice(batch, axis_of_size(cp, rank), how) for rank in range(cp)]
    assert all(part.tokens.shape == (3, 12) for part in parts)
    whole = torch.cat([part.tokens for part in parts], 1)
    assert torch.equal(whole.sort(1).values, tokens)  # every token once
    for part in parts:  # and all that belongs to it goes with it
        for offset, x in ((1000, part.targets), (2000, part.positions), (3000, part.documents)):
            assert torch.equal(part.tokens + offset, x)
    if cp > 1:
        assert not torch.equal(whole, tokens) or how == "ulysses"


def test_the_picture_in_the_docstring() -> None:
    held = {rank: [part.start for part in chunks(8, 4, rank)] for rank in range(4)}
    assert held == {0: [0, 7], 1: [1, 6], 2: [2, 5], 3: [3, 4]}
    assert chunks(8, 4, 1, "ulysses") == [slice(2, 4)]


def positions(rank: int, cp: int, chunk: int) -> list[int]:
    return [p for part in chunks(2 * cp * chunk, cp, rank) for p in range(part.start, part.stop)]


def pairs_of(cp: int, chunk: int, causal: bool) -> list[list[list[tuple[int, int]]]]:
    """For each rank and step, every (query, key) position that is computed, what a causal kernel skips left out."""
    out = []
    for rank in range(cp):
        steps = []
        for step in range(cp):
            source = (rank - step) % cp
            mine, theirs = positions(rank, cp, chunk), positions(source, cp, chunk)
            steps.append(
                [
                    (mine[i], theirs[j])
                    for call in calls(rank, source, chunk, causal)
                    for i in range(call.queries.start, call.queries.stop)
                    for j in range(call.keys.start, call.keys.stop)
                    if not call.causal or j <= i
                ]
            )
        out.append(steps)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cp", range(1, 7))
def test_every_pair_is_computed_once_and_none_for_nothing(cp: int, causal: bool) -> None:
    chunk = 2
    total = range(2 * cp * chunk)
    computed = [pair for steps in pairs_of(cp, chunk, causal) for step in steps for pair in step]
    assert sorted(computed) == [(q, k) for q in total for k in total if k <= q or not causal]


@pytest.mark.parametrize("cp", range(2, 9))
def test_head_tail_chunks_balance_the_work(cp: int) -> None:
    chunk = 4
    zigzag, runs = work(2 * cp * chunk, cp), work(2 * cp * chunk, cp, zigzag=False)
    assert len(set(zigzag)) == 1
    assert sum(zigzag) == sum(runs) == math.comb(2 * cp * chunk + 1, 2)
    # without them the last rank has nearly twice the mean: 2 - 1/cp, up to the diagonal
    assert max(runs) == runs[-1] and min(runs) == runs[0]
    long = 2 * cp * 10_000
    assert work(long, cp, zigzag=False)[-1] / work(long, cp)[0] == pytest.approx(2 - 1 / cp, rel=1e-4)
    # not only in sum: all ranks have the same to do in every step, so no rank waits in any
    for steps in zip(*pairs_of(cp, chunk, causal=True), strict=True):
        assert len({len(step) for step in steps}) == 1
    assert [sum(map(len, steps)) for steps in pairs_of(cp, chunk, causal=True)] == zigzag


def test_documents_are_masked_only_where_a_border_is() -> None:
    """Whatever is left out or goes without a mask: the pairs that see each other are the same."""
    generator = torch.Generator().manual_seed(0)
    chunk, kinds = 4, {"skipped": 0, "without mask": 0, "masked": 0}
    for cp, share in itertools.product((2, 3), (0.02, 0.1, 0.4)):
        ids = (torch.rand(2, 2 * cp * chunk, generator=generator) < share).long().cumsum(1)
        for rank, source in itertools.product(range(cp), range(cp)):
            mine, theirs = positions(rank, cp, chunk), positions(source, cp, chunk)
            q_ids, k_ids = ids[:, mine], ids[:, theirs]
            seen = torch.zeros(2, 2 * chunk, 2 * chunk, dtype=torch.int64)
            for call in calls(rank, source, chunk, causal=True):
                expected = sum(q >= k for q in (0, 1) for k in (0, 1)) if call.causal else 2
                found = list(masked_calls(call, chunk, q_ids, k_ids))
                kinds["skipped"] += expected - len(found)
                for part, mask in found:
                    kinds["without mask" if mask is None else "masked"] += 1
                    assert not (part.causal and mask is not None), "the mask is causal already"
                    block = torch.ones(2, chunk, chunk, dtype=torch.bool) if mask is None else mask[:, 0]
                    seen[:, part.queries, part.keys] += block.tril() if part.causal else block
            order = torch.tensor(mine)[:, None] >= torch.tensor(theirs)
            assert torch.equal(seen, (order & (q_ids[:, :, None] == k_ids[:, None, :])).long())
    assert all(count > 10 for count in kinds.values()), kinds


# --- attention on ranks -----------------------------------------------------------------------------------


def inputs(cp: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q [2, 12, T, 4], k, v [2, 6, T, 4], a gradient, and documents [2, T]; T = 8 cp."""
    generator = torch.Generator().manual_seed(0)
    tokens = 8 * cp
    drawn = [torch.randn(2, heads, tokens, 4, generator=generator, dtype=torch.float64) for heads in (12, 6, 6, 12)]
    documents = (torch.rand(2, tokens, generator=generator) < 0.15).long().cumsum(1)
    documents[1] = 5 - documents[1]  # ids may fall
    return [*(x.to(dtype) for x in drawn), documents]


Case = tuple[str, bool, bool]  # ring or ulysses, causal, documents masked


def attend_on_rank(cp: int, cases: list[Case], dtype: torch.dtype) -> list[tuple[list[Tensor], dict[Any, int]]]:
    """In a rank, for each case: its part of the output and of the gradients of q, k, v, and what was sent."""
    axis = Mesh.build(MeshShape(cp=cp))["cp"]
    return [attend_once(axis, cp, *case, dtype) for case in cases]


def attend_once(
    axis: Axis, cp: int, how: str, causal: bool, masked: bool, dtype: torch.dtype
) -> tuple[list[Tensor], dict[Any, int]]:
    *every, grad, documents = inputs(cp, dtype)
    held = chunks(documents.shape[1], cp, axis.index, how)

    def mine(x: Tensor, dim: int) -> Tensor:
        return torch.cat([x.narrow(dim, s.start, s.stop - s.start) for s in held], dim)

    q, k, v = (mine(x, 2).requires_grad_() for x in every)
    ids = mine(documents, 1) if masked else None
    with ledger.recording() as sent, Witness() as witness:
        if how == "ring":
            out = ring_attention(q, k, v, axis, ids, causal)
        else:
            out = ulysses_attention(q, k, v, axis, ids, attend)
        grads = torch.autograd.grad(out, (q, k, v), mine(grad, 2))
    assert witness.bytes == {operation: n for (_, operation), n in sent.items()}
    return [out.detach(), *grads], dict(sent)


def attend_on_one_device(cp: int, masked: bool, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, grad, documents = inputs(cp, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = torch.ones(2, 1, *2 * documents.shape[1:], dtype=torch.bool)
    mask = mask.tril() if causal else mask
    if masked:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def put_together(parts: list[Tensor], cp: int, how: str) -> Tensor:
    whole = torch.empty(*parts[0].shape[:2], cp * parts[0].shape[2], parts[0].shape[3], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        held = chunks(whole.shape[2], cp, rank, how)
        for where, piece in zip(held, part.chunk(len(held), 2), strict=True):
            whole[:, :, where] = piece
    return whole


CASES: list[Case] = [("ring", True, True), ("ring", True, False), ("ring", False, False), ("ring", False, True)]
CASES += [("ulysses", True, False), ("ulysses", True, True)]


@pytest.mark.parametrize("cp", [2, 3])
def test_attention_is_that_of_one_device(ranks: Ranks, cp: int) -> None:
    per_rank = ranks(attend_on_rank, cp, CASES, torch.float64, world_size=cp)
    for (how, causal, masked), *results in zip(CASES, *per_rank, strict=True):
        want = attend_on_one_device(cp, masked, causal, torch.float64)
        for number, name in enumerate(("out", "dq", "dk", "dv")):
            got = put_together([tensors[number] for tensors, _ in results], cp, how)
            error = (got - want[number]).abs().max().item()
            assert error < 1e-12, f"{how}, causal {causal}, masked {masked}: {name} is {error:.1e} off"
        kv, q, ids = 2 * 2 * 6 * 8 * 4 * 8, 2 * 12 * 8 * 4 * 8, 2 * 8 * 8 * masked  # bytes of a rank's part
        if how == "ring":
            expected = {("cp", "send"): (cp - 1) * (2 * kv + ids) + cp * kv}
        else:
            expected = {("cp", "all_to_all"): 2 * (2 * q + kv)} | ({("cp", "all_gather"): ids} if ids else {})
        assert all(sent == expected for _, sent in results)


def test_in_bfloat16_the_error_is_that_of_one_device(ranks: Ranks) -> None:
    """Partial results are merged in float32: many blocks round no more than one."""
    results = [one for (one,) in ranks(attend_on_rank, 3, [("ring", True, False)], torch.bfloat16, world_size=3)]
    exact = attend_on_one_device(3, False, True, torch.float64)
    narrow = attend_on_one_device(3, False, True, torch.bfloat16)
    for number, name in enumerate(("out", "dq", "dk", "dv")):
        got = put_together([tensors[number] for tensors, _ in results], 3, "ring")
        assert got.dtype == torch.bfloat16
        ours, theirs = ((x.double() - exact[number]).abs().max().item() for x in (got, narrow[number]))
        assert 0 < ours <= 2 * theirs, f"{name}: {ours} against {theirs}"


def events(cp: int) -> list[list[str]]:
    """In a rank: what starts, is computed and is waited for, in order, forward and backward."""
    axis = Mesh.build(MeshShape(cp=cp))["cp"]
    seen: list[str] = []
    rotate, forward, backward = context.rotate, context.attend_with_lse, context.attend_backward

    class Watched:
        def __init__(self, name: str, work: Any) -> None:
            self.name, self.work = name, work

        def wait(self) -> None:
            seen.append(f"wait {self.name}")
            self.work.wait()

    def watched(x: Tensor, over: Axis) -> tuple[Tensor, Watched]:
        name = "dkv" if x.dtype == torch.float32 else "kv"  # of bfloat16, gradients travel wider
        seen.append(f"send {name}")
        buffer, work = rotate(x, over)
        return buffer, Watched(name, work)

    def computed(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append("compute")
            return fn(*args, **options)

        return call

    context.rotate = watched  # type: ignore[assignment]
    context.attend_with_lse, context.attend_backward = computed(forward), computed(backward)
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = ring_attention(q, k, v, axis)
    there, seen = seen, []
    out.sum().backward()
    return [there, seen]


def test_keys_are_on_their_way_while_attention_is_computed(ranks: Ranks) -> None:
    for forward, backward in ranks(events, 3, world_size=3):
        assert forward == ["send kv", "compute", "wait kv"] * 2 + ["compute"]
        assert backward == [
            *("send kv", "compute", "send dkv", "wait kv"),
            *("send kv", "compute", "wait dkv", "send dkv", "wait kv"),
            *("compute", "wait dkv", "send dkv"),
            "wait dkv",
        ]


# --- memory -----------------------------------------------------------------------------------------------


LONG = TrainConfig(seq_len=192, micro_batch_size=1, micro_batches=1, document_mask=True, device="cpu")
SMALL = ModelConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4
)


def largest_tensor(how: str, masked: bool) -> int:
    """In a rank: of a whole step, forward and backward."""
    train = replace(LONG, context=how, document_mask=masked)  # type: ignore[arg-type]
    run = resolve(RunConfig(layout="cp=4", model=SMALL, train=train))
    parallel = parallelize(run, Mesh.build(run.mesh), torch.device("cpu"))
    batch = make_batches(replace(run, train=replace(run.train, steps=1)))[0]
    with Largest() as largest:
        compute_gradients(parallel, [batch])
    return largest.elements


@pytest.mark.parametrize("masked", [False, True])
def test_no_rank_ever_has_a_tensor_of_t_times_t(ranks: Ranks, masked: bool) -> None:
    for elements in ranks(largest_tensor, "ring", masked, world_size=4):
        assert 48 * 37 <= elements < 192 * 192 / 8, elements  # the logits are seen, and a mask is C x C


def test_the_watch_over_large_tensors_sees_them(ranks: Ranks) -> None:
    """Ulysses uses the model's own attention: no scores, but with documents a mask of T x T."""
    assert max(ranks(largest_tensor, "ulysses", False, world_size=4)) < 192 * 192
    assert ranks(largest_tensor, "ulysses", True, world_size=4) == [192 * 192] * 4


# --- in the model -----------------------------------------------------------------------------------------


Block = tuple[Tensor, dict[str, Tensor], dict[Any, int]]  # hidden states, gradients, bytes


def blocks() -> dict[tuple[str, bool], Block]:
    """In a rank: one layer, by ring and by ulysses, eager and compiled."""
    import warnings

    warnings.simplefilter("ignore")  # the compiler makes some of its own
    axis = Mesh.build(MeshShape(cp=2))["cp"]
    return {(how, compiled): one_block(axis, how, compiled) for how in HOW for compiled in (False, True)}


def one_block(axis: Axis, how: str, compiled: bool) -> Block:
    model = GPT(replace(MODEL, num_layers=1)).double()
    init_weights(model, 0)
    context_parallel(model, axis, how)
    if compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True, backend="aot_eager")
    tokens = torch.arange(24).view(2, 12)
    documents = (tokens % 5 == 0).long().cumsum(1)
    batch = context_slice(Batch(tokens, tokens, torch.arange(12).expand(2, 12), documents), axis, how)
    with ledger.recording() as sent:
        hidden = model(batch.tokens, batch.positions, batch.documents)
        model.loss(hidden, batch.targets).backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(sent)


@pytest.mark.slow
def test_a_compiled_block_computes_and_sends_the_same(ranks: Ranks) -> None:
    for found, how in itertools.product(ranks(blocks, world_size=2), HOW):
        eager, compiled = found[how, False], found[how, True]
        torch.testing.assert_close(eager[0], compiled[0], rtol=0, atol=1e-12)
        assert eager[1].keys() == compiled[1].keys() and len(eager[1]) == 11
        for name in eager[1]:
            torch.testing.assert_close(eager[1][name], compiled[1][name], rtol=1e-9, atol=1e-12)
        assert eager[2] == compiled[2] != {}


def validation(run: RunConfig, batch: Batch) -> tuple[float, int]:
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    rows = data_rows(run.train.batch_size, mesh["dp"].size, mesh["dp"].index)
    mine = Batch(batch.tokens[rows], batch.targets[rows], batch.positions[rows], batch.documents[rows])
    loss, count, _ = evaluate(parallel, [mine])
    return loss, count


@pytest.mark.parametrize("layout", ["dp=2,cp=2", "cp=2,pp=2"])
def test_validation_counts_every_target_once(ranks: Ranks, layout: str) -> None:
    train = replace(TRAIN, micro_batches=1, document_mask=True)
    run = resolve(RunConfig(layout=layout, model=replace(MODEL, num_layers=2), train=train))
    batch = make_batches(run)[0]
    whole = GPT(run.model).double()
    init_weights(whole, run.train.seed)
    total = whole.loss(whole(batch.tokens, batch.positions, batch.documents), batch.targets)
    targets = int((batch.targets != IGNORE).sum())
    for loss, count in ranks(validation, run, batch, world_size=4):
        assert count == targets
        assert loss == pytest.approx(total.item() / targets, rel=1e-12)


# --- parity -----------------------------------------------------------------------------------------------

# layout -> cp alone, and with every other axis, up to 8 ranks
LAYOUTS = ["cp=2", "cp=4", "cp=2,tp=2", "cp=2,pp=2", "dp=2,cp=2", "dp=2,cp=2,tp=2", "cp=2,tp=2,pp=2", "cp=8"]
VARIANTS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "three ranks": ("cp=3", {}, {"seq_len": 12}),
    "untied head": ("dp=2,cp=2", {"tie_embeddings": False}, {}),
    "norm on queries and keys": ("cp=2,tp=2", {"qk_norm": True}, {}),
    "frozen embedding and first layer": ("cp=2,pp=2", {"tie_embeddings": False}, {"freeze": ("embed", "layers.0")}),
    "only outputs trained below": (
        "cp=2",
        {"tie_embeddings": False},
        {"freeze": ("embed", "layers.0.attention.", "layers.0.attention_norm", "layers.1")},
    ),
    "only the norms of queries trained": (
        "cp=2",
        {"tie_embeddings": False, "qk_norm": True},
        {"freeze": ("embed", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("mlp", "attention_norm", "attention.k")))},
    ),
    "a key-value head for each query head": ("cp=2", {"num_kv_heads": 16}, {}),
    "one key-value head": ("cp=4", {"num_kv_heads": 1}, {"context": "ring"}),
    "layers recomputed, by a ring": ("cp=2,tp=2", {}, {"recompute": "full", "loss_chunks": 3}),
    "layers recomputed, by ulysses": (
        "cp=2",
        {"tie_embeddings": False},
        {
            "recompute": "full",
            "context": "ulysses",
            "freeze": ("embed", "layers.0.attention.", "layers.0.attention_norm"),
        },
    ),
    "tokens cut over tp as well": ("cp=2,tp=2,pp=2", {}, {"sequence_parallel": True}),
    "micro-batches of one sequence": ("dp=2,cp=2", {}, {"micro_batch_size": 1, "micro_batches": 4}),
}


def expect_equal(layout: str, model: dict[str, object], train: dict[str, object]) -> None:
    small = replace(MODEL, num_layers=MeshShape.parse(layout).pp + 1, **model)  # type: ignore[arg-type]
    report = verify(layout, small, replace(TRAIN, **{"seq_len": 16, "steps": 2, **train}))  # type: ignore[arg-type]
    found = [f"{d.quantity}: {d.error:.2e} at {d.where}" for d in report.differences]
    assert report.ok, f"{report.layout}: first {report.first_divergence}; {found}; {report.bytes_problems}"
    cp = {name: n for name, n in report.bytes_counted.items() if name.startswith(("cp", "dp_cp"))}
    assert len(cp) >= 2 and all(cp.values()), "nothing went over cp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "how", "masked"),
    [(layout, how, True) for layout in LAYOUTS for how in HOW if (layout, how) != ("cp=8", "ulysses")]
    + [(layout, how, False) for layout in ("cp=4", "cp=2,tp=2,pp=2") for how in HOW],
)
def test_a_layout_equals_one_device(layout: str, how: str, masked: bool) -> None:
    expect_equal(layout, {}, {"context": how, "document_mask": masked})


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_equals_one_device(variant: str) -> None:
    layout, model, train = VARIANTS[variant]
    expect_equal(layout, model, {"document_mask": True} | train)


def test_two_ranks_equal_one_device() -> None:
    """The one parity run that is quick."""
    expect_equal("cp=2", {}, {"document_mask": True})
