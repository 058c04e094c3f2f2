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
# - say what each stage of ZeRO cuts, what that saves in memory, and what it costs in bytes;
# - recognise bugs of this technique, none of which crashes anything.
#
# You need chapter 00 (ranks and collectives). All cells run here, on real processes on your CPU; the same library
# files run on GPUs. Reading and running takes about an hour, with the exercises longer.

# %%
import inspect
import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from picotron_mini.collectives import (
    SymmetricMemory,
    all_gather,
    all_gather_several,
    all_reduce,
    ledger,
    reduce_scatter,
)
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.figures.picture import drawing, figure, picture
from picotron_mini.course.figures.zero import Passage, Watched, draw_passages, draw_states, most_at_once
from picotron_mini.course.instruments.kept import kept
from picotron_mini.course.museum import MODEL, TRAIN, exhibit, kill, run, show
from picotron_mini.data.loader import data_rows
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh, coordinates
from picotron_mini.model.gpt import GPT, IGNORE, init_weights
from picotron_mini.parallel import data
from picotron_mini.parallel.buckets import bucket
from picotron_mini.parallel.data import GradientBuckets, all_reduce_gradients, broadcast_parameters
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.parallelize import layout_of
from picotron_mini.parallel.zero import ShardedGradients
from picotron_mini.parallel.zero3 import ShardedWeights, head_with_loss
from picotron_mini.training.sharded_optimizer import ShardedOptimizer
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
# 1. **Many small messages.** One for each parameter, and a norm's weight is 32 numbers. A message of $M$ bytes takes
#    $\alpha + \beta M$ (chapter 00), so below some size its price is all latency.
# 2. **Idle time.** The network has nothing to do during backward, and the processor nothing during the sums.
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
assert sent - results[0][1]["dp", "all_reduce"] == 8 * len(truth) == 232

# %% [markdown]
# The bytes are those of the naive way and 232 more, whatever the buckets: 8 for each of the 29 parameters. That is the
# *flag*, one more number for a parameter in its bucket. What it is for comes three headings on.
#
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
# In chapter 00 two ranks reduced the same two tensors in another order, and nothing complained. Here it could happen by
# itself: gradients may become ready in different orders on different ranks (an expert that one rank does not use, a
# branch). If each rank started what is ready, bucket 2 of one would be added to bucket 0 of another. So the loop starts
# bucket $k$ only after bucket $k-1$.
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
# A ring makes at most twice that of it on each rank's wire (chapter 00), whatever the number of ranks. For a fixed
# batch that limits scaling: each rank has less to compute and as much to send, unless the batch grows too.
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
# What should one see? Take a larger model, of 4.95 million weights, and let backward take 20 ms, in proportion to the
# weights, over a link with $\alpha$ = 0.2 ms and $1/\beta$ = 2 GB/s: assumptions, of a network that is slow beside its
# processors. The library says which parameters share a bucket. The rest is arithmetic: a sum starts when its bucket is
# complete and the one before it is through.

# %%
LARGER = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=32
)
WAYS = {"naive": None, "buckets of 2 MiB": 2 * 2**20}


def simulated(bucket_bytes: float | None) -> tuple[list[float], list[tuple[float, float]]]:
    """Milliseconds: when gradients are ready, and (start, end) of each sum. None: the naive way."""
    sizes = [p.numel() for p in reversed(list(GPT(LARGER).parameters()))]  # backward comes from the end
    ready = [20 * sum(sizes[: i + 1]) / sum(sizes) for i in range(len(sizes))]
    groups = bucket(sizes, 4, bucket_bytes) if bucket_bytes else [[i] for i in range(len(sizes))]
    sums, free = [], 0.0
    for group in groups:
        start = max(free, ready[group[-1]] if bucket_bytes else ready[-1])
        free = start + 0.2 + sum(4 * sizes[i] for i in group) / 2e6  # 2 GB/s are 2e6 bytes a millisecond
        sums.append((start, free))
    return ready, sums


