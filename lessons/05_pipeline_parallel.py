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
# # 05 Pipeline parallel
#
# Give each rank some of the layers, and let the batch travel through the ranks. It is the cheapest way to spread a
# model, counted in bytes, and the only one whose main cost is waiting. After this lesson you can
#
# - cut the chain rule between two processes, by hand, and say what crosses the cut in each direction;
# - derive how much of the time a pipeline idles, and say how many micro-batches a given idle share needs;
# - write the two classic schedules as plain lists, and say what each costs in time and in memory;
# - say how virtual stages and a backward in two halves shrink the bubble, and what they are paid with;
# - read a timeline, a simulated one and that of a real run, and find what the stages wait for;
# - split layers over stages when the output head costs as much as several layers;
# - explain a deadlock of sends and receives from the stacks of the ranks;
# - recognise four bugs that crash nothing.
#
# You need chapter 00 (ranks, send and receive), chapter 01 (18 bytes a weight, the bytes of activations, the flops of
# the head), and chapter 03 for why losses are divided by the *global* number of tokens. Chapter 04 is compared with,
# not needed. Everything runs here on real processes. Reading and running takes 30 to 60 minutes, the exercises longer.

# %%
import inspect
import re
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from picotron_mini.collectives import ledger, receive, send
from picotron_mini.config import ConfigError, MeshShape, ModelConfig, RunConfig
from picotron_mini.course.exercises import check
from picotron_mini.course.figures.picture import LINES, drawing, figure, picture
from picotron_mini.course.figures.timeline import draw_timelines, merge, pretend, timed
from picotron_mini.course.instruments.in_order import messages_in_order
from picotron_mini.course.instruments.saved import SavedBytes
from picotron_mini.course.museum import kill, run, show
from picotron_mini.data.loader import Batch
from picotron_mini.launch import RankError, launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.model.costs import head_flops, layer_activation_bytes, layer_flops, parameters
from picotron_mini.model.gpt import GPT, IGNORE, init_weights
from picotron_mini.parallel import partial, pipeline, schedules
from picotron_mini.parallel.deferred import Deferred
from picotron_mini.parallel.parallelize import layout_of, parallelize, stage_layers
from picotron_mini.parallel.pipeline import run_pipeline
from picotron_mini.parallel.schedule_zero_bubble import zb_h1
from picotron_mini.parallel.schedules import (
    SCHEDULES,
    Action,
    Event,
    balance,
    draw,
    find_schedule,
    route_of,
    simulate,
)
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.presets import preset
from picotron_mini.training.step import compute_gradients, gradients_of
from picotron_mini.verify import MODEL, TRAIN, verify

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# %% [markdown]
# ## The problem, and its price
#
# Take the shape of Llama 3.1 8B. Trained with AdamW in mixed precision a weight takes 18 bytes: 2 for itself in bf16, 4
# each for the master copy, the two moments and the gradient. Data parallelism puts all of it on every rank. Tensor
# parallelism (chapter 04) cuts it, and hands over the hidden states four times in each layer. What if each rank had
# *whole* layers?

# %%
EIGHT_B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, tie_embeddings=False,
)  # fmt: skip
weights = parameters(EIGHT_B)
hidden_bytes = 4096 * EIGHT_B.hidden_size * 2  # one sequence of 4096 tokens, in bf16
print(f"{weights / 1e9:.2f} billion weights: {18 * weights / 1e9:.0f} GB of state, and a GPU of 80 GB")
print(f"tensor parallel: {4 * EIGHT_B.num_layers * hidden_bytes / 1e6:7,.1f} MB handed over by each rank, a sequence")
print(f"one border:      {hidden_bytes / 1e6:7,.1f} MB on the way forward, as many back")

# %% [markdown]
# A factor of 64, both ways counted, in *payload*: what a rank hands over to be sent. (Of the payload of an all_reduce
# a rank of a ring of $n$ then sends $2(n-1)/n$; a message to a neighbour is sent once.) The price is another one:
# while a sequence is in the first layers, the ranks that have the last layers wait for it. How long, and what can be
# done about it, is this chapter.
#
# ## Cutting the chain rule
#
# A **stage** is a run of consecutive layers, and the ranks that hold it: one here, two of them with `dp=2,pp=2`. The
# first has the embedding too, the last the final norm, the
# output head and the loss. Say there are three:
#
# $$h_1 = f_0(\text{tokens}) \qquad h_2 = f_1(h_1) \qquad L = f_2(h_2)$$
#
# Stage 1 knows nothing of $f_0$ and $f_2$. For the gradient of its own weights $W_1$ it needs two things from outside:
# $h_1$, to run its forward, and $\partial L / \partial h_2$, to run its backward. Then
#
# $$\frac{\partial L}{\partial W_1} = \frac{\partial L}{\partial h_2}\,\frac{\partial h_2}{\partial W_1}$$
#
# $$\frac{\partial L}{\partial h_1} = \frac{\partial L}{\partial h_2}\,\frac{\partial h_2}{\partial h_1}$$
#
# The second line is what stage 0 waits for. So hidden states go one way and their gradients come back, both of shape
# `[B, T, D]`, and no stage ever sees a weight of another.
#
# First the truth: one device, the whole batch. As in chapter 03 the targets are uneven on purpose.

# %%
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=80, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8,
    tie_embeddings=False,
)  # fmt: skip
STAGES, ROWS, T, D = 3, 8, 16, CONFIG.hidden_size


