"""The pipeline executor against one device: losses, gradients, bytes, memory, and who waits for whom."""

import graphlib
import itertools
import os
import signal
import time
import weakref
from collections import Counter, defaultdict
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from torch import nn

from picotron_mini.collectives import Done, ledger
from picotron_mini.config import MeshShape, RunConfig, TrainConfig
from picotron_mini.launch import RankError, launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Axis, Mesh
from picotron_mini.model.gpt import GPT
from picotron_mini.parallel import pipeline
from picotron_mini.parallel.actions import Route, route_of
from picotron_mini.parallel.deferred import Deferred
from picotron_mini.parallel.pipeline import run_forward, run_pipeline
from picotron_mini.parallel.receives import receives_in_one_order, receives_in_own_order
from picotron_mini.parallel.schedules import SCHEDULES, Action, balance, find_schedule
from picotron_mini.verify import MODEL, TRAIN, _on_rank, make_batches

B, T, D, V, LAYERS, MICRO_BATCHES = 2, 3, 4, 7, 5, 5
CASES = [(name, m, frozen) for name in SCHEDULES for m in range(1, MICRO_BATCHES + 1) for frozen in (False, True)]


def toy_layers():
    """An embedding, three mixing layers and a head: five layers, the same on every rank."""
    torch.manual_seed(0)
    layers = [nn.Embedding(V, D), *[nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3)], nn.Linear(D, V)]
    return [layer.double() for layer in layers]


def toy_tokens():
    return torch.randint(V, (MICRO_BATCHES, 2, B, T), generator=torch.Generator().manual_seed(1))


