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
# # 08 Mixture of experts
#
# A larger model is better, and every token pays for all of it. A mixture of experts breaks that bond: many MLPs, of
# which a token passes a few. After this lesson you can
#
# - say what a mixture costs in memory, in flops and in bytes on the wire, by formula and by counting;
# - write a router, and say what its gradient is and what it is not;
# - recognise a router that collapses, and choose among four remedies by what they do and what they do not;
# - take tokens to their experts and back, on one device and across ranks, and derive the backward;
# - predict the bytes of an exchange from what the router decided;
# - say which tokens are dropped, and why that must not depend on the number of ranks;
# - move experts between ranks in the middle of a run without changing a bit;
# - recognise seven bugs, of which hardly one crashes.
#
# You need chapters 00 (ranks and collectives), 01 (the model and its costs), 03 (data parallel) and 06 (context
# parallel), since experts are spread over the ranks of both. All cells run here, on real processes on your CPU.
# Reading and running takes about 60 minutes, with the exercises longer.

# %%
import inspect
import os
import tempfile
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from picotron_mini.collectives import ledger
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, MoEConfig, RunConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.exhibits.chapter_08 import MIXTURE
from picotron_mini.course.figures.moe import draw_load, draw_routes, draw_trade
from picotron_mini.course.moe_runs import make_rows, routes, small, train
from picotron_mini.course.museum import TRAIN, kill, run, show
from picotron_mini.data.loader import Batch
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.model import balancing, costs, routing
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.moe import Experts, MoE, Pool, local_dispatch
from picotron_mini.model.routing import choose, keep, room, score, weigh
from picotron_mini.moe import dispatch, exchange, placement
from picotron_mini.moe.dispatch import ExpertDispatch, recording
from picotron_mini.moe.placement import by_load, by_number, imbalance
from picotron_mini.parallel.expert_traffic import even_rows, migration_bytes, rows_for
from picotron_mini.parallel.gather import gather
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.training.migrate import place_experts
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import apply_gradients, compute_gradients
from picotron_mini.verify import make_batches, verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem, and its price
#
# Of a decoder's parameters most are in the MLPs: in a model of the shape of Llama 3 8B, 5.6 of 8.0 billion. Suppose
# they were eight times as many. Here is a dense model whose MLP is as wide as two experts of Mixtral 8x7B, the mixture
# itself, and a dense model as large as the mixture (parameters from the shape alone; state is what AdamW keeps in
# bf16 with float32 masters):

# %%
small_dense = ModelConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=2 * 14_336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, tie_embeddings=False,
)  # fmt: skip
mixtral = replace(small_dense, moe=MoEConfig(num_experts=8, top_k=2, expert_size=14_336))
models = {
    "dense, 2 x 14,336 wide": small_dense,
    "8 experts, top-2": mixtral,
    "dense, 8 x 14,336 wide": replace(small_dense, intermediate_size=8 * 14_336),
}
print("                          parameters   active   Gflop a token       state")
for name, model in models.items():
    n, active = costs.parameters(model), costs.parameters(model, active=True)
    flops = costs.flops_per_token(model, 4096)
    state = sum(costs.state_bytes(model, 2).values())
    print(f"{name:24} {n / 1e9:9.2f} B {active / 1e9:6.2f} B {flops / 1e9:12,.0f} {state / 1e9:12,.0f} GB")
assert (
    round(costs.parameters(mixtral) / 1e9, 1) == 46.7 and round(costs.parameters(mixtral, active=True) / 1e9, 1) == 12.9
)

# %% [markdown]
# The flops of the first, the parameters of the third. That is the whole idea (arXiv 1701.06538). It is also the whole
# price: the memory is that of the third, and a token uses a part of it only. For an expert's three
# matrices and a router's one, a layer has
#
# $$E \, D + 3 E D I \quad \text{weights, of which a token meets} \quad E D + 3 K D I$$
#
# with $E$ experts of inner width $I$, $K$ of them for a token, and width $D$. We count instead of believing: every
# matrix product of one such layer, forward, over 256 tokens.

# %%
E, K, D = 8, 2, 32
CONFIG = MoEConfig(num_experts=E, top_k=K, expert_size=24)
layer = ModelConfig(vocab_size=64, hidden_size=D, head_dim=8, moe=CONFIG)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(fn: object) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


mixture = MoE(CONFIG, D, 0).double()
for n, weight in enumerate(mixture.parameters()):
    weight.data = normal(*weight.shape, seed=n) * D**-0.5
x = normal(4, 64, D)
formula = 2 * x.shape[0] * x.shape[1] * costs.mlp_parameters(layer, active=True)
print(f"a layer of {sum(w.numel() for w in mixture.parameters()):,} weights; flops by formula {formula:,}, ", end="")
print(f"counted {counted(lambda: mixture(x)):,}")
assert counted(lambda: mixture(x)) == formula

# %% [markdown]
# ## The naive way
#
# Suppose that someone has decided: token $t$ goes to the experts `experts[t]` with weights `weights[t]`. Then the
# output is a sum over all experts in which most weights are zero:

# %%
tokens = x.flatten(0, 1)  # [N, D]
decided = mixture.route(x, Pool())
experts, weights = decided.experts, decided.weights.detach()  # [N, K] each


def naive(x: Tensor, experts: Tensor, weights: Tensor, run: Experts) -> Tensor:
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(run.gate, run.up, run.down, strict=True)):
        weight = (weights * (experts == e)).sum(1, keepdim=True)  # [N, 1], mostly 0
        y = y + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return y