def draw(traces: dict[str, tuple[list[float], list[tuple[float, float]]]], words: str):
    """Backward above, and below it a lane for each message."""
    with drawing():
        fig = figure(6.5, 4.2)
        for ax, (name, (ready, sums)) in zip(fig.subplots(2, sharex=True), traces.items(), strict=True):
            ax.broken_barh([(0, max(ready))], (1.1, 0.3), color="#4c8fd6")
            ax.vlines(ready, 1.1, 1.4, color="white", linewidth=0.5)
            for lane, (start, end) in enumerate(sums):
                top = 1 - lane / len(sums)
                ax.broken_barh(
                    [(start, end - start)], (top - 1 / len(sums), 1 / len(sums)), color="#d9822b", linewidth=0
                )
            ax.set_yticks([0.5, 1.25], ["sums", "backward"])
            ax.set_title(f"{name}: {len(sums)} messages, {sums[-1][1]:.0f} ms", loc="left", fontsize=9)
        ax.set_xlabel("milliseconds since backward began; a white line is a gradient that is ready")
    return picture(fig, words)


expected = {name: simulated(size) for name, size in WAYS.items()}
for name, (ready, sums) in expected.items():
    print(f"{name:16} {len(sums):2} messages, the last ends {sums[-1][1] - ready[-1]:4.1f} ms after backward")
assert expected["naive"][1][0][0] == 20 and expected["buckets of 2 MiB"][1][-1][1] < 25

# %% tags=["nbval-ignore-output"]
draw(
    expected,
    "Two simulated timelines of one step, with a lane for each message. Naive: backward first, then a long staircase "
    "of sums. Buckets: a short staircase that lies under backward, and only its last step ends after it.",
)

# %% [markdown]
# Now a real step on two ranks: when each gradient became ready, and when each sum started and ended.


