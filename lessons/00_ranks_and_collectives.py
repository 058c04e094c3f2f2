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
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 Ranks and collectives
#
# A model that is too large or too slow for one device is trained by many. They share nothing: whatever one of them
# needs to know from another has to be sent. This lesson starts real processes from the cells below, lets them talk,
# and measures what talking costs. Everything later, data, tensor and pipeline parallelism, is made of these few
# exchanges. After it you can
#
# - start ranks from a cell, and say what two of them share (nothing);
# - name the five collectives, say which two make up an all_reduce, and build one from sends and receives;
# - say what an exchange costs: the payload, what a ring or a tree puts on the wire for it, and in how many steps;
# - tell from which size on a ring beats a tree;
# - read the ranks of any axis off a mesh;
# - recognise a deadlock, a mismatch and a dead rank by what they print, or do not.
#
# You need Python, what a tensor and a gradient are, and two cores; no GPU. Reading and running takes 30 to 60 minutes,
# with the exercises longer.
#
# **The problem and its price.** A model of 1.8 billion parameters has as many gradients: 7.2 GB in float32. Two
# devices that train it together must agree on them at *every step*. Sent naively among 8 devices, each of them would
# hand over 50 GB a step. With the right exchange it is 12.6 GB, and it can be hidden behind the computation.

# %%
parameters = 1.8e9
gradients = 4 * parameters / 1e9  # GB
ranks = 8
print(f"gradients            {gradients:5.1f} GB")
print(f"everyone to everyone {(ranks - 1) * gradients:5.1f} GB sent by each of {ranks}")
print(f"a ring               {2 * (ranks - 1) / ranks * gradients:5.1f} GB sent by each of {ranks}")

# %% [markdown]
# ## What a rank is
#
# A **rank** is a process with a number. `launch` starts `world_size` of them, calls a function in each, and returns
# their values in rank order. The function may be defined right here, in a cell. What a rank prints comes back with
# its number in front.

# %%
import os

import torch
import torch.distributed as dist

from picotron_mini.launch import launch

torch.set_num_threads(1)


def hello():
    print(f"hello from rank {dist.get_rank()} of {dist.get_world_size()}")
    return os.getpid()


pids = launch(hello, world_size=4)
assert len({*pids, os.getpid()}) == 5, "four ranks and this notebook are five processes"

# %% [markdown]
# Processes share **no memory**. Each rank got a copy of `counter` when it was started. It changes its own copy, and
# neither the other ranks nor this notebook see it.

# %%
counter = 0


def count():
    global counter
    for _ in range(dist.get_rank() + 1):
        counter += 1
    return counter


print("in the ranks:", launch(count, world_size=4))
print("here:        ", counter)
assert counter == 0

# %% [markdown]
# So ranks run the *same program on different data*, and a rank knows only its number. All of parallel training is:
# from my number, find my part of the work; compute; exchange.
#
# ## The exchanges
#
# A **collective** is a call that every rank of a group makes together. There are few. Five of
# them, and messages from one rank to another, carry all the traffic of this library. In the drawings a row is one
# rank's memory. The colour and the digit say whose numbers they are; grey `+b` is the sum of everyone's part `b`.
#
# A collective works along an **axis** of a **mesh**: the ranks that work together, and which of them I am. For now
# the mesh has one axis, `dp`, with all four ranks.

# %%
from picotron_mini import collectives
from picotron_mini.config import MeshShape
from picotron_mini.course.figures.collectives import draw_collective, draw_mesh
from picotron_mini.mesh import Mesh


def on_four_ranks(fn):
    """Call fn(axis) on four ranks; print and return what each of them got."""

    def rank():
        return fn(Mesh.build(MeshShape(dp=4))["dp"])

    values = launch(rank, world_size=4)
    for number, value in enumerate(values):
        print(f"rank {number}: {[int(v) for v in value]}")
    return values