want = naive(tokens, experts, weights, mixture.experts)
routed = counted(lambda: local_dispatch(tokens, experts, weights, mixture.experts))
all_of_them = counted(lambda: naive(tokens, experts, weights, mixture.experts))
print(f"naive: {all_of_them:,} flops, {all_of_them / routed:.0f} times what the mixture needs")
assert all_of_them == routed * E / K

# %% [markdown]
# Right, and pointless: it costs as much as the dense model of the third line. So each expert must see its own tokens
# only. The usual loop does that with `x[(experts == e).any(1)]`. On a GPU each such mask makes the host wait, since it
# must know how many tokens there are before it can make room; with 64 experts, 64 times a layer.
#
# ## Permute, multiply, permute back
#
# Sort instead. Of the $N K$ choices make one list, ordered by expert; take the tokens in that order; now every expert
# has a run of rows, and all runs together are one *grouped* product. Then put the outputs back, weigh, add. For four
# tokens and three experts:

# %%
small_choice = torch.tensor([[2, 0], [1, 2], [0, 2], [2, 1]])
order = small_choice.flatten().argsort(stable=True)
print("choices, token by token:", small_choice.flatten().tolist())
print("order of the choices:   ", order.tolist())
print("experts in that order:  ", small_choice.flatten()[order].tolist())
print("tokens in that order:   ", (order // 2).tolist())
print("rows of each expert:    ", small_choice.flatten().bincount(minlength=3).tolist())

# %% [markdown]
# `order // K` is the token of a choice, because the choices of token $t$ are those from $tK$ on. The inverse of `order`
# (`place`) brings the rows back. In the library it is this, with room for choices that were dropped (-1, later):
# (`passes` are the sort and the copies, compiled or not; `routed` says how many rows to make, where the host need not
# ask; `is_meta` is for rehearsals without memory.)

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(local_dispatch))

# %%
leaf = tokens.clone().requires_grad_()
gradient = normal(*tokens.shape, seed=1)
ways = {}
for name, way in (("naive", naive), ("sorted", local_dispatch)):
    out = way(leaf, experts, weights, mixture.experts)
    ways[name] = [out.detach(), *torch.autograd.grad(out, [leaf, *mixture.experts.parameters()], gradient)]
worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ways["sorted"], ways["naive"], strict=True))
print(f"output and all gradients equal the naive way within 1e-14: {worst < 1e-14}")
assert worst < 1e-14

# %% [markdown]
# The gradient of taking rows is adding them up where they came from. Autograd would do just that, row by row; several
# rows have the same token, so on a GPU they queue for it. But `place` says where a token's rows are. So `take` and
# `combine` have a backward of their own, which gathers as well: the gradient of a permutation is the other permutation.
#
# The experts themselves are one tensor for each projection, expert first. On a GPU in bf16 one call
# (`torch._grouped_mm`) multiplies all runs; on the CPU a loop does:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(Experts.forward))

# %% [markdown]
# What does all the sorting cost? On one CPU core, for widths from 128 to 512, 6 to 22% of the experts' own forward, and
# at most 7% of forward and backward; the naive way takes 4.2 to 4.8 times as long
# ([log](../summary/08_moe_cpu.log)). On a GPU products gain more than copies do:
# on an H100 it was half of the experts' time ([write-up](../summary/08_moe.md#measured-performance)).
#
# ## Routing: who decides?
#
# A matrix $[E, D]$, the *router*. It gives each token a logit for each expert, and the rest is three short functions:

# %% tags=["nbval-ignore-output"]
for function in (score, choose, weigh, routing._scaled):
    print(inspect.getsource(function))

# %% [markdown]
# **Softmax before or after the choice?** Papers write $\operatorname{softmax}$ over all experts, then the best $K$,
# then divide by their sum; or the best $K$ logits, then a softmax over these. It is the same: the sum over all experts
# cancels. Without the division it is not the same, and the experts' outputs are scaled by less than 1.

# %%
logits = normal(5, E, seed=2)
scores = score(CONFIG, logits)
chosen = choose(CONFIG, scores)
before = weigh(CONFIG, scores, chosen)
after = logits.gather(1, chosen).softmax(-1)
plain = weigh(replace(CONFIG, normalize=False), scores, chosen)
print("softmax, best 2, divided by their sum:", [round(w, 4) for w in before[0].tolist()])
print("best 2, softmax over them:            ", [round(w, 4) for w in after[0].tolist()])
print("softmax, best 2, not divided:         ", [round(w, 4) for w in plain[0].tolist()])
assert torch.allclose(before, after, rtol=1e-14) and (plain.sum(1) < 1).all()

# %% [markdown]
# **Sigmoid** (DeepSeek-V3, arXiv 2412.19437) judges each expert by itself: raising one score lowers no other. **In
# which precision?** Scores of many experts lie close together, and in bf16 they tie. How many of 1,000 tokens would
# choose another set of experts if only the scores were rounded? (Logits with a standard deviation of 0.5.)

# %%
for number, k in ((8, 2), (64, 8), (256, 8)):
    scores = normal(1000, number, seed=3).mul(0.5).float().softmax(-1)
    fine, coarse = (s.topk(k).indices.sort().values for s in (scores, scores.bfloat16()))
    print(f"{k} of {number:3}: {(fine != coarse).any(1).float().mean():4.0%} of the tokens")
assert (fine != coarse).any(1).float().mean() > 0.03