# %%
def traced(bucket_bytes: float | None) -> tuple[list[float], list[tuple[float, float]]]:
    """Milliseconds since backward began: as `simulated`, and measured."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    model = GPT(LARGER)
    init_weights(model, 0)
    tokens = torch.randint(LARGER.vocab_size, (4, 129), generator=torch.Generator().manual_seed(dp.index))
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
    rounds = []
    for _ in range(6):  # the best one counts: the first also allocates memory and opens connections
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
        time.sleep(0.01)  # the last callback may come a moment later
        rounds.append(
            ([1e3 * (t - began) for t in ready], sorted((1e3 * (a - began), 1e3 * (b - began)) for a, b in sums))
        )
    return min(rounds, key=lambda one: one[1][-1][1])


# %% tags=["nbval-ignore-output"]
draw(
    {name: launch(traced, size, world_size=2)[0] for name, size in WAYS.items()},
    "The same two timelines, measured on two processes.",
)

# %% [markdown]
# What any machine shows is the order: the naive sums start when backward has ended, and the first buckets do not wait
# for that. How much is gained it need not show. On a CPU "network" and "processor" are the same cores, so the sums slow
# backward down while they run beside it; on GPUs the links are separate, and NCCL's kernels take some of the
# multiprocessors from backward.
#
# The tail says how to choose the size. Small buckets: the tail is short, and there are many latencies. Large ones:
# few messages, and the last bucket, which holds the first layers and the embedding, is long. PyTorch's default is
# 25 MiB (`bucket_cap_mb` in the documentation of DDP), and so is ours (`--bucket-mb`).
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
# ## Stop keeping copies: ZeRO
#
# The gradients were the price in bytes. There is one in memory, and it is the larger one for a large model. Every rank
# keeps, for each weight: the bf16 weight (2 bytes), a float32 gradient (4), a float32 master from which the weight is
# rounded (4), and AdamW's two moments (8). That is 18 bytes, 144 GB for 8 billion weights, and an H100 has 80. More
# ranks do not help: they keep *the same* 144 GB, and all of them compute the same update.
#
# An all_reduce is a reduce_scatter and an all_gather (chapter 00). Between the two each rank has the whole sum of an
# n-th of the gradient. Put the optimizer there:
#
#     plain   gradient --reduce_scatter--> part --all_gather--> gradient       every rank: update all weights
#     ZeRO    gradient --reduce_scatter--> part: update the part of the weights --all_gather--> weights
#
# By hand, for all parameters as one vector, with AdamW:


# %%
def flat(tensors: list[Tensor], ranks: int) -> Tensor:
    """All of them behind each other, padded so that `ranks` divides the length."""
    vector = torch.cat([t.detach().reshape(-1) for t in tensors])
    return torch.cat([vector, vector.new_zeros(-len(vector) % ranks)])


def by_hand() -> tuple[Tensor, int]:
    """The weights after three steps, and the bytes of optimizer state on this rank."""
    dp = Mesh.build(MeshShape(dp=RANKS))["dp"]
    model = make_model()
    tokens, targets = my_rows(dp)
    mine = flat(list(model.parameters()), RANKS).chunk(RANKS)[dp.index].clone()
    optimizer = torch.optim.AdamW([mine], lr=0.01)
    for _ in range(3):
        model.zero_grad()
        (loss_sum(model, tokens, targets) / N).backward()
        mine.grad = reduce_scatter(flat([p.grad for p in model.parameters()], RANKS), dp, 0)
        optimizer.step()
        nn.utils.vector_to_parameters(all_gather(mine, dp, 0), model.parameters())
    moments = [x for x in optimizer.state[mine].values() if x.ndim]
    return flat(list(model.parameters()), 1), sum(x.numel() * 8 for x in moments)


model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    (loss_sum(model, tokens, targets) / N).backward()
    optimizer.step()
want = flat(list(model.parameters()), 1)
results = launch(by_hand, world_size=RANKS)
assert all((got - want).abs().max() < 1e-9 for got, _ in results)
state = results[0][1]
whole = 2 * 8 * len(want)
print(f"the weights of one device, with {state:,} bytes of moments a rank in place of {whole:,}: {state / whole:.3f}")

# %% [markdown]
# That is the first stage. The same cut can go on, and each stage is named by what it cuts over the $N$ ranks:
#
# - **ZeRO 1**: masters and moments. Gradients add up whole over the micro-batches and are reduced once.
# - **ZeRO 2**: the gradients too. There is no room to add them up, so each micro-batch's are reduced in its own
#   backward.
# - **ZeRO 3**: the weights too. A rank borrows a layer's weights when that layer runs.
#
# How many bytes is that? `footprint` knows the layout and nothing of a run. Then four ranks train two steps, and
# Python's garbage collector is asked for every tensor that is left.

# %%
STATES = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4)


def states(stage: int, ranks: int) -> RunConfig:
    train = replace(TRAIN, dtype="bfloat16", zero=stage)
    return resolve(RunConfig(layout=f"dp={ranks}", model=STATES, train=train))


def predict(run: RunConfig):
    return footprint(run, layout_of(run), coordinates(run.mesh, 0))


P = sum(torch.Size(place.shape).numel() for place in layout_of(states(0, 4)).values())
predicted = {"plain": predict(states(0, 4))}
predicted |= {f"ZeRO {stage}, {ranks} ranks": predict(states(stage, ranks)) for ranks in (4, 64) for stage in (1, 2, 3)}
measured = {
    name: total
    for name, (_, total) in zip(
        predicted, launch(kept, [states(s, 4) for s in range(4)], world_size=4)[0], strict=False
    )
}
for name, each in predicted.items():
    said = f", measured {measured[name] / P:5.2f}" if name in measured else ""
    print(f"{name:16} {each.total / P:5.2f} bytes a parameter{said}")
assert all(predicted[name].total == total for name, total in measured.items()), "to the byte"

# %% tags=["nbval-ignore-output"]
draw_states(predicted, measured, P)

# %% [markdown]
# The limits for many ranks: 18 bytes become 6, then 2, then nothing. The four ranks' numbers are 18, $2 + 4 +
# \frac{16}{4}$, $2 + \frac{16}{4}$ and $\frac{18}{4}$, and a little for flags, padding and step counters. (The 16 of
# ZeRO 1 are 4 + 8 of masters and moments, and 4 of the gradient's part, which is reduced into a buffer of its own.)
# This is what stays between steps. Activations come on top, and no stage cuts them.
#
# ### The library's version
#
# By hand everything was one vector, reduced after backward. `ShardedGradients` does it as `GradientBuckets` did:
# buckets that set out during backward, in one order on all ranks, with flags. In a bucket each parameter has a table
# with a row for each rank; [rows.py](../picotron_mini/parallel/rows.py) draws it. These are the three methods that
# differ: where a reduction starts, where it ends, and how the new weights get to everyone.

# %% tags=["nbval-ignore-output"]
for method in (ShardedGradients._start, ShardedGradients._finish_oldest, ShardedGradients.publish):
    print(inspect.getsource(method))

# %% [markdown]
# ### Proof, and the price in bytes
#
# `verify` holds each stage to one device, as before, and the ledger to the prediction. To compare stages we need the
# wire: for a payload of $S$ bytes on $N$ ranks a ring puts $2\frac{N-1}{N}S$ on each rank's wire for an all_reduce,
# $\frac{N-1}{N}S$ for a reduce_scatter, and $(N-1)S$ for an all_gather, whose payload is the rank's own part.


# %%
def wire(sent: dict[str, int], ranks: int = 4) -> float:
    """Bytes on a rank's wire, by rings over all ranks."""
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "reduce_scatter": (ranks - 1) / ranks, "all_gather": ranks - 1}
    return sum(n * factor[name.split()[1]] for name, n in sent.items() if name.startswith("dp"))


