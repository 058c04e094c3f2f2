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
# # 03 Data parallel
#
# Data parallelism is the oldest way to train on many devices, and the one that all others are combined with. Every
# rank has the whole model and a share of the batch. After this lesson you can
#
# - say which loss each rank must differentiate, and why the gradients are *added* and never averaged;
# - write the naive version in five lines, and say what it costs in messages, bytes and idle time;
# - explain buckets: which gradients share one, in which order they are sent, and what would deadlock;
# - prove that a data-parallel run computes what one device computes, to the last digits of float64;
# - predict the bytes a rank sends in a step, to the byte;
# - recognise two bugs of this technique, neither of which crashes anything.
#
# You need chapter 00 (ranks and collectives). All cells run here, on real processes on your CPU; the same library
# files run on GPUs. Reading and running takes 30 to 60 minutes, with the exercises longer.

# %%
import inspect
import time

import torch
from torch import Tensor, nn

from picotron_mini.collectives import all_reduce, ledger
from picotron_mini.config import MeshShape, ModelConfig, RunConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.museum import MODEL, TRAIN, kill, run, show
from picotron_mini.course.picture import GREY, drawing, figure, picture
from picotron_mini.data.loader import data_rows
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import GPT, IGNORE, init_weights
from picotron_mini.parallel import data
from picotron_mini.parallel.data import GradientBuckets, all_reduce_gradients, broadcast_parameters
from picotron_mini.verify import verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem, and its price
#
# Training costs about $6$ floating-point operations for each weight and each token: 2 for the forward pass, 4 for the
# backward pass. A GPU does a fixed number of them a second. Take 8 billion weights, a trillion tokens, and an H100 SXM:
# 989.5 TFLOP/s in dense bf16 by its data sheet, of which a good program gets, let us assume, 40 percent.

# %%
weights, tokens = 8e9, 1e12
flops = 6 * weights * tokens
seconds = flops / (989.5e12 * 0.40)
print(f"{flops:.1e} operations: {seconds / 86400 / 365:.1f} years on one GPU")
for gpus in (64, 1024):
    print(f"{seconds / 86400 / gpus:6.1f} days on {gpus} GPUs, if nothing were lost")
print(f"{4 * weights / 1e9:.0f} GB of float32 gradients to add up over all ranks, at every step")

# %% [markdown]
# The line of 1024 GPUs and the last line are the chapter. Dividing the batch divides the years. The price is the last
# line: every step, the ranks must agree on one gradient, and it is as large as the model. How often is it sent, in how
# many pieces, and what does the processor do meanwhile?
#
# ## What each rank differentiates
#
# The loss of a batch is a mean over its target tokens. Write it as a sum, divided by one number $N$, the targets of
# the *whole* batch over all ranks. A sum splits over ranks $r$, and so does its gradient:
#
# $$\frac{\partial L}{\partial W} = \sum_r \frac{\partial L_r}{\partial W}$$
#
# $$L_r = \frac{1}{N} \sum_{t \in T_r} \ell_t$$
#
# where $T_r$ are the targets of rank $r$ and $\ell_t$ is the cross-entropy of one.
# So each rank divides by the global $N$, and the reduction is a SUM. There is no averaging factor that could be
# wrong. Let us build a batch on which the difference shows: a small Llama-style model, 8 sequences, and in sequence
# $i$ only the first $2i$ targets count (as with padding, or with prompts that are not trained on).

# %%
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


def make_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    init_weights(model, seed)
    return model.double()  # float64: only mistakes are larger than 1e-12