# %% [markdown]
# So the library's router computes in float32 at least, whatever the model does.
#
# **Where does its gradient come from?** The choice is a list of integers and has none. What has one is the weight:
# $y = \sum_e w_e E_e(x)$, so $\partial L / \partial w_e = \partial L / \partial y \cdot E_e(x)$ for the experts that
# were chosen. A router is told how good its choice was and never what it missed. And it is told nothing at all if a
# token passes one expert and its weight is divided by itself:

# %%
z = normal(5, E, seed=2).requires_grad_()
value = normal(5, 1, seed=4)  # stands for what the one expert makes of each token
for normalize in (True, False):
    one = replace(CONFIG, top_k=1, normalize=normalize)
    p = score(one, z)
    (weigh(one, p, choose(one, p)) * value).sum().backward()
    print(f"top-1, normalize={normalize!s:5} the largest gradient of a logit is {z.grad.abs().max():.3f}")
    assert (z.grad.abs().max() < 1e-12) == normalize
    z.grad = None
try:
    resolve(RunConfig(layout="dp=1", model=replace(MIXTURE, moe=replace(CONFIG, top_k=1))))
except ConfigError as error:
    print(error)
else:
    raise AssertionError("a router that learns nothing was accepted")

# %% [markdown]
# ## What goes wrong: the rich get richer
#
# An expert that is chosen learns. What has learnt is better, so it is chosen more. Nothing in the loss stands against
# it. We train a small model on a text of four subjects (sums, the alphabet, sentences, sequences of numbers), a
# sequence of 32 characters about one of them. Eight experts, of which a token passes one, 150 steps, on one device:

# %%
for subject in range(4):
    print(repr(bytes(make_rows(4, 0)[0][subject].tolist()).decode()))
ONE = MoEConfig(num_experts=8, top_k=1, expert_size=64, dense_layers=1, normalize=False, balance="none")
runs = {"nothing": train(small(ONE))}

# %% tags=["nbval-ignore-output"]
print("rows of each expert at the end, of its even share:")
print("  ".join(f"{n:.2f}" for n in runs["nothing"].late_load.tolist()))

# %%
assert runs["nothing"].late_load.max() > 1.6 and runs["nothing"].late_load.min() < 0.6

# %% [markdown]
# An even share is 64 rows a step. The busiest expert has more than twice that in our run, and the idlest less than one
# row. Why care? Not for the loss, as we will see. For the machine: experts will be spread over ranks, **and every rank
# waits for the busiest**. And weights that nobody uses are memory for nothing.
#
# ## Four remedies
#
# **An auxiliary loss** (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961). In a pool of $n$ tokens let $f_e$ be the
# share of the $nK$ choices that expert $e$ got, and $P_e$ the mean of its probability:
#
# $$L = E \sum_e f_e P_e$$
#
# It is 1 if all are equal, and $E / K$ if all tokens choose the same with all their probability. $f$ is a count and
# has no gradient. $P$ has one, and it presses down the probability of an expert in proportion to how often it was
# chosen.


# %%
def auxiliary(p: Tensor, experts: Tensor) -> Tensor:
    """p [n, E], experts [n, K]."""
    f = F.one_hot(experts, p.shape[1]).sum((0, 1)) / experts.numel()
    return p.shape[1] * (f * p.mean(0)).sum()


even = torch.arange(16)[:, None] % E
same = torch.zeros(16, 1, dtype=torch.int64)
print(f"even: {auxiliary(F.one_hot(even[:, 0], E).double(), even):.2f}", end=";  ")
print(f"all to expert 0, K=1: {auxiliary(F.one_hot(same[:, 0], E).double(), same):.2f}")
assert auxiliary(F.one_hot(same[:, 0], E).double(), same) == E

# %% [markdown]
# **Of which pool?** Take two sequences. Each is about one subject and uses two of four experts; together they use all.

# %%
first, second = torch.tensor([[0], [1]] * 4), torch.tensor([[2], [3]] * 4)
for name, pool in (("first", first), ("second", second), ("both as one pool", torch.cat([first, second]))):
    print(f"{name:17} {auxiliary(F.one_hot(pool[:, 0], 4).double(), pool):.2f}")

# %% [markdown]
# Balanced *within* each sequence is another wish than balanced *over* all, and a stronger one: it forbids experts for
# a subject (arXiv 2501.11873). A rank's own tokens, which come by themselves, are a third pool, and a bad one. The
# loss would be 2.00 on each of two ranks and 1.00 on one: it would depend on the layout. So the library has `sequence`,
# and `global`: the micro-batch of all data ranks, with $f$ summed over them ($E$ integers; $P$ need not travel, since
# the sum of the ranks' $f_e P_e$ is the whole).
#
# **Router z-loss** (ST-MoE, arXiv 2202.08906): the mean of $(\log \sum_e e^{z_e})^2$, for small logits. It is often
# named among the balancing losses. Look whether it balances.
#
# **Bias only** (arXiv 2408.15664): no loss, so no gradient that disturbs the language model's. Each expert has a bias,
# added to its score *for the choice and not for the weight*. After each step:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(balancing.move_bias))
print(inspect.getsource(train))

# %% [markdown]
# That is the whole training. The same start, the same batches, four more ways, and a dense model:

# %%
runs["z-loss"] = train(small(replace(ONE, z_weight=0.001)))
runs["aux, sequence"] = train(small(replace(ONE, balance="aux", aux_scope="sequence")))
runs["aux, global"] = train(small(replace(ONE, balance="aux")))
runs["bias"] = train(small(replace(ONE, balance="bias", bias_rate=0.01)))
dense = train(small(None))