# %% [markdown]
# **broadcast**: one rank's numbers go to all. At the start of training, so that all ranks begin with equal weights.

# %% tags=["nbval-ignore-output"]
draw_collective("broadcast")

# %%
values = on_four_ranks(lambda axis: collectives.broadcast(torch.arange(4) + 10 * axis.index, axis, root=0))
assert all(v.tolist() == [0, 1, 2, 3] for v in values)

# %% [markdown]
# **all_reduce**: everyone gets the sum. The work-horse: gradients in data parallelism, partial results in tensor
# parallelism.

# %% tags=["nbval-ignore-output"]
draw_collective("all_reduce")

# %%
values = on_four_ranks(lambda axis: collectives.all_reduce(torch.arange(4) + 10 * axis.index, axis))
assert all(v.tolist() == [60, 64, 68, 72] for v in values)  # 0+10+20+30, 1+11+21+31, ...

# %% [markdown]
# **reduce_scatter**: the same sum, but each rank keeps one part of it.

# %% tags=["nbval-ignore-output"]
draw_collective("reduce_scatter")

# %%
values = on_four_ranks(lambda axis: collectives.reduce_scatter(torch.arange(4) + 10 * axis.index, axis, dim=0))
assert [v.item() for v in values] == [60, 64, 68, 72]

# %% [markdown]
# **all_gather**: everyone gets everyone's part. What reduce_scatter leaves is exactly what all_gather takes, and one
# after the other they are an all_reduce. Keep that in mind: the ring below is built on it.

# %% tags=["nbval-ignore-output"]
draw_collective("all_gather")

# %%
values = on_four_ranks(lambda axis: collectives.all_gather(torch.tensor([10 * axis.index]), axis, dim=0))
assert all(v.tolist() == [0, 10, 20, 30] for v in values)

both = on_four_ranks(
    lambda axis: collectives.all_gather(
        collectives.reduce_scatter(torch.arange(4) + 10 * axis.index, axis, dim=0), axis, dim=0
    )
)
assert all(v.tolist() == [60, 64, 68, 72] for v in both), "the same as all_reduce"

# %% [markdown]
# **all_to_all**: part r of everyone goes to rank r, a transposition of the whole memory. Mixture-of-experts models
# send each token to its expert this way.

# %% tags=["nbval-ignore-output"]
draw_collective("all_to_all")

# %%
values = on_four_ranks(lambda axis: collectives.all_to_all(torch.arange(4) + 10 * axis.index, axis))
assert values[2].tolist() == [2, 12, 22, 32]

# %% [markdown]
# And **send** and **receive**, between two ranks only: what a pipeline uses between its stages. They return at once
# with a *work* under way, and `wait()` says when it is done. Until then the sender must not change the buffer, and
# the receiver must not read it.

# %% tags=["nbval-ignore-output"]
draw_collective("send_receive")


# %%
def to_the_right(axis):
    mine, theirs = torch.tensor([10 * axis.index]), torch.empty(1, dtype=torch.int64)
    works = [
        collectives.send(mine, axis, (axis.index + 1) % axis.size),
        collectives.receive(theirs, axis, (axis.index - 1) % axis.size),
    ]
    for work in works:
        work.wait()
    return theirs


values = on_four_ranks(to_the_right)
assert [v.item() for v in values] == [30, 0, 10, 20]

# %% [markdown]
# Shards are not always equal. Five rows over four ranks are split 2, 2, 1, 0, as `torch.chunk` does, and the backends
# refuse to gather uneven pieces. So `all_gather` pads them to the length of the first, and cuts the padding off
# again. The padding travels, and it is paid for.

# %%
from picotron_mini.layout import split

print(split(5, 4))


def uneven(axis):
    start, stop = split(5, axis.size)[axis.index]
    with collectives.ledger.recording() as sent:
        whole = collectives.all_gather(torch.arange(5)[start:stop], axis, dim=0, total=5)
    assert sum(sent.values()) == 2 * 8, "two numbers of 8 bytes from each rank, also from the one that has none"
    return whole


