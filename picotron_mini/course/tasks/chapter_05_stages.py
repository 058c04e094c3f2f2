"""Exercises of chapter 05, pipeline parallelism: what a stage holds, and what it sends back over its border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...collectives import receive, send
from ...config import MeshShape
from ...launch import launch
from ...mesh import Axis, Mesh
from ...parallel.schedules import balance
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


# --- the backward of a stage ------------------------------------------------------------------------------


def border_stub(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """The backward of one micro-batch on one stage: add to the weights' `.grad`, and return what to send back.

    Args:
        output: what the stage's forward returned, with its graph; on the last stage the loss, a scalar.
        gradient: dL/d(output), from the next stage; None on the last.
        hidden: the stage's input, a leaf that requires a gradient; None on the first.

    Returns:
        dL/d(hidden), which the previous stage waits for in any case; None on the first stage.
    """
    raise NotAttempted


def border(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """Autograd runs down to the leaves, of which the stage's input is one."""
    torch.autograd.backward(output, gradient)
    if hidden is None:
        return None
    return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad


def _none_where_unused(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    output.backward(gradient)
    return None if hidden is None else hidden.grad


def _of_a_sum(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    return border(output.sum(), None, hidden)


def _passed_on(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    output.backward(gradient)
    return gradient


def _input_only(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    if hidden is None:
        return None
    found = torch.autograd.grad(output, hidden, gradient, allow_unused=True)[0]
    return torch.zeros_like(hidden) if found is None else found


_BORDER_HINTS = (  # in this order: what is wrong on one stage may look like something else on another
    "a weight of the stage got no gradient: let autograd run down to all leaves, not to the input alone",
    "this is the derivative of the sum of the outputs: each must be weighted with the gradient that came from the next "
    "stage. On the last stage alone the weight is 1",
    "what was sent back is the gradient that came in, dL/d(output); the previous stage needs dL/d(hidden)",
    "nothing was sent back from a stage whose output does not depend on its input. Its neighbour waits for a message "
    "of that shape, for ever: send zeros",
)
_BORDER_ERRORS = {  # what torch or Python says to natural mistakes, and what it means here
    "grad can be implicitly created only for scalar": "only the last stage's output is a scalar that may start a "
    "backward by itself; on all others backward needs the gradient that came from the next stage as an argument",
    "appears to not have been used in the graph": "torch.autograd.grad refuses an input on which the output does not "
    "depend, and that happens on one stage here. Its neighbour waits for a gradient all the same: send zeros",
    "'NoneType' object has no attribute 'grad'": "the first stage has tokens and no hidden states: there hidden is "
    "None, and there is nothing to send back",
}


_RAISED = tuple(_BORDER_ERRORS.values())


def _without_gradient(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    output.backward()
    return None if hidden is None else torch.zeros_like(hidden) if hidden.grad is None else hidden.grad


def _refuses_unused(output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    output.backward(gradient, retain_graph=True)
    return None if hidden is None else torch.autograd.grad(output, hidden, gradient)[0]


def _always_hidden(output: Tensor, gradient: Tensor | None, hidden: Any) -> Tensor | None:
    output.backward(gradient)
    return torch.zeros_like(output) if hidden.grad is None else hidden.grad


def _border_on_rank(answer: Answer) -> list[str]:
    """The problems of this stage. Two micro-batches; in the second, stage 1 does not use its input."""
    mesh = Mesh.build(MeshShape(pp=3))
    pp, up = mesh["pp"], mesh["pp.backward"]
    problems = []
    for m in range(2):
        weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
        hidden = None if pp.index == 0 else _received(pp, pp.index - 1).requires_grad_()
        unused = m == 1 and pp.index == 1
        x = torch.tensor([0.3, 0.1, -0.7]) if hidden is None or unused else hidden
        output = torch.tanh(x * weight)
        if pp.index == 2:
            output = output.square().sum()
        else:
            send(output.detach(), pp, pp.index + 1).wait()
        gradient = None if pp.index == 2 else _received(up, pp.index + 1)

        leaves = [weight] if hidden is None else [weight, hidden]
        right, *back = torch.autograd.grad(output, leaves, gradient, retain_graph=True, materialize_grads=True)
        of_sum = torch.autograd.grad(output.sum(), weight, retain_graph=True)[0]
        raised = None
        try:
            got = answer(output, gradient, hidden)
        except (RuntimeError, AttributeError) as error:
            raised = next((hint for said, hint in _BORDER_ERRORS.items() if said in str(error)), None)
            if raised is None:
                raise
        if raised is not None:  # the neighbours are still served, so that they have their say
            problems.append(raised)
            if hidden is not None:
                send(back[0], up, pp.index - 1).wait()
            continue
        if weight.grad is None:
            problems.append(_BORDER_HINTS[0])
        elif not torch.allclose(weight.grad, right):
            problems.append(_BORDER_HINTS[1] if torch.allclose(weight.grad, of_sum) else "a weight's gradient is wrong")
        if hidden is not None:
            if got is None:
                problems.append(_BORDER_HINTS[3])
            elif gradient is not None and torch.equal(got, gradient):
                problems.append(_BORDER_HINTS[2])
            elif got.shape != hidden.shape or not torch.allclose(got, back[0]):
                problems.append(f"dL/d(hidden) of stage {pp.index} is {back[0].tolist()}, and {got.tolist()} was sent")
            send(back[0], up, pp.index - 1).wait()
    return problems


def _received(axis: Axis, source: int) -> Tensor:
    buffer = torch.empty(3)
    receive(buffer, axis, source).wait()
    return buffer


def _run_border(answer: Answer) -> str | None:
    found = [problem for rank in launch(_border_on_rank, answer, world_size=3, timeout=60, output="hide")
             for problem in rank]  # fmt: skip
    known = [hint for hint in (*_RAISED, *_BORDER_HINTS) if hint in found]
    return (known or found or [None])[0]


# --- which layers a stage holds ---------------------------------------------------------------------------


def layers_stub(layers: int, stages: int, head: float) -> list[int]:
    """How many layers each stage holds, so that the slowest stage is as fast as possible.

    Args:
        layers: all alike, of cost 1 each; at least one for each stage.
        head: cost of the output head, which the last stage holds besides its layers.
    """
    raise NotAttempted


def layers_of(layers: int, stages: int, head: float) -> list[int]:
    """Raise the pace until the layers fit: at a given pace a stage holds pace layers, the last one pace - head."""
    paces = sorted({float(n) for n in range(1, layers + 1)} | {n + head for n in range(1, layers + 1)})
    for pace in paces:
        last = int(pace - head + 1e-9)
        if last >= 1 and (stages - 1) * int(pace) + last >= layers >= stages:
            counts = [1] * stages
            room = [int(pace)] * (stages - 1) + [last]
            for stage in reversed(range(stages)):
                counts[stage] += min(room[stage] - 1, layers - sum(counts))
            return counts
    raise AssertionError("a stage can always hold all layers")


def _even(layers: int, stages: int, head: float) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def _rest_to_the_last(layers: int, stages: int, head: float) -> list[int]:
    return [layers // stages] * (stages - 1) + [layers - (stages - 1) * (layers // stages)]


def _head_alone(layers: int, stages: int, head: float) -> list[int]:
    return [*_even(layers, stages - 1, head), 0] if stages > 1 else [layers]


def _head_as_one_layer(layers: int, stages: int, head: float) -> list[int]:
    *others, last = _even(layers + 1, stages, head)
    return [*others, last - 1] if last > 1 else _even(layers, stages, head)


_SPLITS = [(16, 4, 3.8), (32, 4, 0.9), (9, 4, 0.7), (28, 4, 9.5), (6, 6, 2.0), (7, 3, 0.0), (5, 1, 2.0), (24, 8, 2.2)]
_EMPTY = "a stage without a layer: a stage for the head alone would be easy, but each stage must hold a layer here"
_LOST = "the stages' layers do not add up to those of the model"
_NO_HEAD = (
    "the head was not counted: the last stage has its share of the layers and the head besides, and all wait for it"
)
_LAST_MORE = "the layers left over went to the last stage, which has the head already"


def _not_a_count(n: object) -> str:
    return f"{n!r} is not how many layers a stage holds; return one int a stage (of a range of layers, its len)"


def _ranges(layers: int, stages: int, head: float) -> list[range]:
    return balance([1.0] * layers, stages, last_extra=head)


def _floats(layers: int, stages: int, head: float) -> list[float]:
    return [float(n) for n in layers_of(layers, stages, head)]


def _slowest(counts: Sequence[int], head: float) -> float:
    return max([*map(float, counts[:-1]), counts[-1] + head])


def _slower_than_possible(counts: Sequence[int], layers: int, stages: int, head: float, best: float) -> str:
    return (
        f"{layers} layers and a head of {head:g} on {stages} stages as {list(counts)}: the slowest stage costs "
        f"{_slowest(counts, head):g}, and {best:g} is possible"
    )


def _best(layers: int, stages: int, head: float) -> float:
    return _slowest([len(part) for part in balance([1.0] * layers, stages, last_extra=head)], head)


def _run_layers(answer: Answer) -> str | None:
    answers = [answer(*case) for case in _SPLITS]
    for counts in answers:
        if found := [n for n in counts if not isinstance(n, int)]:
            return _not_a_count(found[0])
    for (layers, stages, _), counts in zip(_SPLITS, answers, strict=True):
        if len(counts) != stages or sum(counts) != layers:
            return _LOST
        if min(counts) < 1:
            return _EMPTY
    for wrong, hint in ((_even, _NO_HEAD), (_rest_to_the_last, _LAST_MORE)):
        if answers == [wrong(*case) for case in _SPLITS]:
            return hint
    for case, counts in zip(_SPLITS, answers, strict=True):
        if _slowest(counts, case[2]) > (best := _best(*case)) + 1e-9:
            return _slower_than_possible(counts, *case, best)
    return None


EXERCISES = [
    Exercise(
        id="05.border",
        title="The chain rule, cut",
        task="Write the backward of one stage: given its output, the gradient from the next stage and its input, let "
        "the weights have their gradients and return what the previous stage waits for.",
        stub=border_stub,
        reference=border,
        mistakes=(
            Mistake("the input only", _input_only, _BORDER_HINTS[0]),
            Mistake("of the sum", _of_a_sum, _BORDER_HINTS[1]),
            Mistake("passed on", _passed_on, _BORDER_HINTS[2]),
            Mistake("None where unused", _none_where_unused, _BORDER_HINTS[3]),
            Mistake("backward without a gradient", _without_gradient, _RAISED[0]),
            Mistake("autograd.grad of an unused input", _refuses_unused, _RAISED[1]),
            Mistake("hidden on the first stage", _always_hidden, _RAISED[2]),
        ),
        run=_run_border,
    ),
    Exercise(
        id="05.layers",
        title="Layers for each stage",
        task="Split equal layers over the stages so that the slowest stage is as fast as possible. The last stage has "
        "the output head besides, which costs as much as some layers.",
        stub=layers_stub,
        reference=layers_of,
        mistakes=(
            Mistake("evenly", _even, _NO_HEAD),
            Mistake("the rest to the last", _rest_to_the_last, _LAST_MORE),
            Mistake("a stage for the head", _head_alone, _EMPTY),
            Mistake("which layers", _ranges, _not_a_count(range(5))),
            Mistake("floats", _floats, _not_a_count(float(layers_of(*_SPLITS[0])[0]))),
            Mistake("one forgotten", lambda layers, stages, head: _even(layers - 1, stages, head), _LOST),
            Mistake("the head as one layer", _head_as_one_layer,
                    _slower_than_possible(_head_as_one_layer(16, 4, 3.8), 16, 4, 3.8, _best(16, 4, 3.8))),
        ),
        run=_run_layers,
    ),
]  # fmt: skip