plain = wire(report.bytes_counted)  # of the proof above; the same for any number of micro-batches
print(f"plain: {plain:,.0f} bytes on each rank's wire")
ratios = {}
for stage in (1, 2, 3):
    for m in (1, 3):
        train = replace(TRAIN, zero=stage, micro_batches=m)
        report = verify("dp=4", MODEL, train, optimizers=("sgd", "adamw") if m == 3 else ("sgd",))
        assert report.ok and max(d.error for d in report.differences) < 1e-11 and not report.bytes_problems
        ratios[stage, m] = wire(report.bytes_counted) / plain
    one, three = ratios[stage, 1], ratios[stage, 3]
    print(f"ZeRO {stage}: equal to one device; {one:.2f} of plain's bytes, with 3 micro-batches {three:.2f}")
assert [round(ratios[stage, 1], 1) for stage in (1, 2, 3)] == [1, 1, 1.6]

# %% [markdown]
# By formula, for $E$ elements and as many bytes a weight as a gradient element, in units of $\frac{N-1}{N}$ of the
# gradient:
#
# | | gradients | weights | one micro-batch | $m$ micro-batches |
# |---|---|---|---|---|
# | plain | scatter and gather: 2 | | 2 | 2 |
# | ZeRO 1 | scatter: 1 | gather: 1 | 2 | 2 |
# | ZeRO 2 | scatter: $m$ | gather: 1 | 2 | $m + 1$ |
# | ZeRO 3 | scatter: $m$ | gather, forward and backward: $2m$ | 3 | $3m$ |
#
# So ZeRO 1 is free: on eight ranks an eighth of masters and moments, and not a byte more. ZeRO 2 is free with one
# micro-batch, and ZeRO 3 costs half as much again. (This model is so small that a tied embedding, which is gathered for
# each of its two places, makes 1.6 of the 1.5; the rest is padding.) With bf16 weights the gathers are half as long as
# the float32 scatters: 4 + 2 bytes a parameter for ZeRO 1, where plain data parallelism has 4 + 4.
#
# ### ZeRO 3: weights come and go
#
# A unit (a layer, the embedding, the head) is put together before its forward, and again before its backward, and freed
# after each. Four borders, and at two of them something more: the *next* unit's weights set out, so that they travel
# while this one computes. That is **prefetch**.

# %% tags=["nbval-ignore-output"]
for method in ("_before_forward", "_before_backward", "_after_backward", "_free"):
    print(inspect.getsource(getattr(ShardedWeights, method)))

