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
# # 04 Tensor parallel
#
# Data parallelism cuts the batch and copies the model. This chapter cuts the model: each rank holds a slice of every
# matrix and computes a slice of every layer, for the same tokens. After this lesson you can
#
# - cut two matrices so that their product needs one exchange, and say why the other order needs more;
# - say which dim of which weight is cut, which sizes of `tp` a model allows, and why grouped-query heads set the limit;
# - find the gradient that goes missing when a pair has no entry, although the loss is right to the last digit;
# - say which norms need a sum over the ranks and which must not have one;
# - compute the loss over a split vocabulary from three numbers a token, and never see the logits together;
# - cut what lies between the pairs by tokens, for the same bytes on the wire, and say which gradients that breaks;
# - predict the bytes of a step to the byte, and the width of a model below which cutting it does not pay.
#
# You need chapter 00 (ranks and collectives), 01 for the model and what a weight costs while it trains, and 03 for the
# loss that is a sum over the global number of targets. The cells run on real processes on your CPU. Reading and running
# takes 45 to 60 minutes, with the exercises longer.

# %%
import inspect
import re
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini import collectives
from picotron_mini.collectives import all_gather, conjugate, copy_to, ledger, reduce_from
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.figures.picture import GREY, LINES, drawing, figure, picture
from picotron_mini.course.figures.tensor import draw_heads, draw_pair
from picotron_mini.course.instruments.tensor_overlap import exposed, order_of_work
from picotron_mini.course.instruments.tensor_time import block_times, exchange_ratio, layer_of_width
from picotron_mini.course.museum import kill, run, show
from picotron_mini.launch import launch
from picotron_mini.layout import Layout, split
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh, coordinates
from picotron_mini.model.costs import layer_parameters
from picotron_mini.model.gpt import GPT, init_weights, initial_weight
from picotron_mini.parallel import overlap, partial, tensor
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.tensor import sharded_dim, tensor_parallel, vocab_parallel_cross_entropy
from picotron_mini.verify import TRAIN, verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem, and its price
#
# Llama 3 has a version with 126 layers of width 16,384 (arXiv 2407.21783). Take *one* of its layers. Training keeps 18
# bytes for each weight (bf16 weight, float32 master, two moments of Adam, float32 gradient; chapter 01).

# %%
LLAMA_405B = ModelConfig(
    vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_layers=126, num_heads=128, num_kv_heads=8
)
weights = layer_parameters(LLAMA_405B)
print(f"one layer: {weights / 1e9:.2f} billion weights, {18 * weights / 1e9:.0f} GB while it trains")
assert 18 * weights < 80e9 < 2 * 18 * weights

# %% [markdown]
# A GPU of 80 GB holds one layer, and not two. More copies of the model do not help, since each rank would need all 126.
# The layers can be spread over ranks, and one of them still fills a GPU before the first activation is stored. So the
# *layer* has to be cut.
#
# The price: each half-computed layer has to be put together again, for every token, in every layer, forward and
# backward. In data parallelism the ranks met once a step, to add up gradients, and could compute meanwhile. Here they
# meet inside the layer, and the next product waits for the sum.
#
# ## The naive way
#
# Cut each matrix by its outputs, and after each product let everybody have everything. Here it is for one MLP,
# $\operatorname{down}(\operatorname{silu}(\operatorname{gate}(x)) \cdot \operatorname{up}(x))$, on four ranks. A
# Linear's weight is stored as `[out, in]`, so a slice of the outputs is a slice of dim 0.

# %%
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=4,
    tie_embeddings=False,
)  # fmt: skip
T = 16  # tokens


def make_model(config: ModelConfig = CONFIG) -> GPT:
    model = GPT(config)
    init_weights(model, 0)
    return model.double()  # float64: only mistakes are larger than 1e-12