def make_batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, [8, 16] each; in sequence i only the first 2 i targets count."""
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[torch.arange(T) >= 2 * torch.arange(1, ROWS + 1)[:, None]] = IGNORE
    return tokens[:, :-1], targets


def make_stage(index: int, stages: int, config: ModelConfig = CONFIG) -> GPT:
    """The part of the model that one stage holds; the whole model with one stage."""
    layers = balance([1.0] * config.num_layers, stages)[index]
    model = GPT(config, layers=layers, embed=index == 0, head=index == stages - 1)
    init_weights(model, seed=0)  # by global name: the same numbers on any stage
    return model.double()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference in any gradient, relative to that gradient's largest value."""
    assert set(got) == set(want)
    return max(((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want)


model = make_stage(0, 1)
tokens, targets = make_batch()
N = int((targets != IGNORE).sum())
(model.loss(model(tokens), targets) / N).backward()
truth = gradients(model)
print(f"{len(truth)} gradients of {CONFIG.num_layers} layers, {N} targets")

# %% [markdown]
# ## The naive way
#
# Three real processes. Read the lines in order: this is all that pipeline parallelism does, and the rest is about when.


# %%
def one_after_the_other() -> dict[str, Tensor]:
    mesh = Mesh.build(MeshShape(pp=STAGES))
    pp, back = mesh["pp"], mesh["pp.backward"]  # the same ranks twice; why there are two comes later
    first, last = pp.index == 0, pp.index == pp.size - 1
    model = make_stage(pp.index, pp.size)
    tokens, targets = make_batch()

    hidden = tokens
    if not first:
        hidden = torch.empty(ROWS, T, D, dtype=torch.float64)
        receive(hidden, pp, pp.index - 1).wait()
        hidden.requires_grad_()  # a leaf: it has no history in this process
    output = model(hidden)
    if last:
        output = model.loss(output, targets) / N
    else:
        send(output.detach(), pp, pp.index + 1).wait()

    gradient = None  # on the last stage: the derivative of the loss by itself is 1
    if not last:
        gradient = torch.empty_like(output)
        receive(gradient, back, pp.index + 1).wait()
    torch.autograd.backward(output, gradient)  # fills .grad of the weights, and of `hidden`
    if not first:
        send(hidden.grad, back, pp.index - 1).wait()
    print(f"layers {', '.join(model.layers)}; {sum(p.numel() for p in model.parameters()):,} weights")
    return gradients(model)


per_stage = launch(one_after_the_other, world_size=STAGES)
together = {name: gradient for stage in per_stage for name, gradient in stage.items()}
assert error(together, truth) < 1e-12
print("the stages together have the gradient of one device")

# %% [markdown]
# It is right. What does it cost? Put it on a clock. `simulate` is the library's, and runs any order of work on any
# number of stages; a forward takes one unit here and a backward two, as the flops say. `F0` is the forward of the
# only piece of work, `B0` its backward, and `..` is a stage that waits.

# %%
naive = simulate(SCHEDULES["1f1b"], stages=4, micro_batches=1)
print(draw(naive))
print(f"idle: {100 * naive.bubble:.0f} %")
assert naive.bubble == 0.75

# %% [markdown]
# Each stage works a quarter of the time. Four GPUs are as fast as one, and all that was gained is memory.
#
# ## Micro-batches, and the bubble
#
# The cure is as old as the assembly line: cut the batch into $m$ **micro-batches**, and hand on the first when it is
# done. Since the loss is a sum (divided by the $N$ of the whole batch) the gradients of the micro-batches add up in
# `.grad`, and nothing about the result changes.
#
# How much idle time is left? Let $f$ and $b$ be the time of a forward and a backward of one micro-batch on one stage,
# and $p$ the number of stages. The last stage cannot start before the first micro-batch has come through the others,
# after $(p-1)f$. Then it works, $m(f+b)$. Then the last gradient goes back through the others, $(p-1)b$. So the step
# takes
#
# $$(m + p - 1)(f + b)$$
#
# of which each stage works $m(f+b)$, and waits for the rest. The share of the time that it waits is the **bubble**:
#
# $$\frac{p-1}{m+p-1}$$
#
# The ratio of $f$ and $b$ is not in it. Check it against the clock:

# %%
print(f"{'':>10}" + "".join(f"{m:>6} mb" for m in (1, 4, 16, 64)))
for p in (2, 4, 8):
    idle = [simulate(SCHEDULES["1f1b"], p, m, forward_cost=1.0, backward_cost=2.0).bubble for m in (1, 4, 16, 64)]
    print(f"{p:>3} stages" + "".join(f"{100 * share:>7.1f} %" for share in idle))
    assert all(abs(share - (p - 1) / (m + p - 1)) < 1e-12 for share, m in zip(idle, (1, 4, 16, 64), strict=True))

# %% [markdown]
# A rule to remember: with four micro-batches for each stage the bubble is at most a fifth. It is a share of *time*,
# and time is money: 8 stages and 16 micro-batches pay for 8 GPUs and get less than 6.
#
# Why not a thousand micro-batches? The batch is given by what trains well, so more micro-batches are smaller ones,
# until the matrices no longer fill the device. And with data parallelism beside it each pipeline only gets its share of
# the batch: every doubling of `dp` halves $m$.
#
# ## A schedule is a list
#
# What remains to choose is the *order* in which a stage works. In this library a schedule is a pure function that
# returns a list of actions, without a process or a tensor. Here are both, and what they look like on the clock.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(schedules.all_forward_all_backward))
print(inspect.getsource(schedules.one_f_one_b))

# %%
for name in ("afab", "1f1b"):
    timeline = simulate(SCHEDULES[name], stages=4, micro_batches=6)
    print(f"{name}: {timeline.total:.0f} units, {100 * timeline.bubble:.0f} % idle, live {timeline.peak_live}")
    print(draw(timeline), end="\n\n")

# %% [markdown]
# **All forward, all backward** (GPipe, arXiv 1811.06965) is the obvious one. **1F1B**, one forward, one backward
# (PipeDream-flush, arXiv 2006.09503), starts a backward as soon as there is one to run. Both take the same time, and
# the same bubble only moves to another place.
#
# The difference is in the last number, the *live* micro-batches. Between its forward and its backward the activations
# of a micro-batch must be kept. All-forward-all-backward keeps all $m$. Under 1F1B stage $s$ warms up
# with $p-1-s$ forwards, one for each stage behind it, and then alternates: a forward, a backward. (Its first backward
# is not there at once. The picture shows stage 0 run F0 to F3, then wait six units until B0 can start.) After the
# warm-up it runs a forward only where a backward follows. So it keeps at most $p - s$, whatever $m$
# is, and you may raise $m$, which is what shrinks the bubble, without paying in memory. That is its whole point.
#
# ## One executor for any list
#
# The other half of the library's pipeline runs a list of actions on a real stage. Here is its heart. Look for the four
# lines of the naive code, now one micro-batch at a time, in whatever order the list says: `mail.take` waits for a
# message whose `receive` was started before, `requires_grad_` makes it a leaf, `backward` is backward, and `mail.put`
# starts a `send`. `route.needs` and `route.makes` say which message an action starts from and leaves, `live` holds what
# is kept between a forward and its backward. Skip `chunk`, `backward_input` and what comes after it for now: they wait
# for "A smaller bubble", further down.

# %% tags=["nbval-ignore-output"]
source = inspect.getsource(run_pipeline)
print(source[source.index("    def run_forward_of") :])

# %% [markdown]
# (`receive` and `send` themselves stand in [`_Mail`](../picotron_mini/parallel/pipeline.py), a page above it.) Nothing
# in it knows a schedule's name, and each training step of the library goes through it. With one stage no
# message is sent, and 1F1B reads `F0 B0 F1 B1 ...`: run a micro-batch, add its gradient, let go of its activations.
# That is gradient accumulation, and so it has no code of its own.
#
# Run it: both schedules on three stages, and the same function on one stage.


# %%
def one_step(schedule: str, micro_batches: int, mesh: Mesh) -> tuple[dict[str, Tensor], int]:
    """This stage's gradients, and the bytes that it sent, of one step over the batch of above."""
    pp = mesh["pp"]
    model = make_stage(pp.index, pp.size)
    tokens, targets = (x.chunk(micro_batches) for x in make_batch())

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        output = model(tokens[m] if hidden is None else hidden)
        return output if model.head is None else model.loss(output, targets[m]) / N

    with ledger.recording() as sent:
        run_pipeline(
            SCHEDULES[schedule](pp.index, pp.size, micro_batches),
            forward=forward,
            axis=pp,
            gradient_axis=mesh["pp.backward"],
            shape=(ROWS // micro_batches, T, D),
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
    return gradients(model), sum(sent.values())


CASES = [(schedule, micro_batches) for schedule in SCHEDULES for micro_batches in (1, 4, 8)]


def all_cases(stages: int) -> list[tuple[dict[str, Tensor], int]]:
    mesh = Mesh.build(MeshShape(pp=stages))
    return [one_step(*case, mesh) for case in CASES]


for stages in (1, 3):
    per_case = list(zip(*launch(all_cases, stages, world_size=stages), strict=True))
    for per_stage in per_case:
        together = {name: gradient for grads, _ in per_stage for name, gradient in grads.items()}
        assert error(together, truth) < 1e-12
    print(f"pp={stages}: both schedules with 1, 4 and 8 micro-batches are equal to one device")

# %% [markdown]
# Note what `forward` divides by: $N$, the targets of the whole batch. Divide each micro-batch by its own number of
# targets and then by $m$, and you have a mean of means (chapter 03). Forget a divisor, and all gradients are too large
# by a whole factor; the museum below has one that was forgotten.
#
# ## What is kept: micro-batches, and bytes
#
# The simulator counts live micro-batches. What are they in bytes? Autograd can be asked: it tells of every tensor that
# it keeps for a backward, and lets us count it until it is let go. (`SavedBytes` does it, in 70 lines.) And a formula
# predicts it from the model's shape: `layer_activation_bytes` of the library, for one layer and one token.


# %%
def kept(cases: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """For each (schedule, micro-batches): the most bytes that autograd keeps on this stage, and those at the end."""
    mesh = Mesh.build(MeshShape(pp=4))
    pp, out = mesh["pp"], []
    config = replace(CONFIG, num_layers=8)  # two layers a stage
    model = make_stage(pp.index, pp.size, config).float()
    tokens = torch.randint(config.vocab_size, (8, 2, T), generator=torch.Generator().manual_seed(0))
    for schedule, micro_batches in cases:
        saved = SavedBytes(model.parameters())

        def forward(m: int, hidden: Tensor | None, saved: SavedBytes = saved) -> Tensor:
            with saved.watching():
                output = model(tokens[m] if hidden is None else hidden)
                return output if model.head is None else model.loss(output, tokens[m])

        run_pipeline(
            SCHEDULES[schedule](pp.index, pp.size, micro_batches), forward=forward, axis=pp,
            gradient_axis=mesh["pp.backward"], shape=(2, T, D), dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        out.append((saved.peak, saved.now))
    return out


rotary = 2 * T * CONFIG.head_dim // 2 * 4  # cosines and sines, made anew by each forward
one = 2 * (2 * T) * layer_activation_bytes(CONFIG) + rotary
print(f"formula: 2 layers keep {one:,} bytes of one micro-batch of {2 * T} tokens")
cases = [(schedule, micro_batches) for micro_batches in (4, 8) for schedule in SCHEDULES]
counted: dict[tuple[str, int], list[int]] = {}
for case, per_stage in zip(cases, zip(*launch(kept, cases, world_size=4), strict=True), strict=True):
    live = simulate(SCHEDULES[case[0]], 4, case[1]).peak_live
    counted[case] = [peak for peak, _ in per_stage]
    print(f"{case[0]}, {case[1]} micro-batches: live {live}, stage 1 kept {counted[case][1]:>9,} bytes")
    assert all(left == 0 for _, left in per_stage), "at the end of a step nothing is kept"
    for stage in (1, 2):  # inner stages: layers and nothing else
        assert counted[case][stage] == live[stage] * one

# %% [markdown]
# To the byte: the simulator's count times the formula. The outer stages keep a little more, and what that is matters
# once the vocabulary is large: the last stage keeps the log-probabilities of every token over the whole vocabulary,
# though under 1F1B of one micro-batch only.

# %% tags=["nbval-ignore-output"]
with drawing():
    fig = figure(6.8, 2.5)
    for ax, micro_batches in zip(fig.subplots(1, 2, sharey=True), (4, 8), strict=True):
        for shift, colour, name in ((-0.19, LINES[1], "afab"), (0.19, LINES[0], "1f1b")):
            values = [n / 1e3 for n in counted[name, micro_batches]]
            ax.bar([stage + shift for stage in range(4)], values, 0.36, color=colour, label=name)
        ax.set_xticks(range(4), [f"stage {stage}" for stage in range(4)])
        ax.set_title(f"{micro_batches} micro-batches", loc="left", fontsize=9)
    fig.axes[0].set_ylabel("kept activations, kB")
    fig.axes[0].legend()
picture(
    fig,
    "Bars of the bytes kept on four stages. All-forward-all-backward: about equally much on all stages, and twice as "
    "much with 8 micro-batches as with 4. 1F1B: a staircase falling from stage 0 to stage 3, the same for 4 and for 8.",
)

# %% [markdown]
# The staircase is a property of 1F1B: the first stage holds $p$ micro-batches, the last stage a single one. With equal
# layers on equal GPUs stage 0 is the first to run out of memory, unless the vocabulary is so large that the
# log-probabilities of one micro-batch outweigh the layers' activations of $p - 1$.
#
# ## The clock and the real run
#
# A simulator is a claim. Here is the run itself: four processes, the library's executor, and a note of when each action
# began and ended. This machine may have two cores only, and four stages that compute would take turns. So here **a
# sleep stands for the layers**: 15 ms for a forward, 30 ms for a backward. Messages, waiting and order are real.

# %%
FORWARD, BACKWARD = 0.015, 0.030


def traced(name: str, micro_batches: int, stages: int, costs: tuple[float, ...]) -> list[Event]:
    """When this stage did what, in seconds; stage s takes costs[s] times as long."""
    mesh = Mesh.build(MeshShape(pp=stages))
    pp = mesh["pp"]
    weight = torch.ones(D, requires_grad=True)
    events: list[Event] = []
    for scale in (0.0, costs[pp.index]):  # once without work: the first messages open the connections

        def forward(m: int, hidden: Tensor | None, scale: float = scale) -> Tensor:
            x = weight * 1 if hidden is None else hidden * weight
            x = pretend(x, scale * FORWARD, scale * BACKWARD)
            return x.sum() if pp.index == stages - 1 else x

        events.clear()
        dist.barrier()
        run_pipeline(
            SCHEDULES[name](pp.index, stages, micro_batches), forward=timed(forward, pp.index, events), axis=pp,
            gradient_axis=mesh["pp.backward"], shape=(D,), dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
    return events


timelines = {}
for name in ("afab", "1f1b"):
    simulated = simulate(SCHEDULES[name], 4, 8, FORWARD, BACKWARD)
    real = merge(launch(traced, name, 8, 4, (1.0,) * 4, world_size=4))
    assert real.peak_live == simulated.peak_live
    assert [(e.stage, e.action) for e in real.events] == [(e.stage, e.action) for e in simulated.events]
    timelines |= {f"{name}, simulated": simulated, f"{name}, real": real}
print("each stage did what the simulator said, in that order")

# %% tags=["nbval-ignore-output"]
draw_timelines(
    timelines,
    "Four timelines of four stages and eight micro-batches: each schedule simulated, and below it the real run. "
    "Simulated and real look alike. With all forward first, a stage waits in one block before its first backward; with "
    "1F1B it waits after its first forwards, and a little between the last backwards. Simulated, both idle 27 percent; "
    "the real runs a few percent more.",
    "seconds",
)

# %% [markdown]
# The real run is a little longer than the simulated one: a sleep ends late, a message takes time, the executor too.
# Where the boxes of a real trace are much wider apart than the simulator's, look there first.
#
# Now with **real layers**: two stages, so that each has a core. The simulator is given the average times that were
# measured on each stage, and predicts the whole step.


# %%
def traced_layers(micro_batches: int) -> list[Event]:
    mesh = Mesh.build(MeshShape(pp=2))
    pp = mesh["pp"]
    config = ModelConfig(
        vocab_size=512, hidden_size=192, intermediate_size=512, num_layers=6, num_heads=6, num_kv_heads=6, head_dim=32
    )
    model = make_stage(pp.index, 2, config).float()
    tokens = torch.randint(config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    events: list[Event] = []

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        output = model(tokens if hidden is None else hidden)
        return output if model.head is None else model.loss(output, tokens)

    for _ in range(3):  # the last one counts
        events.clear()
        dist.barrier()
        run_pipeline(
            SCHEDULES["1f1b"](pp.index, 2, micro_batches), forward=timed(forward, pp.index, events), axis=pp,
            gradient_axis=mesh["pp.backward"], shape=(2, 128, 192), dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
    return events


real = merge(launch(traced_layers, 6, world_size=2))
assert real.peak_live == (2, 1)


def mean_cost(kind: str) -> list[float]:
    per_stage = [[e.end - e.start for e in real.events if (e.stage, e.action.kind) == (s, kind)] for s in (0, 1)]
    return [sum(times) / len(times) for times in per_stage]


predicted = simulate(SCHEDULES["1f1b"], 2, 6, mean_cost("forward"), mean_cost("backward"))

# %% tags=["nbval-ignore-output"]
print(f"the real step took {real.total / predicted.total:.2f} times what the simulator says")
draw_timelines(
    {"simulated from average times": predicted, "real run of real layers": real},
    "Two timelines of two stages and six micro-batches under 1F1B, with real layers: simulated from average times, and "
    "as it ran. The order is the same; in the real run the widths of the boxes vary.",
    "seconds",
)

# %% [markdown]
# ## Proof
#
# `verify` trains some steps on the layout and on one device by a reference that knows nothing of stages, and compares
# loss, gradients, gradient norm and weights, with SGD and AdamW. Its model has nine layers and a tied embedding, so the
# stages are uneven. On the command line it is `picotron-mini verify pp=4`.

# %%
for stages in (2, 4):
    split = stage_layers(MODEL, stages, TRAIN.seq_len)
    print(f"layers on {stages} stages: {', '.join(str(len(layers)) for layers in split)}")
reports = {layout: verify(layout) for layout in ("pp=2", "pp=4", "dp=2,pp=2")}
for layout, report in reports.items():
    assert report.ok and report.first_divergence is None
    print(f"{layout:10} equal to one device within 1e-9: {', '.join(d.quantity for d in report.differences)}")

# %% [markdown]
# ## What it costs: bytes
#
# With $m$ micro-batches of `[B, T, D]` hidden states and $w$ bytes a number, each stage but the last sends
#
# $$m\,B\,T\,D\,w$$
#
# bytes of activations, and each but the first as many bytes of gradients, however many layers it has. (A tied embedding
# adds its gradient; see below.) From the three-stage run of above:

# %%
border = ROWS * T * D * 8
for (schedule, micro_batches), per_stage in zip(CASES, per_case, strict=True):
    sent = [number for _, number in per_stage]
    print(f"{schedule}, {micro_batches} micro-batches: the stages sent {sent}")
    assert sent == [border, 2 * border, border]

said, seen = report.bytes_predicted["pp send"], report.bytes_counted["pp send"]
assert said == 3 * (2 * 12 * 32) * 8 + 101 * 32 * 8, "3 micro-batches of [2, 12, 32], and a tied embedding [101, 32]"
print(f"verify, pp=4, rank 0: predicted {said:,}, counted {seen:,}")
assert not report.bytes_problems

# %% [markdown]
# The bytes do not depend on $m$: the same batch crosses the border in more pieces. Beside tensor parallelism, for the
# 1.8-billion-parameter model of the `bench` preset, a step of 4 micro-batches, by formula:

# %%
base = preset("bench")
print(f"{'':8}{'most payload of a rank':>22}")
for text in ("pp=2", "tp=2", "pp=4", "tp=4"):
    settings = resolve(replace(base, layout=text, train=replace(base.train, device="cpu")))
    layout = layout_of(settings)
    index = {"pp": min(1, settings.mesh.pp - 1), "dp": 0, "tp": 0}
    most = sum(n for (axis, _), n in predict_step(settings, layout, index).items() if axis != "world")
    print(f"{text:8}{most / 1e9:>19.2f} GB")

# %% [markdown]
# A factor of 49 to 98 in payload. On a ring of four a rank sends 1.5 times its payload of an all_reduce, which makes
# that 73 to 98 on the wire. And each all_reduce is a meeting of all ranks for which the computation stops: in the
# layers alone there are $4 \cdot 24$ of them for a micro-batch. An inner stage sends two messages for it, and they
# travel while the next micro-batch is computed. That is why pipelines are what crosses the slow links between
# machines, and tensor parallelism stays inside one.
#
# ## What it costs: latency
#
# Bytes are one half of a message's price. "Both schedules take the same time" was said of messages that cost nothing.
# Give them a travel time $c$ (a message keeps no stage busy, it only arrives later) and look again:

# %%
print("travel time of a message, in forwards:")
travel = [0.0, 0.25, 0.5, 1.0, 1.5]
print(f"{'':6}" + "".join(f"{c:>8}" for c in travel))
steps = {name: [simulate(SCHEDULES[name], 4, 16, send_cost=c).total for c in travel] for name in SCHEDULES}
for name, totals in steps.items():
    print(f"{name:6}" + "".join(f"{total:>8.1f}" for total in totals))
assert all(total == 3 * (16 + 3) + 2 * 3 * c for total, c in zip(steps["afab"], travel, strict=True))
assert steps["1f1b"][-1] > 1.4 * steps["afab"][-1]

# %% [markdown]
# All-forward-all-backward pays for the travel once there and once back, $2(p-1)c$ a step. 1F1B pays again and again.
# Why? Stage 0 has $p$ micro-batches on the way and starts the next forward only after a backward. A micro-batch's way
# to the last stage and back takes $p(f+b) + 2(p-1)c$, in which stage 0 has only $p(f+b)$ of work. So each micro-batch
# costs
#
# $$f + b + \frac{2(p-1)}{p}\,c$$
#
# in the long run. The lean memory of 1F1B is a budget of work in flight, and latency eats it. The cure is to run
# further ahead: with a warm-up of $2(p-1-s)$ forwards before a stage alternates, in place of $p-1-s$, the travel is
# hidden as long as $c \le (f+b)/2$. The price is nearly twice the memory. You write that schedule in exercise 5.

# %%
p, c = 4, 0.5
long, longer = (simulate(SCHEDULES["1f1b"], p, m, send_cost=c).total for m in (80, 160))
print(f"each micro-batch more: {(longer - long) / 80:.3f} units")
assert abs((longer - long) / 80 - (3 + 2 * (p - 1) / p * c)) < 1e-9

# %% [markdown]
# Where a message takes much less than a forward, as between GPUs of one machine, none of this shows. Between machines,
# with tiny micro-batches, it does.

# %% tags=["nbval-ignore-output"]
draw_timelines(
    {name: simulate(SCHEDULES[name], 4, 8, send_cost=1.0) for name in SCHEDULES},
    "Two timelines of four stages and eight micro-batches in which a message travels for as long as a forward takes. "
    "All forward, all backward: one wait in the middle of each stage. 1F1B: every stage waits again and again, and the "
    "step takes longer.",
    "forwards; a message travels for one",
)

# %% [markdown]
# ## Balance: the head is not free
#
# The slowest stage sets the pace of all. Layers are alike, so with 16 layers on 4 stages each gets four? The last stage
# also has the output head, and in the shape of Llama 3.2 1B (width 2048, vocabulary 128,256) that is one large product:

# %%
ONE_B = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
)
head = head_flops(ONE_B) / layer_flops(ONE_B, 2048)
print(f"the head costs as much as {head:.1f} layers")
even = [range(4 * stage, 4 * stage + 4) for stage in range(4)]
balanced = stage_layers(ONE_B, 4, 2048)  # what the library does
assert balanced == balance([1.0] * 16, 4, last_extra=head)
by_split = {}
for name, split in (("even", even), ("balanced", balanced)):
    costs = [len(layers) + head * (stage == 3) for stage, layers in enumerate(split)]
    by_split[name] = simulate(SCHEDULES["1f1b"], 4, 16, costs, [2 * cost for cost in costs])
    shown = " ".join(f"{cost:.1f}" for cost in costs)
    print(f"{name:9} layers {[len(layers) for layers in split]}, costs {shown}: step {by_split[name].total:.0f}")
gain = by_split["even"].total / by_split["balanced"].total
print(f"the even split takes {gain:.2f} times as long")
assert gain > 1.4

# %% tags=["nbval-ignore-output"]
draw_timelines(
    {"four layers each": by_split["even"], "5, 5, 5, 1 layers": by_split["balanced"]},
    "Two timelines of four stages and 16 micro-batches on one clock. With four layers on each stage the last one works "
    "without a pause and the others wait for it in every round; with 5, 5, 5 and 1 layers all work, and the step ends "
    "after 0.69 of the time.",
    "forwards of one layer",
)

# %% [markdown]
# The head does not show in a count of parameters here (it is tied to the embedding) and not in a count of layers.
# `balance` makes the slowest stage as fast as it can be, by dynamic programming over (stage, first layer of the stage),
# exactly. The embedding is a look-up and costs no time worth counting.
#
# The slowest stage is the pace of a long step, and many splits have the same one. They differ by a number of units
# that hardly depends on $m$: much of a step of few micro-batches, little of a long one. What counts is *where* the slow
# stages are. A step begins with a way down all stages and ends with a way up, and behind a slow stage near the end all
# others wait for their first gradient. So of the splits with the same slowest stage `balance` takes the evenest (the
# least sum of squared costs), and of those the one with the most layers on early stages. Under 1F1B early stages also
# keep the most micro-batches: time and memory pull in opposite directions here, and this is the choice for time.

# %%
SPLITS = {  # 24 layers, a head of 1.33
    "of balance": [4, 3, 3, 3, 3, 3, 3, 2],
    "as even, slow stage late": [3, 3, 3, 3, 3, 3, 4, 2],
    "light early stages": [1, 1, 4, 4, 4, 4, 4, 2],
}
assert [len(part) for part in balance([1.0] * 24, 8, last_extra=1.33)] == SPLITS["of balance"]
for name, split in SPLITS.items():
    costs = [n + 1.33 * (stage == 7) for stage, n in enumerate(split)]
    times = {m: simulate(SCHEDULES["1f1b"], 8, m, costs, [2 * cost for cost in costs]).total for m in (8, 64)}
    print(f"{name:25}slowest stage {max(costs)}: {times[8]:.1f} with 8 micro-batches, {times[64]:.1f} with 64")

# %% [markdown]
# Does a real run agree? Four real stages, with sleeps in the proportions above:

# %%
measured = {}
for name, split in (("even", even), ("balanced", balanced)):
    costs = tuple((len(layers) + head * (stage == 3)) / 5 for stage, layers in enumerate(split))
    measured[name] = merge(launch(traced, "1f1b", 8, 4, costs, world_size=4))

# %% tags=["nbval-ignore-output"]
for_eight = {
    name: simulate(SCHEDULES["1f1b"], 4, 8, costs, [2 * cost for cost in costs]).total
    for name, split in (("even", even), ("balanced", balanced))
    for costs in [[len(layers) + head * (stage == 3) for stage, layers in enumerate(split)]]
}
print(f"even / balanced with 8 micro-batches: simulated {for_eight['even'] / for_eight['balanced']:.2f}, ", end="")
print(f"real {measured['even'].total / measured['balanced'].total:.2f}")

# %% [markdown]
# ## A tied embedding is on two stages
#
# Many small models use one matrix for the look-up and for the head. On one device its gradient is the sum of both uses.
# In a pipeline there are two copies, each stage has one term of the sum, and somebody must add them up:


# %%
TIED = replace(CONFIG, tie_embeddings=True)
whole = make_stage(0, 1, TIED)
(whole.loss(whole(tokens), targets) / N).backward()
tied_truth = gradients(whole)["embed.weight"]


def tied() -> Tensor:
    """This stage's own part of the tied gradient."""
    mesh = Mesh.build(MeshShape(pp=2))
    pp = mesh["pp"]
    model = make_stage(pp.index, 2, TIED)
    tokens, targets = (x.chunk(4) for x in make_batch())

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        output = model(tokens[m] if hidden is None else hidden)
        return output if model.head is None else model.loss(output, targets[m]) / N

    run_pipeline(
        SCHEDULES["1f1b"](pp.index, 2, 4), forward=forward, axis=pp, gradient_axis=mesh["pp.backward"],
        shape=(2, T, D), dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    return gradients(model)["embed.weight" if pp.index == 0 else "head.weight"]


lookup, scores = launch(tied, world_size=2)
for name, part in (("look-up alone", lookup), ("head alone", scores), ("their sum", lookup + scores)):
    off = error({"embed.weight": part}, {"embed.weight": tied_truth})
    print(f"{name:14} is off by {off:.2f} of the largest value")
assert error({"embed.weight": lookup + scores}, {"embed.weight": tied_truth}) < 1e-12

# %% [markdown]
# The library exchanges them after the step's backward, with one send in each direction. Then both stages have the sum,
# and equal updates keep the copies equal:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(partial._exchange))

# %% [markdown]
# The price is the local part of the embedding's gradient from both ends: for the model of the balance example 1.05 GB
# in float32. A border of that model carries 4,096 bytes a token each way (in bf16), so this is what the activations of
# 256,512 tokens weigh, the size of an ordinary step. And the global gradient norm must count the weight once.
#
# ## Who waits for whom
#
# A pipeline is made of point-to-point messages, and those can wait for each other for ever. Look at the steady state of
# 1F1B between two stages. Stage 0 has an activation to send and wants a gradient. Stage 1 has a gradient to send and
# wants an activation. If both wait for their own send to be taken before they receive, nobody ever receives.
#
# On GPUs there is a subtler form of the same. NCCL runs the messages of one process group one after the other, in the
# order in which the program asked for them. Left alone, our executor asks early for what the next action needs, so that
# it can travel while this one computes. (Training gives it an order on which all stages agree;
# [receives.py](../picotron_mini/parallel/receives.py) says why.) This function decides what is early: for each action
# the list of receives to start before it.
# `route.needs` gives the message that an action starts from (none at the pipeline's ends), `m.kind` its direction,
# "forward" or "backward", and `opened` are the directions in which a message has been asked for at all.

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(pipeline.receives_in_own_order))

# %% [markdown]
# So in the steady state of 1F1B, with one queue a rank:
#
#     stage 0   receive gradient 1, send activation 2        the send is behind a receive ...
#     stage 1   receive activation 2, send gradient 1        ... that is behind a receive of that very send
#
# With one group for both directions this waits for ever. Gloo is kind and lets messages overtake, so on the CPU nobody
# would notice. So let us act NCCL's rule out: `messages_in_order` gives each process group one queue that is worked off
# strictly in order. First with two groups, as the library has it, then with one.


# %%
def ordered(one_group: bool) -> float:
    messages_in_order()
    mesh = Mesh.build(MeshShape(pp=2))
    pp = mesh["pp"]
    weight = torch.ones(4, requires_grad=True)

    def forward(m: int, hidden: Tensor | None) -> Tensor:
        x = weight * (m + 1.0 if hidden is None else hidden)
        return x.sum() if pp.index == 1 else x

    run_pipeline(
        SCHEDULES["1f1b"](pp.index, 2, 4), forward=forward, axis=pp,
        gradient_axis=pp if one_group else mesh["pp.backward"],
        shape=(4,), dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    return weight.grad.sum().item()


assert launch(ordered, False, world_size=2) == [40.0, 40.0]
print("two groups: done")
try:
    launch(ordered, True, world_size=2, timeout=6)
except RankError as hang:
    stacks = str(hang)
    print("one group: " + re.search(r"no end after \d+ s", stacks)[0])

# %% [markdown]
# `launch` has a deadline and then asks each rank for its stack. Read from the top, the innermost call first:

# %% tags=["nbval-ignore-output"]
print(re.sub(r'File ".*/(?:\d+|(\w+))\.py", line \d+', lambda found: found[1] or "this cell", stacks))

# %%
first, second = stacks.split("rank 1 was at:")
assert "take" in first and "run_backward_of" in first, "rank 0 waits for a gradient"
assert "take" in second and "run_forward_of" in second, "rank 1 waits for an activation"
print("rank 0 waits in a backward for a gradient, rank 1 in a forward for an activation")

# %% [markdown]
# That is how to read a hang: not *where* each rank is, but *which message* each waits for, then which rank was to send
# it, and what that rank does instead. Here both senders have the message ready, behind the receive that they wait for.
#
# The executor keeps four rules, which stand at the head of [pipeline.py](../picotron_mini/parallel/pipeline.py): a
# group for each direction; every stage receives in the order in which its neighbour sends; a gradient always goes
# back, even zeros from a stage that ignored its input; at most two sends a direction are under way. A
# [test](../tests/parallel/test_pipeline.py) writes down the executor's calls, lays NCCL's rules over them as a graph,
# and looks for circles, for sizes up to 8 stages and 16 micro-batches.
#
# ## Messages carry no label
#
# A message is bytes. That it belongs to micro-batch 3 is known only because both sides count. So all stages must go
# through the micro-batches in one order, forward and backward. If one of them runs its backwards last in, first out, as
# a stack would, then every shape fits, nothing waits, and the gradient of micro-batch 3 is multiplied with the
# activations of micro-batch 0.


# %%
def in_stack_order(stage: int, stages: int, micro_batches: int) -> list[Action]:
    actions = SCHEDULES["afab"](stage, stages, micro_batches)
    if stage == stages - 1:  # only the last stage differs
        actions[micro_batches:] = reversed(actions[micro_batches:])
    return actions


def one_step_mixed() -> dict[str, Tensor]:
    SCHEDULES["mixed"] = in_stack_order
    return one_step("mixed", 4, Mesh.build(MeshShape(pp=3)))[0]


per_stage = launch(one_step_mixed, world_size=3)
for stage, got in enumerate(per_stage):
    off = error(got, {name: truth[name] for name in got})
    print(
        f"stage {stage}: gradients "
        + ("equal to one device" if off < 1e-12 else f"off by {off:.1f} of the largest value")
    )
assert error(per_stage[2], {name: truth[name] for name in per_stage[2]}) < 1e-12
assert error(per_stage[0], {name: truth[name] for name in per_stage[0]}) > 0.1

# %% [markdown]
# The last stage, the one with the loss that you watch, is right to the last digit. All others train on noise.
#
# ## The same from PyTorch
#
# `torch.distributed.pipelining` is this technique in PyTorch: `PipelineStage` wraps a module, a schedule object cuts
# the batch and runs it. It takes our stage as it is, on gloo too. Two things to know. It divides gradients by the
# number of micro-batches unless `scale_grads=False`: right for a loss that is a mean over each micro-batch with equally
# many targets, wrong for ours, which is divided already. And it finds out the shapes at the borders by itself, with a
# first exchange, where our executor is told them.


# %%
def theirs(cases: list[tuple[str, bool]]) -> list[dict[str, Tensor]]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    pp, out = Mesh.build(MeshShape(pp=2))["pp"], []
    tokens, targets = make_batch()
    for name, scale_grads in cases:
        model = make_stage(pp.index, 2)
        stage = PipelineStage(model, pp.index, pp.size, torch.device("cpu"), group=pp.group)
        schedule = {"1f1b": Schedule1F1B, "afab": ScheduleGPipe}[name](
            stage, n_microbatches=4, loss_fn=lambda h, t, model=model: model.loss(h, t) / N, scale_grads=scale_grads
        )
        if pp.index == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=targets)
        out.append(gradients(model))
    return out


cases = [("afab", False), ("1f1b", False), ("1f1b", True)]
for (name, scale_grads), per_stage in zip(cases, zip(*launch(theirs, cases, world_size=2), strict=True), strict=True):
    together = {key: gradient for stage in per_stage for key, gradient in stage.items()}
    factor = (truth["embed.weight"].norm() / together["embed.weight"].norm()).item()
    assert error({key: factor * gradient for key, gradient in together.items()}, truth) < 1e-12
    print(f"{name}, scale_grads={scale_grads}: our gradients are PyTorch's times {factor:.6f}")
    assert abs(factor - (4 if scale_grads else 1)) < 1e-9

# %% [markdown]
# ## Where the bubble stands
#
# Of the two classic schedules, 1F1B is the one to use when memory decides, and the default of the library (`--schedule
# 1f1b`). Neither shrinks the bubble by itself: with equal stages both idle $(p-1)/(m+p-1)$ of the time, and only $m$
# makes it smaller.
#
# ## A smaller bubble
#
# But $m$ is given by the batch. What else is in the formula? The $p - 1$ in it is the way of the first micro-batch down
# the stages and of the last gradient back up, $(p-1)(f+b)$. There are two ways to shorten that, and both can be had
# together.
#
# **Virtual stages.** Cut the model into $vp$ parts instead of $p$ and deal them out in turn: with $p=2$, $v=2$ rank 0
# holds parts 0 and 2, rank 1 parts 1 and 3. The way to the end of the *first round* passes $p-1$ parts that are $v$
# times as small, and a rank that would wait for the way back takes a micro-batch of its second part meanwhile. This is
# **interleaved** 1F1B (arXiv 2104.04473):
#
# $$\text{bubble} = \frac{p-1}{v\,m+p-1}$$
#
# Each micro-batch goes round $v$ times, so there are $vp-1$ borders in place of $p-1$, and about $v$ times the bytes.
#
# **Half a backward.** For a linear layer $y = xW^T$ a backward is two products with as many flops each:
#
# $$\frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W \qquad
# \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^{\!T} x$$
#
# The stage before waits for the first, call it I. Nobody waits for the second, W, until the optimizer does. So send I's
# result on at once, and do W where the stage would idle. That is **zero bubble** (arXiv 2401.10241). Its schedule ZB-H1
# is 1F1B with I in place of B, and each W put off by as many backwards as the stage has stages above it:

# %% tags=["nbval-ignore-output"]
print(inspect.getsource(zb_h1))

# %% [markdown]
# Autograd does both products in one sweep. The library replaces the forward of a linear layer by one whose backward
# does I, and puts aside what W needs. By hand, on one layer:

# %%
linear = nn.Linear(4, 3, bias=False).double()
x = torch.arange(8.0, dtype=torch.float64).view(2, 4).requires_grad_()
right_x, right_w = torch.autograd.grad(linear(x).square().sum(), [x, linear.weight])
deferred = Deferred([linear])
with deferred.collecting() as products:
    linear(x).square().sum().backward()
print(f"after I: dL/dx is {'right' if torch.allclose(x.grad, right_x) else 'wrong'}, dL/dW {linear.weight.grad}")
assert linear.weight.grad is None and torch.allclose(x.grad, right_x)
products[0].run()
print(f"after W: dL/dW is {'right' if torch.allclose(linear.weight.grad, right_w) else 'wrong'}")
assert torch.allclose(linear.weight.grad, right_w)

# %% [markdown]
# **The V.** Lay two parts a rank out as a V in place of a loop (arXiv 2405.15362): rank 0 holds the first and the last,
# the last rank the two in the middle. The path turns round without a message, and on every rank one micro-batch goes
# down while another comes up. With split backwards nothing is left to wait for but the first way down. Embedding and
# head are on one rank, so a tied embedding is there once, and nothing needs to be exchanged.
#
# All five on one clock. A whole stage takes 1 forward and 2 backward, I and W 1 each; half a stage takes half of it.
# "Live" counts micro-batches through a *whole* stage, so two halves are one:

# %%
p, m = 4, 8
five = {}
print(f"{'':12}{'time':>6}{'idle':>8}   most live activations, by stage")
for name in ("afab", "1f1b", "interleaved", "zb-h1", "zb-v"):
    v = 2 if name in ("interleaved", "zb-v") else 1
    five[name] = simulate(find_schedule(name, v), p, m, 1 / v, 2 / v, route=route_of(name, p, v))
    live = [peak / v for peak in five[name].peak_live]
    print(f"{name:12}{five[name].total:>6.1f}{100 * five[name].bubble:>6.1f} %   {live}")
assert abs(five["interleaved"].bubble - (p - 1) / (2 * m + p - 1)) < 1e-12
assert five["zb-h1"].total == 3 * m + (p - 1)  # 1F1B: 3 m + 3 (p - 1)
assert five["zb-v"].total == (6 * m + p - 1) / 2  # in forwards of half a stage: 6 m + p - 1
assert max(five["zb-h1"].peak_live) == max(five["1f1b"].peak_live) == p

# %% tags=["nbval-ignore-output"]
draw_timelines(
    five,
    "Five timelines of four stages and eight micro-batches, one below the other. All-forward-all-backward and 1F1B end "
    "last, after 33 units. Interleaved ends earlier, with smaller boxes. ZB-H1 ends after 27: its stages fill the end "
    "with weight gradients. ZB-V ends after 25.5, and the upper stages have hardly a gap.",
    "forwards of a whole stage",
)

# %% [markdown]
# Read the price in the last column. Interleaved keeps *more* than 1F1B on every stage, since it runs further ahead.
# ZB-H1 keeps on all stages what 1F1B keeps on stage 0: equal sizes, so nothing is lost on equal GPUs. ZB-V keeps as
# much too, and has the shortest step. (The simulator counts a micro-batch as live until its W. What I has used up is
# freed earlier; only inputs and output gradients of linear layers wait for W.)
#
# A claim of equal gradients is easier to make than to keep here: one weight gradient too few and the loss is still
# right. So on real ranks, against one device:

# %%
for name in ("afab", "1f1b", "interleaved", "zb-h1", "zb-v"):
    said = verify("pp=2", train=replace(TRAIN, schedule=name, micro_batches=4), optimizers=("sgd",))
    assert said.ok and not said.bytes_problems
    print(f"{name:12}equal to one device; rank 0 sent {said.bytes_counted['pp send']:>7,} bytes, as predicted")

# %% [markdown]
# Besides the tied embedding's gradient, rank 0 sends one border's worth with a single stage a rank: activations down.
# Interleaved it sends three, the activations of both its parts and the gradient of the second. In the V it sends two,
# activations down and, from the head, gradients; and the tied embedding is on one rank, so it sends none of that.
#
# Not everything goes together. What cannot, is refused before a process starts:

# %%
REFUSED = [
    {"schedule": "interleaved", "micro_batches": 3},  # groups of pp micro-batches fill the ring
    {"schedule": "zb-h1", "compile": True},  # a compiled backward is one piece
    {"schedule": "zb-v", "recompute": "full"},  # so is one that runs the forward again
    {"schedule": "zb-h1", "loss_chunks": 2},  # and that of a loss in chunks
]
for settings in REFUSED:
    try:
        resolve(RunConfig(layout="pp=2", model=MODEL, train=replace(TRAIN, **settings)))
    except ConfigError as refused:
        print(refused, end="\n\n")
    else:
        raise AssertionError("it was accepted")

# %% [markdown]
# Which to take? Where memory allows and links are fast, more parts; where links are slow, ZB-H1, which sends what 1F1B
# sends. Two warnings. Costs are equal here: where I, W and F differ, or the head makes the last part heavy, some bubble
# returns (give `simulate` your own). And a smaller matrix product, or a backward that cannot be compiled, may cost more
# than the bubble it removes: on two H100s 1F1B made 40,040 tokens/s per GPU, interleaved 41,037, and ZB-V, which does
# not compile, 29,052 ([write-up](../summary/05_pipeline_parallel.md#measured-performance)).
#
# ## Exercises
#
# Fill in a body and run the cell; the check answers with one line, and if it fails the line names the misconception.
# `solution("05.border")` (from `picotron_mini.course.exercises`) prints an answer.
#
# **1. The chain rule, cut.** Write the backward of one stage. It is run on three real stages, of which one ignores its
# input once.


# %%
def border(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """Let the weights have their gradients, and return dL/d(hidden); None on the first stage, where hidden is None."""


check("05.border", border)

# %% [markdown]
# **2. One forward, one backward.** Write the schedule for one stage: as fast as all-forward-all-backward, and at most
# `stages - stage` micro-batches alive. It is simulated for 30 sizes; a deadlock is told as such.


# %%
def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[Action]: ...


check("05.one_f_one_b", one_f_one_b)

# %% [markdown]
# **3. How many micro-batches?** The smallest number with which the stages idle at most `percent` % of the time.


# %%
def micro_batches_for(stages: int, percent: int) -> int: ...


check("05.micro_batches", micro_batches_for)

# %% [markdown]
# **4. Layers for each stage.** All layers cost 1, the head costs `head` and sits on the last stage. Return how many
# layers each stage holds, so that the slowest is as fast as possible. Every stage needs one.


# %%
def layers_for(layers: int, stages: int, head: float) -> list[int]: ...


check("05.layers", layers_for)

# %% [markdown]
# **5. Slow links, within a budget.** A message travels for half as long as a forward and a backward take. Write a
# schedule that is as fast as all-forward-all-backward and keeps, on stage $s$, at most the activations of $2(p-1-s)+1$
# micro-batches. The time is simulated; the bytes are counted on three real stages.


# %%
def slow_links(stage: int, stages: int, micro_batches: int) -> list[Action]: ...


check("05.slow_links", slow_links)

# %% [markdown]
# **6. Weight gradients that wait, within a budget.** Now the backward is in two halves. F, I and W take one unit each,
# messages nothing, and there are at least as many micro-batches as stages. A micro-batch is kept from its F to its W.
# Stage $s$ may keep `more` of them besides the $p-s$ of 1F1B, and none more than $p$: at most
# $\min(p,\ p-s+\text{more})$. Write the order of one stage, so that the step takes at most
#
# $$3m+2(p-1)-\min(\text{more},\ p-1)$$
#
# units. (1F1B takes $3m+3(p-1)$. ZB-H1 takes $3m+(p-1)$ and keeps more than `more=0` allows.) The actions are
# `Action("forward", m)`, `Action("backward_input", m)` and `Action("backward_weight", m)`. F's run in ascending order,
# and so do I's; a W runs at any time after its I. `schedules.one_f_one_b` is a place to start. The order is simulated
# for 80 sizes, and any that keeps to time and memory passes.


# %%
def late_weights(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]: ...


check("05.late_weights", late_weights)

# %% [markdown]
# ## From the bug museum
#
# Room 05 has bugs of pipelines. This one was found in huggingface/picotron.

# %% tags=["nbval-ignore-output"]
show("05.loss_not_divided")

# %%
broken = run("05.loss_not_divided", "pp=2", optimizers=("sgd",))
print("equal to one device:", broken.ok)
for difference in broken.differences:
    print(f"{difference.quantity:14} off by {difference.error:.3f} of the largest value")
assert not broken.ok
assert not broken.bytes_problems, "every byte is right"

# %% [markdown]
# Three micro-batches, so gradients and norm are three times what they should be: off by two. The loss that is printed
# is right, and stays right, because the *weights* agree to seven digits! Gradients are clipped by their norm in this
# run, and a factor in the gradient is a factor in the norm. AdamW would hide it without clipping. Whoever compares
# losses, or weights of a clipped run, never sees this bug. `verify` compares gradients.
#
# And would *your* test have noticed? A test is a function of the mesh that runs on both stages of `pp=2`, in ranks in
# which the bug has been planted. (So do not call `verify` in it: that starts ranks of its own, and they are sound.)
# Here is one step of the library on the batch of this lesson, and a test that many would write:


# %%
def library_step(mesh: Mesh) -> tuple[float, dict[str, Tensor]]:
    """On this stage of pp=2: the loss (0 on the first stage), and the gradients by name, in 4 micro-batches."""
    train = replace(TRAIN, seq_len=T, micro_batch_size=ROWS // 4, micro_batches=4)
    parallel = parallelize(resolve(RunConfig(layout="pp=2", model=CONFIG, train=train)), mesh, torch.device("cpu"))
    tokens, targets = make_batch()
    positions, documents = torch.arange(T).expand(ROWS, T), torch.zeros_like(tokens)  # one document a row
    parts = zip(*(x.chunk(4) for x in (tokens, targets, positions, documents)), strict=True)
    loss, _ = compute_gradients(parallel, [Batch(*part) for part in parts])
    return loss.item(), gradients_of(parallel)


one_device = make_stage(0, 1)
true_loss = (one_device.loss(one_device(make_batch()[0]), make_batch()[1]) / N).item()


def compares_losses(mesh: Mesh) -> None:
    loss, _ = library_step(mesh)
    assert mesh["pp"].index == 0 or abs(loss - true_loss) < 1e-9


assert not kill("05.loss_not_divided", compares_losses, record=False).passed

# %% [markdown]
# Now yours. The gradients of one device are in `truth`, by the same names. It must pass on the sound library and fail
# with the bug in it.


# %%
def my_test(mesh: Mesh) -> None:
    """Use `library_step(mesh)` and assert something that the bug breaks."""


kill("05.loss_not_divided", my_test)

# %% [markdown]
# More of this room: `05.stages_start_alike`, `05.tied_weight_not_exchanged`, `05.gradients_in_stack_order`. At the back
# of it are three of the schedules with a smaller bubble: `05.last_weights_forgotten` ends the step with the last I,
# `05.reduced_before_last_weights` sums gradients over the replicas while a W is to come, and
# `05.messages_in_own_order` lets the stages of a V take one message for another. For each: on which layouts is it
# invisible? Those are the ones on which people test.
#
# ## On GPUs
#
# The same files run on NCCL. The library starts its own ranks:
#
# ```console
# $ picotron-mini verify pp=2 --device cuda --dtype float32                   # equal to one device, on GPUs
# $ picotron-mini describe pp=4 --preset bench --device cpu                   # who holds which layers, and sends what
# $ picotron-mini bench --preset bench --layout pp=2 --micro-batches 8        # tokens per second, against --layout dp=1
# $ picotron-mini bench --preset bench --layout pp=2 --micro-batches 8 --schedule afab
# $ picotron-mini bench --preset bench --layout pp=2 --micro-batches 8 --schedule interleaved --virtual-stages 3
# $ picotron-mini bench --preset bench --layout pp=2 --micro-batches 8 --schedule zb-v --no-compile
# ```
#
# or joins those of `torchrun`, for example one stage a machine on two machines:
#
# ```console
# $ torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
#     --no-python picotron-mini train --preset h100 --layout pp=2,dp=8 \
#     --batch-size 256 --micro-batch-size 4 --micro-batches 8
# ```
#
# `pp` is the slowest axis of the rank numbers, so the stages are what lies on different machines. Before you run,
# predict: the bubble of $p$ and $m$, and the activations of stage 0.
#
# This chapter's closing run, on two H200s with torch 2.11:
#
# ```console
# $ torchrun --nproc-per-node 2 -m picotron_mini train --preset h100 pp=2 --schedule interleaved --steps 60
# step 51/60  loss 6.134  validation 5.526 (1.957 bits per byte)  356,089 tokens/s  memory 18.3 GiB  0:02 left
# step 60/60  loss 5.889  validation 5.375 (1.904 bits per byte)  347,555 tokens/s  memory 18.3 GiB  0:00 left
# ```
#
# With `dp=2 --zero 2` the same run made 395,292 and 414,865 in these two lines. There are 4 micro-batches, and two
# virtual stages on each rank: what does the bubble leave of the speed?
#
# ## What to read next
#
# - [The write-up](../summary/05_pipeline_parallel.md): decisions, what was tried and dropped, measurements.
# - [Questions](../interview_questions/05_pipeline_parallel.md), from warm-up to design, with proofs that run.
# - GPipe (arXiv 1811.06965) for micro-batches and the bubble; PipeDream-flush is a section of *Memory-Efficient
#   Pipeline-Parallel DNN Training* (arXiv 2006.09503).
# - *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM* (arXiv 2104.04473): 1F1B at scale,
#   several runs of layers a stage, and how the three parallelisms are combined.
# - *Zero Bubble Pipeline Parallelism* (arXiv 2401.10241) cuts the backward in two, so that there is work left for the
#   bubble; arXiv 2405.15362 lays it out as a V.
