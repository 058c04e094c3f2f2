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
# # 07 3D parallel
#
# Each axis that you have met runs into a wall of its own. So large runs use several at once, and the question becomes
# *which*: how many ranks on each, in which order, on which links. After this lesson you can
#
# - say in numbers where data, tensor, pipeline and context parallelism each stop;
# - draw the groups of any mesh, and decide which axis gets the fast links;
# - put the techniques on a model in an order that works, and show what another order breaks;
# - prove a layout of four axes at once equal to one device;
# - predict bytes, memory and step time of a layout, rank all legal ones, and rehearse one of 1,024 ranks on a laptop;
# - recognise bugs that no test on a single axis can see.
#
# You need chapters 03 (data parallel), 04 (tensor parallel), 05 (pipeline parallel) and 06 (context parallel). All
# cells run here, on up to 16 real processes on your CPU. Reading and running takes 45 to 60 minutes, with the exercises
# longer.

# %%
import inspect
import textwrap
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from picotron_mini.collectives import ledger
from picotron_mini.config import AXES, ConfigError, MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.figures.layout import (
    bytes_between_hosts,
    crosses,
    draw_bytes,
    draw_memory,
    draw_mesh,
    draw_time,
    groups,
)
from picotron_mini.course.museum import MODEL, TRAIN, kill, run, show
from picotron_mini.data.loader import Batch
from picotron_mini.dry_run import dry_run, held_bytes
from picotron_mini.launch import launch
from picotron_mini.layout import split
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.model import costs
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.parallel.data import GradientBuckets
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.machine import MACHINES
from picotron_mini.parallel.parallelize import layout_of, parallelize, stage_layers
from picotron_mini.parallel.plan import meshes
from picotron_mini.parallel.predict import predict
from picotron_mini.parallel.tensor import sharded_dim, tensor_parallel
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step
from picotron_mini.verify import make_batches, verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem: one axis is not enough
#
# A model of the shape of Llama 3 70B, bf16 with float32 masters and AdamW, sequences of 8,192 tokens, 64 of them a
# step, on 64 GPUs of 80 GB, eight a host. Put all 64 ranks on one axis, whichever, and look at what becomes of the
# rank that has most to keep.

# %%
llama = ModelConfig(
    vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64, num_kv_heads=8,
    head_dim=128, tie_embeddings=False,
)  # fmt: skip
WORK = TrainConfig(seq_len=8192, batch_size=64, micro_batch_size=1, dtype="bfloat16", device="cuda", compile=True)
FIRST = dict.fromkeys(AXES, 0)  # the coordinates of rank 0


def large(layout: str, **train: object) -> RunConfig:
    return resolve(RunConfig(layout=layout, model=llama, train=replace(WORK, **train)), gpus=64)


print(f"{costs.parameters(llama) / 1e9:.1f} billion parameters")
for layout, train in (("dp=64", {}), ("dp=64", {"zero": 3}), ("cp=64", {}), ("pp=64", {}), ("tp=64", {}), ("tp=8", {})):
    name = layout + (" zero=3" if train else "")
    try:
        each = large(layout, **train)
    except ConfigError as error:
        print(f"{name:13} refused: {error}")
        continue
    kept = footprint(each, layout_of(each), FIRST).total
    sent = sum(predict_step(each, layout_of(each), FIRST).values())
    m, p = each.train.micro_batches, each.mesh.pp
    bubble = f", {(p - 1) / (m + p - 1):.0%} of the time idle" if p > 1 else ""
    print(f"{name:13} keeps {kept / 1e9:>6,.0f} GB, sends {sent / 1e9:>6,.1f} GB a step{bubble}")

# %% [markdown]
# Read it line by line.
#
# (*Sent* is rank 0's payload. Of an all_gather that is a rank's own part: ZeRO 3 fetches 64 times its 4.4 GB of
# weights. A middle stage of a pipeline sends twice what the first does.)
#
# - **dp** copies everything: 18 bytes a parameter on each rank, sixteen devices' worth. ZeRO 3 cuts that by 64, and
#   then the weights travel for every micro-batch. And dp ends where the batch ends: 64 sequences are 64 ranks. A
#   thousand ranks would need a batch of a thousand.
# - **cp** cuts activations only. Weights and their state stay whole.
# - **pp** sends least by far, and idles half of the time: the batch has 64 micro-batches for 64 stages.
# - **tp** is refused: there are 8 key-value heads. With 8 ranks it does not fit, and it sends the most by far, between
#   products, waited for. Over a slow link that is hopeless.
#
# No axis does it. But their limits are of different kinds, so they can be *multiplied*: tp=8 inside a host cuts
# all matrices by 8, pp=4 again by 4, and for dp there are 2 replicas left.