x = torch.randn(T, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
mlp = make_model().layers["0"].mlp
gate, up, down = (layer.weight.detach() for layer in (mlp.gate, mlp.up, mlp.down))
whole_y = mlp(x).detach()


def naive_mlp() -> tuple[Tensor, int]:
    tp = Mesh.build(MeshShape(tp=4))["tp"]

    def product(h: Tensor, weight: Tensor) -> Tensor:
        mine = weight.chunk(4, dim=0)[tp.index]  # [out / 4, in]
        return all_gather(h @ mine.T, tp, dim=-1)  # [T, out / 4] -> [T, out]

    with ledger.recording() as sent:
        y = product(F.silu(product(x, gate)) * product(x, up), down)
    return y, sent["tp", "all_gather"]


results = launch(naive_mlp, world_size=4)
assert all(torch.allclose(y, whole_y, rtol=0, atol=1e-12) for y, _ in results)
naive_wire = 3 * results[0][1]  # in a ring, a rank passes on n - 1 shards of the size of its own
print(f"equal to one device; each rank puts {naive_wire:,} bytes on a ring's wire, forward")
assert naive_wire == 3 * T * (80 + 80 + 32) // 4 * 8

# %% [markdown]
# It is right. Three exchanges for one MLP, and two of them of the inner width, which is the wide one. The memory of the
# activations is not cut either: each rank holds all of `silu(gate) * up`.
#
# Look at what is exchanged for nothing. `silu` and the product with `up` work element by element: column 7 of the
# result needs column 7 of `gate` and of `up`, and no other. Whoever computed both columns could go on alone. What does
# `down` need? Let us draw it.
#
# ## One pair, one exchange: on paper

# %% tags=["nbval-ignore-output"]
draw_pair()

# %% [markdown]
# Cut the first matrix by its outputs (*column parallel*: in the formula $xA$ these are columns) and the second by its
# inputs (*row parallel*):
#
# $$x \, [A_1 \; A_2] = [x A_1 \;\; x A_2]$$
#
# $$h_1 B_1 + h_2 B_2 = y$$
#
# with $h_i = f(x A_i)$ for any $f$ that works on each element alone. The columns that rank $i$ has made are just the
# ones that its rows of $B$ want. Between the two products nobody says a word. At the end each rank has a term of the
# full size $[T, D]$, and the sum of the terms is $y$: one all_reduce.
#
# The other order does not work. With rows first, the ranks hold *terms* $a_1 + a_2$ before $f$, and
# $f(a_1 + a_2) \ne f(a_1) + f(a_2)$, so they would have to meet there, and again after the second matrix. The
# nonlinearity decides.

# %%
a = torch.tensor([1.0, -2.0])
print("silu of the sum", round(F.silu(a.sum()).item(), 3), "  sum of the silus", round(F.silu(a).sum().item(), 3))


def paired_mlp() -> tuple[Tensor, int]:
    tp = Mesh.build(MeshShape(tp=4))["tp"]
    a_gate, a_up = (weight.chunk(4, dim=0)[tp.index] for weight in (gate, up))  # outputs
    b_down = down.chunk(4, dim=1)[tp.index]  # inputs
    with ledger.recording() as sent:
        y = reduce_from((F.silu(x @ a_gate.T) * (x @ a_up.T)) @ b_down.T, tp)
    return y, sent["tp", "all_reduce"]


results = launch(paired_mlp, world_size=4)
assert all(torch.allclose(y, whole_y, rtol=0, atol=1e-12) for y, _ in results)
paired_wire = 2 * 3 * results[0][1] // 4  # in a ring, an all_reduce of S bytes is 2 (n - 1) / n S
print(f"naive  {naive_wire:,} bytes on the wire, forward\npaired {paired_wire:,}")
assert paired_wire == 2 * 3 * T * 32 * 8 // 4 and naive_wire == 3 * paired_wire

# %% [markdown]
# A third of the bytes, one meeting where there were three, and the wide activations stay cut. (The exact factor depends
# on the ratio of inner width to width, 80 to 32 here.)
#
# ## Backward: the entry and the exit
#
# What happens to the gradient? Every rank gets the same $\partial L / \partial y$, since all hold the same $y$. From it
# rank $i$ finds the gradients of $B_i$, $h_i$ and $A_i$ alone. But $x$ was used by all of them:
#
# $$\frac{\partial L}{\partial x} = \sum_i \frac{\partial L}{\partial (x A_i)} A_i^T$$
#
# Rank $i$ knows one term. So the pair has an *entry* that does nothing forward and adds up backward, and an *exit* that
# adds up forward and does nothing backward. Each is the mirror image of the other: *conjugate*. (Megatron-LM, arXiv
# 1909.08053, calls them $f$ and $g$.) Chapter 00 has shown them at work, and here is the code:

# %% tags=["nbval-ignore-output"]
for piece in (conjugate._CopyTo, conjugate._ReduceFrom, copy_to, reduce_from):
    print(inspect.getsource(piece))

# %% [markdown]
# Why does the exit's backward do *nothing*? The sum $y = h_1 B_1 + h_2 B_2$ hands each term the gradient as it is. The
# ranks compute one and the same loss, once, though on several machines. A tool that sees several losses and adds them
# up puts an all_reduce there, and every gradient below is multiplied by the number of ranks. That is an exhibit of the
# museum at the end of this page.
#
# ## A whole model
#
# A model has many pairs: gate and up with down, and q, k and v with o. Both sit behind a norm and end in a residual
# addition. The plan is a table of two entries, and it is applied to the plain model from outside. Look for three
# things: where the weights are cut, which hooks make the entries (`enter`) and exits (`leave`), and what replaces
# embedding and loss. (`sequence_parallel` comes near the end. Until then it is off: read `copy_to` for `enter` and
# `reduce_from` for `leave`.)

# %% tags=["nbval-ignore-output"]
print("PLAN =", tensor.PLAN, "\n")
print(inspect.getsource(tensor_parallel))

# %% [markdown]
# The parameters keep their names, and the layout says who holds what. This is rank 1 of 2:

# %%


def layout_for(tp: int) -> Layout:
    return layout_of(resolve(RunConfig(layout=f"tp={tp}", model=CONFIG, train=TRAIN)))


layout = layout_for(2)
print(f"{'parameter':32}{'global shape':>14}{'cut':>7}{'on rank 1':>12}")
for name, place in layout.items():
    if name.startswith(("embed", "layers.0", "norm", "head")):
        dim = sharded_dim(name)
        local = list(place.local_shape(coordinates(MeshShape(tp=2), 1)))
        print(f"{name:32}{list(place.shape)!s:>14}{'-' if dim is None else f'dim {dim}':>7}{local!s:>12}")
assert layout["layers.0.mlp.down.weight"].shards[0].dim == 1

# %% [markdown]
# Now the truth of this chapter, from one device, and the same on two ranks.


# %%
def make_batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, [2, 16] each."""
    tokens = torch.randint(CONFIG.vocab_size, (2, T + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


Result = tuple[float, dict[str, Tensor]]  # the loss, and every gradient


def one_device(config: ModelConfig = CONFIG) -> Result:
    model = make_model(config)
    tokens, targets = make_batch()
    loss = model.loss(model(tokens), targets) / targets.numel()
    loss.backward()
    return loss.item(), gradients(model)


def on_a_rank(config: ModelConfig, tp: int, broken: Callable[[], None] | None = None) -> Result:
    """The same on a rank: this rank's slices. `broken` changes the library in this rank only."""
    if broken:
        broken()
    axis = Mesh.build(MeshShape(tp=tp))["tp"]
    model = make_model(config)
    tensor_parallel(model, axis)
    tokens, targets = make_batch()
    loss = model.loss(model(tokens), targets) / targets.numel()
    loss.backward()
    return loss.item(), gradients(model)


def errors(results: list[Result], truth: dict[str, Tensor]) -> dict[str, float]:
    """For each parameter the largest relative error of its gradient on any rank, against the same part of the truth."""
    shape = MeshShape(tp=len(results))
    layout = layout_for(shape.tp)
    out = {}
    for name, whole in truth.items():
        parts = [whole[layout[name].slices(coordinates(shape, rank))] for rank in range(shape.tp)]
        far = [(grads[name] - part).abs().max() for (_, grads), part in zip(results, parts, strict=True)]
        out[name] = (max(far) / whole.abs().max()).item()
    return out


loss, truth = one_device()
results = launch(on_a_rank, CONFIG, 2, world_size=2)
worst = max(errors(results, truth).values())
print(f"loss {loss:.6f} on one device, {results[0][0]:.6f} on two ranks")
print(f"{len(truth)} gradients, all equal to one device within 1e-12: {worst < 1e-12}")
assert worst < 1e-12 and abs(results[0][0] - loss) < 1e-12

# %% [markdown]
# ## Where a gradient goes missing
#
# Leave out the entries. They are the identity forward, so the loss cannot change. What does?


# %%
def no_entries() -> None:
    tensor.copy_to = lambda x, axis: x  # in this rank, before the model runs


wrong = launch(on_a_rank, CONFIG, 2, no_entries, world_size=2)
print("loss equal to the last digit:", wrong[0][0] == results[0][0])
assert wrong[0][0] == results[0][0]
error = errors(wrong, truth)
backward_order = list(reversed(truth))  # the order in which backward meets them
for name in backward_order[:5]:
    print(f"{name:28}{'right' if error[name] < 1e-12 else f'wrong by {error[name]:.2f} of its largest value'}")
first_wrong = next(name for name in backward_order if error[name] > 1e-12)
assert first_wrong == "norm.weight" and error["head.weight"] < 1e-12
assert all(error[name] > 1e-3 for name in backward_order[1:])

# %% [markdown]
# Walk down from the loss. `head.weight` is right: its slice of the gradient needs this rank's slice of the logits only.
# The first wrong parameter is the final `norm.weight`, directly below the head's missing entry, and everything further
# down is wrong as well. No shape is off, nothing is NaN, and the loss of this step is right to the last digit. The run
# trains, on gradients that each rank has a part of.
#
# Is anything lost? For the final norm, no. Its two parts add up to the truth:

# %%
parts = [grads["norm.weight"] for _, grads in wrong]
print("norm.weight: the ranks' parts add up to the truth:", torch.allclose(sum(parts), truth["norm.weight"]))
assert torch.allclose(sum(parts), truth["norm.weight"], rtol=0, atol=1e-14)
name = "layers.2.mlp.down.weight"
for rank, part in enumerate(truth[name].chunk(2, dim=1)):
    print(
        f"{name}: rank {rank} is off by {((wrong[rank][1][name] - part).norm() / part.norm()).item():.2f} of its norm"
    )

# %% [markdown]
# So could one leave out the entries and add up all gradients at the end? Not for a matrix that is cut. The gradient of
# $B_1$ is $h_1^T \, \partial L / \partial y$, and only rank 0 has $h_1$. If rank 0 has met only its own part of
# $\partial L / \partial y$, the rest of the product is computed by nobody. The sum must be taken at the entry, where
# both parts still exist.
#
# A subtler variant: the head keeps its entry, and the blocks have none.


# %%
def no_entries_in_blocks() -> None:
    real, calls = tensor.copy_to, []

    def entry(x: Tensor, axis: Axis) -> Tensor:
        calls.append(x)
        return x if len(calls) <= 2 * CONFIG.num_layers else real(x, axis)  # the last call is the head's

    tensor.copy_to = entry


wrong = launch(on_a_rank, CONFIG, 2, no_entries_in_blocks, world_size=2)
error = errors(wrong, truth)
for name in backward_order[:7]:
    print(f"{name:34}{'right' if error[name] < 1e-12 else f'wrong by {error[name]:.2f} of its largest value'}")
assert next(name for name in backward_order if error[name] > 1e-12) == "layers.2.mlp_norm.weight"

# %% [markdown]
# The last layer's MLP is right, all three matrices. The norm before it is the first wrong one: it is what stands
# between the missing entry and the rest. Remember the pattern. **The parameter just below a missing entry is the first
# wrong one, and the layer that caused it is right.** Whoever looks at the last MLP only sees nothing.
#
# ## Heads are columns
#
# In attention the elementwise $f$ of the paper becomes softmax attention, and that is not elementwise at all: a score
# is a sum over the channels of a head. But *heads* never mix before `o`. So the columns of q, k and v are cut at the
# borders of heads, and `o` is row parallel. The model reads its number of heads from the weight
# (`view(B, T, -1, head_dim)`), so that it runs with half of them unchanged.
#
# Under grouped-query attention several query heads share a key-value head. Our model has 8 and 4:

# %% tags=["nbval-ignore-output"]
draw_heads(8, 4, (2, 4, 8))

# %% [markdown]
# With `tp=8` each rank would have one query head and *half* a key-value head. A half is of no use: the score needs all
# channels of the key. So `tp` must divide the number of key-value heads, and the library says so before a process
# exists:

# %%
for tp in (8, 3):
    try:
        resolve(RunConfig(layout=f"tp={tp}", model=CONFIG, train=TRAIN))
    except ConfigError as refused:
        print(refused, end="\n\n")
        assert f"tp={tp} does not divide num_kv_heads=4" in str(refused)
    else:
        raise AssertionError("it was accepted")

# %% [markdown]
# Llama 3's 405B has 128 query heads and 8 key-value heads, so here it could be cut in 8 and not in 16. Going further
# means *copies* of the key-value heads on several ranks, and then the gradients of k and v must be added up over the
# copies, for the reason that the next section shows on a norm.
#
# ## Norms: which need a sum, which must not have one
#
# Every rank holds every norm whole. Does its gradient need a sum over the ranks? Let us look, at a model that has a
# norm on the residual stream and one on the queries (`qk_norm`, as Qwen3 has it). Three candidates for the gradient:
# rank 0's own, rank 1's own, and their sum.

# %%
WITH_QK_NORM = replace(CONFIG, qk_norm=True)
_, truth_qk = one_device(WITH_QK_NORM)
ranks_qk = [grads for _, grads in launch(on_a_rank, WITH_QK_NORM, 2, world_size=2)]


def verdict(got: Tensor, want: Tensor) -> str:
    error = ((got - want).abs().max() / want.abs().max()).item()
    return "right" if error < 1e-12 else f"off by {error:.2f}"


print(f"{'':36}{'rank 0':>12}{'rank 1':>12}{'the sum':>12}")
for name in ("layers.0.attention_norm.weight", "layers.0.attention.q_norm.weight"):
    one, two = (grads[name] for grads in ranks_qk)
    print(f"{name:36}" + "".join(f"{verdict(g, truth_qk[name]):>12}" for g in (one, two, one + two)))
one, two = (grads["layers.0.attention.q_norm.weight"] for grads in ranks_qk)
assert verdict(one + two, truth_qk["layers.0.attention.q_norm.weight"]) == "right"
assert verdict(ranks_qk[0]["layers.0.attention_norm.weight"], truth_qk["layers.0.attention_norm.weight"]) == "right"

# %% [markdown]
# - `attention_norm` stands *outside* the pair. Its input is whole, and the gradient that reaches it was summed by the
#   entry. Each rank has the right answer already, and a sum is off by 1.00: twice the truth, `tp` times in general.
# - `q_norm` stands *inside*, between entry and exit. It is one weight `[head_dim]` that all heads share, and a rank
#   sees its own heads. Each rank has a part, and the sum is right.
#
# The rule: **outside the pairs gradients are whole, inside they belong to this rank's slice.** A weight that is inside
# and not cut is the only case that needs a sum. The plan names them, and after backward they travel together, in one
# message:

# %% tags=["nbval-ignore-output"]
print("HEAD_NORMS =", tensor.HEAD_NORMS, "\n")
print(inspect.getsource(partial.sum_partial_gradients))

# %% [markdown]
# ## The vocabulary is cut too
#
# The embedding table is cut by rows. A rank looks up the tokens that are its own, puts zeros for the others, and the
# sum over ranks finds each token's one non-zero row. The head is column parallel: each rank gets a slice of the logits
# $[T, V/n]$. The slices may be uneven: each rank but the last ones has $\lceil V/n \rceil$ rows. But nobody may be left
# without any, so a vocabulary of 9 over four ranks (3, 3, 3 and none) is refused.
#
# Then comes the loss. How large would the logits be, if they were put together?

# %%
V, tokens, n = LLAMA_405B.vocab_size, 8192, 8
gathered = V // n * 2  # bytes a token that a rank hands to all_gather: its slice, in bf16
print(f"whole logits in float32: {V * tokens * 4 / 1e9:.1f} GB on every rank, for one sequence of {tokens} tokens")
print(f"gathered: a rank hands over {gathered:,} bytes a token; three float32: {3 * 4}; {gathered // 12:,} times less")

# %% [markdown]
# Three numbers suffice. The loss of a token with target $y$ is
#
# $$-\log p_y = \log \sum_v e^{z_v} - z_y$$
#
# A number $m$ may be subtracted from all logits, since it cancels:
#
# $$-\log p_y = \log \sum_v e^{z_v - m} - (z_y - m)$$
#
# and a sum over the vocabulary is a sum over ranks of sums over their slices:
#
# $$\sum_v e^{z_v - m} = \sum_r \sum_{v \in r} e^{z_v - m}$$
#
# Each rank adds up its own exponentials. The target's logit is on exactly one rank, and the others put 0. So a token
# needs: the maximum $m$, the sum of exponentials, and $z_y - m$. **All ranks must subtract the same $m$**, or their
# exponentials have different units; that is why the maximum is taken over the ranks first. And it must be a maximum (or
# near it), or `exp` overflows. It needs no gradient, because it cancels.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(vocab_parallel_cross_entropy))

# %% [markdown]
# Backward nothing is sent: the gradient of $z_v$ is $p_v$, minus 1 at the target. The rank has $e^{z_v - m}$ and, from
# forward, the whole sum.
#
# We run it on 101 tokens over four ranks, which is uneven: 26, 26, 26 and 23. Once with ordinary logits, once with huge
# ones.

# %%
print(split(101, 4))


def split_loss(scale: float) -> tuple[float, Tensor, int, float]:
    """The loss, this rank's slice of its gradient, the bytes, and the loss without the shift."""
    tp = Mesh.build(MeshShape(tp=4))["tp"]
    start, stop = split(101, 4)[tp.index]
    logits, targets = make_logits(scale)
    mine = logits[..., start:stop].clone().requires_grad_()
    with ledger.recording() as sent:
        loss = vocab_parallel_cross_entropy(mine, targets, (start, stop), tp)
        loss.backward()
    exp_sum = collectives.all_reduce(mine.detach().exp().sum(-1), tp)
    unshifted = (exp_sum.log() - logits.gather(-1, targets[..., None])[..., 0]).sum()
    return loss.item(), mine.grad, sent["tp", "all_reduce"], unshifted.item()


def make_logits(scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(2, T, 101, dtype=torch.float64, generator=generator)
    return logits, torch.randint(101, (2, T), generator=generator)


for scale in (1.0, 1e3):
    logits, targets = make_logits(scale)
    whole = logits.clone().requires_grad_()
    want = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="sum")
    want.backward()
    results = launch(split_loss, scale, world_size=4)
    together = torch.cat([grad for _, grad, _, _ in results], -1)
    for got, _, sent, _ in results:
        assert abs(got - want.item()) < 1e-12 * want.item() and sent == 3 * 2 * T * 8
    assert torch.allclose(together, whole.grad, rtol=0, atol=1e-12)
    print(f"logits of size {scale:g}: loss {want.item():.3f}, split the same; without the shift {results[0][3]:.3f}")
print(
    f"{results[0][2]} bytes = 3 numbers x {2 * T} tokens x 8; slices gathered would be {26 * 2 * T * 8:,} on each rank"
)

# %% [markdown]
# ## Weights that do not know the layout
#
# With what values does a slice start? If each rank seeded its generator alike and drew its own slice, all slices would
# be *equal*, and if it seeded by rank, `tp=2` would be another model than `tp=4`. Here each parameter is drawn whole,
# from a generator seeded by its *name*, and the rank keeps its part. The price is the memory of one whole parameter
# for a moment. What it buys: the slices of any layout are the one-device weights, bit by bit.


# %%
def start(tp: int) -> Tensor:
    """This rank's slice of a weight, as `parallelize` makes it."""
    axis = Mesh.build(MeshShape(tp=tp))["tp"]
    name = "layers.1.mlp.up.weight"
    place = layout_for(tp)[name]
    whole = initial_weight(CONFIG, name, place.shape, seed=0)
    return whole[place.slices({"pp": 0, "dp": 0, "tp": axis.index})].clone()


one = make_model().layers["1"].mlp.up.weight.float()
for tp in (2, 4):
    slices = launch(start, tp, world_size=tp)
    assert torch.equal(torch.cat(slices), one) and not torch.equal(slices[0], slices[1])
    print(f"tp={tp}: the slices together are the one-device weight, bit by bit")

# %% [markdown]
# ## Proof
#
# `verify` trains some steps on the layout and on one device and compares loss, every gradient, the gradient norm and
# the weights. We make it hard: four ranks, grouped-query heads, norms on queries and keys, a tied head, an uneven
# vocabulary, three micro-batches. On the command line it is `picotron-mini verify tp=4`.

# %%
HARD = ModelConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=4,
    qk_norm=True,
)  # fmt: skip
report = verify("tp=4", HARD, TRAIN)
for difference in report.differences:
    assert difference.error < 1e-12
    print(f"{difference.quantity:14} equal to one device within 1e-12")