# %% tags=["nbval-ignore-output"]
print("                busiest  idlest   bits   held-out loss")
for name, each in runs.items():
    load = each.late_load
    print(f"{name:15} {load.max():7.2f} {load.min():7.2f} {each.bits:7.2f} {each.held_out:12.3f}")
print(f"{'dense':15} {'':15} {'':7} {dense.held_out:12.3f}   as many active weights")

# %%
busiest = {name: each.late_load.max().item() for name, each in runs.items()}
assert busiest["bias"] < 1.5 < busiest["nothing"] and busiest["aux, global"] < 2.2 < busiest["z-loss"]

# %% tags=["nbval-ignore-output"]
draw_load({name: runs[name].load for name in ("nothing", "z-loss", "aux, global", "bias")})

# %% [markdown]
# What this shows, and what it does not:
#
# - Three of the four balance; over eight seeds the busiest expert has 1.16 of its share with biases, 1.60 and 1.80 with
#   an auxiliary loss, 2.54 with nothing. **The z-loss does not balance**: 3.60. It is there for the size of logits.
# - *Bits* says how much the chosen expert tells about the subject of a character, of 2 bits that there are to know,
#   on text that was not trained on. Balance does not forbid specialisation: over eight seeds 0.71 bits with nothing,
#   0.69 with a global pool, 0.74 with biases. Balance within sequences costs some: 0.42.
# - **Do not read the losses.** Another seed reorders them; the means over eight seeds lie between 1.05 and 1.07, and
#   the seeds of one way (nothing) between 1.00 and 1.27. With as many active weights, a mixture of this size on this
#   text is not better than the dense model. Nothing here says what would be at scale.
#
# The means are those of the [write-up](../summary/08_moe.md#measured-performance), the panels are of this one seed.
#
# And where do characters go? One letter to a box, the colour is the expert:

# %% tags=["nbval-ignore-output"]
texts = (
    "17+25=42;8+31=39;40+2=42;",
    "EFGHIJK.WXYZA.MNOPQ.CDEF.",
    "gina finds a red house.\nh",
    "3,5,7,9,11,13\n0,3,6,9,12,",
)
shown = [text.replace("\n", "↵") for text in texts]
draw_routes([(label, routes(runs["bias"].model, text).tolist()) for label, text in zip(shown, texts, strict=True)])

# %% [markdown]
# No expert has a subject for itself, and no subject an expert. Which one a character gets depends on the character and
# on what stands around it: the same digit can go to one expert in a sum and to another in a sequence.
#
# ## One exit for the auxiliary loss
#
# A layer has this loss, and the loss of the model is computed elsewhere: in a pipeline on another rank. Carrying
# numbers through all layers is where trainers forgot to add them (a bug that is in the museum). The library hangs it
# on the layer's output instead: forward passes the output unchanged, and when its gradient comes by in the backward,
# the gradient of the auxiliary loss joins in. The sums over ranks, which only the backward needs, travel meanwhile.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(balancing._Attach))

# %% [markdown]
# ## Expert parallel
#
# Of Mixtral's 46.7 billion parameters 45.1 are experts, and with their state all are 841 GB. Data ranks hold a copy
# each. But they differ in tokens only, so let `ep` of them hold the experts *between* them: nobody loses anything that
# could not be asked of a neighbour. The same ranks, dealt out anew:

# %%
mesh = MeshShape.parse("dp=4,ep=2")
for rank in range(4):
    here = Mesh(mesh, rank)
    held = range(here["ep"].index * 4, here["ep"].index * 4 + 4)
    print(
        f"rank {rank} holds experts {held[0]} to {held[-1]}, trades tokens with ranks {here['ep'].ranks}, "
        f"sums gradients of experts over {here['edp'].ranks}, of all else over {here['dp'].ranks}"
    )

# %% [markdown]
# A token's journey: to the ranks that hold its experts, through them, and back. How many rows go from whom to whom is
# up to the router, so it is an `all_to_all` with **uneven splits**, and the ranks first tell each other the numbers.
# Two decisions:
#
# - A token goes *once to each rank* that holds one of its experts, not once to each expert. Two of its experts on one
#   rank make one row. The receiver weighs and adds up, and one row comes back.
# - Beside each row travel its weights and the numbers of its experts.
#
# Read the source for the order in which things start and are waited for. The shared expert, which every token passes
# in some models, is computed while rows travel.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(dispatch.plan))
print(inspect.getsource(ExpertDispatch.__call__))

# %% [markdown]
# On four real ranks, two experts on each, 12 tokens a rank, and a router with favourites:

# %%
RANKS, N = 4, 12