# %% [markdown]
# Let us watch one micro-batch. `Watched` is this class with a note at each event, so the picture is the order of the
# program, not a measurement of time.


# %%
UNTIED = replace(CONFIG, tie_embeddings=False)
UNITS = ["embedding", "layer 0", "layer 1", "layer 2", "norm", "head"]


def watched() -> list[Passage]:
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    model = GPT(UNTIED)
    init_weights(model, 0)
    sharded = Watched([model.embed, *model.layers.values(), model.norm, head_with_loss(model)], dp)
    tokens, targets = my_rows(dp)
    model.loss(model(tokens), targets).backward()
    sharded.after_backward()
    sharded.finish()
    return sharded.passages


passages, others = launch(watched, world_size=2)
assert passages == others, "all ranks make the same calls in the same order"
print(f"at most {most_at_once(passages)} of {len(UNITS)} units are whole or on their way")
assert most_at_once(passages) == 2

# %% tags=["nbval-ignore-output"]
draw_passages(
    passages,
    UNITS,
    "Six units, a row each, in the order of one rank's program. Forward: a unit's weights are on their way while the "
    "unit before it computes, then it computes and is freed. Backward the same from the head upwards, and after each "
    "unit its gradient sets out to its owners.",
)

# %% [markdown]
# Read a column: while one unit is blue, the next one is on its way. The first of each pass has nobody to hide behind.
# The head is freed after its forward and fetched again at once, for its backward comes next. Here that is a gather for
# nothing; and who keeps it, to save the gather, must not keep it over the optimizer's step. (An exhibit does.)
#
# ### Groups: HSDP
#
# Gathers in every micro-batch want fast links, and 1024 ranks do not have them all over. So cut inside groups that
# have, and let each group keep a copy of everything: once a step the rows are summed over the groups (`--zero-group`).

# %%
hybrid = verify("dp=4", MODEL, replace(TRAIN, zero=3, zero_group=2))
assert hybrid.ok and not hybrid.bytes_problems
for name, number in hybrid.bytes_counted.items():
    print(f"{name:18} {number:8,}")
a_scatter = hybrid.bytes_counted["dp reduce_scatter"] // TRAIN.micro_batches
assert hybrid.bytes_counted["dp all_reduce"] - 8 == a_scatter // 2, "and 8 to agree on the number of targets"

# %% [markdown]
# Gathers and scatters stay inside a group of two. The all_reduce is what crosses: a half of the gradient, once a step,
# where plain data parallelism would have sent all of it. The price is memory, a half of the states and not a quarter.
#
# ### Messages that nobody sends
#
# On a GPU a collective is a kernel of NCCL's, and kernels run on multiprocessors. Those that move bytes cannot
# multiply: while ZeRO's gradients travel, the matrix products beside them take longer. Does it take a kernel to move
# bytes?
#
# Not between GPUs of one host. They can map each other's memory, and every GPU has *copy engines*, which do nothing but
# copy. So let each rank leave its part where the others can read it, in *symmetric memory*, and copy what it needs out
# of theirs. An all_gather is then one copy for each rank, and no other rank takes part. A reduce_scatter is a copy of
# my part of everyone's gradient, and additions in the order of the ranks:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(SymmetricMemory._add_up))

# %% [markdown]
# `_meet_at` is the price. A collective brings its own order: nobody receives before somebody has sent. Who reads memory
# gets whatever is there. Here rank 1 comes late: rank 0 reads once without waiting for it, and once after `meet`. Ranks
# on the CPU share pages of memory in the same way:


# %%
def read_too_early() -> tuple[float, float]:
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    memory = SymmetricMemory(dp, torch.device("cpu"))
    shard = memory.empty(1, torch.float32).fill_(0)
    memory.meet()
    whole, seen = torch.empty(2), []
    if dp.index == 1:
        memory.meet()  # comes late: when rank 0 has read
    shard.fill_(7 + dp.index)
    memory.all_gather_several([whole], [shard]).wait()
    seen.append(float(whole[1]))
    if dp.index == 0:
        memory.meet()
    memory.meet()  # both have written
    memory.all_gather_several([whole], [shard]).wait()
    seen.append(float(whole[1]))
    memory.meet()
    return seen[0], seen[1]