assert report.ok and report.first_divergence is None

# %% [markdown]
# ## What it costs
#
# The unit is the *payload* that a rank hands to `torch.distributed`. Let $a = B T D g$ be the bytes of one micro-batch
# of hidden states, $B$ sequences of $T$ tokens, width $D$, $g$ bytes a number. One step of $L$ layers and $m$
# micro-batches sends
#
# $$m \left( (4 L + 2)\, a + 3\, B T w \right) + 2\, L\, d\, g'$$
#
# bytes: an exit forward and an entry backward for attention and for MLP make 4 a layer; the embedding's exit and the
# head's entry make 2; the loss has three numbers a token of $w$ bytes (float32 at least). The last term is there only
# with `qk_norm`: two norms of head width $d$ a layer, $g'$ bytes an element of a gradient. The code that evaluates it
# never imports the collectives, and the ledger must agree to the byte.

# %%
m, B, seq, L, D, g = TRAIN.micro_batches, TRAIN.micro_batch_size, TRAIN.seq_len, 3, HARD.hidden_size, 8
hidden = B * seq * D * g
by_hand = m * ((4 * L + 2) * hidden + 3 * B * seq * 8) + 2 * L * HARD.head_dim * 8
print(f"by hand    {by_hand:,}")
print(f"predicted  {report.bytes_predicted['tp all_reduce']:,}")
print(f"counted    {report.bytes_counted['tp all_reduce']:,}")
assert by_hand == report.bytes_predicted["tp all_reduce"] == report.bytes_counted["tp all_reduce"]
assert not report.bytes_problems