def everything() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [RANKS N, D], experts and weights [RANKS N, K], and a gradient of the output."""
    logits = normal(RANKS * N, E, seed=5) + torch.tensor([2.0, 1, 0, 0, 0, 0, 0, -1])
    scores = score(CONFIG, logits)
    chosen = choose(CONFIG, scores)
    return normal(RANKS * N, D, seed=6), chosen, weigh(CONFIG, scores, chosen), normal(RANKS * N, D, seed=7)


def make_experts(part: slice = slice(None)) -> Experts:
    run = Experts(CONFIG, D)
    for n, (name, weight) in enumerate(list(run.named_parameters())):
        setattr(run, name, nn.Parameter((normal(*weight.shape, seed=n) * D**-0.5)[part].clone()))
    return run


def out_and_gradients(dispatch: object, part: slice, run: Experts) -> list[Tensor]:
    x, experts, weights, gradient = (each[part].clone() for each in everything())
    x.requires_grad_()
    weights.requires_grad_()
    y = dispatch(x, experts, weights, run, None)
    y.backward(gradient)
    return [y.detach(), x.grad, weights.grad, *(w.grad for w in run.parameters())]


def on_rank() -> tuple[list[Tensor], dict[str, int]]:
    axis = Mesh.build(MeshShape(dp=RANKS, ep=RANKS))["ep"]
    held = E // RANKS
    run = make_experts(slice(axis.index * held, (axis.index + 1) * held))
    with ledger.recording() as sent:
        found = out_and_gradients(ExpertDispatch(axis, E), slice(axis.index * N, (axis.index + 1) * N), run)
    return found, {operation: n for (_, operation), n in sent.items()}


truth = out_and_gradients(local_dispatch, slice(None), make_experts())
results = launch(on_rank, world_size=RANKS)
worst = 0.0
for rank, (found, _) in enumerate(results):
    own_tokens, own_experts = slice(rank * N, (rank + 1) * N), slice(rank * 2, rank * 2 + 2)
    for n, (got, whole) in enumerate(zip(found, truth, strict=True)):
        want = whole[own_tokens if n < 3 else own_experts]
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
print(f"output, gradients of tokens, weights and experts equal one device within 1e-14: {worst < 1e-14}")
assert worst < 1e-14

# %%
choices = everything()[1]
rows = torch.tensor([rows_for(part.tolist(), RANKS, E // RANKS) for part in choices.split(N)])  # [from, to]
for rank in range(RANKS):
    print(f"rank {rank}: sends {rows[rank].tolist()}, receives {rows[:, rank].tolist()}")
print(f"{int(rows.sum())} rows for {RANKS * N} tokens with {K} experts each")

# %% tags=["nbval-ignore-output"]
draw_trade(rows, "rows sent")

# %% [markdown]
# The gradient of an expert is here the sum over the tokens of *all* ranks of its group, without any all_reduce: it came
# in with the gradients of the rows. Only copies in other groups (`edp`) remain to be added.
#
# ### Backward: the lists change places
#
# A row that went from rank 0 to rank 1 has a gradient on rank 1, and it must go home. So backward is the same exchange
# with `sends` and `receives` swapped. That is the whole derivation. And to hide the journey it is two nodes of the
# graph with a gap between them:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(exchange._Start))
print(inspect.getsource(exchange._Wait))

# %% [markdown]
# Forward: `start` sends, `wait` waits, other work in between. Backward runs in reverse: the gradient of `wait` comes
# first and *sends*, the other work's backward follows, and the gradient of `start` *waits*. The overlap of the forward
# gives that of the backward for nothing.
#
# ## Proof
#
# Some steps of training on ranks and on one device, auxiliary loss and routing statistics included. On the command
# line it is `picotron-mini verify dp=4,ep=2`, which gives a dense model experts if it has none.

# %%
reports = {}
cases = {
    "dp=4,ep=2": (MIXTURE, TRAIN),
    "dp=2,tp=2,ep=2": (replace(MIXTURE, moe=replace(MIXTURE.moe, shared_size=8, z_weight=0.01)), TRAIN),
}
for layout, (model, settings) in cases.items():
    report = reports[layout] = verify(layout, model, settings)
    assert report.ok and report.max_rel_err < 1e-12 and not report.bytes_problems, report.first_divergence
    print(f"{layout:15} loss, gradients, norm, weights, loads and auxiliary losses equal one device within 1e-12")

# %% [markdown]
# ## What it costs, to the byte
#
# Nothing can predict what a router decides. But given its decisions, everything follows. With $S$ rows sent and $R$
# received by a rank, $w$ bytes a number and $g = \max(w, 4)$ a weight:
#
# $$\text{forward: } S (D w + 2 K g) + R D w \qquad \text{backward: } S D w + R (D w + 2 K g)$$
#
# and $16 \, ep$ bytes of numbers of rows, counted apart as control traffic. For the four ranks above:

# %%
w = 8
for rank, (_, sent) in enumerate(results):
    S, R = int(rows[rank].sum()), int(rows[:, rank].sum())
    formula = (S * (D * w + 2 * K * w) + R * D * w) + (S * D * w + R * (D * w + 2 * K * w))
    assert sent == {"all_to_all": formula, "counts": 16 * RANKS}
    print(f"rank {rank}: S={S}, R={R}: formula = counted = {formula:,} bytes")

# %% [markdown]
# Rank 0, which holds the favourites, receives most, and so computes most and sends most back. `verify` does the same
# for whole steps: it records what the routers decided, predicts from that without looking at what was sent, and
# compares with the ledger.

# %%
for layout, report in reports.items():
    for name, n in report.bytes_counted.items():
        assert n == report.bytes_predicted[name]
    moved = {name: n for name, n in report.bytes_counted.items() if name.split()[0] in ("ep", "edp", "dp")}
    print(f"{layout}: " + ", ".join(f"{name} {n:,}" for name, n in moved.items()))

# %% [markdown]
# **Before a run** one can only expect. If all sets of $K$ experts are equally likely, a token needs
#
# $$ep \left( 1 - \binom{E - E/ep}{K} \Big/ \binom{E}{K} \right)$$
#
# rows: one minus the chance that a rank has none of the token's experts, for each rank.

# %%
for number, k, ep in ((8, 2, 2), (8, 2, 8), (64, 8, 8), (256, 8, 32)):
    expected = even_rows(MoEConfig(num_experts=number, top_k=k), ep, 1_000_000) / 1e6
    print(f"{k} of {number:3} experts on {ep:2} ranks: {expected:.2f} rows a token instead of {k}")

# %% [markdown]
# ## Capacity: some tokens are dropped
#
# Early systems gave every expert a fixed room of $C = \lceil c \, T K / E \rceil$ rows, so that all shapes are known:
# what comes later is *dropped* and keeps nothing of this layer but its residual. We can afford not to (*dropless*,
# the default here), but the setting is there. What would our routers lose, with room for $c$ times the even share?


# %% tags=["nbval-ignore-output"]
def choices_of(model: GPT) -> Tensor:
    """Which experts 64 held-out sequences choose: [64, T, K]."""
    text = make_rows(64, 1)[0][:, :-1]
    return torch.stack([routes(model, bytes(row.tolist()).decode()) for row in text])[..., None]


print("rows dropped with c =     1.0   1.25     2")
for name in ("nothing", "aux, sequence", "aux, global", "bias"):
    picked = choices_of(runs[name].model)
    lost = []
    for c in (1.0, 1.25, 2.0):
        config = replace(ONE, capacity=c)
        lost.append(1 - keep(picked, 8, room(config, picked.shape[1])).double().mean().item())
    print(f"{name:20}", "".join(f"{n:8.0%}" for n in lost))

# %% [markdown]
# Much, even for balanced routers: the room is for each sequence, and over the *batch* they are balanced. Only the one
# that was balanced within sequences is made for it.
#
# Why is it for each sequence? Because **which tokens are dropped must not depend on the layout**. Let the room be that
# of a rank's tokens, first come, first served, as comes by itself, and cut eight sequences over 1, 2 and 4 ranks:

# %%
picks = normal(8, 16, E, seed=8).add(torch.tensor([2.0, 1, 0, 0, 0, 0, 0, -1])).topk(K).indices  # [B, T, K]


def kept_by_rank(ranks: int) -> Tensor:
    parts = [part.reshape(1, -1, K) for part in picks.chunk(ranks)]  # all tokens of a rank in one queue
    return torch.cat([keep(p, E, room(replace(CONFIG, capacity=1.0), p.shape[1])).view(-1, 16, K) for p in parts])


def kept_by_sequence(ranks: int) -> Tensor:
    return torch.cat([keep(part, E, room(replace(CONFIG, capacity=1.0), 16)) for part in picks.chunk(ranks)])


for name, kept in (("room of a rank", kept_by_rank), ("room of a sequence", kept_by_sequence)):
    changed = [int((kept(ranks) != kept(1)).sum()) for ranks in (2, 4)]
    print(f"{name:18}: {changed[0]} of {picks.numel()} choices change with 2 ranks, {changed[1]} with 4")
    assert (max(changed) > 0) == (kept is kept_by_rank)

# %% [markdown]
# The order in the queue is fixed too: by position. (A token stands in an expert's queue at most once.) Under context
# parallelism a sequence lies on several ranks, so they tell each other their choices first, and all decide the same:

# %%
tight = replace(MIXTURE, moe=replace(MIXTURE.moe, capacity=0.5))
report = verify("dp=2,cp=2,ep=2", tight, replace(TRAIN, seq_len=16, steps=2))
assert report.ok and report.max_rel_err < 1e-12, report.first_divergence
print("capacity 0.5 on dp=2,cp=2,ep=2: the same tokens are dropped as on one device; all equal within 1e-12")

# %% [markdown]
# ## Placement: which expert where
#
# All ranks wait for the busiest. If loads differ, the placement by number is a bad one, and better ones cost nothing
# but a move. Greedy, longest first: the busiest expert to the rank that has least so far and a slot left
# (`pack`). An order lists the expert in each slot, rank by rank.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(placement.pack))
print(inspect.getsource(placement.by_load))

# %%
load = [40, 30, 10, 5, 5, 5, 3, 2]
for ranks in (2, 4):
    after = by_load(load, ranks)
    print(
        f"{ranks} ranks: busiest over mean {imbalance(load, by_number(8), ranks):.2f} by number, "
        f"{imbalance(load, after, ranks):.2f} by load; order of experts {after}"
    )

# %% [markdown]
# With four ranks nothing is better than 1.68: expert 0 alone has 40% of the load, its rank holds one more, and an
# expert cannot be cut by moving it. A **copy** cuts it: give each rank `--expert-replicas` slots more, each for the
# expert whose copies have most to do, and let tokens take the copies in turn. Gradients of copies are then summed, in
# every step, or they would not stay copies.

# %%
for replicas in (1, 2):
    after = by_load(load, 4, by_number(8, 4, replicas))
    print(f"4 ranks, {replicas} more a rank: {imbalance(load, after, 4):.2f}; order of experts {after}")
assert imbalance(load, by_load(load, 4, by_number(8, 4, 1)), 4) < 1.06

# %% [markdown]
# And what would placement do for the run that collapsed?

# %% tags=["nbval-ignore-output"]
load_of_run = runs["nothing"].load[-20:].mean(0).tolist()
for ranks in (2, 4, 8):
    before, after = (imbalance(load_of_run, o, ranks) for o in (by_number(8), by_load(load_of_run, ranks)))
    print(f"{ranks} ranks: {before:.2f} -> {after:.2f}; none can be below {max(1, max(load_of_run) * ranks):.2f}")

# %% [markdown]
# Placement cures an unlucky order and not a collapse. Now move experts in the middle of a run: two ranks, a router with
# favourites, one step, then a new placement by the load of that step. Weights and Adam's moments of an expert travel
# with it; the router goes on naming experts by their numbers, and dispatch looks up the slot.

# %%
BIG = replace(MIXTURE, num_layers=1, moe=MoEConfig(num_experts=8, top_k=2, expert_size=12, balance="none"))
MOVING = resolve(RunConfig(layout="dp=2,ep=2", model=BIG, train=replace(TRAIN, lr=1e-6, steps=1)))


def move() -> tuple[bool, dict[str, int], tuple[int, ...], list[list[int]]]:
    mesh = Mesh.build(MOVING.mesh)
    parallel = parallelize(MOVING, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, MOVING.train)
    router = parallel.parameters["layers.0.mlp.router.weight"]
    router.data = normal(*router.shape, seed=9) * (2.0 ** -torch.arange(8.0))[:, None] * 4  # favourites
    batch = make_batches(MOVING)[0]
    m, b = MOVING.train.micro_batches, MOVING.train.micro_batch_size
    start = mesh["dp"].index * m * b
    parts = [slice(start + k * b, start + (k + 1) * b) for k in range(m)]
    mine = [Batch(batch.tokens[p], batch.targets[p], batch.positions[p], batch.documents[p]) for p in parts]

    def busy() -> tuple[list[int], tuple[Tensor, Tensor]]:
        """How many choices fall on each rank's experts; the loss and tokens of a step's forward and backward."""
        with recording() as log:
            done = compute_gradients(parallel, mine)
        slots = torch.tensor([chosen for _, step in log for chosen in step]).flatten()
        return (slots // 4).bincount(minlength=2).tolist(), done

    def state() -> list[Tensor]:
        """Every expert's weights and moments, whole and by number, on rank 0."""
        out = []
        for name, place in parallel.layout.items():
            if "experts" in name:
                moments = [v for v in optimizer.state[parallel.trained[name]].values() if v.dim()]
                out += [gather(t, place, mesh, t.dtype, parallel.device) for t in (parallel.masters[name], *moments)]
        return [tensor.clone() for tensor in out if tensor is not None]

    before, (loss, count) = busy()
    routed = apply_gradients(parallel, optimizer, loss, count).routing
    kept = state()
    with ledger.recording() as sent:
        place_experts(parallel, optimizer, {0: routed.counts[0]})
    same = all(torch.equal(a, b) for a, b in zip(kept, state(), strict=True))
    order = parallel.layout["layers.0.mlp.experts.up"].order
    return same, dict(sent), order, [before, busy()[0]]


