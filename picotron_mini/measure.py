"""The measurements that calibrate.py solves for rates, made on each rank: passes of known work, messages, updates.

    measure(run)     on every rank at once     ->   {("forward", 0): seconds, ("all_reduce", 2**20): seconds, ...}

Four rates are measured by themselves, each by work that is nothing else: a large product, attention, a large copy, and
very small operators, of which only the start takes time. Passes of the model can then be explained by them.

All ranks start each call together (a barrier before it), and the best of some rounds counts: what disturbs makes
slower, never faster. A CPU's links suffer most from it: beside one busy process they look about twice as slow.

    CPU    computing is timed by what the process has used of a core; messages by the clock on the wall, as the mean of
           a row of them with products between, as a step has them: a single one at its best takes a third of that
    GPU    its host runs ahead of it in training, so it is timed by its own clock, with all that it has to do launched
           before it may begin (`_on_gpu`); and apart from that, what the host needs to launch a layer and a message
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

import torch

from .collectives import all_gather, all_reduce, all_reduce_async, all_to_all, barrier, receive, reduce_scatter, send
from .config import MeshShape, RunConfig
from .legality import layout_problems
from .mesh import Axis, Mesh
from .model.costs import parameters
from .model.gpt import GPT, attend, init_weights
from .model.permute import fused
from .parallel.activations import share_of
from .parallel.expert import mixtures, of_one_shape
from .parallel.parallelize import DTYPES
from .parallel.work import Work, forward_work
from .training.optimizer import clip_factor, make_optimizer

LAYERS = 2  # of a timed pass: enough that the time of one is not that of its start
ROUNDS = 10
SIZES = {"cuda": (2**10, 2**20, 2**24, 2**28), "cpu": (2**10, 2**16, 2**20, 2**23)}  # bytes of the timed messages
ELEMENTS = {"cuda": 2**28, "cpu": 8_000_000}  # of the timed update, or as many as the model has
WEIGHT = {"cuda": (2048, 4096), "cpu": (250, 1000)}  # shape of each of its weights
SQUARE = {"cuda": 8192, "cpu": 512}  # rows and columns of the timed product
COPIED = {"cuda": 2**28, "cpu": 2**23}  # numbers of 4 bytes of the timed copy
SMALL = 200  # operators of the timed starts
ROW = 10  # messages, each behind a product, that CPUs are timed with together
ASLEEP = 60_000_000  # cycles that a GPU is kept busy while its host launches what is timed: 30 ms and more


def payload(operation: str, size: int, ranks: int) -> float:
    """Bytes that a rank hands over so that the whole is `size`."""
    return size / ranks if operation == "all_gather" else size


def passes(run: RunConfig) -> list[tuple[Work, tuple[int, int, bool]]]:
    """The passes to time: their work, and micro-batch, tensor-parallel size and whether it is the head."""
    size = run.train.micro_batch_size
    out = []
    for tp in (1, 2, 4):
        mesh = MeshShape(tp=tp)
        if layout_problems(run.model, mesh):
            continue
        for micro_batch in sorted({max(1, size // 2), size, 2 * size} if tp == 1 else {size}):
            train = replace(run.train, micro_batch_size=micro_batch, recompute="none", sequence_parallel=False)
            each = replace(run, layout=str(mesh), train=train)
            out.append((forward_work(each, timed_layers(run), False), (micro_batch, tp, False)))
    for micro_batch in (max(1, size // 2), 2 * size):
        each = replace(run, layout="1", train=replace(run.train, micro_batch_size=micro_batch))
        out.append((forward_work(each, (), True), (micro_batch, 1, True)))
    return out


def timed_layers(run: RunConfig) -> range:
    """The last layers: of a mixture of experts those that have experts."""
    return range(max(0, run.model.num_layers - LAYERS), run.model.num_layers)


def direct(run: RunConfig, device: torch.device) -> dict[str, tuple[float, Callable[[], object]]]:
    """What measures a rate by itself: units of work (flops, flops, bytes, operators), and a call that does them."""
    dtype, n, train = DTYPES[run.train.dtype], SQUARE[device.type], run.train
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    shape = (train.micro_batch_size, train.seq_len, run.model.head_dim)
    q = torch.randn(shape[0], run.model.num_heads, *shape[1:], device=device, dtype=dtype)
    k, v = (torch.randn(shape[0], run.model.num_kv_heads, *shape[1:], device=device, dtype=dtype) for _ in range(2))
    documents = torch.zeros(shape[:2], dtype=torch.int64, device=device) if train.document_mask else None
    seen = train.seq_len * (1.0 if train.document_mask else 0.5)
    large, other = (torch.zeros(COPIED[device.type], device=device) for _ in range(2))
    small = torch.zeros(8, device=device)

    def starts() -> None:
        for _ in range(SMALL):
            small.add_(1.0)

    return {
        "product": (2.0 * n**3, lambda: a @ b),
        "attention": (4.0 * q.numel() * seen, lambda: attend(q, k, v, documents)),
        "copy": (2.0 * large.nbytes, lambda: other.copy_(large)),
        "start": (float(SMALL), starts),
    }


def measure(run: RunConfig) -> dict[tuple[str, int], float]:
    """Seconds of everything, by name and number or size."""
    mesh = Mesh.build(MeshShape(dp=torch.distributed.get_world_size()))
    axis, cuda = mesh["dp"], run.train.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    out: dict[tuple[str, int], float] = {}

    # a CPU's own time where nothing is waited for: what other programs take of the cores does not count
    computing = _on_gpu if cuda else partial(_by, time.process_time)
    wall = partial(_by, time.perf_counter)

    def timed(*calls: Callable[[], object], how: Callable[[Callable[[], object]], float] = computing) -> list[float]:
        """Best seconds of each call, all made in turn."""
        times: list[list[float]] = [[] for _ in calls]
        for round_ in range(ROUNDS + 2):
            barrier(axis)
            for call, found in zip(calls, times, strict=True):
                seconds = how(call)
                if round_ > 1:
                    found.append(seconds)
        return [min(found) for found in times]

    for name, (units, call) in direct(run, device).items():
        out[name, 0] = timed(call)[0] / units
    for number, (_, which) in enumerate(passes(run)):
        forward, backward = _pass(run, which, device)
        out["forward", number], out["backward", number] = timed(forward, backward)
        if cuda:
            out["host", number] = sum(timed(forward, backward, how=_to_launch))
    if axis.size > 1:
        sizes = SIZES[device.type]
        flops, product = direct(run, device)["product"]
        for operation, collective in OPERATIONS.items():
            for size in sizes:
                x = torch.ones(int(payload(operation, size, axis.size)) // 4, device=device)
                call = partial(collective, x, axis)
                if cuda:
                    (out[operation, size],) = timed(call)
                else:
                    (seconds,) = timed(partial(_in_a_row, product, call), how=wall)
                    out[operation, size] = max(1e-6, seconds / ROW - flops * out["product", 0])
                if cuda and (operation, size) == ("all_reduce", sizes[0]):
                    (out["host_message", 0],) = timed(call, how=_to_launch)
        x = torch.ones(sizes[-1] // 4, device=device)
        forward, backward = _pass(run, passes(run)[0][1], device)

        def alone() -> None:
            forward()
            backward()

        def both() -> None:
            work = all_reduce_async(x, axis)
            alone()
            work.wait()

        out["alone", 0], out["both", 0] = timed(alone, both, how=computing if cuda else wall)
    shape = WEIGHT[device.type]
    number = max(1, min(ELEMENTS[device.type], parameters(run.model)) // prod(shape))
    weights = {str(i): torch.randn(shape, device=device) for i in range(number)}
    gradients = [torch.randn_like(weight) for weight in weights.values()]
    others = [torch.randn_like(weight) for weight in weights.values()]
    optimizer = make_optimizer(weights, run.train)

    def update() -> None:
        factor = clip_factor(torch.nn.utils.get_total_norm(gradients), 1.0)
        torch._foreach_mul_(gradients, factor)
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    elements = prod(shape) * len(weights)
    adding = lambda: [a.add_(b) for a, b in zip(gradients, others, strict=True)]  # noqa: E731
    times = timed(update, adding)
    out["update", 0], out["accumulate", 0] = (seconds / elements for seconds in times)
    return out


def _pass(run: RunConfig, which: tuple[int, int, bool], device: torch.device) -> tuple[Callable[[], object], ...]:
    """The forward and the backward of some layers, or of the head with the loss, to be called in turn."""
    micro_batch, tp, head = which
    model = GPT(share_of(run.model, tp), layers=() if head else timed_layers(run), embed=False, head=head)
    init_weights(model, 0)
    model = model.to(device, DTYPES[run.train.dtype])
    if run.train.compile:
        for part, name in [each for block in model.layers.values() for each in of_one_shape(block)]:
            setattr(part, name, torch.compile(getattr(part, name), fullgraph=True))
        for moe in mixtures(model):
            moe.experts.passes = fused()
        model.cross_entropy = torch.compile(model.cross_entropy)
    shape = (micro_batch, run.train.seq_len)
    hidden = torch.randn(
        *shape, run.model.hidden_size, device=device, dtype=DTYPES[run.train.dtype], requires_grad=True
    )
    targets = torch.randint(run.model.vocab_size, shape, device=device)
    documents = torch.zeros(shape, dtype=torch.int64, device=device) if run.train.document_mask else None
    kept: list[torch.Tensor] = []

    def forward() -> None:
        out = model(hidden, None, documents)
        kept[:] = [model.loss(out, targets) if head else out.sum()]

    def backward() -> None:
        kept.pop().backward()

    return forward, backward


def _exchange(x: torch.Tensor, axis: Axis) -> None:
    """A message from each even rank to the next one."""
    if axis.index % 2 == 0 and axis.index + 1 < axis.size:
        send(x, axis, axis.index + 1).wait()
    elif axis.index % 2:
        receive(x, axis, axis.index - 1).wait()


OPERATIONS: dict[str, Callable[[torch.Tensor, Axis], object]] = {
    "all_reduce": all_reduce,
    "all_gather": lambda x, axis: all_gather(x, axis, 0),
    "reduce_scatter": lambda x, axis: reduce_scatter(x, axis, 0),
    "all_to_all": all_to_all,
    "send": _exchange,
}


def _by(clock: Callable[[], float], call: Callable[[], object]) -> float:
    """Seconds of a call, by this clock."""
    start = clock()
    call()
    return clock() - start


def _in_a_row(between: Callable[[], object], call: Callable[[], object]) -> None:
    for _ in range(ROW):
        between()
        call()


def _on_gpu(call: Callable[[], object]) -> float:
    """Seconds of the GPU for a call, all of which has been launched when it begins."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(ASLEEP)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _to_launch(call: Callable[[], object]) -> float:
    """Seconds of the host for a call that a GPU runs."""
    torch.cuda.synchronize()
    return _by(time.perf_counter, call)