def make_batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, [8, 16] each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (8, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    counted = 2 * torch.arange(1, 9)[:, None]  # 2, 4, ..., 16 targets
    targets[torch.arange(16) >= counted] = IGNORE
    return tokens[:, :-1], targets


def loss_sum(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return model.loss(model(tokens), targets)  # a SUM over the targets


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference in any gradient, relative to that gradient's largest value."""
    assert set(got) == set(want)
    return max(((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want)


# %% [markdown]
# One device, the whole batch: this is the truth of the chapter.

# %%
model = make_model()
tokens, targets = make_batch()
N = int((targets != IGNORE).sum())
(loss_sum(model, tokens, targets) / N).backward()
truth = gradients(model)
print(f"{len(truth)} gradients, {sum(g.numel() for g in truth.values()):,} numbers, {N} targets")
assert sum(range(2, 17, 2)) == N

# %% [markdown]
# Now four ranks. Which rows a rank gets is a function of the library, `data_rows`. Below, each rank takes the mean
# over *its own* tokens and the ranks' gradients are averaged, which is what most people write first.

# %%
RANKS = 4


def my_rows(dp: Axis, micro_batch: int = 0, micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    tokens, targets = make_batch()
    rows = data_rows(len(tokens), dp.size, dp.index, micro_batches, micro_batch)
    return tokens[rows], targets[rows]


def average_of_averages() -> dict[str, Tensor]:
    dp = Mesh.build(MeshShape(dp=RANKS))["dp"]
    model = make_model()
    tokens, targets = my_rows(dp)
    mine = (targets != IGNORE).sum()
    print(f"{mine} targets")
    (loss_sum(model, tokens, targets) / mine).backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, dp) / dp.size
    return gradients(model)


wrong = error(launch(average_of_averages, world_size=RANKS)[0], truth)
print(f"relative error of the worst gradient: {wrong:.1f}")
assert wrong > 0.05

# %% [markdown]
# Nothing crashed, and a loss computed this way falls nicely. It is just another training run than the one you
# would have had on one device: a token of rank 0 weighs five times as much as one of rank 3. On a batch where all
# targets count the error is zero, and so the tests of many projects never see it.
#
# ## The naive way
#
# The right version in the simplest form, from the library. Two functions:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(broadcast_parameters))
print(inspect.getsource(all_reduce_gradients))

# %% [markdown]
# The ranks must also *start* from one set of weights. Here they start from four different seeds on purpose, and the
# broadcast makes them equal. The ledger counts each byte that a rank hands to `torch.distributed`.


# %%
def naive() -> tuple[dict[str, Tensor], dict[tuple[str, str], int]]:
    dp = Mesh.build(MeshShape(dp=RANKS))["dp"]
    model = make_model(seed=dp.index)
    first = model.layers["0"].mlp.up.weight
    print(f"before: {first[0, 0].item():+.4f}", end="   ")
    broadcast_parameters(model, dp)
    print(f"after: {first[0, 0].item():+.4f}")

    tokens, targets = my_rows(dp)
    N = all_reduce((targets != IGNORE).sum(), dp)  # of all ranks
    (loss_sum(model, tokens, targets) / N).backward()
    with ledger.recording() as sent:
        all_reduce_gradients(model.parameters(), dp)
    return gradients(model), dict(sent)


results = launch(naive, world_size=RANKS)
for grads, _ in results:
    assert error(grads, truth) < 1e-12
print(f"all ranks have the gradient of one device; rank 0 sent {results[0][1]['dp', 'all_reduce']:,} bytes")
assert results[0][1]["dp", "all_reduce"] == 8 * sum(g.numel() for g in truth.values())

# %% [markdown]
# It is right. What does it cost?
#
# 1. **Many small messages.** One for each parameter, and a norm's weight is 32 numbers. A message takes about
#    *latency + size / bandwidth*, so below some size its price is all latency.
# 2. **Idle time.** The network has nothing to do during backward, and the processor nothing during the sums.
#
# The first is easy to see. We time an `all_reduce` between two ranks, for messages from 64 bytes to 4 MB. (Timings
# differ from machine to machine, so this picture is not compared when the notebook is tested.)


# %%
def time_all_reduce(sizes: list[int]) -> list[float]:
    """Seconds for one all_reduce of each size in bytes, the best of several."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    best = [float("inf")] * len(sizes)
    for _ in range(30):  # round after round, so that a disturbance does not hit one size only
        for i, size in enumerate(sizes):
            x = torch.ones(size // 4)
            start = time.perf_counter()
            data.all_reduce_async(x, dp).wait()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


# %% tags=["nbval-ignore-output"]
sizes = [2**k for k in range(6, 23)]
times = launch(time_all_reduce, sizes, world_size=2)[0]
with drawing():
    fig = figure(6.5, 2.8)
    ax = fig.subplots()
    ax.loglog(sizes, [1e6 * t for t in times], "o-", color="#4c8fd6", markersize=4)
    ax.axvline(4 * CONFIG.hidden_size, color=GREY, linestyle=":")
    ax.text(4.6 * CONFIG.hidden_size, 1e6 * max(times) / 2, "a norm's\ngradient", va="top")
    ax.set_xlabel("bytes in one message")
    ax.set_ylabel("microseconds")
picture(
    fig,
    "Time of one all_reduce between two processes against message size, both axes logarithmic: flat for small "
    "messages, where latency is all, then rising in proportion to the size.",
)

# %% [markdown]
# The flat part on the left is latency: the first thousands of bytes are free once you pay for the message. On GPUs
# the picture has the same shape with other numbers.
#
# ## Buckets, started during backward
#
# Both costs have one cure. Backward goes through the layers from last to first, so the last layer's gradients are
# final long before the first layer's. Put parameters into *buckets* in that order. As soon as a bucket is complete,
# start its sum, and compute on:
#
#     backward     layer 4 | layer 3 | layer 2 | layer 1 |
#     all_reduce           | bucket 0          | bucket 1| bucket 2 |  <- only this tail is waited for
#
# Bucket 0 holds layer 4, bucket 1 layers 3 and 2, and bucket 2 layer 1: none starts before its last gradient exists.
#
# Here is the library's whole implementation. It has four ideas to look for: where the hook puts the gradient, when the
# buffer has another dtype than the weights, what `while self.next ...` is for, and what the flags say.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(GradientBuckets))

# %% [markdown]
# The hook runs inside `loss.backward()`, each time autograd has finished one parameter's gradient. It copies the
# gradient into its place in a flat buffer (or finds it there already: `p.grad` *is* a view of the buffer). When the
# last parameter of the next bucket arrives, `_start` hands the buffer to an asynchronous all_reduce. `finish` waits.
#
# Run it with three bucket sizes. The gradient is that of one device each time; what changes is the number of
# messages.


# %%
def bucketed(bucket_bytes: float, micro_batches: int = 1) -> tuple[dict[str, Tensor], int, int]:
    """The gradients, the number of messages, and the bytes of one step."""
    dp = Mesh.build(MeshShape(dp=RANKS))["dp"]
    model = make_model()
    buckets = GradientBuckets(model.parameters(), dp, bucket_bytes)
    targets = sum((my_rows(dp, m, micro_batches)[1] != IGNORE).sum() for m in range(micro_batches))
    N = all_reduce(targets, dp)
    with ledger.recording() as sent:
        for m in range(micro_batches):
            if m == micro_batches - 1:
                buckets.arm()  # from here on, gradients are final: sums may start
            (loss_sum(model, *my_rows(dp, m, micro_batches)) / N).backward()
        buckets.finish()
    return gradients(model), len(buckets.buckets), sent["dp", "all_reduce"]


for size in (1, 40_000, 25 * 2**20):
    grads, messages, sent = launch(bucketed, size, world_size=RANKS)[0]
    assert error(grads, truth) < 1e-12
    print(f"buckets of {size:>10,} bytes: {messages:>2} messages, {sent:,} bytes, gradient equal")

# %% [markdown]
# ### Many micro-batches, one reduction
#
# When the batch does not fit in memory, a rank runs several micro-batches and lets their gradients add up. Only the
# last backward may start reductions: before it, no gradient is final. That is what `arm` says (PyTorch's DDP spells
# it the other way round, with `no_sync()` around the others). The bytes do not grow with the number of micro-batches:

# %%
for micro_batches in (1, 2):
    grads, _, sent = launch(bucketed, 40_000, micro_batches, world_size=RANKS)[0]
    assert error(grads, truth) < 1e-12
    print(f"micro-batches: {micro_batches}   bytes: {sent:,}")

# %% [markdown]
# ### All ranks in one order
#
# A collective has no label. The first all_reduce that rank 0 starts is matched with the first that rank 1 starts.
# If gradients become ready in different orders on different ranks (an expert that one rank does not use, a branch),
# and each rank starts what is ready, then bucket 2 of one is added to bucket 0 of another. With equal sizes that is
# silent garbage, with others an error or a hang. So the loop starts bucket $k$ only after bucket $k-1$.
#
# ### Gradients that do not exist
#
# What if a parameter got a gradient on some ranks only, or on none? The sum must reach all ranks in the first case.
# In the second the gradient must stay `None`: AdamW leaves a `None` alone, and moves a weight whose gradient is zero
# (by its momentum and weight decay). So each bucket carries one number more for each parameter, 1 where there is a
# gradient; after the sum it tells how many ranks had one.


# %%
class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.on_rank_1, self.never = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, rank: int) -> Tensor:
        return (self.always + (self.on_rank_1 if rank == 1 else 0)).sum()


def odd_one_out() -> dict[str, list[float] | None]:
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    model = Branches()
    buckets = GradientBuckets(model.parameters(), dp)
    buckets.arm()
    model(dp.index).backward()
    buckets.finish()
    return {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}


first, second = launch(odd_one_out, world_size=2)
print(first)
assert first == second == {"always": [2.0, 2.0], "on_rank_1": [1.0, 1.0], "never": None}

# %% [markdown]
# ## Proof
#
# So far we compared gradients of one step. `verify` does it properly: some steps of training on the layout and on
# one device, by a reference that imports the model and nothing else of the library; loss, every gradient, the global
# gradient norm and the weights; with SGD (which shows a wrong scale) and AdamW (which hides it from the weights). On
# the command line it is `picotron-mini verify dp=4`.

# %%
report = verify("dp=4", MODEL, TRAIN)
for difference in report.differences:
    assert difference.error < 1e-12
    print(f"{difference.quantity:14} equal to one device within 1e-12")
assert report.ok and report.first_divergence is None

# %% [markdown]
# ## What it costs
#
# The unit of this course is the *payload*: the bytes that a rank hands to `torch.distributed`. With $P$ weights in
# $k$ parameters and $g$ bytes for an element of a sum ($g$ is 4 at least: gradients of bf16 weights are added in
# float32), one step of data parallelism is
#
# $$g \, (P + k)$$
#
# bytes of all_reduce, for any number of ranks and micro-batches, plus 8 to agree on $N$. The formula sees
# nothing of the run: its code does not import the collectives. The ledger counts during the run. The two must agree to
# the byte.

# %%
settings = resolve(RunConfig(layout="dp=4", model=MODEL, train=TRAIN))
whole = GPT(settings.model)
P, k = sum(p.numel() for p in whole.parameters()), len(list(whole.parameters()))
print(f"formula    8 * ({P:,} + {k}) + 8 = {8 * (P + k) + 8:,}")
print(f"predicted  {report.bytes_predicted['dp all_reduce']:,}")
print(f"counted    {report.bytes_counted['dp all_reduce']:,}")
assert 8 * (P + k) + 8 == report.bytes_predicted["dp all_reduce"] == report.bytes_counted["dp all_reduce"]
assert not report.bytes_problems

# %% [markdown]
# On the wire, a ring sends $2\frac{n-1}{n}$ times the payload from each of $n$ ranks (chapter 00): once with 2 ranks,
# 1.5 times with 4, and never twice. So the bytes hardly depend on the number of ranks. For a fixed batch that limits
# scaling: each rank has less to compute and as much to send, unless the batch grows too.
#
# What it does depend on is how often you pay. Two ranks run the same global batch in 1, 2 and 4 micro-batches, once
# with a reduction after each and once as above, and the ledger counts.


# %%
def paid(micro_batches: int, after_each: bool) -> int:
    """Bytes of one step."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    model = make_model()
    buckets = GradientBuckets(model.parameters(), dp)
    with ledger.recording() as sent:
        for m in range(micro_batches):
            if after_each or m == micro_batches - 1:
                buckets.arm()
            loss_sum(model, *my_rows(dp, m, micro_batches)).backward()
            if after_each or m == micro_batches - 1:
                buckets.finish()
                buckets.reset()
    return sent["dp", "all_reduce"]


counts = [1, 2, 4]
each, once = ([launch(paid, n, after_each, world_size=2)[0] for n in counts] for after_each in (True, False))
print(f"after each: {each}\nonce a step: {once}")
assert each == [n * each[0] for n in counts] and once == each[:1] * 3

# %% tags=["nbval-ignore-output"]
with drawing():
    fig = figure(6.5, 2.4)
    ax = fig.subplots()
    ax.bar([i - 0.18 for i in range(3)], [n / 1e3 for n in each], 0.34, color="#d9822b", label="after each micro-batch")
    ax.bar([i + 0.18 for i in range(3)], [n / 1e3 for n in once], 0.34, color="#4c8fd6", label="once a step")
    ax.set_xticks(range(3), counts)
    ax.set_xlabel("micro-batches a step")
    ax.set_ylabel("payload, kB a rank")
    ax.legend()
picture(
    fig,
    "Bars of the bytes counted in one step with 1, 2 and 4 micro-batches: reducing after each grows in proportion, "
    "reducing once a step stays level.",
)

# %% [markdown]
# ## See it overlap
#
# We record one step on two ranks: when each gradient became ready, and when each sum started and ended. First the
# naive way, then buckets. The model is larger, so that there is something to see.


# %%
def traced(bucket_bytes: float | None) -> tuple[list[float], list[tuple[float, float]]]:
    """Seconds since backward began: when gradients were ready, and (start, end) of each sum. None: the naive way."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    config = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=32
    )
    model = GPT(config)
    init_weights(model, 0)
    tokens = torch.randint(config.vocab_size, (4, 129), generator=torch.Generator().manual_seed(dp.index))
    sums: list[tuple[float, float]] = []
    start_sum = data.all_reduce_async

    def watched(buffer: Tensor, axis: Axis) -> object:
        began = time.perf_counter()
        work = start_sum(buffer, axis)
        # gloo's own thread calls this at the moment the sum is done, while backward goes on here
        work.get_future().add_done_callback(lambda _: sums.append((began, time.perf_counter())))
        return work

    data.all_reduce_async = watched
    buckets = GradientBuckets(model.parameters(), dp, bucket_bytes) if bucket_bytes else None
    ready: list[float] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: ready.append(time.perf_counter()))
    for _ in range(3):  # the last one counts: the first also allocates memory and opens connections
        model.zero_grad()
        sums.clear()
        ready.clear()
        if buckets is not None:
            buckets.reset()
            buckets.arm()
        loss = loss_sum(model, tokens[:, :-1], tokens[:, 1:])
        began = time.perf_counter()
        loss.backward()
        if buckets is not None:
            buckets.finish()
        else:
            all_reduce_gradients(model.parameters(), dp)
    return [t - began for t in ready], sorted((a - began, b - began) for a, b in sums)


# %% tags=["nbval-ignore-output"]
ways = {"naive": None, "buckets of 2 MiB": 2 * 2**20}
traces = {name: launch(traced, size, world_size=2)[0] for name, size in ways.items()}
with drawing():
    fig = figure(6.5, 3.6)
    for ax, (name, (ready, sums)) in zip(fig.subplots(2, sharex=True), traces.items(), strict=True):
        ax.broken_barh([(0, 1e3 * max(ready))], (1.1, 0.8), color="#4c8fd6")
        ax.vlines([1e3 * t for t in ready], 1.1, 1.9, color="white", linewidth=0.5)
        ax.broken_barh([(1e3 * a, 1e3 * (b - a)) for a, b in sums], (0.1, 0.8), color="#d9822b", linewidth=0)
        ax.set_yticks([0.5, 1.5], ["sums", "backward"])
        ax.set_title(f"{name}: {len(sums)} messages", loc="left", fontsize=9)
    ax.set_xlabel("milliseconds since backward began; a white line is a gradient that became ready")
picture(
    fig,
    "Two timelines of one step. Naive: backward first, then a row of many short sums. Buckets: a few longer sums lie "
    "under backward and only the last one ends after it.",
)

# %% [markdown]
# On this machine "network" and "processor" are the same two cores, so the sums slow backward down while they run
# beside it; on GPUs the links are separate, and NCCL's kernels take some of the multiprocessors from backward.
# The structure is the same: naive pays backward *plus* sums, buckets pay backward plus the last bucket.
#
# That tail says how to choose the size. Small buckets: the tail is short, and there are many latencies. Large ones:
# few messages, and the last bucket, which holds the first layers and the embedding, is long. PyTorch's default is
# 25 MiB, and so is ours (`--bucket-mb`).
#
# ## The same from PyTorch
#
# `torch.nn.parallel.DistributedDataParallel` is this technique, in C++, with more cases handled. It *averages* over
# ranks. With our loss (divided by the global $N$) its gradient is therefore ours, divided by the number of ranks:


# %%
def with_ddp() -> dict[str, Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    dp = Mesh.build(MeshShape(dp=2))["dp"]
    model = make_model()
    wrapped = DistributedDataParallel(model)
    tokens, targets = my_rows(dp)
    N = all_reduce((targets != IGNORE).sum(), dp)
    # through the wrapper: it is DDP's forward that prepares its hooks
    hidden = wrapped(tokens)
    (model.loss(hidden, targets) / N).backward()
    return gradients(model)


theirs = launch(with_ddp, world_size=2)[0]
ratio = {name: (truth[name].norm() / g.norm()).item() for name, g in theirs.items()}
print(f"truth / DDP: between {min(ratio.values()):.6f} and {max(ratio.values()):.6f}")
assert error({name: 2 * g for name, g in theirs.items()}, truth) < 1e-12

# %% [markdown]
# So our loss needs a factor for DDP: the number of ranks. A mean over local tokens needs none, and has the error of the
# first experiment wherever ranks hold different numbers of targets.
#
# ## Exercises
#
# Fill in a body and run the cell. The check runs your function on real ranks, and answers with one line. If it fails,
# the line names the misconception. `solution("03.buckets")` (from `picotron_mini.course.exercises`) prints an answer,
# and `picotron-mini progress` lists what you have done.
#
# **1. The loss that each rank differentiates.** Two ranks hold different numbers of targets. Return what this rank
# calls `.backward()` on, so that the sum of the gradients is that of the mean over all targets.


# %%
def local_loss(losses: Tensor, mask: Tensor, axis: Axis) -> Tensor:
    """losses [T], one a token; mask [T], which of them count. `all_reduce(x, axis)` returns the sum over ranks."""


check("03.local_loss", local_loss)

# %% [markdown]
# **2. The naive reduction.** Add up the gradients of all ranks, in place. Some parameters are frozen (their `.grad`
# is `None` on every rank), and a tied one is listed twice.


# %%
def reduce_gradients(parameters: list[nn.Parameter], axis: Axis) -> None: ...


check("03.reduce_gradients", reduce_gradients)

# %% [markdown]
# **3. Which gradients travel together.** `sizes` are the elements of each parameter in the order of the forward pass.
# Return lists of indices: buckets that are complete as early in backward as possible. A bucket is closed once it has
# reached `limit` elements.


# %%
def buckets(sizes: list[int], limit: int) -> list[list[int]]: ...


check("03.buckets", buckets)

# %% [markdown]
# **4. When a reduction may start.** Buckets become complete in another order on each rank; `completed` is this
# rank's. For each entry say which reductions start at that moment (often none), so that no two ranks disagree and
# none waits longer than it must.


# %%
def start_order(completed: list[int]) -> list[list[int]]: ...


check("03.start_order", start_order)

# %% [markdown]
# **5. The price, to the byte.** How many bytes does one rank hand to `all_reduce` in a step of `GradientBuckets`?
# `itemsize` is that of the weights: 2 for bf16. The 8 bytes for the number of targets do not count here:
# `GradientBuckets` does not send them. The ledger of a real run decides.


# %%
def step_bytes(sizes: list[int], itemsize: int, micro_batches: int, ranks: int) -> int: ...


check("03.step_bytes", step_bytes)

# %% [markdown]
# ## From the bug museum
#
# Every exhibit is a real bug, as a change to this library that is made inside the ranks only. This one was found in
# huggingface/picotron (commit 59714b1).

# %% tags=["nbval-ignore-output"]
show("03.parameter_reduced")

# %% [markdown]
# Does `verify` notice? It is asked on two ranks, with the bug in the library:

# %%
broken = run("03.parameter_reduced", "dp=2", optimizers=("sgd",))
print(f"equal to one device: {broken.ok}; first to diverge: {broken.first_divergence.split(',')[0]}")
assert not broken.ok

# %% [markdown]
# And would *your* test have noticed? Write one: a function of the mesh that is called on every rank, uses
# `GradientBuckets` and asserts something. It must pass on the sound library and fail with the bug in it.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("03.parameter_reduced", my_test)

# %% [markdown]
# More of this room: `03.average_of_averages`, `03.accumulation_lost`, `03.reduced_too_early`,
# `03.norm_counts_copies`. The same `my_test` does not catch them all; what would?
#
# ## On GPUs
#
# The same files run on NCCL; nothing is written twice. The library starts its own ranks:
#
# ```console
# $ picotron-mini verify dp=2 --device cuda --dtype float32    # equal to one device, on GPUs
# $ picotron-mini bench --preset bench --layout dp=2           # tokens per second, against --layout dp=1
# ```
#
# or joins those that `torchrun` made, on one machine or on several:
#
# ```console
# $ torchrun --nproc-per-node 2 --no-python picotron-mini train --preset h100x2
# ```
#
# What changes: NCCL runs the sums on a CUDA stream of its own, beside the stream of backward. `all_reduce_async`
# makes that stream wait until the bucket is filled, and `finish` makes the main stream wait for the sums, without
# stopping the processor. The [write-up](../summary/03_data_parallel.md) has the CPU timings; the speed on GPUs is not
# measured yet.
#
# ## What to read next
#
# - The write-up of this chapter: decisions, what was tried and dropped, measurements.
# - [Questions](../interview_questions/03_data_parallel.md), from warm-up to design, with proofs that run.
# - *PyTorch Distributed: Experiences on Accelerating Data Parallel Training* (arXiv 2006.15704): DDP's own paper.
# - *ZeRO* (arXiv 1910.02054): every rank keeps all of the weights and of the optimizer's state here. It need not.
# - The next chapters cut the model where this one cut the batch: tensor parallelism (04) and pipelines (05).