results = launch(move, world_size=2)
order = results[0][2]
predicted = migration_bytes(MOVING, layout_of(MOVING), coordinates(MOVING.mesh, 0), 0, order)
print(f"new order {order}; weights and moments equal to the last bit: {results[0][0]}")
print(f"moved: predicted = counted = {sum(predicted.values()):,} bytes on rank 0")
for when, name in ((0, "before"), (1, "after ")):
    load = [sum(result[3][when][rank] for result in results) for rank in range(2)]
    print(f"{name}: choices on the two ranks' experts {load}, busiest over mean {max(load) * 2 / sum(load):.2f}")
assert results[0][0] and results[0][1] == predicted

# %% [markdown]
# The bits of the weights are the same. Is the *run*? Its sums run in another order, so it is equal up to rounding, as
# all layouts are. Here experts move after every step:

# %%
for replicas in (0, 1):
    moving = replace(TRAIN, place_every=1, expert_replicas=replicas)
    report = verify("dp=2,ep=2", BIG, moving, optimizers=("adamw",))
    assert report.ok and report.max_rel_err < 1e-12, report.first_divergence
print("a run whose experts move after every step equals one device within 1e-12, with copies of experts and without")

# %% [markdown]
# ## The same from transformers
#
# Is it the mixture that everyone else computes? We save ours, with weights disturbed, and let the Mixtral of
# `transformers` read the folder:

