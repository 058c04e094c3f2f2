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

Sends and receives run beside the computation. Four rules keep them from waiting for each other for ever:

- Activations and gradients travel in two process groups. They meet between two stages, and NCCL runs the
  messages of a group in order: in one group, a send that nobody receives yet would block the receive behind it.
- Every stage receives in the order in which its neighbour sends. Both schedules go through the micro-batches in
  order, so no message carries a label.
- A gradient always travels back, even zeros from a stage whose output does not depend on its input, and even to
  a frozen stage that has no use for it. Who sends what does not depend on which weights are trained.
- At most two sends a direction are under way (a double buffer). The neighbour receives them in order and needs
  nothing of this stage for it that comes later, so waiting for the oldest of them ends.

Cost, counted as what a stage hands to `torch.distributed`, with `m` micro-batches: each stage but the last sends
m * B*T*D*itemsize bytes of activations, each but the first as many bytes of gradients, however many layers it has.
(Tensor parallelism hands over the same tensor four times in every layer.) The price of a pipeline is its bubble.

Papers: GPipe (arXiv 1811.06965), PipeDream-flush (arXiv 2006.09503), Megatron-LM (arXiv 2104.04473).
Legend: B batch of one micro-batch, T tokens, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..collectives import Work, receive, send
from ..mesh import Axis
from .schedules import Action, Kind

SENDS_UNDER_WAY = 2  # a direction: one travels while the next is computed


class _Channel:
    """One direction of traffic: receives from one neighbour, sends to the other, in order and without waiting."""

    def __init__(self, axis: Axis, step: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.axis, self.source, self.to = axis, axis.index - step, axis.index + step
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.posted: deque[tuple[Tensor, Work]] = deque()  # receives that were started and not taken yet
        self.sending: deque[tuple[Tensor, Work]] = deque()  # keeps the tensors alive until they are gone
        self.open = False  # whether a first receive was started

    def post(self) -> None:
        """Start receiving the next message [B, T, D], if there is a neighbour that sends any."""
        self.open = True
        if 0 <= self.source < self.axis.size:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.posted.append((buffer, receive(buffer, self.axis, self.source)))

    def take(self) -> Tensor | None:
        """The oldest message that was posted, [B, T, D]; `None` at the end of the pipeline where none arrive."""
        if not self.posted:
            return None
        buffer, work = self.posted.popleft()
        work.wait()
        return buffer

    def put(self, x: Tensor) -> None:
        """Start sending x [B, T, D], if there is a neighbour that wants it."""
        if 0 <= self.to < self.axis.size:
            if len(self.sending) == SENDS_UNDER_WAY:
                self._finish_oldest()
            x = x.detach().contiguous()
            self.sending.append((x, send(x, self.axis, self.to)))

    def drain(self) -> None:
        """Wait until everything is sent."""
        while self.sending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        _, work = self.sending.popleft()
        work.wait()


def run_pipeline(
    actions: Sequence[Action],
    *,
    forward: Callable[[int, Tensor | None], Tensor],
    axis: Axis,
    gradient_axis: Axis,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    before_last_backward: Callable[[], object] | None = None,
    after_backward: Callable[[], object] | None = None,
) -> Tensor:
    """Run the actions of this stage; gradients add up in `.grad` of the parameters that `forward` uses.

    Args:
        actions: what `schedule(axis.index, axis.size, micro_batches)` returned.
        forward: the stage, `forward(m, hidden)` for micro-batch m. `hidden` [B, T, D] is `None` on the first
            stage, which finds its own tokens. Returns hidden states [B, T, D]; on the last stage a scalar, this
            micro-batch's share of the loss, already divided by the global number of target tokens.
        axis: the pipeline's mesh axis, that activations travel on.
        gradient_axis: the same ranks with a process group of their own, that gradients travel on.
        shape, dtype, device: of the hidden states at the borders, the same on all stages.
        before_last_backward: called once before this stage's last backward. From here on each gradient that
            becomes ready is final, so that a data-parallel reducer may start to sum it over the replicas.
        after_backward: called after each backward, when all gradients of that micro-batch are there (ZeRO 2 and 3).

    Returns:
        The sum of the losses, a detached scalar of at least float32, on the last stage; 0 on the others.

    Raises:
        ValueError: `forward` returned hidden states of another shape or dtype than was announced to the neighbours.
    """
    channels: dict[Kind, _Channel] = {
        "forward": _Channel(axis, 1, shape, dtype, device),
        "backward": _Channel(gradient_axis, -1, shape, dtype, device),
    }
    activations, gradients = channels["forward"], channels["backward"]
    last_stage = axis.index == axis.size - 1
    loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
    live: dict[int, tuple[Tensor | None, Tensor]] = {}  # micro-batch -> stage input, stage output with its graph

    def run_forward_of(m: int) -> None:
        hidden = activations.take()
        if hidden is not None:
            hidden.requires_grad_(torch.is_grad_enabled())  # a leaf: its gradient is what goes back
        output = forward(m, hidden)
        if last_stage:
            loss.add_(output.detach())
        else:
            _check(output, shape, dtype)
            activations.put(output)
        if torch.is_grad_enabled():
            live[m] = hidden, output

    def run_backward_of(m: int) -> None:
        gradient = gradients.take()  # None on the last stage: the derivative of the loss by itself is 1
        hidden, output = live.pop(m)  # the activations end with this function
        if output.requires_grad:  # not where everything up to here is frozen
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            gradients.put(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)

    backwards = sum(action.kind == "backward" for action in actions)
    for action, upcoming in zip(actions, [*actions, None][1:], strict=True):
        _post_ahead(channels, action, upcoming)
        if action.kind == "forward":
            run_forward_of(action.micro_batch)
        else:
            backwards -= 1
            if backwards == 0 and before_last_backward is not None:
                before_last_backward()
            run_backward_of(action.micro_batch)
            if after_backward is not None:
                after_backward()
    activations.drain()
    gradients.drain()
    return loss


def run_forward(
    micro_batches: int,
    *,
    forward: Callable[[int, Tensor | None], Tensor],
    axis: Axis,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Forwards only, for validation: the arguments and the returned loss are those of `run_pipeline`."""
    actions = [Action("forward", m) for m in range(micro_batches)]
    with torch.no_grad():
        return run_pipeline(
            actions, forward=forward, axis=axis, gradient_axis=axis, shape=shape, dtype=dtype, device=device
        )


def _post_ahead(channels: dict[Kind, _Channel], action: Action, upcoming: Action | None) -> None:
    """Receive for this action, and already for the next one, so that its input travels during this computation.

    The first message of a direction waits for its turn, though: NCCL may set up the connection with it, and
    then holds this process until the neighbour joins, who may need the result of this very action first.
    """
    mine = channels[action.kind]
    if not mine.posted:
        mine.post()
    if upcoming is not None:
        theirs = channels[upcoming.kind]
        if theirs.open and len(theirs.posted) < (2 if theirs is mine else 1):
            theirs.post()


def _check(output: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if output.shape != tuple(shape) or output.dtype != dtype:
        raise ValueError(
            f"the stage returned {output.dtype} {list(output.shape)}, and its neighbour expects {dtype} {list(shape)}"
        )