early, late = launch(read_too_early, world_size=2)[0]
print(f"rank 0 reads of rank 1: at once {early:.0f}, after both have met {late:.0f}")
assert (early, late) == (0, 8)

# %% [markdown]
# So a gradient needs two meetings: before it is read, and before its memory is used again (question 23 forgets that
# one, and reads what belongs to the next step). On a GPU a meeting is a small kernel, which waits for flags that the
# others set. Weights are more patient. They change once a step, so ZeRO 3 meets once when they have changed and once
# before they change again, and all its gathers between need nobody. `--symmetric-memory` turns it on. The bytes are
# those of the collectives, and so is the result:

# %%
for stage in (1, 2, 3):
    report = verify("dp=4", MODEL, replace(TRAIN, zero=stage, symmetric_memory=True))
    assert report.ok and max(d.error for d in report.differences) < 1e-11 and not report.bytes_problems
    print(f"ZeRO {stage}: equal to one device, in the bytes that were predicted")

# %% [markdown]
# Is it faster? Here it is no question of multiprocessors, but gloo sends through sockets, which copy more than once.
# (The meetings are not in these times: think of weights, between two updates.)


# %%
def times(megabytes: int = 4, rounds: int = 15) -> tuple[float, float]:
    """Seconds of an all_gather by gloo and by reading; of many rounds in turn the median."""
    dp = Mesh.build(MeshShape(dp=2))["dp"]
    memory = SymmetricMemory(dp, torch.device("cpu"))
    shard = memory.empty(megabytes * 2**18, torch.float32).fill_(dp.index)
    whole = torch.empty(2 * len(shard))
    memory.meet()
    taken = {"gloo": [], "reading": []}
    for _ in range(rounds):
        for way, gather in (
            ("gloo", lambda: all_gather_several([whole], [shard], dp)),
            ("reading", lambda: memory.all_gather_several([whole], [shard])),
        ):
            whole.fill_(-1)
            memory.meet()
            start = time.perf_counter()
            gather().wait()
            taken[way].append(time.perf_counter() - start)
            assert whole[0] == 0 and whole[-1] == 1
    return median(taken["gloo"]), median(taken["reading"])


gloo, reading = launch(times, world_size=2)[0]

# %% tags=["nbval-ignore-output"]
print(f"4 MiB of each of two ranks: gloo {1e3 * gloo:.1f} ms, reading {1e3 * reading:.1f}; {gloo / reading:.1f} times")

# %% [markdown]
# On two H200s a gather by copies takes 0.72 of NCCL's time, and a reduction 0.82. Products beside them are held up as
# much for each ms, but for fewer. ZeRO 2 (with `--bucket-mb 100`) comes from 0.94 of one GPU's speed to 0.95, and ZeRO
# 3 with split masters from 0.90 to 0.93 ([chapter 07](../summary/07_3d_parallel.md#measured-performance), with the
# story of a run that hung). ZeRO 1 and 2 still gather their weights by NCCL. Between hosts there is no memory to map:
# there `--zero-group` cuts inside a host.
#
# ### The same from PyTorch: `fully_shard`
#
# Three steps of SGD on one tiny model, cut by our class and by PyTorch's. Like DDP, `fully_shard` divides by the number
# of ranks, so its loss gets that factor.