values = on_four_ranks(uneven)
assert all(v.tolist() == [0, 1, 2, 3, 4] for v in values)

# %% [markdown]
# ## What they cost: the naive sum
#
# How does a backend compute an all_reduce? It has only messages. Let us write it three times. First the naive way:
# everyone sends everything to everyone.

# %% tags=["nbval-ignore-output"]
import inspect

from picotron_mini.course.rings import naive_all_reduce, ring_all_reduce, tree_all_reduce

print(inspect.getsource(naive_all_reduce))


# %%
def try_sum(fn):
    """The largest number of bytes that any of four ranks sends while it sums 1024 numbers of 4 bytes with fn."""

    def rank():
        axis = Mesh.build(MeshShape(dp=4))["dp"]
        x = torch.arange(1024.0) + axis.index
        with collectives.ledger.recording() as sent:
            total = fn(x, axis)
        assert torch.equal(total, 4 * torch.arange(1024.0) + 6), "0 + 1 + 2 + 3 = 6"
        return sum(sent.values())

    return launch(rank, world_size=4)


naive = try_sum(naive_all_reduce)
print("naive:", naive, "bytes sent by each rank, for a tensor of", 1024 * 4)
assert naive == [3 * 4096] * 4

# %% [markdown]
# It is right, and every rank sends $(n-1)S$ bytes: with more ranks each of them sends *more*.
#
# ## The ring
#
# Cut the tensor in $n$ parts and let them travel in a circle. In the first half (a reduce-scatter) a part collects
# every rank's share on its way; in the second (an all-gather) the finished parts go around once more. $2(n-1)$
# messages of $S/n$ bytes:
#
# $$\text{sent by each rank} = 2\,\frac{n-1}{n}\,S < 2S$$
#
# However many ranks there are, none sends more than twice the tensor. Less is not possible
# (Patarasuk and Yuan, 2009, proved it for any all-reduce made of messages).

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(ring_all_reduce))

