# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 Context parallel
#
# One sequence can be too long for one device. Then the ranks must share the sequence itself, and attention, in which
# every token looks at all tokens before it, has to work across ranks. After this lesson you can
#
# - say which parts of a decoder care about the other tokens, and which do not;
# - put attention together from blocks of keys, exactly, and derive why it works;
# - explain ring attention, forward and backward, and when its messages cost no time;
# - balance the work under a causal mask, and say what it costs not to;
# - compare the ring with Ulysses, in bytes, for a given model and number of ranks;
# - recognise four bugs of this technique, none of which crashes anything.
#
# You need chapters 00 (ranks and collectives), 01 (the model and its costs) and 03 (data parallel). All cells run
# here, on real processes on your CPU. Reading and running takes 45 to 60 minutes, with the exercises longer.

# %%
import inspect
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.collectives import gather_from, ledger, rotate
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.figures.context import border, draw_bytes, draw_pairs, draw_work, layer_bytes
from picotron_mini.course.instruments.largest import Largest
from picotron_mini.course.instruments.saved import SavedBytes
from picotron_mini.course.museum import MODEL, TRAIN, kill, run, show
from picotron_mini.data.loader import Batch
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model import costs
from picotron_mini.model.gpt import GPT, attend, init_weights, rope
from picotron_mini.parallel import context
from picotron_mini.parallel.attention_kernels import attend_backward, attend_with_lse
from picotron_mini.parallel.chunks import calls, chunks, context_slice, masked_calls, work
from picotron_mini.parallel.context import context_parallel, ring_attention
from picotron_mini.parallel.predict import memory_of_stages
from picotron_mini.parallel.ulysses import ulysses_attention
from picotron_mini.verify import verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem, and its price
#
# A model of the shape of Llama 3 8B, one sequence, bf16. Two things grow with its length $T$: what the forward keeps
# for backward, in proportion to $T$, and the products of attention, in proportion to $T^2$.

# %%
llama = ModelConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, tie_embeddings=False,
)  # fmt: skip
print(f"{costs.parameters(llama) / 1e9:.1f} billion parameters")
print("  tokens   kept for backward   layer inputs alone   attention's share of a layer's flops")
for T in (8192, 32_768, 131_072, 1_048_576):
    kept = costs.activation_bytes(llama, 2) * T
    inputs = 2 * llama.num_layers * llama.hidden_size * T
    share = 1 - 2 * costs.layer_matrix_parameters(llama) / costs.layer_flops(llama, T)
    print(f"{T:>8,} {kept / 1e9:>16,.0f} GB {inputs / 1e9:>17,.0f} GB {share:>22.0%}")
assert costs.activation_bytes(llama, 2) * 32_768 > 80e9

# %% [markdown]
# (The last column counts the masked half of attention. Causal kernels leave it out: then it is 71 % at 131,072.)
#
# An H100 has 80 GB. What have you met so far that helps with 131,072 tokens? The batch is one sequence already, so
# there is nothing to divide over data ranks, and no smaller micro-batch. Computing every layer again in backward leaves
# the inputs of the layers, third column, beside weights and optimizer. Tensor parallelism with sequence parallelism
# divides most of it, up to 8 ranks here. And what this chapter adds, `cp`? The library predicts the memory of a rank:


# %%
def predicted(layout: str, **settings: object) -> float:
    """GB of a rank at its worst moment, in a compiled bf16 step of one sequence of 131,072 tokens."""
    train = TrainConfig(
        seq_len=131_072, batch_size=1, micro_batch_size=1, dtype="bfloat16", device="cuda", compile=True, **settings
    )
    run = resolve(RunConfig(layout=layout, model=llama, train=train), gpus=64)
    return sum(memory_of_stages(run)[0].values()) / 1e9


print(f"weights and their state, whole: {sum(costs.state_bytes(llama, 2).values()) / 1e9:.0f} GB")
gigabytes = {}
for layout, settings in (
    ("tp=8", {"sequence_parallel": True}),
    ("tp=8", {"sequence_parallel": True, "recompute": "full"}),
    ("cp=8", {"recompute": "full", "loss_chunks": 8}),
    ("tp=8,cp=8", {"sequence_parallel": True}),
):
    said = ", ".join([layout, *(name if value is True else f"{name}={value}" for name, value in settings.items())])
    gigabytes[said] = predicted(layout, **settings)
    print(f"{said:42}{gigabytes[said]:>5.0f} GB a rank")
assert [round(n) for n in gigabytes.values()] == [169, 36, 153, 37]

# %% [markdown]
# With every layer recomputed, `tp=8` fits. There it ends: `tp` stops at the 8 key-value heads, a million tokens need
# eight times the activations, and the forward of each layer is computed twice. So cut the sequence, on an axis of its
# own. Weights and their state stay whole on that axis, so it does not fit alone (third line). It comes beside `tp`,
# `pp` or ZeRO, not in their place: `tp=8,cp=8` keeps 37 GB with nothing recomputed.
#
# ## What looks at other tokens?
#
# Take one layer, feed it a sequence whole, and then in two halves. Whatever gives the same result does not care which
# tokens are there beside.