# %% [markdown]
# Neither $V$ nor the number of weights is in it, and nor is `tp`, if it is more than 1. Compare data parallelism: there
# a layer costs its weights, once a step, whatever the number of tokens; here it costs activations, for every token,
# whatever the number of weights. For a layer of Llama 3's 8B (218 million weights, width 4096) the two meet at some
# number of tokens:

# %%
LLAMA_8B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8
)
data_bytes = 4 * layer_parameters(LLAMA_8B)  # float32 sums, once a step
token_bytes = 4 * 4096 * 2  # four all_reduces of D numbers in bf16
print(f"data parallel   {data_bytes / 1e6:.0f} MB a layer and step")
print(
    f"tensor parallel {token_bytes / 1e3:.1f} kB a layer and token: as much after {data_bytes // token_bytes:,} tokens"
)

# %% [markdown]
# So with some 27 thousand tokens a step and rank the two are of one size, and the difference is *when*. The gradients
# of data parallelism can travel while backward computes; each of these sums is waited for by the next product. (Cut the
# model as well, and data parallelism has less to send: each rank's gradients are $1/n$ of the layer.)
#
# ### In which dtype do the terms travel?
#
# In that of the activations, the $g$ of the formula: bf16 in a bf16 run. So each rank rounds its term, and the sum of
# the terms is rounded as it goes from rank to rank, where one device adds all of it in a float32 accumulator and rounds
# once. A row parallel product of 4,096 inputs, its terms added one after the other in bf16:

# %%
generator = torch.Generator().manual_seed(4)
h, weight = torch.randn(256, 4096, generator=generator), torch.randn(4096, 256, generator=generator)
exact = h.bfloat16().double() @ weight.bfloat16().double()
for n in (1, 2, 4, 8):
    parts = zip(h.bfloat16().float().chunk(n, 1), weight.bfloat16().float().chunk(n, 0), strict=True)
    terms = [(inputs @ rows).bfloat16() for inputs, rows in parts]
    total = sum(terms[1:], terms[0])
    print(f"tp={n}: error {((total.double() - exact).norm() / exact.norm()).item():.4f} of the result")

