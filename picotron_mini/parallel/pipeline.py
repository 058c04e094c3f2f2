"""Pipeline parallelism: each stage holds some of the layers and hands hidden states to the next one.

    stage 0           stage 1           stage 2
    embed, layers  -> layers         -> layers, head, loss        hidden states h [B, T, D]
                  <-                <-                            their gradients dL/dh [B, T, D]

The chain rule is cut at the borders. With h1 = f0(tokens), h2 = f1(h1), L = f2(h2), stage 1 receives h1, keeps
it as a leaf, computes h2 and sends it. Later it receives dL/dh2, lets autograd turn that into the gradients of
its own weights and into dL/dh1, and sends dL/dh1 back. No stage ever sees a weight of another.

This file is the *executor*: it runs the list of actions that `schedules.py` made, whichever it is, and it is
the engine of every training step. With one stage nothing is sent, and F0 B0 F1 B1 ... is gradient accumulation.

    forward m     h = receive(previous)      out = forward(m, h)      send(out, next)
    backward m    g = receive(next)          autograd(out, g)         send(h.grad, previous)

A stage may hold several chunks of the model (`Route`); what goes from one to another of its own stays where it is. And
a backward may come in two halves (`deferred.py`): I sends h.grad, W computes the weights' gradients later.

Sends and receives run beside the computation. Four rules keep them from waiting for each other for ever:

- What travels down the stages and what travels up have a process group each. They meet between two stages, and NCCL
  runs the messages of a group in order: in one group, a send that nobody receives yet would block the receive behind.
- Every stage receives in the order in which its neighbour sends, so no message carries a label. On a line of stages
  that is everyone's own order; else the order is made once, from the schedule (`receives.py`).
- A gradient always travels back, even zeros from a stage whose output does not depend on its input, and even to
  a frozen stage that has no use for it. Who sends what does not depend on which weights are trained.
- At most two sends a direction are under way (a double buffer). The neighbour receives them in order and needs
  nothing of this stage for it that comes later, so waiting for the oldest of them ends.

Cost, counted as what a stage hands to `torch.distributed`, with `m` micro-batches: each stage but the last sends
m * B*T*D*itemsize bytes of activations, each but the first as many bytes of gradients, however many layers it has.
With several chunks it does so for each border between two stages.
(Tensor parallelism hands over the same tensor four times in every layer.) The price of a pipeline is its bubble.

Papers: GPipe (arXiv 1811.06965), PipeDream-flush (arXiv 2006.09503), Megatron-LM (arXiv 2104.04473).
Legend: B batch of one micro-batch, T tokens, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..collectives import Work, receive, send
from ..mesh import Axis
from .actions import Action, Message, Route
from .deferred import Deferred, WeightProduct
from .receives import Receives, receives_in_one_order, receives_in_own_order

SENDS_UNDER_WAY = 2  # a direction: one travels while the next is computed

Forward = Callable[[int, Tensor | None], Tensor]


class _Mail:
    """The messages of one stage: receives started ahead, sends kept alive until they are gone, and its own notes."""

    def __init__(
        self, route: Route, down: Axis, up: Axis, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.route, self.stage, self.axes = route, down.index, {True: down, False: up}
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.posted: dict[Message, tuple[Tensor, Work | None]] = {}  # started, or left here by another chunk
        self.sending: dict[bool, deque[tuple[Tensor, Work]]] = {True: deque(), False: deque()}

    def post(self, message: Message) -> None:
        """Start receiving a message [B, T, D]; one from a chunk of this very stage needs no receive."""
        source, to = self.route.ends(message)
        if source != to:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.posted[message] = buffer, receive(buffer, self.axes[self.route.goes_down(message)], source)

    def take(self, message: Message | None) -> Tensor | None:
        """A message that was posted, [B, T, D]; `None` at the ends of the pipeline, where none arrive."""
        if message is None:
            return None
        buffer, work = self.posted.pop(message)
        if work is not None:
            work.wait()
        return buffer

    def put(self, message: Message | None, x: Tensor) -> None:
        """Start sending x [B, T, D], or leave it for another chunk of this stage."""
        if message is None:
            return
        x, (source, to), down = x.detach(), self.route.ends(message), self.route.goes_down(message)
        if source == to:
            self.posted[message] = x, None
            return
        queue = self.sending[down]
        if len(queue) == SENDS_UNDER_WAY:
            queue.popleft()[1].wait()
        x = x.contiguous()
        queue.append((x, send(x, self.axes[down], to)))

    def drain(self) -> None:
        """Wait until everything is sent."""
        for queue in self.sending.values():
            while queue:
                queue.popleft()[1].wait()


def run_pipeline(
    actions: Sequence[Action],
    *,
    forward: Forward | Sequence[Forward],
    axis: Axis,
    gradient_axis: Axis,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    before_last_backward: Callable[[], object] | None = None,
    after_backward: Callable[[], object] | None = None,
    route: Route | None = None,
    receives: Receives | None = None,
    deferred: Deferred | None = None,
) -> Tensor:
    """Run the actions of this stage; gradients add up in `.grad` of the parameters that `forward` uses.

    Args:
        actions: what `schedule(axis.index, axis.size, micro_batches)` returned.
        forward: the stage, `forward(m, hidden)` for micro-batch m, or one such function for each of its chunks.
            `hidden` [B, T, D] is `None` at the model's beginning, which finds its own tokens. Returns hidden states
            [B, T, D]; at the model's end a scalar, this micro-batch's share of the loss, already divided by the
            global number of target tokens.
        axis: the pipeline's mesh axis, for what travels down the stages: on a line the activations.
        gradient_axis: the same ranks with a process group of their own, for what travels up.
        shape, dtype, device: of the hidden states at the borders, the same on all stages.
        before_last_backward: called once before this stage's last whole backward. With one chunk, from here on each
            gradient that becomes ready is final, so that a data-parallel reducer may start to sum it over the replicas.
        after_backward: called after each backward, of two halves after the first. Of a whole one all gradients of its
            micro-batch and chunk are there.
        route: where the virtual stages are; None: one a stage.
        receives: what to start receiving before each action; None: in this stage's own order, right on a line of
            ranks whose receives do not hold them up.
        deferred: of the chunks' linear layers, if the schedule splits backwards.

    Returns:
        The sum of the losses, a detached scalar of at least float32, where the model ends; 0 on the other stages.

    Raises:
        ValueError: `forward` returned hidden states of another shape or dtype than was announced to the neighbours.
    """
    stage, route = axis.index, route or Route(axis.size)
    chunks = [forward] if callable(forward) else forward
    mail = _Mail(route, axis, gradient_axis, shape, dtype, device)
    loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
    live: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # (chunk, m) -> input, output with its graph
    waiting: dict[tuple[int, int], list[WeightProduct]] = {}  # (chunk, m) -> what its W has to do

    def run_forward_of(action: Action) -> None:
        hidden, made = mail.take(route.needs(stage, action)), route.makes(stage, action)
        if hidden is not None:
            hidden.requires_grad_(torch.is_grad_enabled())  # a leaf: its gradient is what goes back
        output = chunks[action.chunk](action.micro_batch, hidden)
        if made is None:
            loss.add_(output.detach())
        else:
            _check(output, shape, dtype)
            mail.put(made, output)
        if torch.is_grad_enabled():
            live[action.chunk, action.micro_batch] = hidden, output

    def run_backward_of(action: Action) -> None:
        gradient = mail.take(route.needs(stage, action))  # None at the end: the derivative of the loss by itself is 1
        hidden, output = live.pop((action.chunk, action.micro_batch))  # the activations end with this function
        if output.requires_grad:  # not where everything up to here is frozen
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            mail.put(route.makes(stage, action), torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)

    backwards = sum(action.kind == "backward" for action in actions)
    for action, upcoming in zip(actions, receives or receives_in_own_order(actions, route, stage), strict=True):
        for message in upcoming:
            mail.post(message)
        if action.kind == "forward":
            run_forward_of(action)
        elif action.kind == "backward":
            backwards -= 1
            if backwards == 0 and before_last_backward is not None:
                before_last_backward()
            run_backward_of(action)
            if after_backward is not None:
                after_backward()
        elif action.kind == "backward_input":
            assert deferred is not None, "a schedule that splits backwards needs linear layers that do"
            with deferred.collecting() as waiting[action.chunk, action.micro_batch]:
                run_backward_of(action)
            if after_backward is not None:
                after_backward()
        else:
            products = waiting.pop((action.chunk, action.micro_batch))
            while products:
                products.pop(0).run()  # each is freed before the next is computed
    mail.drain()
    return loss


def run_forward(
    micro_batches: int,
    *,
    forward: Forward | Sequence[Forward],
    axis: Axis,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    gradient_axis: Axis | None = None,
    route: Route | None = None,
) -> Tensor:
    """Forwards only, for validation: the arguments and the returned loss are those of `run_pipeline`."""
    route = route or Route(axis.size)
    actions, receives = _forwards(route, micro_batches)
    with torch.no_grad():
        return run_pipeline(
            actions, forward=forward, axis=axis, gradient_axis=gradient_axis or axis, shape=shape, dtype=dtype,
            device=device, route=route, receives=receives[axis.index] if receives else None,
        )  # fmt: skip


@cache  # a validation asks again for every batch
def _forwards(route: Route, micro_batches: int) -> tuple[list[Action], list[Receives] | None]:
    """The actions of every stage, and with several stages when each starts which receive."""
    stages = route.stages
    groups = [range(start, min(start + stages, micro_batches)) for start in range(0, micro_batches, stages)]
    actions = [Action("forward", m, chunk) for group in groups for chunk in range(route.chunks) for m in group]
    return actions, None if stages == 1 else receives_in_one_order([actions] * stages, route)


def _check(output: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if output.shape != tuple(shape) or output.dtype != dtype:
        raise ValueError(
            f"the stage returned {output.dtype} {list(output.shape)}, and its neighbour expects {dtype} {list(shape)}"
        )