# %%
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=80, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4
)


def make_model() -> GPT:
    model = GPT(CONFIG)
    init_weights(model, 0)
    return model.double()


model = make_model()
block = model.layers["0"]
x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
positions = torch.arange(16)[None]


def attention(x: Tensor, positions: Tensor) -> Tensor:
    return block.attention(x, *rope(CONFIG, positions, x.dtype))


parts_of_a_decoder = {
    "norm": lambda x, _: block.attention_norm(x),
    "q, k, v": lambda x, _: torch.cat([block.attention.q(x), block.attention.k(x), block.attention.v(x)], -1),
    "attention": attention,
    "MLP": lambda x, _: block.mlp(x),
    "output head": lambda x, _: model.head(x),
}
for name, f in parts_of_a_decoder.items():
    halves = torch.cat([f(x[:, half], positions[:, half]) for half in (slice(0, 8), slice(8, 16))], 1)
    equal = torch.allclose(halves, f(x, positions), rtol=0, atol=1e-12)
    print(f"{name:12} {'token by token' if equal else 'needs other tokens'}")
    assert equal == (name != "attention")

# %% [markdown]
# Attention, and nothing else. (The loss is a sum over tokens.) So each rank takes $t = T/cp$ of the tokens, and with
# them $1/cp$ of all activations; weights stay whole on every rank, as in data parallelism. One question is left: how
# does a query reach keys that lie on other ranks?
#
# ## The naive way
#
# Gather all keys and values on every rank, and attend as ever, with a mask that knows where this rank's queries stand.
# Four ranks, a run of the sequence each. First the truth, on one device: 8 query heads on 4 key-value heads, 32
# tokens, float64.

# %%
RANKS, TOKENS = 4, 32


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [2, 8, T, 4], k and v [2, 4, T, 4], and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, h, TOKENS, 4, generator=generator, dtype=torch.float64) for h in (8, 4, 4, 8))


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


*whole, grad = make_inputs()
for tensor in whole:
    tensor.requires_grad_()
truth = gradients(attend(*whole), whole, grad)  # out, dq, dk, dv


def mine(x: Tensor, rank: int, how: str) -> Tensor:
    """A rank's tokens of x [B, H, T, Dh]."""
    return torch.cat([x[:, :, part] for part in chunks(TOKENS, RANKS, rank, how)], 2)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, masked: bool = True) -> Tensor:
    """Queries are the axis.index-th run of t tokens. Not `masked` it is another function, of the same sizes."""
    k, v = gather_from(k, axis, 2), gather_from(v, axis, 2)  # [B, Hkv, T, Dh]
    here = torch.arange(q.shape[2]) + axis.index * q.shape[2]
    sees = torch.arange(k.shape[2]) <= here[:, None]  # [t, T]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees if masked else None, enable_gqa=True)


def on_rank(attention: object, how: str) -> tuple[list[Tensor], dict[str, int], int]:
    """In a rank: output and gradients, bytes by operation, and the elements of the largest tensor."""
    axis = Mesh.build(MeshShape(cp=RANKS))["cp"]
    *inputs, grad = (mine(x, axis.index, how) for x in make_inputs())
    for tensor in inputs:
        tensor.requires_grad_()
    with ledger.recording() as sent, Largest() as largest:
        found = gradients(attention(*inputs, axis), inputs, grad)
    return found, {operation: n for (_, operation), n in sent.items()}, largest.elements


def assert_equal_to_one_device(results: list, how: str) -> None:
    for rank, (found, _, _) in enumerate(results):
        for got, want in zip(found, truth, strict=True):
            assert (got - mine(want, rank, how)).abs().max() < 1e-12