# %%
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
warnings.filterwarnings("ignore", message="IProgress not found")  # its progress bars want a widget
import transformers

from picotron_mini.model.hf import save_hf

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
config = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    moe=MoEConfig(num_experts=8, top_k=2, expert_size=24),
)  # fmt: skip
ours = GPT(config)
init_weights(ours, 0)
with torch.no_grad():
    for n, weight in enumerate(ours.parameters()):
        weight.add_(0.2 * normal(*weight.shape, seed=n).float())
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, config, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(0))
    got, want = ours.logits(ours(tokens)), theirs(tokens).logits
error = ((got - want).abs().max() / want.abs().max()).item()
print(f"{type(theirs).__name__}: logits agree within 1e-5 in float32: {error < 1e-5}")
assert error < 1e-5 and type(theirs).__name__ == "MixtralForCausalLM"

# %% [markdown]
# The project's own tests go further: logits and all gradients within 1e-9 in float64, for random shapes of Mixtral and
# of Qwen3-MoE, both ways ([test_moe_hf.py](../tests/model/test_moe_hf.py)).
#
# ## Exercises
#
# `solution("08.mixture")` (from `picotron_mini.course.exercises`) prints an answer.
#
# **1. Route and combine.** Given logits and the experts as functions from rows to rows, compute the mixture: softmax,
# the best $K$, weights that sum to 1. Together the experts may see at most $N K$ rows.


# %%
def mixture_of(x: Tensor, logits: Tensor, experts: list, top_k: int) -> Tensor:
    """x [N, D], logits [N, E] -> [N, D]."""


check("08.mixture", mixture_of)