# %%
def beside_fully_shard() -> list[tuple[float, float]]:
    """This rank's loss in each step: with ours, and with theirs."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports inside torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dp = Mesh.build(MeshShape(dp=2))["dp"]
        ours, theirs = make_model(), make_model()
        sharded = ShardedWeights([ours.embed, *ours.layers.values(), ours.norm, head_with_loss(ours)], dp)
        for part in (*theirs.layers.values(), theirs):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        tokens, targets = my_rows(dp)
        losses = []
        for _ in range(3):
            sharded.reset()
            loss = ours.loss(ours(tokens), targets) / N
            loss.backward()
            sharded.after_backward()
            sharded.finish()
            theirs.zero_grad()
            their_loss = theirs.loss(theirs(tokens), targets) / N
            (their_loss * dp.size).backward()
            losses.append((loss.item(), their_loss.item()))
            with torch.no_grad():
                for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                    sharded.own(mine).sub_(sharded.gradient(mine), alpha=0.5)
                    other.to_local().sub_(other.grad.to_local(), alpha=0.5)
    return losses


for step, parts in enumerate(zip(*launch(beside_fully_shard, world_size=2), strict=True)):
    ours, theirs = (sum(losses) for losses in zip(*parts, strict=True))  # a rank's loss is its part of the sum
    print(f"step {step}: ours {ours:.6f}, fully_shard {theirs:.6f}")
    assert abs(ours - theirs) < 1e-12

# %% [markdown]
# ### Around any optimizer
#
# ZeRO 1 needs nothing of the model. `ShardedOptimizer` takes a class of `torch.optim` and gives each rank its share: of
# those that treat each element by itself any flat piece, of those that look at a whole matrix (Adafactor keeps means of
# rows and columns) whole parameters. L-BFGS looks at *all* parameters together, so no rank can do its share alone.


# %%
def share_of(kind: type) -> float:
    """This rank's elements of state over those of one device."""
    dp = Mesh.build(MeshShape(dp=RANKS))["dp"]
    sizes, weights = [], []
    for make in (kind, lambda parameters, **options: ShardedOptimizer(parameters, kind, dp, **options)):
        model = make_model()
        optimizer = make(model.parameters(), lr=0.01)
        (loss_sum(model, *make_batch()) / N).backward()  # equal on all ranks, as after GradientBuckets
        optimizer.step()
        inner = getattr(optimizer, "optimizer", optimizer)
        sizes.append(sum(x.numel() for state in inner.state.values() for x in state.values() if x.ndim))
        weights.append(flat(list(model.parameters()), 1))
    assert torch.equal(*weights), "the same update, to the last bit"
    return sizes[1] / sizes[0]


for kind in (torch.optim.AdamW, torch.optim.Adafactor):
    print(f"{kind.__name__:10}", "  ".join(f"{share:.2f}" for share in launch(share_of, kind, world_size=RANKS)))
try:
    ShardedOptimizer(make_model().parameters(), torch.optim.LBFGS, Axis("dp", 4, 0, (0, 1, 2, 3)))
except ConfigError as refused:
    print(refused)
else:
    raise AssertionError("L-BFGS was shared out")

# %% [markdown]
# **Which stage?** The first that fits. ZeRO 1 whenever there are two ranks; ZeRO 2 if the gradients are too much and
# micro-batches are few; ZeRO 3 if the weights do not fit, on fast links or with enough tokens to hide the gathers
# behind; in groups where only neighbours have fast links.
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
# `itemsize` is that of the weights: 2 for bf16; `ranks` may be 1. The 8 bytes for the number of targets do not count
# here: `GradientBuckets` does not send them. The ledger of a real run decides.


# %%
def step_bytes(sizes: list[int], itemsize: int, micro_batches: int, ranks: int) -> int: ...


check("03.step_bytes", step_bytes)

# %% [markdown]
# **6. What a rank keeps.** Bytes from step to step with AdamW, in stage 0 (plain) to 3 of ZeRO, for weights of
# `itemsize` bytes: 2 is bf16, as above. With 4 the weights are float32 and their own masters, and a rank's part of
# those is a part of the weights that it has. Ranks that train are measured; you may be half a percent off, which is
# more than the flags.


# %%
def kept_bytes(parameters: int, ranks: int, stage: int, itemsize: int) -> float: ...


check("03.kept_bytes", kept_bytes)

# %% [markdown]
# **7. The same steps with a share of the state.** Train `weight` [12] in place, over the sum of all ranks' gradients:
# one [12] of this rank for each step. `make_optimizer([tensor])` is an AdamW over that tensor. Three ranks; each may
# keep at most 64 bytes of optimizer state, a third of what plain data parallelism keeps; no all_reduce. There are
# `reduce_scatter(x, axis, 0)` and `all_gather(x, axis, 0)`.