def toy_loss(logits, targets, micro_batches):
    """Sum over tokens, divided by the global number of tokens; micro-batches weigh differently on purpose."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (
        B * T * micro_batches
    )


def freeze(layers, frozen):
    for layer in layers[:2]:
        layer.requires_grad_(not frozen)


def gradients(layers, numbers):
    return {
        f"{i}.{name}": p.grad.clone()
        for i, layer in zip(numbers, layers, strict=True)
        for name, p in layer.named_parameters()
        if p.grad is not None
    }


def one_device(micro_batches, frozen):
    layers = toy_layers()
    freeze(layers, frozen)
    total = 0.0
    for tokens, targets in toy_tokens()[:micro_batches]:
        loss = toy_loss(nn.Sequential(*layers)(tokens), targets, micro_batches)
        loss.backward()
        total += loss.item()
    return total, gradients(layers, range(LAYERS))


def pipeline_rank(stages, cases):
    """Run the cases on one stage; returns for each (loss, gradients, bytes sent, most live outputs, callback log)."""
    mesh = Mesh.build(MeshShape(pp=stages))
    axis, numbers = mesh["pp"], balance([1.0] * LAYERS, stages)[mesh["pp"].index]
    data, out = toy_tokens(), {}
    common = {"axis": axis, "shape": (B, T, D), "dtype": torch.float64, "device": torch.device("cpu")}
    for name, micro_batches, frozen in cases:
        all_layers = toy_layers()
        freeze(all_layers, frozen)
        layers = [all_layers[i] for i in numbers]
        alive, peaks, last = [], [], []

        def forward(m, hidden, layers=layers, alive=alive, peaks=peaks, micro_batches=micro_batches):
            tokens, targets = data[m]
            x = tokens if hidden is None else hidden
            for layer in layers:
                x = layer(x)
            if axis.index == stages - 1:
                x = toy_loss(x, targets, micro_batches)
            alive.append(weakref.ref(x))
            peaks.append(sum(ref() is not None for ref in alive))  # outputs that the executor still holds
            return x

        actions = SCHEDULES[name](axis.index, stages, micro_batches)
        with ledger.recording() as record:
            loss = run_pipeline(
                actions,
                forward=forward,
                gradient_axis=mesh["pp.backward"],
                before_last_backward=lambda layers=layers, last=last: last.append(gradients(layers, numbers)),
                **common,
            )
        peak = max(peaks)
        peaks.clear()
        validation = run_forward(micro_batches, forward=forward, **common)
        assert loss.dtype == validation.dtype == torch.float64 and not loss.requires_grad
        assert len(last) == 1 and max(peaks) == 1  # validation keeps nothing
        before_last = {k: (v - last[0].get(k, 0)).abs().max() for k, v in gradients(layers, numbers).items()}
        out[name, micro_batches, frozen] = (
            loss.item(), validation.item(), gradients(layers, numbers), dict(record), peak, before_last
        )  # fmt: skip
    return out


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_equals_one_device(stages):
    ranks = launch(pipeline_rank, stages, CASES, world_size=stages, timeout=60)
    for name, m, frozen in CASES:
        loss, expected = one_device(m, frozen)
        got = [rank[name, m, frozen] for rank in ranks]
        assert got[-1][0] == pytest.approx(loss, abs=1e-12)
        assert got[-1][1] == pytest.approx(loss, abs=1e-12)
        assert all(r[0] == r[1] == 0 for r in got[:-1])
        merged = {k: v for r in got for k, v in r[2].items()}
        assert sum(len(r[2]) for r in got) == len(merged) == len(expected)
        for key, value in expected.items():
            torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-12)
        for stage, (_, _, _, record, peak, last) in enumerate(got):
            messages = (stage < stages - 1) + (stage > 0)  # activations down, gradients up
            assert sum(record.values()) == messages * m * B * T * D * 8
            assert peak == (m if name == "afab" else min(stages - stage, m))
            # The last micro-batch's gradients, and only these, came after the callback.
            assert all(change > 0 for change in last.values())
            if m == 1:
                assert last == {key: grad.abs().max() for key, grad in got[stage][2].items()}


def swapped_gradients(stages):
    """A planted bug: the last stage answers micro-batch 1 before 0, and the others take it for 0."""
    real = SCHEDULES["afab"]

    def wrong(stage, stages, micro_batches):
        actions = real(stage, stages, micro_batches)
        if stage == stages - 1:
            actions[micro_batches], actions[micro_batches + 1] = actions[micro_batches + 1], actions[micro_batches]
        return actions

    SCHEDULES["afab"] = wrong
    try:
        return pipeline_rank(stages, [("afab", 2, False)])
    finally:
        SCHEDULES["afab"] = real


def test_oracle_kills_swapped_gradients():
    ranks = launch(swapped_gradients, 2, world_size=2, timeout=60)
    _, expected = one_device(2, False)
    off = [
        (rank["afab", 2, False][2][key] - value).abs().max().item()
        for rank in ranks
        for key, value in expected.items()
        if key in rank["afab", 2, False][2]
    ]
    assert max(off) > 1e-3  # the first stage is wrong ...
    last = ranks[1]["afab", 2, False][2]
    assert all(torch.allclose(last[key], expected[key], rtol=0, atol=1e-12) for key in last)  # ... the last is not


def detached_stage(stages):
    """The middle stage throws its input away; the first one must get zeros, and nobody may wait for ever."""
    mesh = Mesh.build(MeshShape(pp=stages))
    weight = torch.ones(D, dtype=torch.float64, requires_grad=True)

    def forward(m, hidden):
        if mesh["pp"].index == 0:
            return weight.expand(B, T, D)
        return hidden.detach() * weight if mesh["pp"].index == 1 else (hidden * weight).sum()

    run_pipeline(
        SCHEDULES["1f1b"](mesh["pp"].index, stages, 3), forward=forward, axis=mesh["pp"],
        gradient_axis=mesh["pp.backward"], shape=(B, T, D), dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    return weight.grad.tolist()


def test_stage_that_ignores_its_input_sends_zeros():
    ranks = launch(detached_stage, 3, world_size=3, timeout=60)
    assert ranks == [[0.0] * D, [3.0 * B * T] * D, [3.0 * B * T] * D]


def failing_stage(stages, bad_shape):
    mesh = Mesh.build(MeshShape(pp=stages))

    def forward(m, hidden):
        if mesh["pp"].index == 1 and m == 1 and not bad_shape:
            raise RuntimeError("stage 1 broke")
        return torch.ones(()) if mesh["pp"].index == stages - 1 else torch.ones(B, T, D + bad_shape)

    run_pipeline(
        SCHEDULES["1f1b"](mesh["pp"].index, stages, 4), forward=forward, axis=mesh["pp"],
        gradient_axis=mesh["pp.backward"], shape=(B, T, D), dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def test_exception_in_a_stage_surfaces():
    with pytest.raises(RankError, match="stage 1 broke") as caught:
        launch(failing_stage, 3, False, world_size=3, timeout=60)
    assert caught.value.rank == 1


def broken_stage(schedule, how):
    """One step of a pipeline of two, of which the second stage breaks in its second forward."""
    train = replace(TRAIN, schedule=schedule, micro_batches=4, batch_size=0, steps=1)
    run = resolve(RunConfig(layout="pp=2", model=replace(MODEL, num_layers=5), train=train))
    calls = []

    def breaks(module, _):
        calls.append(isinstance(module, GPT))
        if sum(calls) < 2 or dist.get_rank() == 0:
            return
        if how == "raises":
            raise RuntimeError("stage 1 broke")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(1)

    nn.modules.module.register_module_forward_pre_hook(breaks)
    _on_rank([run], make_batches(run))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", sorted(get_args(get_type_hints(TrainConfig)["schedule"])))
@pytest.mark.parametrize(
    ("how", "cause"),
    [("raises", "RuntimeError: stage 1 broke"), ("killed", "killed by SIGKILL"), ("hangs", "rank 1 was at:")],
)
def test_a_stage_that_breaks_ends_the_others_in_every_schedule(schedule, how, cause):
    with pytest.raises(RankError) as caught:
        launch(broken_stage, schedule, how, world_size=2, timeout=8 if how == "hangs" else 60)
    assert cause in str(caught.value)
    if how == "hangs":
        assert "in breaks" in str(caught.value).split("rank 1 was at:")[1]
    else:
        assert caught.value.rank == 1


def test_wrong_shape_is_named_before_it_is_sent():
    with pytest.raises(RankError, match=r"returned torch.float32 \[2, 3, 5\], and its neighbour expects .*\[2, 3, 4\]"):
        launch(failing_stage, 3, True, world_size=3, timeout=60)


# --- does it wait for ever on NCCL? -----------------------------------------------------------------------
#
# gloo matches messages by label and forgives an order that NCCL does not. So the executor is run without
# ranks, its communication calls are written down, and the rules of NCCL are laid over them as a graph of
# "cannot happen before". A cycle is a deadlock.


def communication(monkeypatch, schedule, stage, stages, micro_batches, channels, route=None, receives=None):
    """The calls of one stage in host order: ("send" | "recv" | "wait", channel, peer, number of the message)."""
    calls, counts = [], defaultdict(int)

    class Ticket(Done):
        def __init__(self, message):
            self.message = message

        def wait(self):
            calls.append(("wait", *self.message))

    def call(kind):
        def record(tensor, axis, peer):
            message = (axis.name, *((stage, peer) if kind == "send" else (peer, stage)), counts[kind, axis.name])
            counts[kind, axis.name] += 1
            calls.append((kind, *message))
            return Ticket(message)

        return record

    monkeypatch.setattr(pipeline, "send", call("send"))
    monkeypatch.setattr(pipeline, "receive", call("recv"))
    axes = [Axis(name, stages, stage, tuple(range(stages))) for name in channels]
    route = route or Route(stages)
    ends = [route.position(stage, chunk) == route.length - 1 for chunk in range(route.chunks)]
    run_pipeline(
        schedule(stage, stages, micro_batches),
        forward=[lambda m, h, end=end: torch.ones(()) if end else torch.ones(1) for end in ends],
        axis=axes[0], gradient_axis=axes[1], shape=(1,), dtype=torch.float32, device=torch.device("cpu"), route=route,
        receives=receives, deferred=Deferred([]),
    )  # fmt: skip
    under_way = Counter()
    for kind, channel, source, _, _ in calls:
        under_way[channel] += (kind == "send") - (kind == "wait" and source == stage)
        assert under_way[channel] <= pipeline.SENDS_UNDER_WAY
    assert not any(under_way.values())
    return calls


def nccl_deadlock(traces, lazy):
    """Whether the calls of all stages can never finish.

    A message runs once both ends have reached it on their communication stream, which runs messages in order
    and after what the compute stream did before the call; a wait holds the compute stream. Connected at
    the start (`lazy=False`), a process group has one stream. Connected on demand, each pair has its own,
    and the first message of a pair holds the host until the other end calls too.
    """
    graph, numbers = defaultdict(set), defaultdict(list)
    first_call = {}
    for stage, trace in enumerate(traces):
        pairs = set()
        for t, (kind, channel, source, to, _) in enumerate(trace):
            if kind != "wait" and (channel, source, to) not in pairs:
                pairs.add((channel, source, to))
                first_call[stage, channel, source, to] = t
    for stage, trace in enumerate(traces):
        compute, streams = ("start", stage), {}
        for t, (kind, channel, source, to, number) in enumerate(trace):
            host, done = ("host", stage, t), ("done", channel, source, to, number)
            graph[host].add(("host", stage, t - 1))
            if kind == "wait":
                graph["compute", stage, t] |= {compute, done, host}
                compute = ("compute", stage, t)
                continue
            numbers[kind, channel, source, to].append(number)
            if lazy and first_call[stage, channel, source, to] == t:
                peer = to if kind == "send" else source
                graph[host].add(("host", peer, first_call[peer, channel, source, to] - 1))
            stream = (channel, source, to) if lazy else channel
            graph[done] |= {host, compute, streams.get(stream, host)}
            streams[stream] = done
    assert all(numbers["send", *pair] == numbers["recv", *pair] for _, *pair in numbers)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return True
    return False


SIZES = list(itertools.product((2, 3, 4, 8), (1, 2, 3, 4, 7, 16)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock_under_the_rules_of_nccl(monkeypatch, name):
    for stages, m in SIZES:
        traces = [
            communication(monkeypatch, SCHEDULES[name], s, stages, m, ("pp", "pp.backward")) for s in range(stages)
        ]
        assert not nccl_deadlock(traces, lazy=False), (stages, m)
        assert not nccl_deadlock(traces, lazy=True), (stages, m)


def virtual_traces(monkeypatch, name, chunks, stages, m, order):
    schedule, route = find_schedule(name, chunks), route_of(name, stages, chunks)
    receives = order([schedule(s, stages, m) for s in range(stages)], route)
    return [
        communication(monkeypatch, schedule, s, stages, m, ("pp", "pp.backward"), route, receives[s])
        for s in range(stages)
    ]


def own_order(lists, route):
    return [receives_in_own_order(actions, route, stage) for stage, actions in enumerate(lists)]


VIRTUAL = [
    ("zb-h1", 1, own_order), *[(n, c, receives_in_one_order) for n, c in (("zb-h1", 1), ("zb-v", 2))],
    *[("interleaved", chunks, receives_in_one_order) for chunks in (2, 3)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "chunks", "order"), VIRTUAL)
def test_no_deadlock_of_virtual_stages_under_the_rules_of_nccl(monkeypatch, name, chunks, order):
    for stages, m in SIZES:
        if name != "interleaved" or m % stages == 0:
            traces = virtual_traces(monkeypatch, name, chunks, stages, m, order)
            assert not nccl_deadlock(traces, lazy=False), (stages, m)
            assert not nccl_deadlock(traces, lazy=True), (stages, m)


def test_everyones_own_order_would_deadlock_on_a_ring(monkeypatch):
    assert nccl_deadlock(virtual_traces(monkeypatch, "interleaved", 2, 2, 4, own_order), lazy=False)


def test_one_process_group_for_both_directions_would_deadlock(monkeypatch):
    traces = [communication(monkeypatch, SCHEDULES["1f1b"], s, 2, 4, ("pp", "pp")) for s in range(2)]
    assert nccl_deadlock(traces, lazy=False)


def test_forward_only_is_without_graph():
    graphs = []

    def forward(m, hidden):
        graphs.append(torch.is_grad_enabled())
        return torch.tensor(float(m + 1))

    axis = Axis("pp", 1, 0, (0,))
    loss = run_forward(3, forward=forward, axis=axis, shape=(1,), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert loss.item() == 6 and loss.dtype == torch.float32 and graphs == [False] * 3


def test_one_stage_runs_any_order_of_micro_batches():
    x = torch.tensor(2.0, requires_grad=True)
    axis = Axis("pp", 1, 0, (0,))
    actions = [Action("forward", 1), Action("forward", 0), Action("backward", 1), Action("backward", 0)]
    loss = run_pipeline(
        actions, forward=lambda m, h: x * (m + 1), axis=axis, gradient_axis=axis, shape=(1,), dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert loss.item() == 6 and x.grad.item() == 3