# %% [markdown]
# **2. Which choices find room.** Every expert takes `capacity` rows of each sequence; earlier positions first, and of
# one token the better choice first (which decides nothing: it stands in an expert's queue at most once).


# %%
def kept(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """experts [B, T, K] int64, best choice first -> [B, T, K] bool."""


check("08.kept", kept)

# %% [markdown]
# **3. An auxiliary loss on two ranks.** Return this rank's part of the loss of the whole pool: the ranks' gradients
# are going to be *summed*. `all_reduce(x, axis)` (of `picotron_mini.collectives`) has no gradient. At most
# $8E + 8$ bytes may be sent.


# %%
def my_part(p: Tensor, experts: Tensor, axis: object) -> Tensor:
    """p [n, E] with a gradient, experts [n, K] of this rank's n tokens -> a scalar."""


check("08.auxiliary", my_part)

# %% [markdown]
# **4. The way back.** Forward, this rank sent `sends[j]` rows to rank j and got `receives[j]` from it. You hold the
# gradient of what came. Return the gradient of what was sent. `trade(x, axis, sends, receives)` is the exchange.


# %%
def way_back(gradient: Tensor, axis: object, sends: list[int], receives: list[int], trade: object) -> Tensor:
    """gradient [sum(receives), D] -> [sum(sends), D]."""


check("08.way_back", way_back)

# %% [markdown]
# **5. Dispatch with a budget.** Take tokens to the ranks of their experts and back, forward only. Each token may travel
# once to each rank that holds one of its experts. `tell(sends, axis)` returns `receives`; `trade` as above;
# `run(rows, local, weights)` applies this rank's experts to rows [R, D], weighs and adds (`local` [R, K]: the number of
# the expert on this rank, -1 if it is not here).


# %%
def my_dispatch(x: Tensor, experts: Tensor, weights: Tensor, axis: object, held: int, tools: object) -> Tensor:
    """x [N, D], experts and weights [N, K]; expert e is number e % held on rank e // held; -> [N, D].

    tools.tell, tools.trade, tools.run as above.
    """


check("08.dispatch", my_dispatch)

# %% [markdown]
# ## From the bug museum
#
# Seven exhibits hang in this room. Here is one that crashes nothing, and leaves the loss of the first step right to
# the last digit:

# %% tags=["nbval-ignore-output"]
show("08.experts_summed_over_dp")

# %%
broken = run("08.experts_summed_over_dp", "dp=2,ep=2", optimizers=("sgd",))
print(f"equal to one device: {broken.ok}; first to diverge: {broken.first_divergence.split(',')[0]}")
assert not broken.ok

# %% [markdown]
# And one for you.

# %% tags=["nbval-ignore-output"]
show("08.weights_without_gradient")

# %% [markdown]
# Write a test that notices: a function of the mesh that runs on both ranks of `dp=2,ep=2`, sends some tokens through
# `ExpertDispatch(mesh["ep"], ...)`, and asserts something about a gradient. It must pass on the sound library.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("08.weights_without_gradient", my_test)

# %% [markdown]
# More of this room: `08.swapped_splits`, `08.experts_of_the_first_rank`, `08.router_gradient_lost`,
# `08.auxiliary_loss_of_nobody`, `08.balance_of_each_rank`. Which of them would a test on two ranks with equal loads
# miss? (`08.swapped_splits`: equal lists are the same when swapped.)
#
# ## On GPUs
#
# The same files run on NCCL, with one grouped product in place of the loop:
#
# ```console
# $ picotron-mini verify dp=2,ep=2 --device cuda --dtype float32
# $ picotron-mini bench --preset bench-moe --layout dp=2,ep=2
# $ picotron-mini bench --preset bench-moe --layout dp=2,ep=2 --dispatch-parts 2
# $ picotron-mini train --preset moe-tiny
# $ torchrun --nproc-per-node 8 --no-python picotron-mini train --preset moe-tiny --layout dp=8,ep=8
# ```
#
# `train --preset moe-tiny` runs on the CPU too, in 3 to 5 minutes on two free cores: 8 experts, top-2, on real text.
# Its report draws the load of every layer over time and says what each expert gets.
#
# This chapter's closing run, on two H200s with torch 2.11. The model is as tiny as on your laptop; the point is that
# the same files run on NCCL:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset moe-tiny dp=2,ep=2 --steps 60
# step 60/60  loss 2.872  validation 2.527 (3.646 bits per byte)  72,682 tokens/s  memory 239 MiB  0:00 left
# ```
#
# What a GPU really does with experts takes a model of 5.4 billion parameters: on the same two GPUs 15,833 tokens/s per
# GPU with an all_to_all, for whose sizes the host waits, and 29,621 with `--dispatch allgather --cuda-graph`
# ([write-up](../summary/08_moe.md#measured-performance)).
#
# ## What to read next
#
# - [The write-up](../summary/08_moe.md): decisions, what was dropped, limits.
# - [Questions](../interview_questions/08_moe.md), from warm-up to design, with proofs that run.
# - *Outrageously Large Neural Networks* (arXiv 1701.06538), *GShard* (arXiv 2006.16668), *Switch Transformers* (arXiv
#   2101.03961): where sparse layers, expert parallelism and capacity come from.
# - *Mixtral of Experts* (arXiv 2401.04088), *DeepSeekMoE* (arXiv 2401.06066), *DeepSeek-V3* (arXiv 2412.19437).
# - *Auxiliary-Loss-Free Load Balancing* (arXiv 2408.15664) and *Demons in the Detail* (arXiv 2501.11873): balance.