# %%
def zero_steps(weight: Tensor, gradients: list[Tensor], make_optimizer, axis: Axis) -> None: ...


check("03.zero_steps", zero_steps)

# %% [markdown]
# ## From the bug museum
#
# Every exhibit is a real bug, as a change to this library that is made inside the ranks only. This one was found in
# huggingface/picotron (commit 59714b1), in its class `DataParallelNaive`. (`DataParallelBucket`, which its training
# script uses, is sound.)

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
# `GradientBuckets` and asserts something. It must pass on the sound library, and its assertion must fail with the bug
# in it. `kill` runs it on `dp=2`, the exhibit's first layout.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("03.parameter_reduced", my_test)

# %% [markdown]
# More of this room: `03.average_of_averages`, `03.accumulation_lost`, `03.reduced_too_early`,
# `03.norm_counts_copies`. The same `my_test` does not catch them all; what would?
#
# ZeRO has an annex. This bug is right for a whole step, in every number:

# %% tags=["nbval-ignore-output"]
show("03.updated_alone")

# %%
for steps in (1, 2):
    train = replace(TRAIN, zero=1, steps=steps)
    alone = verify("dp=2", MODEL, train, optimizers=("sgd",), patch=exhibit("03.updated_alone").patch)
    equal = all(d.error <= d.tolerance for d in alone.differences)
    print(f"compared after {steps}: numbers of one device: {equal}; bytes as predicted: {not alone.bytes_problems}")
    assert equal == (steps == 1) and alone.bytes_problems

# %% [markdown]
# Then take `03.last_micro_batch_only`: ZeRO 2 that keeps the last micro-batch's gradients alone. The class is
# `ShardedGradients(groups, axis, start="each")`; its docstring, printed by `help`, shows a step.


# %%
def my_zero_test(mesh: Mesh) -> None: ...


kill("03.last_micro_batch_only", my_zero_test)

# %% [markdown]
# (That exhibit was noticed by its bytes in the first step, and by a number only in the second.) The others:
# `03.norm_of_one_part`, `03.rows_left_over`, `03.kept_over_the_step`.
#
# ## On GPUs
#
# The same files run on NCCL; nothing is written twice. The library starts its own ranks:
#
# ```console
# $ picotron-mini verify dp=2 --device cuda --dtype float32    # equal to one device, on GPUs
# $ picotron-mini bench --preset bench --layout dp=2           # tokens per second, against --layout dp=1
# $ picotron-mini bench --preset bench --layout dp=2 --zero 3  # and what cutting the states costs
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
# stopping the processor.
#
# This chapter's closing run, on two H200s with torch 2.11:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset h100 dp=2 --zero 2 --steps 60
# step 51/60  loss 6.180  validation 5.526 (1.957 bits per byte)  395,292 tokens/s  memory 16.2 GiB  0:02 left
# step 60/60  loss 5.920  validation 5.369 (1.902 bits per byte)  414,865 tokens/s  memory 16.2 GiB  0:00 left
# ```
#
# 292 million parameters on CPython's own text, all 60 steps in 31 s, compiling included. Of the 16.2 GiB only 2.7 are
# weights, masters, moments and gradients: can you say which of them are halves? The
# [write-up](../summary/03_data_parallel.md#measured-performance) has the log, and what each stage of ZeRO costs in
# speed.
#
# ## What to read next
#
# - [The write-up](../summary/03_data_parallel.md): decisions, what was tried and dropped, measurements.
# - [Questions](../interview_questions/03_data_parallel.md), from warm-up to design, with proofs that run.
# - *PyTorch Distributed: Experiences on Accelerating Data Parallel Training* (arXiv 2006.15704): DDP's own paper.
# - *ZeRO* (arXiv 1910.02054) and *PyTorch FSDP* (arXiv 2304.11277).
# - The next chapters cut the model where this one cut the batch: tensor parallelism (04) and pipelines (05).