results = launch(on_rank, gathered_attention, "ulysses", world_size=RANKS)  # "ulysses": one run of tokens a rank
assert_equal_to_one_device(results, "ulysses")
kv = 2 * 2 * 4 * (TOKENS // RANKS) * 4 * 8  # bytes of a rank's own keys and values
print(f"equal to one device; a rank's own keys and values: {kv:,} bytes; handed over: {results[0][1]}")
assert results[0][1] == {"all_gather": kv, "reduce_scatter": RANKS * kv}

# %% [markdown]
# Right, in two lines. On the wire each of the two costs $(cp-1)$ times the `kv` of a rank (chapter 00). Llama 3 was
# trained in this way (arXiv 2407.21783), with few key-value heads. What it costs:
#
# 1. **Memory that does not shrink.** Every rank holds the keys and values of the *whole* sequence in every layer,
#    until backward has used them. With the model above and 131,072 tokens:
# 2. **Waiting.** Attention cannot begin before the last key has arrived.
# 3. **Idle ranks.** Rank 0 has the first queries, which see few keys. We come to that.

# %%
gathered = 2 * 131_072 * llama.num_kv_heads * llama.head_dim * 2
print(f"{gathered / 1e9:.2f} GB a layer, {llama.num_layers * gathered / 1e9:.1f} GB in all, for any number of ranks")


def kept(how: str, cp: int) -> int:
    """In a rank: bytes that the whole model keeps for its backward."""
    axis = Mesh.build(MeshShape(cp=cp))["cp"]
    model = make_model()
    if how == "ring":
        context_parallel(model, axis, "ring")
    else:
        for block in model.layers.values():
            masked = how == "gathered"
            block.attention.attend = lambda q, k, v, documents: gathered_attention(q, k, v, axis, masked)  # noqa: B023
    tokens = torch.arange(256)[None] % CONFIG.vocab_size
    batch = Batch(tokens, tokens, torch.arange(256)[None], torch.zeros_like(tokens))
    batch = context_slice(batch, axis, "ring" if how == "ring" else "ulysses")
    saved = SavedBytes(model.parameters())
    with saved.watching():
        loss = model.loss(model(batch.tokens, batch.positions), batch.targets)
    at_the_end = saved.now
    loss.backward()
    return at_the_end


one = launch(kept, "ring", 1, world_size=1)[0]
print(f"one device keeps {one:,} bytes")
ways = ("gathered", "without its mask", "ring")
found = {(how, cp): launch(kept, how, cp, world_size=cp)[0] for how in ways for cp in (2, 4)}
for (how, cp), n in found.items():
    print(f"{how:16} cp={cp}: {n / one:.3f} of it on a rank")
assert found["ring", 4] < 0.26 * one < found["without its mask", 4] < 0.3 * one < found["gathered", 4]

# %% [markdown]
# The ring, which we have not built yet, keeps a quarter on each of four ranks. Gathered keys stay a share that no
# number of ranks divides. Most of the difference is the mask, though: `scaled_dot_product_attention` makes a bias of
# $t \times T$ of it, in the dtype of the queries, and each layer keeps its own. A kernel that is told where the queries
# begin needs none, and keeps what the second pair of lines says.
#
# ## Attention from blocks
#
# The keys need not be there at the same time. Let one query have scores $s_j$ with all keys $j$, and let the keys be
# split into blocks. Write for block $b$
#
# $$\operatorname{lse}_b = \log \sum_{j \in b} e^{s_j}$$
#
# $$o_b = \sum_{j \in b} e^{s_j - \operatorname{lse}_b} v_j$$
#
# which is attention over that block alone. Over all keys, $\operatorname{lse} = \log \sum_b e^{\operatorname{lse}_b}$,
# and since $e^{s_j - \operatorname{lse}} = e^{s_j - \operatorname{lse}_b} \cdot e^{\operatorname{lse}_b -
# \operatorname{lse}}$,
#
# $$o = \sum_b e^{\operatorname{lse}_b - \operatorname{lse}} \, o_b$$
#
# No approximation anywhere. A block contributes its output and *one number a query*, the logarithm of its sum of
# exponentials. Attention kernels compute that number anyway; `attend_with_lse` asks for it. The library's merge is
# four lines, and two blocks of unequal length give the whole:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(context._merge))

# %%
q, k, v, grad = make_inputs()
want, want_lse = attend_with_lse(q, k, v)
out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
blocks = [slice(0, 20), slice(20, 32)]
for keys in blocks:
    context._merge(out, lse, *attend_with_lse(q, k[:, :, keys], v[:, :, keys]))
assert (out - want).abs().max() < 2e-15 and (lse - want_lse).abs().max() < 2e-15
print("two blocks merged equal the whole within 2e-15")

# %% [markdown]
# ## Ring attention
#
# Now let the blocks travel. Each rank keeps its queries; keys and values go round a ring. While a rank attends to the
# keys that it holds, they are already on their way to the next rank, and the previous rank's are coming in:

# %%
for step in range(RANKS):
    print(f"step {step}:", "   ".join(f"rank {r} has kv{(r - step) % RANKS}" for r in range(RANKS)))

# %% [markdown]
# After $cp-1$ hops every query has met every key (arXiv 2310.01889). Look for three things in the source: where the
# messages start, where they are waited for, and what a message holds.


# %% tags=["nbval-ignore-output"]
def source_of(operator: str) -> str:
    """The registered operators are objects of torch; their source stands in the module."""
    after = inspect.getsource(context).split(f"def {operator}(")[1]
    return f"def {operator}({after}".split("\n\n\n")[0]


print(source_of("_ring_forward"))


# %%
def ring(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    return ring_attention(q, k, v, axis)


results = launch(on_rank, ring, "ring", world_size=RANKS)
assert_equal_to_one_device(results, "ring")
print(f"output and gradients equal to one device within 1e-12; sent: {results[0][1]}")
forward, backward = (RANKS - 1) * kv, (RANKS - 1) * kv + RANKS * kv
assert results[0][1] == {"send": forward + backward}

# %% [markdown]
# Is attention really computed while keys travel? We let rank 0 keep a diary of its calls.


# %%
def diary() -> list[str]:
    axis = Mesh.build(MeshShape(cp=3))["cp"]
    seen: list[str] = []

    class Watched:
        def __init__(self, work: object) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("wait")
            self.work.wait()

    def sending(x: Tensor, over: Axis) -> tuple[Tensor, Watched]:
        seen.append("send")
        buffer, work = rotate(x, over)
        return buffer, Watched(work)

    def attending(*args: Tensor, **how: object) -> tuple[Tensor, Tensor]:
        seen.append("attend")
        return attend_with_lse(*args, **how)

    context.rotate, context.attend_with_lse = sending, attending
    ring_attention(*(torch.randn(1, 2, 4, 8) for _ in range(3)), axis)
    return seen


entries = launch(diary, world_size=3)[0]
print(" ".join(entries))
assert entries == ["send", "attend", "wait"] * 2 + ["attend"]

# %% [markdown]
# When is the message hidden? With chunks of $C = t/2$ tokens a step multiplies $2C^2$ pairs of a query and a key for
# each head (next section), at $4 D_h$ flops a pair, and sends $2 \cdot 2C \cdot H_{kv} D_h$ numbers of 2 bytes. With
# $F$ flops and $W$ bytes a second the times are equal at
#
# $$C = \frac{H_{kv}}{H} \cdot \frac{F}{W}$$
#
# and from there on the *longer* the sequence, the better: work grows with $C^2$, bytes with $C$.

# %%
for name, flops, link in (
    ("50 GB/s, a network card", 400e12, 50e9),
    ("450 GB/s, links in a machine", 400e12, 450e9),
    ("182 GB/s and 424 TFLOP/s, measured", 424e12, 182e9),
):
    C = llama.num_kv_heads / llama.num_heads * flops / link
    print(f"{name}: C = {C:,.0f}, so {2 * C:,.0f} tokens a rank")

# %% [markdown]
# The 400 TFLOP/s of the kernel and the two links are assumptions. The third line is from the row of 32,768 tokens in
# the [table](../summary/07_3d_parallel.md#measured-performance), a ring of two H200s: 22.5 GB sent in 124 ms, and 238
# TFLOP (two forwards, one backward, the unmasked half) in the 561 ms of its attention kernels. Put in yours.
#
# ## A causal mask makes ranks idle
#
# The query at position $p$ sees $p+1$ keys. Cut the sequence in $cp$ runs, and rank 0 has the cheap queries. The last
# rank has $2 - 1/cp$ times the mean, and all wait for it. Cut it in $2cp$ chunks instead and give rank $r$ the chunks
# $r$ and $2cp-1-r$, one cheap, one dear:

# %%
for cp in (2, 4, 8):
    runs, zigzag = work(4096, cp, zigzag=False), work(4096, cp)
    mean = sum(runs) / cp
    print(f"cp={cp}: last rank {runs[-1] / mean:.3f} of the mean; with head-tail chunks {max(zigzag) / mean:.3f}")
    assert len(set(zigzag)) == 1 and abs(runs[-1] / mean - (2 - 1 / cp)) < 1e-3

# %% tags=["nbval-ignore-output"]
draw_work(RANKS, 4096)

# %% [markdown]
# Equal in sum is not enough: in a ring all ranks wait for each other at *every step*. Here is the causal triangle with
# cp=4, drawn from `calls`, the function that the ring asks what to compute. Colour is the rank, the number is the
# step.

# %% tags=["nbval-ignore-output"]
draw_pairs(RANKS)

# %% [markdown]
# In every step but the first each rank computes two whole squares; in the first, one whole and two halves. No square
# but those on the diagonal is cut by the mask. So nothing is computed to be thrown away, and nobody waits. The rule
# behind it fits in one line a case:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(calls))

# %% [markdown]
# ## Backward: a second ring
#
# Nobody kept the probabilities. A block's part of the gradient can do without them:
#
# $$p_j = e^{s_j - \operatorname{lse}} \qquad dv_j = p_j \, do$$
#
# $$ds_j = p_j \, (do \cdot v_j - do \cdot o)$$
#
# with the output $o$ and the log-sum-exp *over all keys*. A block needs its own keys and values, and of all others
# these two. That is the FlashAttention-2 backward (arXiv 2307.08691), and it is why the ring saves the rank's own q, k
# and v (and the ids of documents), `out` and `lse`, and nothing else. On one device, with the two blocks from above:

# %%
whole = [x.clone().requires_grad_() for x in (q, k, v)]
out, lse = attend_with_lse(q, k, v)
_, *want = gradients(F.scaled_dot_product_attention(*whole, enable_gqa=True), whole, grad)


def from_blocks(out_and_lse: object) -> list[Tensor]:
    """dq, dk, dv, block by block."""
    found = []
    for keys in blocks:
        kb, vb = k[:, :, keys].contiguous(), v[:, :, keys].contiguous()
        found.append(attend_backward(grad, q, kb, vb, *out_and_lse(kb, vb), causal=False, mask=None))
    dq, dk, dv = zip(*found, strict=True)
    return [sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)]


def errors(found: list[Tensor]) -> list[float]:
    return [((got - w).abs().max() / w.abs().max()).item() for got, w in zip(found, want, strict=True)]


assert max(errors(from_blocks(lambda kb, vb: (out, lse)))) < 1e-14
print("with out and lse of all keys: equal within 1e-14")
wrong = errors(from_blocks(lambda kb, vb: attend_with_lse(q, kb, vb)))
print("with those of the block: relative errors", ", ".join(f"{e:.2f}" for e in wrong), "of dq, dk, dv")
assert min(wrong) > 0.1

# %% [markdown]
# On ranks, $dq$ stays with its queries. But $dk$ and $dv$ of a block are sums over all ranks' queries, so they must
# travel with the block, each rank adding its part. They cannot leave together with it: the keys depart *before* this
# rank has computed, its part is ready *after*. So they follow one hop behind, and need $cp$ hops to be home where keys
# need $cp-1$. They are added in float32 at least, and travel so.

# %% tags=["nbval-ignore-output"]
print(source_of("_ring_backward"))

# %% [markdown]
# So a hop of backward carries three times the bytes of a forward hop in bf16 ($2 + 4$ bytes against 2), beside 2.5
# times the products (five instead of two).
#
# ### Never a matrix of T times T
#
# One head's scores over 131,072 tokens would be 17 billion numbers. Fused kernels never write them. Does anything
# else, a mask for instance? We watch every operator in a forward and backward, with and without masked documents, and
# note the largest tensor:


# %%
def largest(how: str, masked: bool) -> int:
    axis = Mesh.build(MeshShape(cp=RANKS))["cp"]
    generator = torch.Generator().manual_seed(axis.index)
    tokens = 512 // RANKS
    q, k, v = (torch.randn(1, 4, tokens, 2, generator=generator).requires_grad_() for _ in range(3))
    documents = (torch.arange(tokens) // 50)[None] if masked else None
    with Largest() as seen:
        if how == "ring":
            out = ring_attention(q, k, v, axis, documents)
        else:
            out = ulysses_attention(q, k, v, axis, documents, attend)
        out.sum().backward()
    return seen.elements


for how, masked in (("ring", False), ("ring", True), ("ulysses", True)):
    elements = launch(largest, how, masked, world_size=RANKS)[0]
    print(f"{how:8} documents masked: {masked!s:5}  {elements:>7,} elements, {elements / 512**2:.3f} of T x T")
    assert (elements >= 512**2) == (how == "ulysses")

# %% [markdown]
# Without documents the largest tensor is a rank's keys and values together, $2 \cdot 4 \cdot 128 \cdot 2$ numbers. With
# them it is a mask of $C \times C$, a chunk of 64 tokens against another. The last line is the technique that we turn
# to now.
#
# ## Ulysses: trade tokens for heads
#
# Attention mixes tokens, but never heads. So before attention, let the ranks trade: each gives away its tokens of most
# heads and gets all tokens of a few heads. Then ordinary attention runs on the whole sequence, and a second trade
# brings the output back (DeepSpeed Ulysses, arXiv 2309.14509). Two `all_to_all`s:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(ulysses_attention))


# %%
def ulysses(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    return ulysses_attention(q, k, v, axis, None, attend)


results = launch(on_rank, ulysses, "ulysses", world_size=RANKS)
assert_equal_to_one_device(results, "ulysses")
queries = 2 * 8 * (TOKENS // RANKS) * 4 * 8  # bytes of a rank's own queries
print(f"equal to one device within 1e-12; sent: {results[0][1]}")
assert results[0][1] == {"all_to_all": 2 * (2 * queries + kv)}

# %% [markdown]
# All heads cost the same, so there is nothing to balance, and each rank holds one plain run of tokens. Any attention
# kernel fits between the trades. What it needs is whole heads for everyone: $cp \cdot tp$ must divide the query heads
# *and the key-value heads*. The library refuses anything else, before a process starts:

# %%
try:
    resolve(RunConfig(layout="cp=4", model=MODEL, train=replace(TRAIN, context="ulysses")))
except ConfigError as error:
    print(error)
else:
    raise AssertionError("two key-value heads were shared by four ranks")

# %% [markdown]
# ### Which sends less?
#
# Count bytes on the wire for one layer and micro-batch, forward and backward, in a rank's queries $n_q = B t H D_h$ and
# keys $n_k = B t H_{kv} D_h$, with $w$ bytes a number and $g = \max(w, 4)$ for gradients on the ring. Of what a rank
# hands to an all_to_all, $1/cp$ stays at home:
#
# $$\text{ring:} \quad 2 n_k \left( 2 (cp - 1) w + cp \, g \right)$$
#
# $$\text{Ulysses:} \quad \frac{cp-1}{cp} \cdot 4 (n_q + n_k) \, w$$
#
# Both $n$ fall as $1/cp$, so Ulysses sends less and less, and the ring about the same. But the ring sends no
# queries: the fewer key-value heads, the better for it. With the share $\sigma = H_{kv}/H$ and bf16 the two are equal
# at
#
# $$\sigma = \frac{cp-1}{2cp^2-2cp+1}$$
#
# and below it the ring sends less. Our ledger counts *payload*, what is handed to `torch.distributed`: that of an
# all_to_all whole, without the first factor. In payload the border is $\frac{1}{2(cp-1)}$. Formula and ledger:


# %%
def sent_in_a_layer(how: str, kv_heads: int, dtype: torch.dtype) -> int:
    axis = Mesh.build(MeshShape(cp=RANKS))["cp"]
    q, k, v = (torch.randn(1, h, 8, 8).to(dtype).requires_grad_() for h in (8, kv_heads, kv_heads))
    with ledger.recording() as sent:
        (ring if how == "ring" else ulysses)(q, k, v, axis).sum().backward()
    return sum(sent.values())


for dtype, kv_heads in ((torch.bfloat16, 8), (torch.bfloat16, 4), (torch.float64, 4)):
    counted = {how: launch(sent_in_a_layer, how, kv_heads, dtype, world_size=RANKS)[0] for how in ("ring", "ulysses")}
    for how, n in counted.items():
        assert n == layer_bytes(how, RANKS, 8 * 8 * 8, kv_heads * 8 * 8, dtype.itemsize)
    print(f"cp=4, {kv_heads} of 8 heads have keys, {str(dtype)[6:]:8} {counted}")
for cp in (2, 4, 8):
    on_wire = (cp - 1) / (2 * cp**2 - 2 * cp + 1)
    print(f"cp={cp}: in bf16 the ring sends less if Hkv/H < {on_wire:.3f}; in payload if it is < {border(cp, 2):.3f}")
    assert abs(border(cp, 2) - 1 / (2 * (cp - 1))) < 1e-12
    ring_sends, ulysses_sends = (layer_bytes(how, cp, 1, on_wire, 2) for how in ("ring", "ulysses"))
    assert abs(ring_sends - (cp - 1) / cp * ulysses_sends) < 1e-12
assert (layer_bytes("ring", 2, 4, 1, 2), layer_bytes("ulysses", 2, 4, 1, 2) / 2) == (24, 20)  # 8 of 32 heads

# %% tags=["nbval-ignore-output"]
draw_bytes(32, (32, 8, 2), (2, 4, 8, 16, 32))

# %% [markdown]
# The picture shows payload. Where key-value heads abound, Ulysses wins from the start. With 8 of 32 it wins at cp=4 and
# 8, and at 16 it is refused; at cp=2 the ring is handed less, and on the wire Ulysses sends less (20 bytes for each
# number of k, where the ring sends 24). With 2 of 32 the ring is cheaper everywhere, by either count. Do not stop at
# bytes, though: every byte of Ulysses is waited for, and the ring's hide behind attention once $C$ is large enough.
#
# ### Who uses which
#
# Llama 3 gathers. NVIDIA's Transformer Engine, which Megatron-LM calls, has all three (`cp_comm_type`: `p2p`, the ring,
# is the default; `all_gather`; `a2a`) and a fourth, `a2a+p2p`: Ulysses inside groups that have enough key-value heads
# and fast links, and a ring between the groups (USP, arXiv 2405.07719, is of this kind). That is one answer to more
# ranks than key-value heads. The other is to *copy* key-value heads, so that each rank has what its query heads read,
# and to add their gradients up over the copies, as in chapter 04; it sends each copy. This library does neither.
# PyTorch's own tool (below) gathers unless told otherwise.
#
# ## Packed documents
#
# A packed row holds several documents, and with `document_mask` a token sees its own only. Ids travel with the keys, 8
# bytes a token. Most pairs of chunks then need no mask: two chunks of one and the same document need none, two without
# a document in common are skipped. Two sequences of 64 tokens on 4 ranks:

# %%
ids = torch.stack([torch.arange(64) // 24, torch.arange(64) // 32])  # documents of 24 and of 32 tokens
kinds = {"whole": 0, "diagonal": 0, "masked": 0}
total, size = 0, 64 // (2 * RANKS)
held = [torch.cat([ids[:, s] for s in chunks(64, RANKS, rank)], 1) for rank in range(RANKS)]
for rank in range(RANKS):
    for source in range(RANKS):
        for call in calls(rank, source, size, causal=True):
            total += 3 if call.causal else 2
            for part, mask in masked_calls(call, size, held[rank], held[source]):
                kinds["masked" if mask is not None else "diagonal" if part.causal else "whole"] += 1
print(f"of {total} pairs of chunks: {kinds}, {total - sum(kinds.values())} skipped")
assert total == 36 and all(kinds.values())

# %% [markdown]
# That saves work, and spoils the balance: a rank whose pairs are skipped waits for the others. On a GPU the decision
# would have to wait for the ids, so there every pair gets its mask.
#
# ## Positions come from outside
#
# Rotary embedding turns queries and keys by their position in the *sequence*. A model that numbers its own input
# $0 \dots t-1$ has been right for years, and is wrong on every rank. On rank 1 of 4 the tokens are these:

# %%
batch = Batch(*(torch.arange(16)[None] for _ in range(4)))
part = context_slice(batch, Axis("cp", 4, 1, (0, 1, 2, 3)))
print("positions on rank 1 of 4:", part.positions[0].tolist(), "and not", list(range(4)))
assert part.positions[0].tolist() == [2, 3, 12, 13]
report = run("06.positions_from_zero", "cp=2", optimizers=("sgd",))
print(f"numbered from zero: equal to one device: {report.ok}; every byte as predicted: {not report.bytes_problems}")
assert not report.ok and not report.bytes_problems

# %% [markdown]
# Distances inside a chunk are right, between chunks wrong. The loss still falls. That is why `GPT.forward` takes
# positions, and `context_slice` cuts them together with tokens, targets and documents.
#
# ## Gradients are summed over dp and cp
#
# Every rank holds all weights and saw some of the tokens. That is the situation of chapter 03, and the answer is the
# same: divide each loss by the number of targets of the *whole* batch, and SUM. Ranks that differ in `dp` or in `cp`
# are one group for it, `mesh["dp_cp"]`. Attention's own backward is no part of this sum: after it each rank has the
# true gradient of its own q, k and v, and what it lacks is the other tokens' share of the weights.

# %%
mesh = Mesh(MeshShape(dp=2, cp=2, tp=2), 0)
print(
    "rank 0 of dp=2,cp=2,tp=2 sums gradients with ranks", mesh["dp_cp"].ranks, "and passes keys among", mesh["cp"].ranks
)

# %% [markdown]
# ## Proof
#
# Some steps of training on ranks and on one device; loss, every gradient, the global norm, the weights, with SGD and
# AdamW. Documents are masked, and four ranks with Ulysses get a model with as many key-value heads. On the command
# line it is `picotron-mini verify cp=4 --seq-len 16`; the ring needs a length that $2cp$ divides.

# %%
reports = {}
for layout, how in (("cp=2", "ring"), ("cp=4", "ring"), ("cp=2", "ulysses"), ("cp=4", "ulysses")):
    small = replace(MODEL, num_kv_heads=4) if (layout, how) == ("cp=4", "ulysses") else MODEL
    train = replace(TRAIN, context=how, document_mask=True, seq_len=16)
    report = reports[layout, how] = verify(layout, small, train)
    assert report.ok and report.max_rel_err < 1e-12 and not report.bytes_problems
    print(f"{layout} {how:8} loss, gradients, norm and weights equal to one device within 1e-12")

# %% [markdown]
# ## What it costs, to the byte
#
# For $m$ micro-batches and $L$ layers, all of which are trained, with $kv = 2 n_k$ and documents masked:
#
# $$m L \left( (cp-1)(kv \, w + 8 B t) + kv \left( (cp-1) w + cp \, g \right) \right)$$
#
# goes round the ring; with Ulysses $m L \cdot 4 (n_q + n_k) w$ in all_to_alls and $8 m L B t$ in all_gathers of ids.
# The gradients add $g (P + k)$ over `dp_cp`, for $P$ weights in $k$ parameters, as in chapter 03.

# %%
m, L, B, g = TRAIN.micro_batches, MODEL.num_layers, TRAIN.micro_batch_size, 8
for (layout, how), report in reports.items():
    cp = int(layout[3:])
    t, heads = 16 // cp, 4 if (layout, how) == ("cp=4", "ulysses") else MODEL.num_kv_heads
    kv = 2 * B * t * heads * MODEL.head_dim
    n_q, n_k = B * t * MODEL.num_heads * MODEL.head_dim, kv // 2
    if how == "ring":
        formula = {"cp send": m * L * ((cp - 1) * (kv * g + 8 * B * t) + kv * ((cp - 1) * g + cp * g))}
    else:
        formula = {"cp all_to_all": m * L * 4 * (n_q + n_k) * g, "cp all_gather": 8 * m * L * B * t}
    for name, n in formula.items():
        assert n == report.bytes_predicted[name] == report.bytes_counted[name]
        print(f"{layout} {how:8} {name:14} formula = predicted = counted = {n:,} bytes")

# %% [markdown]
# ## The same from PyTorch
#
# `torch.distributed.tensor.experimental.context_parallel` replaces `scaled_dot_product_attention` inside a `with`
# block by a ring, and cuts the buffers you name, head and tail too. Does it run on gloo?


# %%
def with_pytorch() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as theirs
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh("cpu", (2,))
    said = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        q, k, v = (torch.randn(1, 4, 16, 8) for _ in range(3))
        try:
            with theirs(mesh, buffers=(q, k, v), buffer_seq_dims=(2, 2, 2)), sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
            said.append(f"{backend.name}: runs")
        except (NotImplementedError, RuntimeError) as error:
            said.append(f"{backend.name}: {type(error).__name__}: {error}")
    return said


# %% tags=["nbval-ignore-output"]
print("\n".join(launch(with_pytorch, world_size=2, output="hide")[0]))

# %% [markdown]
# With torch 2.13 it does not. The fused kernel for the CPU has no sharding strategy in its table, and the plain one
# mixes tensors of two kinds. It is made for the kernels of CUDA; we could not set it beside our ring here, so this
# lesson says nothing about which is faster.
#
# ## Exercises
#
# `solution("06.merge")` (from `picotron_mini.course.exercises`) prints an answer.
#
# **1. Two blocks are one.** Attention over two blocks of keys is given, with the log-sum-exps. Return output and
# log-sum-exp over both. The scores may be in the hundreds.


# %%
def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """out_1, out_2 [B, H, T, Dh]; lse_1, lse_2 [B, H, T]."""


check("06.merge", merge)

# %% [markdown]
# **2. A ring with a budget.** No mask, forward only, three ranks. `attend_with_lse(q, k, v)` attends to a block,
# `rotate(x, axis)` returns a buffer and a work. Same result as on one device; each rank may send at most $(cp-1)$
# times the bytes of its own k and v, and never hold a tensor larger than these two together.


# %%
def my_ring(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """q [B, H, t, Dh]; k, v [B, Hkv, t, Dh]."""


check("06.ring", my_ring)

# %% [markdown]
# **3. Who holds which tokens.** Return the positions of a rank, in at most two runs, so that all ranks multiply the
# same number of pairs under a causal mask.


# %%
def held_positions(seq_len: int, cp: int, rank: int) -> list[int]: ...


check("06.held", held_positions)

# %% [markdown]
# **4. Ring or Ulysses.** Say which is handed fewer bytes in the training step of one layer, `"ring"` or `"ulysses"`, or
# which is allowed at all. The check runs both and asks the ledger, so it is payload that counts, not the wire.


# %%
def cheaper(cp: int, num_heads: int, num_kv_heads: int, bytes_per_number: int) -> str: ...


check("06.cheaper", cheaper)

# %% [markdown]
# ## From the bug museum
#
# You have seen why backward needs `out` and `lse` of all keys. Here is the other version, in the library.

# %% tags=["nbval-ignore-output"]
show("06.probabilities_of_one_block")

# %%
broken = run("06.probabilities_of_one_block", "cp=2", optimizers=("sgd",))
print(f"equal to one device: {broken.ok}; first to diverge: {broken.first_divergence.split(',')[0]}")
assert not broken.ok

# %% [markdown]
# The loss of the first step is right, and so are all gradients above the last attention. In the order of backward the
# first wrong one is that attention's v; its o, which is met before, is right. Write a test that notices: a function of
# the mesh that runs on both ranks of `cp=2`, calls `ring_attention` on `mesh["cp"]`, and asserts something about a
# gradient. It must pass on the sound library and fail with the bug in it.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("06.probabilities_of_one_block", my_test)

# %% [markdown]
# More of this room: `06.positions_from_zero`, `06.tokens_cut_in_runs`, `06.one_data_rank_is_not_wrapped`. The last is
# real (huggingface/picotron): it is invisible on every layout with dp=2. What does that say about your choice of
# layouts?
#
# ## On GPUs
#
# The same files run on NCCL:
#
# ```console
# $ picotron-mini verify cp=2 --seq-len 64 --device cuda --dtype float32
# $ picotron-mini bench --preset bench --layout cp=2 --seq-len 16384 --micro-batch-size 1
# $ picotron-mini bench --preset bench --layout cp=2 --seq-len 16384 --micro-batch-size 1 --context ulysses
# $ torchrun --nproc-per-node 8 --no-python picotron-mini train --preset h100 --layout cp=8 --seq-len 8192 \
#     --batch-size 8 --micro-batch-size 1
# ```
#
# What has been checked there: on an H200, with torch 2.11, cuDNN's forward and backward of a block agree with float64,
# with and without a mask, heads of 8 to 128 wide. On two of them the whole ring on these kernels is equal to one device
# in bf16 (without masks of documents), and ring and Ulysses are in float32, where the library uses no fused kernel on a
# GPU: plain products write a block's scores out, exact, slow, for proofs. The
# [write-up](../summary/06_context_parallel.md#measured-performance) has the errors beside what is allowed.
#
# This chapter's closing run, on two H200s with torch 2.11:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset h100 cp=2 --steps 60
# step 51/60  loss 6.141  validation 5.530 (1.959 bits per byte)  117,328 tokens/s  memory 11.5 GiB  0:05 left
# step 60/60  loss 5.896  validation 5.377 (1.905 bits per byte)  99,074 tokens/s  memory 11.5 GiB  0:00 left
# ```
#
# It works, and nobody should train like this: sequences of 1,024 tokens do fit, the ring cuts each layer's attention
# into small pieces with messages in between, and `dp=2 --zero 2` made three to four times the speed. Context
# parallelism is for sequences that do not fit. With the `bench` preset at 32,768 tokens two GPUs reach an MFU of 46 %
# by the ring; that counts the masked half of attention, as is usual, and without it they reach 31 %.
#
# ## What to read next
#
# - [The write-up](../summary/06_context_parallel.md): decisions, what was dropped, limits.
# - [Questions](../interview_questions/06_context_parallel.md), from warm-up to design, with proofs that run.
# - *Ring Attention with Blockwise Transformers for Near-Infinite Context* (arXiv 2310.01889).
# - *DeepSpeed Ulysses* (arXiv 2309.14509); *The Llama 3 Herd of Models* (arXiv 2407.21783), section on context
#   parallelism.
# - *FlashAttention-2* (arXiv 2307.08691): the log-sum-exp and the backward that needs nothing else.