# %% [markdown]
# Terms in float32 would have the error of the first line for twice the bytes. The library sends bf16, and judges a bf16
# run by the error of its gradients: at most twice that of one device in bf16.
#
# ## When does it stop paying?
#
# Set the time of a layer's exchanges against that of its products. With $R$ useful operations a second on a rank, $n$
# ranks, links that take $\beta$ seconds a byte (chapter 00), and $\phi$ flops a token for the layer's forward:
#
# $$\text{products} = \frac{3 \phi}{n R}$$
#
# $$\text{exchanges} = 4 \cdot 2\,\frac{n-1}{n} \cdot \beta D g$$
#
# per token (backward is twice forward, and a ring carries $2\frac{n-1}{n}$ of a payload). Their ratio is
#
# $$\frac{\text{exchanges}}{\text{products}} = c\,(n-1)$$
#
# $$c = \frac{8\, \beta\, D\, g\, R}{3\, \phi}$$
#
# The batch has cancelled: more tokens do not help here, and in data parallelism they did. For a layer of this kind
# $\phi \approx 24 D^2 + 4DT$, so $c \approx \beta gR / (9D + 1.5T)$: **wide models can be cut, narrow ones cannot.**
# And the speed-up of $n$ ranks, if nothing overlaps, is
#
# $$\frac{n}{1 + c\,(n-1)}$$
#
# For $c > 1$ it is below 1 whatever $n$: cutting is slower than not cutting. For $c < 1$ it grows with $n$ towards
# $1/c$, and never beyond. Let us assume 400 TFLOP/s of bf16, and two links: 450 GB/s, what an H100's NVLink carries one
# way by its data sheet, and 50 GB/s, a network card of 400 Gbit/s.

# %%
R, SEQ = 400e12, 4096
LINKS = {"450 GB/s, inside a machine": 450e9, "50 GB/s, between machines": 50e9}
print(f"{'width':>6}  {'link':28}{'c':>6}{'speed-up of 2':>15}{'of 8':>7}{'limit':>7}")
for width in (1024, 4096, 16384):
    for link_name, link in LINKS.items():
        c = exchange_ratio(layer_of_width(width), SEQ, 2, 2, R, link)
        speed = [n / (1 + c * (n - 1)) for n in (2, 8)]
        print(f"{width:>6}  {link_name:28}{c:>6.2f}{speed[0]:>15.2f}{speed[1]:>7.2f}{1 / c:>7.1f}")
        exact = exchange_ratio(layer_of_width(width), SEQ, 8, 2, R, link)
        assert abs(exact - 7 * c) < 1e-12
even = (2 * R / 50e9 - 1.5 * SEQ) / 9  # c = g R / (link (9 D + 1.5 T)) = 1, solved for D
print(f"between machines cutting breaks even at a width of {even:,.0f}")
assert [exchange_ratio(layer_of_width(width), SEQ, 2, 2, R, 50e9) < 1 for width in (768, 1536)] == [False, True]

# %% tags=["nbval-ignore-output"]
widths = [2**k for k in range(9, 15)]
with drawing():
    fig = figure(6.5, 3.0)
    ax = fig.subplots()
    for (link_name, link), style in zip(LINKS.items(), ("-", "--"), strict=True):
        for n, colour in zip((2, 4, 8), LINES, strict=False):
            shares = [r / (1 + r) for r in (exchange_ratio(layer_of_width(w), SEQ, n, 2, R, link) for w in widths)]
            ax.plot(widths, [100 * s for s in shares], style, color=colour, label=f"tp={n}, {link_name}")
    ax.set(xscale="log", xlabel="width of the model", ylabel="% of a layer's time\nspent in exchanges", ylim=(0, 100))
    ax.set_xticks(widths, widths)
    ax.minorticks_off()
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
picture(
    fig,
    "The share of a layer's time that is spent in exchanges, against the width of the model, for 2, 4 and 8 ranks on a "
    "fast and on a slow link: every curve falls with the width, rises with the number of ranks, and is far higher on "
    "the slow link.",
)

# %% [markdown]
# So tensor parallelism stays inside a machine, where links are fast, and the mesh numbers its ranks with `tp` fastest
# so that it does. The formula leaves out latency (small batches do worse) and that thinner matrices run at a lower $R$.
#
# Does a real machine behave so? We time one layer, forward and backward, at `tp` = 1, 2 and 4: with its exchanges, and
# the same products without a word (a layer as small as the rank's slice). Times vary, so this is not compared when the
# notebook is tested.

# %% tags=["nbval-ignore-output"]
measured_widths, sizes = (64, 128, 256, 512), (1, 2, 4)
per_rank = launch(block_times, measured_widths, sizes, 128, 8, world_size=4)
with drawing():
    fig = figure(6.5, 2.7)
    left, right = fig.subplots(1, 2)
    for n, colour in zip((2, 4), LINES, strict=False):
        whole, products = ([max(times[w, n][k] for times in per_rank[:n]) for w in measured_widths] for k in (0, 1))
        ratio = [seconds / per_rank[0][w, 1][0] for seconds, w in zip(whole, measured_widths, strict=True)]
        left.plot(measured_widths, ratio, "o-", color=colour, label=f"tp={n}", markersize=4)
        share = [100 * max(0.0, 1 - p / w) for w, p in zip(whole, products, strict=True)]
        right.plot(measured_widths, share, "o-", color=colour, label=f"tp={n}", markersize=4)
    left.axhline(1, color=GREY, linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="width", title="time of a layer, over that of tp=1")
    left.set_yticks((0.5, 1, 2, 5, 10), ("0.5", "1", "2", "5", "10"))
    right.set(xscale="log", xlabel="width", ylim=(0, 100), title="% of it in exchanges")
    for ax in (left, right):
        ax.set_xticks(measured_widths, measured_widths)
        ax.minorticks_off()
        ax.title.set_fontsize(9)
    left.legend()
picture(
    fig,
    "Two panels against the width of a layer, for tp 2 and 4. Left, its time over that of one rank: several times as "
    "long for narrow layers, falling as the width grows. Right, the share of it that is spent in exchanges: most of "
    "it for narrow layers, falling too.",
)

# %% [markdown]
# Above the dotted line, cutting made the layer *slower* than one rank alone. In narrow layers nearly all of the time
# goes into exchanges, which are latency and the operating system's turns, and their share falls as the width grows, as
# in the formula. If this page was made on two cores, `tp=4` has no more of them than `tp=2`: its products cannot be
# faster, and its exchanges come on top. If other programs used these cores meanwhile, the same is true of `tp=2`: then
# cutting a wide layer gains nothing, though next to nothing of its time is exchanges. The
# [write-up](../summary/04_tensor_parallel.md) has the numbers of a longer run.
#
# ## The same from PyTorch
#
# `torch.distributed.tensor.parallel` has the two cuts as styles, `ColwiseParallel` and `RowwiseParallel`, and applies a
# plan of names to a model. `loss_parallel` is its loss over slices of the logits. We use the plan that one writes first
# and let its own `CommDebugMode` count the exchanges; then we say that attention and MLP take their input whole
# (`PrepareModuleInput`), and count again.