# %%
ring = try_sum(ring_all_reduce)
print("ring: ", ring)
assert ring == [2 * 3 * 4096 // 4] * 4

# %% [markdown]
# ## The tree
#
# A ring of $n$ ranks takes $2(n-1)$ steps, one after the other. For a small tensor the bytes do not matter and the
# steps do. A tree sums pairs, then pairs of pairs, up to rank 0, and sends the sum down again: $2\log_2 n$ steps, of
# the *whole* tensor.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(tree_all_reduce))

# %%
tree = try_sum(tree_all_reduce)
print("tree: ", tree)
assert sum(tree) == sum(ring) == 2 * 3 * 4096, "all ranks together send the same"

# %% [markdown]
# Ranks 0 and 2 send the tensor twice (rank 0, the root, on the way down; rank 2 once up and once down), ranks 1 and 3
# once. All together send $2(n-1)S$ bytes,
# as in the ring. But in the ring all links work all the time, and in the tree most of them wait.
#
# ## When which? The alpha-beta model
#
# A message of $M$ bytes takes about
#
# $$t(M) = \alpha + \beta M$$
#
# where $\alpha$ is the latency (until the first byte arrives) and $\beta$ the seconds that a byte takes, so that
# $1/\beta$ is the bandwidth. Then
#
# $$t_{\text{ring}} = 2(n-1)\left(\alpha + \beta\frac{S}{n}\right)$$
#
# $$t_{\text{tree}} = 2\log_2 n\,(\alpha + \beta S)$$
#
# Small $S$: the ring pays $2(n-1)\alpha$ and the tree $2\log_2 n\,\alpha$, so the tree wins. Large $S$: the ring pays
# nearly $2\beta S$ and the tree $2\log_2 n\,\beta S$, so the ring wins. Here is the model for links of 10 microseconds
# and 100 GB/s, an assumption of the size of what one finds between GPUs:

# %% tags=["nbval-ignore-output"]
from picotron_mini.course.figures.picture import LINES, drawing, figure, picture
from picotron_mini.course.rings import ring_seconds, tree_seconds

latency, bandwidth = 10e-6, 100e9
with drawing():
    fig = figure(5.6, 3.0)
    axes = fig.subplots()
    large = [2**k for k in range(10, 29)]
    for (name, model), colour in zip({"ring": ring_seconds, "tree": tree_seconds}.items(), LINES, strict=False):
        for ranks, style in ((4, "-"), (64, "--")):
            milliseconds = [1e3 * model(size, ranks, latency, bandwidth) for size in large]
            axes.plot(large, milliseconds, style, color=colour, label=f"{name} of {ranks}")
    axes.set(xscale="log", yscale="log", xlabel="size of the tensor", ylabel="milliseconds")
    axes.set_xticks(large[::6], ["1 KiB", "64 KiB", "4 MiB", "256 MiB"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend()
picture(
    fig,
    "The model's time of an all-reduce against its size, both axes logarithmic, for rings and trees of 4 and of 64 "
    "ranks. Each curve is flat while the tensor is small, where the trees are lower, and rises in proportion to the "
    "size where it is large, where the rings are. They cross near 1 MB with 4 ranks and near 11 MB with 64",
)

# %% [markdown]
# Left, the curves are flat: the size does not matter, the number of steps does, and a ring of 64 has 126 of them.
# Right, the bytes matter, and a ring of 64 is hardly slower than one of 4. Where they cross is your fourth exercise.
#
# That was a formula. Let us measure, on four real ranks. Each time is that of the slowest rank, the best of several
# rounds.

# %%
sizes = [2**k for k in range(10, 25, 2)]  # 1 KiB to 16 MiB


def measure(names):
    """Seconds of each sum at each size, on this rank."""
    import time

    from picotron_mini.course import rings

    axis = Mesh.build(MeshShape(dp=4))["dp"]
    fns = {name: getattr(rings, f"{name}_all_reduce", collectives.all_reduce) for name in names}
    out = {}
    for size in sizes:
        x = torch.ones(size // 4)
        for name, fn in fns.items():
            best = float("inf")
            for _ in range(4 if size < 2**20 else 3):
                repeat = 5 if size < 2**20 else 1
                collectives.barrier(axis)
                start = time.perf_counter()
                for _ in range(repeat):
                    fn(x, axis)
                best = min(best, (time.perf_counter() - start) / repeat)
            out[name, size] = best
    return out


names = ("ring", "tree", "library")
per_rank = launch(measure, names, world_size=4)
seconds = {key: max(times[key] for times in per_rank) for key in per_rank[0]}
assert all(t > 0 for t in seconds.values())

# %% [markdown]
# Fit a line, $t = a + bS$, to each. The ring has 6 steps and sends 1.5 S along each link; the tree has 4 steps and
# its critical path carries 4 S. So $a/\text{steps}$ is a latency, and $1.5/b$ or $4/b$ a bandwidth.

# %% tags=["nbval-ignore-output"]
import numpy as np


def fit(name):
    """Latency and bandwidth of one message, from a fit of relative errors."""
    t = np.array([seconds[name, size] for size in sizes])
    columns = np.stack([np.ones(len(sizes)), np.array(sizes, float)], 1)
    a, b = np.linalg.lstsq(columns / t[:, None], np.ones(len(sizes)), rcond=None)[0]
    steps, path = {"ring": (6, 1.5), "tree": (4, 4.0)}[name]
    return a / steps, path / b


fitted = {name: fit(name) for name in ("ring", "tree")}
for name, (latency, bandwidth) in fitted.items():
    print(f"{name}: latency {1e6 * latency:6.0f} us, bandwidth {bandwidth / 1e9:5.2f} GB/s")

# %% tags=["nbval-ignore-output"]
models = {"ring": ring_seconds, "tree": tree_seconds, "library": None}
with drawing():
    fig = figure(5.6, 3.2)
    axes = fig.subplots()
    for (name, model), colour, marker in zip(models.items(), LINES, "osx", strict=False):
        label = {"library": "all_reduce of gloo"}.get(name, name)
        axes.plot(sizes, [1e3 * seconds[name, size] for size in sizes], marker, color=colour, label=label)
        if model:
            axes.plot(sizes, [1e3 * model(size, 4, *fitted[name]) for size in sizes], "--", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="size of the tensor", ylabel="milliseconds")
    axes.set_xticks(sizes[::2], [f"{size // 1024} KiB" for size in sizes[::2]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title("4 ranks: measured, and the fitted model (dashed)", fontsize=9)
    axes.legend()
picture(
    fig,
    "Measured times of an all-reduce against its size, both axes logarithmic, for the ring, the tree and gloo's own, "
    "with the fitted model of ring and tree as dashed lines",
)

# %% [markdown]
# If the model were the whole truth, both fits would find the same latency and the same bandwidth. Do yours? The model
# gives each rank a processor and each link wires of its own. Where four ranks share two cores they take turns: left,
# points jump by factors, since a step takes as long as the operating system lets a rank wait; right, the ring keeps all
# four busy at once where the tree's resting ranks cost nothing. Both send $2(n-1)S$ bytes in all, so on shared cores
# the ring's advantage shrinks. On a machine with a link for each device it is what the formula says. Measure before you
# believe a model, this one included.
#
# Real backends choose: NCCL has rings and trees (its documentation lists them under the variable `NCCL_ALGO`), and
# takes one for each call by a model like this one.
#
# ## The bill, in one table
#
# There are two ways to count, and mixing them up is the classic mistake. The **payload** is what a rank hands to
# `torch.distributed`; it depends on the call only, and it is what this library predicts and counts. The **wire** is
# what the algorithm makes of it.

# %%
S, n = 4096, 4
bill = {  # payload a rank hands over; what the busiest rank sends for it by a ring; in how many steps
    "broadcast": (S, S, n - 1),
    "all_reduce": (S, 2 * (n - 1) * S // n, 2 * (n - 1)),
    "reduce_scatter": (S, (n - 1) * S // n, n - 1),
    "all_gather": (S // n, (n - 1) * S // n, n - 1),
    "all_to_all": (S, (n - 1) * S // n, n - 1),  # no ring: each part goes straight to its rank
}
print(f"{'of S = 4096 bytes, 4 ranks':28}{'payload':>8}{'on the wire':>13}{'steps':>7}")
for name, (payload, wire, steps) in bill.items():
    print(f"{name:28}{payload:8}{wire:13}{steps:7}")


def count_payload():
    axis = Mesh.build(MeshShape(dp=4))["dp"]
    x = torch.ones(S // 4)
    with collectives.ledger.recording() as sent:
        collectives.broadcast(x, axis)
        collectives.all_reduce(x, axis)
        collectives.reduce_scatter(x, axis, 0)
        collectives.all_gather(x[: S // 4 // n], axis, 0)
        collectives.all_to_all(x, axis)
    return {operation: amount for (_, operation), amount in sent.items()}


counted = launch(count_payload, world_size=4)
assert counted[0] == {name: payload for name, (payload, _, _) in bill.items()}
assert "broadcast" not in counted[1], "only the root hands something over"

# %% [markdown]
# ## The ledger, and who checks it
#
# Each call notes its bytes in a **ledger**, by axis and operation. The lessons hold each technique to a formula,
# *equal to the byte*. But who checks the ledger? If it forgot a line, prediction and count could be wrong together.
# So there is a **witness** that shares no code with it: torch shows it every operator that runs, forward and
# backward, and it adds up those that belong to `torch.distributed`.

# %% tags=["nbval-ignore-output"]
from picotron_mini.course.instruments.witness import Witness

print(inspect.getsource(Witness))


# %%
def ledger_and_witness():
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    x = torch.ones(3, 5, requires_grad=True)
    with collectives.ledger.recording() as ledger, Witness() as witness:
        y = collectives.copy_to(x, axis).exp()  # forward: nothing. Backward: an all_reduce
        collectives.reduce_from(y, axis).sum().backward()  # forward: an all_reduce. Backward: nothing
        collectives.all_gather(x.detach(), axis, dim=1)
    return dict(ledger), dict(witness.bytes)


for rank, (ledger, witness) in enumerate(launch(ledger_and_witness, world_size=2)):
    print(f"rank {rank}: the ledger says {ledger}")
    print(f"        the witness says {witness}")
    assert witness == {operation: amount for (_, operation), amount in ledger.items()}
    assert ledger["tp", "all_reduce"] == 2 * 3 * 5 * 4

# %% [markdown]
# `copy_to` and `reduce_from` are the **conjugate pair** of tensor parallelism, where gradients cross ranks too: what
# is an all_reduce on the way forward is a copy on the way back, and the other way round. Here is the proof that they
# are right: two layers, the first cut by its outputs and the second by its inputs, against the same layers on one
# device.

# %%
torch.manual_seed(0)
x, first, second = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (4, 6), (6, 3)))


def two_halves():
    axis = Mesh.build(MeshShape(tp=2))["tp"]
    whole = x.clone().requires_grad_()
    a, b = first.chunk(2, dim=1)[axis.index], second.chunk(2, dim=0)[axis.index]
    y = collectives.reduce_from(torch.tanh(collectives.copy_to(whole, axis) @ a) @ b, axis)
    (y**2).sum().backward()
    return y.detach(), whole.grad


one = x.clone().requires_grad_()
y = torch.tanh(one @ first) @ second
(y**2).sum().backward()
for rank, (y_rank, gradient) in enumerate(launch(two_halves, world_size=2)):
    value_error = ((y_rank - y).abs().max() / y.abs().max()).item()
    gradient_error = ((gradient - one.grad).abs().max() / one.grad.abs().max()).item()
    print(f"rank {rank}: within 1e-12 of one device: value {value_error < 1e-12}, gradient {gradient_error < 1e-12}")
    assert max(value_error, gradient_error) < 1e-12

# %% [markdown]
# ## How it goes wrong
#
# **A deadlock.** Both ranks wait for the other to begin. Nothing fails; nothing happens either. `launch` has a
# deadline, and then shows where *each* rank stood.

# %%
import re

from picotron_mini.launch import RankError


def both_receive_first():
    axis = Mesh.build(MeshShape(dp=2))["dp"]
    other, buffer = 1 - axis.index, torch.empty(1)
    collectives.receive(buffer, axis, other).wait()
    collectives.send(torch.ones(1), axis, other).wait()


try:
    launch(both_receive_first, world_size=2, timeout=4)
except RankError as error:
    message = re.sub(r'File ".*?"', "in this cell", str(error))
    print(message)
assert message.count("line 9 in both_receive_first") == 2, "both stand at the same line"

# %% [markdown]
# Sending first on both sides hangs as well: gloo hands over a message when the other side asks for it. The cure is to
# start both, and wait afterwards, as `to_the_right` did above.
#
# **A mismatch.** Collectives are matched by their *order*, not by their names. If two ranks reduce the same two
# tensors in another order, the sums are made of different tensors. No error, no warning.


# %%
def in_another_order():
    axis = Mesh.build(MeshShape(dp=2))["dp"]
    weights, bias = torch.tensor([1.0]), torch.tensor([100.0])
    if axis.index == 0:
        weights, bias = collectives.all_reduce(weights, axis), collectives.all_reduce(bias, axis)
    else:
        bias, weights = collectives.all_reduce(bias, axis), collectives.all_reduce(weights, axis)
    return weights.item(), bias.item()


sums = launch(in_another_order, world_size=2)
print("right is (2.0, 200.0), and the ranks have", sums)
assert sums == [(101.0, 101.0)] * 2

# %% [markdown]
# **Another type.** gloo adds what it gets as if it were of its own type. One rank says 1 as a whole number, the other
# 3.0 as a float, and the first finds `1077936129 = 1 + 0x40400000`, the bits of 3.0 read as an integer. With
# `TORCH_DISTRIBUTED_DEBUG=DETAIL` torch compares all calls before it makes them, slowly, and says so.


# %%
def different_types():
    axis = Mesh.build(MeshShape(dp=2))["dp"]
    x = torch.tensor([1], dtype=torch.int32) if axis.index == 0 else torch.tensor([3.0])
    return collectives.all_reduce(x, axis).item()


wrong, _ = launch(different_types, world_size=2)
print("1 + 3.0 =", wrong)
assert wrong == 1 + torch.tensor(3.0).view(torch.int32).item()

os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
try:
    launch(different_types, world_size=2, output="hide")
except RankError as error:
    print("in detail:", re.search(r"Detected mismatch between collectives on ranks", str(error))[0])
else:
    raise AssertionError("the mismatch was not noticed")
finally:
    del os.environ["TORCH_DISTRIBUTED_DEBUG"]

# %% [markdown]
# **One rank fails.** The others wait for it in a collective, and only see that a connection closed. The error to read
# is the *first* one; `launch` finds it and raises it here. In logs of large runs, look for the earliest.


# %%
def one_divides_by_zero():
    axis = Mesh.build(MeshShape(dp=3))["dp"]
    if axis.index == 1:
        return 1 / 0
    return collectives.all_reduce(torch.ones(1), axis)


try:
    launch(one_divides_by_zero, world_size=3)
except RankError as error:
    print(str(error).splitlines()[0], str(error).splitlines()[-1])
    assert error.rank == 1

# %% [markdown]
# ## A mesh: who talks to whom
#
# Real layouts combine techniques, and each has its own group of partners. The ranks form a grid of four axes: pipeline
# stages (`pp`), copies of the model (`dp`), parts of each sequence (`cp`, chapter 06), slices of a layer (`tp`). `tp`
# varies fastest, because it talks most and neighbours have the fastest links.
#
# $$\text{rank} = ((pp \cdot n_{dp} + dp) \cdot n_{cp} + cp) \cdot n_{tp} + tp$$
#
# Drawn with one part a sequence, `cp=1`:

# %% tags=["nbval-ignore-output"]
draw_mesh(MeshShape(pp=2, dp=2, tp=2))

# %%
shape = MeshShape(pp=2, dp=2, tp=2)
for axis_name in ("tp", "dp", "pp"):
    groups = sorted({Mesh(shape, rank)[axis_name].ranks for rank in range(8)})
    print(f"{axis_name}: " + "  ".join(str(group) for group in groups))
assert Mesh(shape, 5)["dp"].ranks == (5, 7)


# %% [markdown]
# The same call on another axis is another sum. Four ranks, each with a power of ten:


# %%
def two_axes():
    mesh = Mesh.build(MeshShape(dp=2, tp=2))
    x = torch.tensor([10**mesh.rank])
    return [collectives.all_reduce(x, mesh[name]).item() for name in ("tp", "dp", "world")]


for rank, (tp, dp, world) in enumerate(launch(two_axes, world_size=4)):
    print(f"rank {rank}: over tp {tp:4}, over dp {dp:4}, over all {world}")

# %% [markdown]
# ## Exercises
#
# Fill in a function and run `check`. It says passed, failed with a hint, or not attempted yet. `solution("00...")`
# from `picotron_mini.course.exercises` shows an answer, when you have given up.
#
# 1. **One collective from another.** Write reduce_scatter with `collectives.all_to_all(x, axis)` and a sum. `x` has n K
#    elements in one dim, and rank r returns K of them, the sum of everyone's part r.

# %%
from picotron_mini.course.exercises import check


def my_reduce_scatter(x, axis): ...


check("00.reduce_scatter", my_reduce_scatter)

# %% [markdown]
# 2. **A ring within a budget.** `ring_all_reduce` needs a length that n divides. Write one for any length, also less
#    than n: the same sum on every rank, with `collectives.send` and `collectives.receive` only, `x` unchanged, and no
#    rank sends more than $2(n-1)\lceil L/n\rceil$ numbers.


# %%
def my_ring(x, axis): ...


check("00.ring_of_any_length", my_ring)

# %% [markdown]
# 3. **Who talks to whom.** From the mesh's shape (`shape.pp`, `shape.dp`, `shape.cp`, `shape.tp`) and a rank, name the
#    ranks on its axis `name`, in order, without `Mesh`.


# %%
def my_axis_ranks(shape, rank, name): ...


check("00.axis_ranks", my_axis_ranks)

# %% [markdown]
# 4. **Tree or ring.** In the alpha-beta model, from how many bytes on is the ring as fast as the tree? (`bandwidth` is
#    $1/\beta$.)


# %%
def my_crossover(ranks, latency, bandwidth): ...


check("00.crossover", my_crossover)
# %% [markdown]
# ## The bug museum
#
# Each room holds bugs that crash nothing. The smallest: a sum that was a mean. `show` tells its story and prints the
# change that it makes to the library; `run` trains with it and compares with one device.

# %% tags=["nbval-ignore-output"]
from picotron_mini.course.museum import kill, run, show

show("00.all_reduce_averages")

# %%
report = run("00.all_reduce_averages", "tp=2", optimizers=["sgd"])
print("equal to one device:", report.ok)
for difference in report.differences:
    print(f"{difference.quantity:14} largest relative error {difference.error:.0e}")
assert not report.ok
assert not report.bytes_problems, "the bytes are all right, and the numbers are wrong: counting is not enough"


# %% [markdown]
# Now write a test that notices it: a function of the mesh, called on each rank, whose `assert` fails with the bug and
# not without. (To crash is not to notice.) `kill` runs it on the exhibit's first layout, `tp=2` here; a third argument
# names another.


# %%
def my_test(mesh): ...


kill("00.all_reduce_averages", my_test)

# %% [markdown]
# ## The same on GPUs
#
# Nothing above says gloo or CPU, except by default. `launch(fn, world_size=2, device="cuda")` starts a rank for each
# GPU and uses NCCL. On several machines the ranks are started by `torchrun`, once on each, and `launch` in the script
# joins them:
#
# ```
# torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 --rdzv-backend c10d script.py
# ```
#
# Where the script is
#
# ```python
# import torch, torch.distributed as dist
# from picotron_mini.launch import launch
#
# def work():
#     x = torch.ones(1, device="cuda") * dist.get_rank()
#     dist.all_reduce(x)
#     return x.item()
#
# print(launch(work, world_size=16, device="cuda"))
# ```
#
# `launch` returns this rank's value alone there, and refuses a number of ranks that is not the script's.
#
# ## What to read next
#
# - [The write-up](../summary/00_ranks_and_collectives.md) says how `launch` and the collectives are built, and what
#   was tried and dropped; [the questions](../interview_questions/00_ranks_and_collectives.md) ask what you learned
#   here.
# - Megatron-LM ([arXiv 1909.08053](https://arxiv.org/abs/1909.08053)) is where the conjugate pair comes from; ZeRO
#   ([arXiv 1910.02054](https://arxiv.org/abs/1910.02054)) splits the all_reduce into its two halves and saves memory
#   with it; the first chapters of Thakur, Rabenseifner and Gropp (2005), *Optimization of collective communication
#   operations in MPICH*, compare rings, trees and halving.
# - Next lesson with ranks: [03, data parallelism](03_data_parallel.ipynb), which is one all_reduce, done well.