# %%
together = large("dp=2,tp=8,pp=4", zero=1, sequence_parallel=True, recompute="full")
kept = footprint(together, layout_of(together), FIRST).total
needs = predict(together, MACHINES["h100-cluster"])
print(f"dp=2,tp=8,pp=4 with ZeRO 1 keeps {kept / 1e9:.0f} GB between steps; does it fit: {needs.fits}")
assert needs.fits and kept < 60e9

# %% [markdown]
# ## The mesh
#
# Ranks have numbers, and the mesh turns a number into a coordinate on each axis. `tp` runs fastest, then `cp`, `dp`,
# `pp`. A *group* of an axis is the ranks that differ in that coordinate only. Eight ranks, four a host:

# %%
shape = MeshShape(dp=2, tp=2, pp=2)
for axis in ("tp", "dp", "pp"):
    print(f"{axis}: {groups(shape, axis)}")
for rank in range(8):  # the library, rank by rank, says the same
    assert all(Mesh(shape, rank)[axis].ranks in groups(shape, axis) for axis in ("tp", "dp", "pp", "world"))
print("rank 5 is at", {axis: n for axis, n in coordinates(shape, 5).items() if getattr(shape, axis) > 1})

# %% tags=["nbval-ignore-output"]
draw_mesh(shape, 4)

# %% [markdown]
# A colour is a group. With this numbering tp and dp stay inside a host, and only the pipeline's messages leave it.
# Number the same ranks with tp slowest, and it is tp that leaves:

# %% tags=["nbval-ignore-output"]
draw_mesh(shape, 4, order=("tp", "cp", "dp", "pp"))

# %% [markdown]
# Nothing that is computed changes: any numbering gives the same result. The bytes do not change either. *Where* they
# travel does. We let the library predict a rank's bytes, and add up the axes that cross hosts, for the 70B model on
# 64 ranks in hosts of 8:

# %%
sent = predict_step(together, layout_of(together), FIRST)
by_axis = {axis: sum(n for (a, _), n in sent.items() if a == axis) for axis in ("tp", "dp", "pp")}
print("a rank sends in a step:", ", ".join(f"{axis} {n / 1e9:.1f} GB" for axis, n in by_axis.items()))
orders = {
    "pp, dp, cp, tp (ours)": AXES,
    "dp, pp, cp, tp": ("dp", "pp", "cp", "tp"),
    "tp, cp, dp, pp": ("tp", "cp", "dp", "pp"),
}
slow = {name: bytes_between_hosts(sent, together.mesh, 8, order) for name, order in orders.items()}
for name, n in slow.items():
    print(f"slowest to fastest {name:22} {n / 1e9:>7.1f} GB of it on axes that cross hosts")
assert slow["pp, dp, cp, tp (ours)"] == slow["dp, pp, cp, tp"] < slow["tp, cp, dp, pp"] / 10

# %% [markdown]
# So the rule: **what talks most gets the fastest links.** tp exchanges hidden states in every layer and waits for them,
# so it is fastest, and as large as a host at most. What may lie between hosts is what talks seldom, or can hide: the
# pipeline's messages (small, between neighbours), and the gradients of dp (large, once a step, beside backward).
# Which of these two is outermost is a choice. Here the host is full with tp=8, so both cross and the sums are equal.
# The library puts pp outermost, so that where dp and tp fit into a host together, dp stays inside. Llama 3 was trained
# with dp outermost (arXiv 2407.21783): its sharded weights are fetched ahead of use, and so stand the slowest links.
#
# ## The order of application
#
# All techniques change the same model, one after the other. Here is the library's docstring, which is also the order of
# its code:

# %% tags=["nbval-ignore-output"]
print(inspect.getmodule(parallelize).__doc__)

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(parallelize))

# %% [markdown]
# Why this order? Take two neighbours and swap them.
#
# **Pipeline before everything**, because it removes most of the model. Build the whole of it first and cut then, and
# the build alone takes more memory than training will:

# %%
with torch.device("meta"):  # shapes, and no memory
    whole = GPT(llama)
    stage = GPT(llama, layers=stage_layers(llama, 4, 8192)[1], embed=False, head=False)