# %%
def with_pytorch(prepare: bool) -> tuple[dict[str, Tensor], int]:
    """The whole gradients, and the number of all_reduces of one forward and backward."""
    import warnings

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    whole = Replicate()
    plan = {
        "embed": RowwiseParallel(input_layouts=whole),
        **{f"layers.*.{name}": ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v")},
        **{f"layers.*.{name}": ColwiseParallel() for name in ("mlp.gate", "mlp.up")},
        **{f"layers.*.{name}": RowwiseParallel() for name in ("attention.o", "mlp.down")},
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    if prepare:  # of attention's five arguments, the first is a tensor that all ranks have
        inputs = (whole, None, None, None, None)
        plan["layers.*.attention"] = PrepareModuleInput(input_layouts=inputs, desired_input_layouts=inputs)
        plan["layers.*.mlp"] = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
    model = make_model()
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    tokens, targets = make_batch()
    counter = CommDebugMode()
    with counter, loss_parallel(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CommDebugMode's own hooks complain of inputs without gradient
        logits = model.logits(model(tokens))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / targets.numel()
        loss.backward()
    grads = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
    return grads, sum(counter.get_comm_counts().values())


def ours() -> int:
    from picotron_mini.course.instruments.witness import Witness

    with Witness() as witness:
        on_a_rank(CONFIG, 2)
    return witness.calls["all_reduce"]


counts = {"ours": launch(ours, world_size=2)[0]}
for prepare, label in ((False, "PyTorch, the plain plan"), (True, "PyTorch, inputs prepared")):
    theirs, counts[label] = launch(with_pytorch, prepare, world_size=2)[0]
    far = max(((theirs[name] - truth[name]).abs().max() / truth[name].abs().max()).item() for name in truth)
    assert far < 1e-12
for label, number in counts.items():
    print(f"{label:26}{number:>3} all_reduces a step, gradients equal to one device within 1e-12")
assert counts["ours"] == 3 * 4 + 2 + 2  # the loss: one for the maximum, one for the other two numbers
assert counts["PyTorch, the plain plan"] == 3 * 7 + 2 + 3 and counts["PyTorch, inputs prepared"] == 3 * 4 + 2 + 3

# %% [markdown]
# All three are right. But in the plain plan each matrix has an entry *of its own*: q, k and v each sum a gradient of
# the same input, and gate and up do too, so that a layer has 7 all_reduces where 4 suffice. Preparing the input of the
# module, once, brings it down. Ours has one hook on the module for the same reason. A parity test does not see this
# difference. Counting does.
#
# ## Exercises
#
# Fill in a body and run the cell. The check runs your function on real ranks where that matters, and answers with one
# line. `solution("04.plan")` (from `picotron_mini.course.exercises`) prints an answer. There are seven; the last needs
# sequence parallelism and stands at the end of that section, below.
#
# **1. Which dim of which weight.** For a parameter's name (`"layers.2.mlp.down.weight"`, `"head.weight"`) return the
# dim that is cut, 0 or 1; or `"whole"`; or `"sum"` if it is held whole and the ranks' gradients must be added up.


# %%
def plan(name: str) -> int | str: ...


check("04.plan", plan)

# %% [markdown]
# **2. How far a model can be cut.** List the sizes of `tp` from 1 to `most` that the library accepts. Mind the heads of
# both kinds, the MLP, and that no rank's slice of the vocabulary is empty.


# %%
def legal_sizes(model: ModelConfig, most: int) -> list[int]: ...


check("04.legal_sizes", legal_sizes)

# %% [markdown]
# **3. A row parallel linear layer, with a bias.** Our model has no biases. Where does one go?


# %%
def row_linear(x: Tensor, weight: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """x [T, F/n], weight [D, F/n], bias [D] whole -> [T, D]. There are `reduce_from(x, axis)` and `copy_to`."""


check("04.row_linear", row_linear)

# %% [markdown]
# **4. The entry of a pair.** Write it as a `torch.autograd.Function`, defined inside, and return `....apply(x)`. For
# the sum there is `all_reduce(x, axis)` (import it from `picotron_mini.collectives`), which returns a new tensor, and
# carries no gradient. Beside your entry the check lets x go on, as the residual stream does.


# %%
def my_copy_to(x: Tensor, axis: Axis) -> Tensor: ...


check("04.copy_to", my_copy_to)

# %% [markdown]
# **5. The loss without the logits, within a budget.** The loss of one device and its gradient, for at most three
# numbers a token. There are `reduce_from(x, axis)` and `all_reduce_max(x, axis)`. Targets of -100 do not count.


# %%
def my_split_loss(logits: Tensor, targets: Tensor, vocabulary: tuple[int, int], axis: Axis) -> Tensor:
    """logits [T, Vr], the columns [start, stop) = vocabulary; targets [T] -> the summed loss."""


check("04.split_loss", my_split_loss)

# %% [markdown]
# **6. The price of a layer.** Payload that one rank hands to all_reduce for one layer in one step, `tokens` being those
# of one micro-batch; `tp` may be 1. The ledger of a real run decides.


# %%
def layer_bytes(tokens: int, width: int, itemsize: int, micro_batches: int, tp: int) -> int: ...


check("04.layer_bytes", layer_bytes)

# %% [markdown]
# ## From the bug museum
#
# You have met the first exhibit of this room above: `04.copy_to_without_backward` is the entry that we left out. Here
# is its counterpart, an exit that sums in backward too.

# %% tags=["nbval-ignore-output"]
show("04.reduce_from_sums_again")

# %%
broken = run("04.reduce_from_sums_again", "tp=2", optimizers=("sgd",))
by_quantity = {difference.quantity: difference.error for difference in broken.differences}
print("equal to one device:", broken.ok)
for quantity, error in by_quantity.items():
    print(f"{quantity:14} largest relative error {error:.0e}")
assert not broken.ok and broken.bytes_problems, "the ledger sees it as well: more is sent than predicted"

# %% [markdown]
# Would your test have noticed? Write one: a function of the mesh that is called on every rank, uses something of
# `picotron_mini.parallel.tensor` and asserts something. It must pass on the sound library and fail with the bug in it.
# The mutant replaces the attribute of the module, so call `tensor.reduce_from(...)`: the name `reduce_from` imported at
# the top of this page stays the sound one.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("04.reduce_from_sums_again", my_test)

# %% [markdown]
# More of this room: `04.copy_to_without_backward`, `04.slice_zero_for_all`, `04.head_norms_not_summed`, and
# `04.token_norms_not_summed`, of which more below. A test of values kills one of them; which?
#
# <details markdown="1">
# <summary>Answer</summary>
#
# `04.slice_zero_for_all`: the others compute the right values, and wrong gradients. But the test has to cut the weights
# by the layout (`Placement.slices`), as a training run does. `tensor_parallel` cuts a whole model without it.
#
# </details>
#
# ## On GPUs
#
# The same files run on NCCL:
#
# ```console
# $ picotron-mini verify tp=2 --device cuda --dtype float32    # equal to one device, on GPUs
# $ picotron-mini bench --preset bench --layout tp=2           # tokens per second, against --layout dp=1 and dp=2
# $ picotron-mini bench --preset bench --layout tp=2 --no-compile
# ```
#
# or on ranks that `torchrun` made. `tp` varies fastest over the ranks, so with 8 GPUs a machine a `tp` of up to 8 stays
# inside one:
#
# ```console
# $ torchrun --nproc-per-node 8 --no-python picotron-mini train --preset h100 --layout dp=2,tp=4
# ```
#
# What changes: the exchanges run on NCCL's stream, and each is waited for before the next product starts, until the
# last section of this lesson changes that.
#
# This chapter's closing run, on two H200s with torch 2.11:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset h100 tp=2 --sequence-parallel --steps 60
# step 51/60  loss 6.169  validation 5.565 (1.971 bits per byte)  141,476 tokens/s  memory 10.1 GiB  0:04 left
# step 60/60  loss 5.925  validation 5.417 (1.919 bits per byte)  159,923 tokens/s  memory 10.1 GiB  0:00 left
# ```
#
# The same model and text made 414,865 tokens/s with `dp=2 --zero 2`. So two ranks were as fast as 0.77 of one of those
# GPUs, and the formula has 1.7 at this width and length, with the 450 GB/s of the data sheet. It knows no host: the
# kernels of this model are so short that the GPU waits for their launches. With long kernels, and rates that were
# measured, it is good. The `bench` preset has 1.8 billion parameters; with `--sequence-parallel`, recorded as a CUDA
# graph (not the command above), `tp=2` makes 0.82 of the speed of `dp=2`
# ([table](../summary/07_3d_parallel.md#measured-performance)). From that row:

# %%
compute, exchanges = 326, 78  # ms of a step: kernels that are not NCCL's, and NCCL's alone
sent = (4 * 24 + 2) * 16 * 2048 * 2048 * 2  # on a wire of two ranks: 24 layers, 16 sequences of 2048, width 2048, bf16
c = exchanges / compute
print(f"{sent / 1e9:.1f} GB in {exchanges} ms: {sent / exchanges / 1e6:.0f} GB/s")
print(f"c = {c:.2f}: two ranks make {2 / (1 + c):.2f} of one; of dp=2 that is {1 / (1 + c):.2f}")
print(f"measured {39_604 / 48_182:.2f}")
assert abs(1 / (1 + c) - 39_604 / 48_182) < 0.02
small = exchange_ratio(layer_of_width(1024), 1024, 2, 2, R, 450e9)
assert round(2 / (1 + small), 1) == 1.7 and round(159_923 / (414_865 / 2), 2) == 0.77

# %% [markdown]
# ## What is still whole
#
# Not everything was cut. Between an exit and the next entry every rank holds the same hidden states, and computes the
# same norms and the same residual additions. How much is that? We count the bytes that autograd keeps for the backward
# of one layer.


# %%
LONG = 256  # tokens


def kept(tp: int, sequence_parallel: bool = False) -> int:
    """Bytes of activations that one layer keeps on a rank."""
    axis = Mesh.build(MeshShape(tp=tp))["tp"]
    layer = GPT(CONFIG, layers=[0], embed=False, head=False)
    tensor_parallel(layer, axis, sequence_parallel)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = t, storage.nbytes()
        return t

    mine = LONG // tp if sequence_parallel else LONG  # the tokens that this rank has between the pairs
    hidden = torch.randn(1, mine, CONFIG.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(hidden, positions=torch.arange(LONG)[None])  # attention sees all tokens, and needs their positions
    return sum(size for _, size in storages.values())


amounts = {tp: launch(kept, tp, world_size=tp)[0] for tp in (1, 2, 4)}
for tp, amount in amounts.items():
    print(f"tp={tp}: {amount / amounts[1]:.2f} of the activations of one device")
assert amounts[4] > amounts[1] / 4 * 1.3

# %% [markdown]
# Weights, gradients and optimizer state are divided by `tp`. Activations are not, quite: what lies inside the pairs is,
# and what lies between them is kept by every rank.
#
# ## Sequence parallelism: cut that too
#
# By what can it be cut? Not by channels: a norm needs all channels of a token. But a norm and an addition need nothing
# of *other tokens*. So let each rank keep $T/n$ of the tokens there. What has to change at the borders?
#
# - The **entry** finds a part of the tokens on each rank and must hand all of them to the products: an all_gather.
# - The **exit** has a term of the sum for all tokens, and each rank wants the sum for its own tokens only: that is a
#   reduce_scatter, the first half of the all_reduce that was there.
#
# ```text
# [B, T/n, D]  --all_gather-->  [B, T, D]  --the two products-->  terms of [B, T, D]
#                                          --reduce_scatter-->    [B, T/n, D]
# ```
#
# And an all_reduce *is* a reduce_scatter and an all_gather (chapter 00). The exit does the first half, the next entry
# the second, and the norm runs between them, on a part of the tokens. Backward they change roles, as a conjugate pair
# does: the gradient of gathering is a reduce_scatter, that of scattering an all_gather. (arXiv 2205.05198 calls them
# $g$ and $\bar g$.)
#
# *Which* tokens are a rank's own? The first $T/n$ of every sequence for rank 0, one might say. But an all_gather puts
# what it receives one rank behind the other, and in memory the tokens lie one *sequence* behind the other: so both
# sides of every exchange would have to be put in order, by a copy. A norm does not ask which tokens it gets. So the
# $BT$ tokens of the micro-batch are taken as one row, and each rank has one run of it: with four sequences and two
# ranks the first two, and the last two. $[B, T/n, D]$ is then a number of rows in a handy shape, and a gathered
# $[B, T, D]$ is in order as it arrives (`by_rows`).

# %% tags=["nbval-ignore-output"]
for piece in (tensor.by_rows, conjugate._GatherFrom, conjugate._ScatterTo):
    print(inspect.getsource(piece))

# %% [markdown]
# In `tensor_parallel` above it is one option: `enter` and `leave` are these two in place of `copy_to` and
# `reduce_from`. The same hard case as before, and the bytes of both:

# %%
sequence = verify("tp=4", HARD, replace(TRAIN, sequence_parallel=True))
assert sequence.ok and sequence.first_divergence is None and not sequence.bytes_problems
print("equal to one device within 1e-9: " + ", ".join(d.quantity for d in sequence.differences))
sent = sequence.bytes_counted
exchanges, n = m * (4 * L + 2), 4
norms = (2 * L + 1) * D + 2 * L * HARD.head_dim  # their elements: on the residual stream, and on the heads
assert sent["tp reduce_scatter"] == exchanges * hidden
assert sent["tp all_gather"] == exchanges * hidden // n  # the payload of a gather is the rank's own part
assert sent["tp all_reduce"] == m * 3 * B * seq * 8 + norms * 8
wire = {
    "all_reduce": exchanges * 2 * (n - 1) * hidden // n,
    "the two halves": (n - 1) * sent["tp reduce_scatter"] // n + (n - 1) * sent["tp all_gather"],
}
for name, number in wire.items():
    print(f"hidden states by {name:15} a rank of a ring puts {number:,} bytes on the wire")
assert len(set(wire.values())) == 1

# %% [markdown]
# Not a byte more. What became of the memory?

# %%
for tp in (2, 4):
    amounts[tp, "sequence"] = launch(kept, tp, True, world_size=tp)[0]
    without, cut = (amounts[key] / amounts[1] for key in (tp, (tp, "sequence")))
    print(f"tp={tp}: {without:.2f} of one device without, {cut:.2f} with")
    gathered, rotary = LONG * CONFIG.hidden_size * 4, 2 * LONG * CONFIG.head_dim // 2 * 4
    whole = 2 * gathered + rotary  # what every rank has of all tokens
    assert amounts[tp, "sequence"] == whole + (amounts[1] - whole) // tp

# %% [markdown]
# Nearer to $1/n$, and not there. Two tensors of all tokens are left in each layer (and the small tables of cosines and
# sines): the *gathered inputs* of q, k, v and of gate and up. A linear layer keeps its input for the gradient of its
# weight, and that input is the gathered one. One could keep the own part only and gather again in backward, for one
# exchange more; this library does not.
#
# What else changed? Each norm now sees its rank's tokens, so its gradient has become a *part*, and the rule of above
# ("outside the pairs gradients are whole") no longer holds: outside the pairs they belong to this rank's *tokens*. All
# norms need the sum now (`TOKEN_NORMS` beside `HEAD_NORMS`; the bytes above had them). No shape says so. Leave it out:

# %%
broken = run("04.token_norms_not_summed", "tp=2", optimizers=("sgd",))
print("equal to one device:", broken.ok)
print("first divergence:", re.sub(r", step.*", "", broken.first_divergence))
assert not broken.ok and "norm" in broken.first_divergence

# %% [markdown]
# The museum has it as `04.token_norms_not_summed`. Whoever turns the option on and looks at the first loss sees
# nothing. In the order of backward the final norm is met first, and it is among the wrong ones.
#
# **Exercise 7. Norm and MLP on a rank's own tokens.** This rank has its rows of x, the whole weight of the norm, and
# its slices of `up` and `down`. Return its rows of
#
# $$\operatorname{down}(\operatorname{silu}(\operatorname{up}(\operatorname{norm}(x))))$$
#
# where the norm is `F.rms_norm(x, norm.shape, norm)`. The loss is a sum over the rows of all ranks. The check compares
# with one device: the rows, this rank's part of the gradients of x, `up` and `down`, and the whole gradient of `norm`.
# The library adds up the norms' gradients after backward; here your function sees to it.
#
# Write the entry by hand, as in exercise 4. For values there are `all_gather(x, axis, 0)` and
# `reduce_scatter(x, axis, 0)`, and with gradients `scatter_to(x, axis, 0)` and `copy_to(x, axis)`, all in
# `picotron_mini.collectives`. Forward and backward together put no more bytes on a ring's wire than two all_reduces of
# $[T, D]$ and one of $[D]$ do.


# %%
def my_mlp_on_rows(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    """x [T/n, D], norm [D] whole, up [F/n, D], down [D, F/n] -> this rank's rows [T/n, D]."""


check("04.mlp_on_rows", my_mlp_on_rows)

# %% [markdown]
# ## Overlap: do not wait
#
# Four times a layer a rank stands still until an exchange has arrived. Must it? Two observations:
#
# - **The exit's forward** is a product over tokens, and the sum of one token has nothing to do with the next token's.
#   So take the tokens in $k$ parts: while the sum of the first part travels, compute the product of the second.
# - **The entry's backward** is two products, $dx = dy\,W$ and $dW = dy^\top x$. Only $dx$ is summed over the ranks. So
#   compute $dx$ first, start its sum, and compute $dW$ meanwhile.
#
# With sequence parallelism the entry's forward and the exit's backward gather, in parts too. To have $dx$ before *all*
# $dW$, the linear layers of an entry (q, k, v; or gate, up) become one function. To the compiler it is an operator, as
# each collective is: it knows the shapes that come out and does not look inside, so the layer stays one graph.


# %% tags=["nbval-ignore-output"]
def source_of(operator: str) -> str:
    """The registered operators are objects of torch; their source stands in the module."""
    after = inspect.getsource(overlap).split(f"def {operator}(")[1]
    return f"def {operator}({after}".split("\n\n\n")[0]


print(source_of("_multiply_and_sum"), source_of("_enter_backward"), sep="\n\n\n")

# %% [markdown]
# One thing changes with the parts: a gather of a part delivers the rows of *that part*, rank by rank. For them to be in
# order, each rank must have a run of each part, and not one run of everything. A norm does not ask, so this is free as
# well, and no product is ever put together from pieces: each is written where it belongs.
#
# `--tensor-overlap 2` turns it on, in two parts. The sums are the same and so are the bytes, so there is nothing to
# predict anew:

# %%
hidden_behind = verify("tp=4", HARD, replace(TRAIN, sequence_parallel=True, tensor_overlap=2))
assert hidden_behind.ok and not hidden_behind.bytes_problems
assert hidden_behind.bytes_counted == sequence.bytes_counted
print("equal to one device within 1e-9, in the same bytes")

# %% [markdown]
# Is it really in this order? Ask a rank what it starts, waits for and computes, in one step of one layer:

# %%
(work, *_) = launch(order_of_work, False, 2, world_size=2)
print(" ".join(work))
forward = 2 * ["all_reduce", "all_reduce", "wait", "wait"]
assert work == [*forward, "dW", "all_reduce", "dW", "dW", "wait", "dW", "all_reduce", "dW", "dW", "dW", "wait"]

# %% [markdown]
# Forward: two sums are started before one is waited for, at the exit of attention and at that of the MLP. Backward,
# from the right end of the layer: the exit of the MLP needs no exchange (one `dW`); its entry starts its sum, computes
# two `dW` (gate, up) and waits; then attention, whose entry has three.
#
# How much does it hide? If a product takes $P$ and its exchange $C \le P$, the last part alone is exposed: $C/k$. If
# $C > P$, the product is too short, and no more than its own time can be hidden. On the rank of above (400 TFLOP/s),
# with `tp=2` and 8,192 tokens of width 2048, inner width 8192:

# %%
N, D2, F2 = 8192, 2048, 8192
products = {"attention": D2, "MLP": F2}  # what the exit's product takes in, over all ranks
print(f"{'':30}{'product':>9}{'exchange':>10}{'exposed with 1':>16}{'2':>7}{'4':>7}{'8 parts':>9}   (ms)")
for link_name, link in LINKS.items():
    for pair_name, inner in products.items():
        product, exchange = 1e3 * 2 * N * D2 * inner / 2 / R, 1e3 * N * D2 * 2 / link
        left = [exposed(product, exchange, parts) for parts in (1, 2, 4, 8)]
        name = f"{pair_name}, {link_name.split(',')[0]}"
        print(f"{name:30}{product:>9.3f}{exchange:>10.3f}{left[0]:>16.3f}{left[1]:>7.3f}{left[2]:>7.3f}{left[3]:>9.3f}")
        assert abs(left[0] - exchange) < 1e-12 and left == sorted(left, reverse=True)

# %% [markdown]
# Inside a machine all but one part is hidden, for attention with little to spare. Between machines the products are too
# short: overlap does not make a slow link fast. And the table flatters many parts: each pays its latency, and a GPU
# multiplies thin matrices less well, so the best number has to be measured (`tests/performance/tensor_overlap.py`).
#
# Measured, with the `bench` preset and `tp=2 --sequence-parallel`, it has not paid by NCCL. On two H100s two parts were
# slower than one, 30,393 tokens/s per GPU in place of 36,380. On two H200s, recorded, they were no faster, 38,450 in
# place of 38,796: 55 ms of a step were waited for in place of 72, and all other kernels took 18 ms longer. On others
# four parts made 36,555: they should hide more, but sending took twice as long.
#
# Why do the other kernels take longer? NCCL's kernels take multiprocessors from them. Copy engines take none: with
# `--symmetric-memory` ([chapter 03](03_data_parallel.ipynb) has how) the same two parts make 40,512, which is 4 % more
# than without overlap. The five largest products take 225 ms in place of 241. (The profile has 32 ms exposed in place
# of 72, but counts as compute what ranks now add and copy by themselves, 39 ms. Tokens/s are the fairer measure.)
#
# What is left could hide behind the *other half of the batch*, at the price of two chains of work in each layer
# (Domino, arXiv 2409.15241); this library does not.
#
# ## What to read next
#
# - The [write-up](../summary/04_tensor_parallel.md): decisions, what was tried and dropped, measurements.
# - [Questions](../interview_questions/04_tensor_parallel.md), from warm-up to design, with proofs that run.
# - *Megatron-LM* (arXiv 1909.08053): the pair, the conjugate operators, the split vocabulary.
# - *Efficient Large-Scale Language Model Training on GPU Clusters* (arXiv 2104.04473): why `tp` stays inside a machine,
#   with pipelines and data parallelism around it.
# - *Reducing Activation Recomputation in Large Transformer Models* (arXiv 2205.05198): sequence parallelism, and
#   what is worth computing again.
# - *Grouped-query attention* (arXiv 2305.13245): where the limit on `tp` comes from.