elements = [sum(p.numel() for p in model.parameters()) for model in (whole, stage)]
print(
    "in float32: the whole model {:.0f} GB, the second of four stages {:.0f} GB".format(
        *(4 * n / 1e9 for n in elements)
    )
)
assert elements[0] > 4 * elements[1]

# %% [markdown]
# **Tensor before data.** Cutting a weight makes a new parameter. Data parallelism hangs its hooks on parameters. Hang
# them first, and they hang on weights that nobody uses any more. We try both orders on dp=2,tp=2, compare the gradients
# with those of one device, and count bytes.

# %%
CONFIG = ModelConfig(
    vocab_size=100, hidden_size=32, intermediate_size=80, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4,
    tie_embeddings=False,
)  # fmt: skip


def make_model() -> GPT:
    model = GPT(CONFIG)
    init_weights(model, 0)
    return model.double()


def make_tokens() -> tuple[Tensor, Tensor]:
    """Inputs and targets [4, 16] of the whole batch."""
    tokens = torch.randint(CONFIG.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The sum over these tokens, divided by the number of all."""
    return model.loss(model(tokens), targets) / (4 * 16)


one = make_model()
loss_of(one, *make_tokens()).backward()
truth = {name: p.grad for name, p in one.named_parameters()}


def in_order(order: str) -> tuple[list[str], int]:
    """In a rank: the parameters whose gradient is that of one device, and the bytes sent over dp."""
    mesh = Mesh.build(MeshShape(dp=2, tp=2))
    model = make_model()
    buckets = None
    for technique in order.split(", "):
        if technique == "tensor":
            tensor_parallel(model, mesh["tp"])
        else:
            buckets = GradientBuckets(model.parameters(), mesh["dp"])
    buckets.arm()
    rows = slice(2 * mesh["dp"].index, 2 * mesh["dp"].index + 2)
    with ledger.recording() as sent:
        loss_of(model, *(x[rows] for x in make_tokens())).backward()
        buckets.finish()
    right = []
    for name, p in model.named_parameters():
        dim = sharded_dim(name)
        want = truth[name]
        if dim is not None:
            start, stop = split(want.shape[dim], 2)[mesh["tp"].index]
            want = want.narrow(dim, start, stop - start)
        if p.grad is not None and (p.grad - want).abs().max() < 1e-12:
            right.append(name)
    return right, sent["dp", "all_reduce"]


for order in ("tensor, data", "data, tensor"):
    right, sent_bytes = launch(in_order, order, world_size=4)[0]
    print(f"{order}: {len(right)} of {len(truth)} gradients right; {sent_bytes:,} bytes over dp")
    assert (len(right) == len(truth)) == (order == "tensor, data")

# %% [markdown]
# The wrong order raises nothing. It sends *more* bytes, whole weights' worth of zeros, and only the norms, which tensor
# parallelism leaves alone, get their sums. The byte prediction would have told.
#
# The other places in the list have reasons of the same kind:
#
# - **Weights after cutting, each by its global name.** Draw them from one seed a rank instead, and stages start alike
#   (picotron did: `05.stages_start_alike` in the museum), or a layout changes the experiment.
# - **Masters before data**: what is reduced and cut is the gradient of what is updated.
# - **Compile inside recompute**: what is compiled is one block with its exchanges; what is forgotten is its inside.
# - **Data last**, since it takes the parameters as they are: cut, cast, frozen or not.
#
# ## All axes at once
#
# Now the real thing: `dp=2,cp=2,tp=2` and `pp=2` on top, 16 processes, with ZeRO 2 and sequence parallelism. And the
# eight-rank layouts with each axis left out once. Two steps of training are compared with one device: loss, every
# gradient, the norm, the weights.

# %%
LAYOUTS = {
    "dp=2,cp=2,tp=2": {}, "dp=2,cp=2,pp=2": {"zero": 1}, "dp=2,tp=2,pp=2": {"zero": 2, "schedule": "zb-h1"},
    "cp=2,tp=2,pp=2": {"sequence_parallel": True}, "dp=2,cp=2,tp=2,pp=2": {"zero": 2, "sequence_parallel": True},
}  # fmt: skip
reports = {}
for layout, train in LAYOUTS.items():
    report = reports[layout] = verify(layout, MODEL, replace(TRAIN, steps=2, **train), optimizers=("adamw",))
    assert report.ok and report.max_rel_err < 1e-12 and not report.bytes_problems
    print(f"{layout:20} {train or ''!s:47} equal to one device within 1e-12, every byte as predicted")

# %% [markdown]
# On the command line: `picotron-mini verify dp=2,cp=2,tp=2,pp=2 --zero 2 --sequence-parallel --seq-len 16`. What makes
# it come out even is not this chapter's code: there is next to none. It is that the axes share one fact, the *layout*,
# which says for each parameter where its parts are and over which axes its gradient is summed. With all axes on:

# %%
report_run = resolve(
    RunConfig(layout="dp=2,cp=2,tp=2,pp=2", model=MODEL, train=replace(TRAIN, zero=2, sequence_parallel=True))
)
for name in ("embed.weight", "layers.0.mlp.up.weight", "layers.0.mlp_norm.weight"):
    place = layout_of(report_run)[name]
    cuts = ", ".join(f"dim {s.dim} over {s.axis}" for s in place.shards)
    print(f"{name:26} stages {place.stages!s:7} cut: {cuts:32} summed over {', '.join(place.sum_axes)}")

# %% [markdown]
# Three different lines. The matrix is summed over the axes that share out tokens, dp and cp. The norm also over tp,
# because with sequence parallelism those ranks share out tokens as well. The tied embedding over pp, because it lies on
# two stages. The rule behind all three: *sum over an axis if its ranks hold the same numbers and each has a part of
# their gradient.*
#
# ## Bytes by axis
#
# Each technique's formula is known from its chapter. What is new is how they act on *each other*. Double one axis,
# keep the global batch, and see what a rank sends on every axis, compared with before. A rank of a middle stage of the
# 70B model:

# %%
base = MeshShape(pp=4, dp=2, cp=2, tp=2)


def sent_on(shape: MeshShape) -> dict[str, int]:
    each = resolve(RunConfig(layout=str(shape), model=llama, train=WORK), gpus=128)
    sent = predict_step(each, layout_of(each), {**FIRST, "pp": 1})
    return {a: sum(n for (axis, _), n in sent.items() if axis in (a, f"{a}_cp")) for a in ("dp", "cp", "tp", "pp")}


before = sent_on(base)
ratios = {}
print("doubled   " + "".join(f"{axis:>6}" for axis in before))
for axis in before:
    after = sent_on(replace(base, **{axis: 2 * getattr(base, axis)}))
    ratios[axis] = {a: after[a] / before[a] for a in before}
    print(f"{axis:10}" + "".join(f"{ratios[axis][a]:6.2f}" for a in before))
assert (
    abs(ratios["tp"]["dp"] - 0.5) < 0.01 and abs(ratios["dp"]["dp"] - 1) < 0.01 and abs(ratios["dp"]["tp"] - 0.5) < 0.01
)

# %% [markdown]
# Read a column. What dp sends is halved by tp and by pp, which cut the weights, and by nothing else. What tp sends is
# halved by everything that leaves a rank fewer tokens or fewer layers. What cp sends is halved by dp and pp for the
# same reason, and by tp, which shares out the key-value heads. What pp sends depends on a rank's tokens alone
# (with sequence parallelism, each tp rank sends its own).
#
# Now the diagonal: **no axis lowers its own traffic.** Twice as many tp ranks each still send all hidden states, and
# have half as much to compute between. Only the *other* axes lower it. That is the reason for the shape that many large
# runs have: tp up to a host and no further, then pp or cp, and dp for the rest. (Payload: a ring of n moves
# 2(n-1)/n of an all_reduce's, (n-1)/n of a reduce_scatter's, and n-1 times an all_gather's.)
#
# That the formulas are the truth, to the byte, we take from the 16 ranks above:

# %%
report = reports["dp=2,cp=2,tp=2,pp=2"]
for name, n in report.bytes_predicted.items():
    print(f"{name:20} predicted {n:>7,}  counted {report.bytes_counted[name]:>7,}")
assert report.bytes_predicted == report.bytes_counted

# %% tags=["nbval-ignore-output"]
draw_bytes(
    {
        layout.replace(",", "\n"): {
            axis: sum(n for name, n in each.bytes_counted.items() if name.split()[0] in (axis, f"{axis}_cp"))
            for axis in ("dp", "cp", "tp", "pp")
        }
        for layout, each in reports.items()
    }
)

# %% [markdown]
# ## Memory
#
# Between steps a rank keeps weights, gradients, masters and the optimizer's state; `footprint.py` has the formulas, and
# its docstring is the table. Eight real ranks, dp=2,tp=2,pp=2, each ZeRO stage: what is predicted, and what their
# storages add up to after a step.


# %%
def storages(stages_of_zero: tuple[int, ...]) -> list[tuple[int, int]]:
    """In a rank: bytes predicted and counted, after one step."""
    out = []
    mesh = Mesh.build(shape)
    for zero in stages_of_zero:
        each = resolve(RunConfig(layout=str(shape), model=MODEL, train=replace(TRAIN, zero=zero)))
        parallel = parallelize(each, mesh, torch.device("cpu"))
        optimizer = make_optimizer(parallel.trained, each.train)
        rows = each.train.micro_batch_size
        train_step(parallel, optimizer, [type(b)(*(x[:rows] for x in vars(b).values())) for b in make_batches(each)])
        out.append((footprint(each, parallel.layout, parallel.index).total, held_bytes(parallel, optimizer)))
    return out


found = launch(storages, (0, 1, 2, 3), world_size=8)
for zero in range(4):
    per_rank = [of_rank[zero] for of_rank in found]
    assert all(predicted == counted for predicted, counted in per_rank)
    least, most = min(n for n, _ in per_rank), max(n for n, _ in per_rank)
    print(f"zero={zero}: ranks keep {least:,} to {most:,} bytes, predicted = counted on all 8")

# %% [markdown]
# To the byte, on every rank. The rest of the peak (activations, messages under way, temporaries) cannot be had to the
# byte. It is estimated: so many bytes a token and layer, times the micro-batches that a stage has under way at once.
# For the 70B model on 64 GPUs:

# %%
CANDIDATES = {
    "dp=64 zero=3": ("dp=64", {"zero": 3}),
    "dp=64 zero=3, recompute": ("dp=64", {"zero": 3, "recompute": "full"}),
    "dp=8,tp=8": ("dp=8,tp=8", {"zero": 1, "sequence_parallel": True}),
    "dp=8,tp=8, recompute": ("dp=8,tp=8", {"zero": 1, "sequence_parallel": True, "recompute": "full"}),
    "dp=2,tp=8,pp=4": ("dp=2,tp=8,pp=4", {"zero": 1, "sequence_parallel": True}),
    "dp=2,cp=2,tp=4,pp=4": ("dp=2,cp=2,tp=4,pp=4", {"zero": 1, "sequence_parallel": True}),
}
gpu = MACHINES["h100-cluster"]
memory = {name: predict(large(layout, **train), gpu) for name, (layout, train) in CANDIDATES.items()}

# %% tags=["nbval-ignore-output"]
draw_memory(memory, gpu.memory)

# %% [markdown]
# The first bar keeps 20 GB between steps and would not fit for its activations: ZeRO does nothing for a sequence of
# 8,192 tokens through 80 layers. tp with sequence parallelism, cp, pp and recompute do. And the stages of a pipeline do
# not get away with a fourth of the activations: the first one has four micro-batches under way.
#
# Is the estimate any good? Two real ranks, a small model, and PyTorch's profiler. It sees every allocation, but not
# what gloo's own threads give back, so these are layouts in which no collective makes a tensor of its own:


# %%
SMALL = ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=6, num_heads=4, num_kv_heads=2)
STEP = TrainConfig(seq_len=128, batch_size=8, device="cpu", bucket_mb=1)
CHOSEN = {
    "dp=2, micro-batch 4": ("dp=2", {"micro_batch_size": 4}),
    "cp=2, micro-batch 8": ("cp=2", {"micro_batch_size": 8}),
    "pp=2, micro-batch 2": ("pp=2", {"micro_batch_size": 2}),
    "pp=2, all forward first": ("pp=2", {"micro_batch_size": 2, "schedule": "afab"}),
}


def peak(each: RunConfig) -> int:
    """In a rank: the most bytes allocated at once, over two steps."""
    mesh = Mesh.build(each.mesh)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        parallel = parallelize(each, mesh, torch.device("cpu"))
        optimizer = make_optimizer(parallel.trained, each.train)
        tokens = torch.zeros(each.train.micro_batch_size, each.train.seq_len, dtype=torch.int64)
        positions = torch.arange(each.train.seq_len).expand_as(tokens)
        for _ in range(2):
            train_step(parallel, optimizer, [Batch(tokens, tokens, positions, tokens)] * each.train.micro_batches)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(0).max())


runs = [
    resolve(RunConfig(layout=layout, model=SMALL, train=replace(STEP, **train))) for layout, train in CHOSEN.values()
]
for name, each in zip(CHOSEN, runs, strict=True):
    measured = max(launch(peak, each, world_size=2, output="hide"))
    ratio = predict(each, gpu).memory_bytes / measured
    print(f"{name:24} peak predicted within a tenth: {abs(ratio - 1) < 0.1}")
    assert abs(ratio - 1) < 0.1

# %% [markdown]
# ## The plan
#
# A model, a batch, so many ranks: which layout? Write the number of ranks as pp · dp · cp · tp in every way, ask
# the one predicate of legality, predict memory and step time of what is left, and rank what fits. Time is work over
# rates, plus messages by latency and bandwidth less what hides behind computing, plus the bubble from the schedule's
# own clock. The rates belong to a *machine*:

# %% tags=["nbval-ignore-output"]
print(textwrap.fill(gpu.source, 96))

# %%
legal, ranked = 0, []
for mesh in meshes(64):
    if crosses(mesh, "tp", 8) or crosses(mesh, "cp", 8):  # exchanges in every layer, over slow links
        continue
    try:
        each = large(str(mesh), zero=int(mesh.dp > 1), sequence_parallel=mesh.tp > 1, recompute="full")
    except ConfigError:
        continue
    legal += 1
    if each.train.micro_batches >= mesh.pp and (found := predict(each, gpu)).fits:
        ranked.append(found)
ranked.sort(key=lambda found: found.seconds)
print(f"{len(meshes(64))} ways to write 64 as pp * dp * cp * tp")
assert 0 < len(ranked) < legal < len(meshes(64))

# %% tags=["nbval-ignore-output"]
print(f"{legal} legal with these settings and worth a look, {len(ranked)} of them have no idle stage and fit")
print(f"{'layout':22}{'time':>6}{'GB':>5}   {'GB a rank and step, by axis'}")
for found in ranked[:8]:
    each = {
        a: sum(n for (axis, _), n in found.traffic.items() if axis in (a, f"{a}_cp")) for a in ("tp", "cp", "dp", "pp")
    }
    text = ", ".join(f"{axis} {n / 1e9:.1f}" for axis, n in each.items() if n > 1e6)
    print(f"{found.run.layout:22}{found.seconds / ranked[0].seconds:6.2f}{found.memory_bytes / 1e9:5.0f}   {text}")

# %% tags=["nbval-ignore-output"]
draw_time(ranked[:8])

# %% [markdown]
# Times are in units of the best. Look at what each layout pays with: bubble (many stages, few micro-batches), waiting
# for tp, or gradients that backward cannot hide. And look at how close the first ones lie. A prediction orders layouts
# well when they differ much, and cannot tell neighbours apart: measure the two or three best (`picotron-mini bench`).
#
# We held recompute, schedule and micro-batch fixed, so only meshes competed. The library's `plan` varies these too, and
# gives up memory savings where a layout fits without. On the command line:
#
# ```console
# $ picotron-mini plan --ranks 64 --machine h100-cluster --preset bench
# ```
#
# ### Is it true?
#
# Bytes and the memory between steps are checked to the byte, above and in the tests. Step time depends on the machine,
# and a page that is compared word by word cannot hold it. `tests/performance/plan_checked.py` measures the machine's
# rates, predicts twenty layouts, runs them, and prints both. The [write-up](../summary/07_3d_parallel.md) has what came
# out. On two CPU cores all sixteen layouts of one and two ranks are within 15 % in time and 6 % in memory. That took a
# lesson of its own: the best of ten messages, each timed alone, takes a third of what messages in a step take on
# average. On one and two GPUs 42 runs were compared with the rates above: all memory is
# within 10 %, 39 times are within 20 %, and the order of twelve layouts of one model is nearly right (rank correlation
# 0.83). Where it misses, the host is slower than the GPU. Two GPUs are not 64, though: for the links between hosts the
# ranking above is a calculation.
#
# ## A rehearsal of 1,024 ranks
#
# Nobody wants to learn on 1,024 GPUs that the bytes were miscounted. What a rank does depends on its coordinates only,
# not on what it receives. So this process can *be* rank 517 of 1,024: the real `parallelize` and the real training
# step, on tensors without memory, with a process group that sends nothing. The ledger counts as ever.

# %%
thousand = resolve(
    RunConfig(
        layout="dp=8,cp=2,tp=8,pp=8",
        model=llama,
        train=replace(
            WORK, batch_size=64, zero=1, sequence_parallel=True, recompute="full", device="cpu", compile=False
        ),
    )
)
rehearsed = dry_run(thousand, 517)
print(f"rank 517 of {thousand.mesh.world_size} is at {rehearsed.index}")
print(f"{rehearsed.parameters / 1e9:.2f} billion parameters, {rehearsed.held / 1e9:.1f} GB kept, as predicted")
for (axis, operation), n in sorted(rehearsed.counted.items()):
    print(f"{axis:6} {operation:15} {n:>15,} bytes, as predicted")
assert rehearsed.problems == [] and rehearsed.counted == rehearsed.predicted

# %% [markdown]
# On the command line: `picotron-mini plan dp=8,cp=2,tp=8,pp=8 --dry-run ...`. What a rehearsal cannot tell: values
# (that is for `verify`, with smaller axes), time, and whether the network holds.
#
# ## The same from PyTorch
#
# `init_device_mesh` makes the grid; `parallelize_module` cuts by a plan of names; `fully_shard` shares the cut
# parameters out over dp (ZeRO 3). The order is theirs too: tensor first, then data. Same model, same batch, dp=2,tp=2:


# %%
def with_pytorch() -> tuple[dict[str, Tensor], list[int], str]:
    """In a rank: whole gradients, the ranks of its tp group, and how one weight is placed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = Replicate()
    five = (whole, None, None, None, None)  # attention's arguments; the first is the hidden states
    tensor_plan = {
        "layers.*.attention": PrepareModuleInput(input_layouts=five, desired_input_layouts=five),
        "layers.*.mlp": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        **{f"layers.*.{name}": ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v")},
        **{f"layers.*.{name}": ColwiseParallel() for name in ("mlp.gate", "mlp.up")},
        **{f"layers.*.{name}": RowwiseParallel() for name in ("attention.o", "mlp.down")},
    }
    model = make_model()
    parallelize_module(model, mesh["tp"], tensor_plan)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    rows = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    tokens, targets = (x[rows] for x in make_tokens())
    logits = model.head(model(tokens))
    (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (4 * 16)).backward()
    grads = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor) and isinstance(p.grad, DTensor)
        grads[name] = p.grad.full_tensor()
    place = str(model.layers["0"].mlp.down.weight.placements)
    return grads, torch.distributed.get_process_group_ranks(mesh["tp"].get_group()), place


theirs = launch(with_pytorch, world_size=4, output="hide")
ours = Mesh(MeshShape(dp=2, tp=2), 3)["tp"].ranks
print(f"rank 3's tp group: theirs {theirs[3][1]}, ours {list(ours)}")
ratio = {name: (truth[name].norm() / g.norm()).item() for name, g in theirs[0][0].items()}
print(f"norm of each gradient, one device over PyTorch: {min(ratio.values()):.6f} to {max(ratio.values()):.6f}")
print("mlp.down.weight is placed as", theirs[0][2])
for name, g in theirs[0][0].items():
    assert (2 * g - truth[name]).abs().max() < 1e-12 * truth[name].abs().max()

# %% [markdown]
# The same numbering (the last dim of their mesh is fastest), the same cuts, and gradients that are half of the truth:
# `fully_shard` *averages* over dp, as DDP does (chapter 03). With a loss that is divided by the global number of tokens
# one has to multiply by dp, or to tell it so. A `DTensor` carries its placement with it, which is what `Placement` is
# in our layout. The order of the techniques and their agreement are the trainer's own work there too.
#
# ## Exercises
#
# `solution("07.across")` (from `picotron_mini.course.exercises`) prints an answer.
#
# **1. What crosses between hosts.** Given the mesh, the ranks of a host, and a rank's bytes by (axis, operation), add
# up those on axes that have ranks on more than one host. `dp_cp` and `world` are axes too.


# %%
def across(shape: MeshShape, ranks_per_host: int, sent: dict[tuple[str, str], int]) -> int: ...


check("07.across", across)

# %% [markdown]
# **2. Who holds a part of this gradient.** Return the axes over which it is summed, for a `"matrix"` (cut over tp), a
# `"norm"` (whole on every tp rank) and the `"tied"` embedding; only axes larger than 1.


# %%
def summed(kind: str, shape: MeshShape, sequence_parallel: bool) -> set[str]: ...


check("07.summed", summed)

# %% [markdown]
# **3. The norm of a gradient that nobody has whole.** On dp=2,tp=2,pp=2 each rank holds slices. Return the norm of the
# one global gradient, the same on all eight ranks. `layout[name].counts(coordinates(mesh.shape, mesh.rank))` says
# whether this rank is the first of those that hold the same numbers; `all_reduce(x, mesh["world"])` of
# `picotron_mini.collectives` sums. Some ranks count nothing: begin with `torch.zeros((), dtype=torch.float64)`.


# %%
def global_norm(gradients: dict[str, Tensor], layout: dict, mesh: Mesh) -> float: ...


check("07.norm", global_norm)

# %% [markdown]
# **4. A layout within a budget.** Eight ranks on two hosts of four. The model has 4 layers, 4 heads, 2 key-value heads;
# the batch is 8 sequences of 16 tokens in micro-batches of one. Return a layout and settings, such as
# `("dp=8", {"zero": 1})`, which is legal, keeps at most 140,000 bytes on every rank between steps, and hands over at
# most 5,000 bytes a step on axes that cross hosts. The check runs it on eight ranks and counts. There is more than one.


# %%
def choose() -> tuple[str, dict]: ...


check("07.budget", choose)

# %% [markdown]
# ## From the bug museum
#
# With several axes every part can be right, and their agreement wrong.

# %% tags=["nbval-ignore-output"]
show("07.two_numberings")

# %%
for layout in ("tp=2", "dp=4", "dp=2,tp=2"):
    broken = run("07.two_numberings", layout, optimizers=("sgd",))
    print(f"{layout:10} equal to one device with the bug: {broken.ok}")
    assert broken.ok == (layout != "dp=2,tp=2")

# %% [markdown]
# On two ranks it cannot show, and not on four of one axis either. That is why every layout is tested, and not every
# technique. Write a test that notices: a function of the mesh that runs on all four ranks of `dp=2,tp=2`, builds a
# `parallelize(run, mesh, torch.device("cpu"))` and asserts something about who this rank is.


# %%
def my_test(mesh: Mesh) -> None: ...


kill("07.two_numberings", my_test)

# %% [markdown]
# More of this room: `07.summed_over_dp_only`, `07.targets_counted_over_dp`, `07.norm_per_stage`. Two real ones from
# huggingface/picotron hang in other rooms: `06.one_data_rank_is_not_wrapped` (gradients not summed over cp where dp is
# 1) and `05.stages_start_alike` (one seed for all stages).
#
# ## On GPUs
#
# ```console
# $ picotron-mini plan --ranks 8 --preset bench                      # measures this machine, ranks its layouts
# $ picotron-mini verify dp=2,tp=2,pp=2 --device cuda --dtype float32
# $ picotron-mini bench --preset bench --layout dp=2,tp=2,pp=2       # measure the two or three best
# $ torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python \
#     picotron-mini train --preset h100 --layout dp=2,tp=4,pp=2 --zero 1 --sequence-parallel
# ```
#
# `torchrun` fills hosts rank by rank, which is what the mesh counts on: 8 ranks a host, so tp=4 and dp=2 stay inside.
#
# This chapter's closing run, on two H200s with torch 2.11, needs least memory of all chapters' closing runs:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset h100 tp=2 --recompute full --steps 60
# step 51/60  loss 6.087  validation 5.463 (1.935 bits per byte)  143,026 tokens/s  memory 4 GiB  0:04 left
# step 60/60  loss 5.837  validation 5.301 (1.878 bits per byte)  160,835 tokens/s  memory 4 GiB  0:00 left
# ```
#
# 4 GiB a GPU where `dp=2 --zero 2` needs 16.2, at 0.39 of its speed. What `plan` predicts for such layouts, and how far
# it was off, is in the [write-up](../summary/07_3d_parallel.md#measured-performance).
#
# ## What to read next
#
# - [The write-up](../summary/07_3d_parallel.md): decisions, how well predictions were met, limits.
# - [Questions](../interview_questions/07_3d_parallel.md), from warm-up to design, with proofs that run.
# - *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM* (arXiv 2104.04473): tensor,
#   pipeline and data parallelism together, and rules for choosing.
# - *The Llama 3 Herd of Models* (arXiv 2407.21783), on four axes and their order.
# - *TorchTitan* (arXiv 2410.06511): the same composition with PyTorch's own tools.
