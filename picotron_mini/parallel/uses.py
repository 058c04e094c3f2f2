"""When does a module's forward begin, when does its backward end? Four borders around each use of a module.

    before_forward | forward | after_forward    ...    before_backward | backward | after_backward
                                                             ^                          ^
                              the gradient arrives at the module's output      and leaves at its input

A module that is called tells of its forward. Its backward is nobody's call: autograd walks a graph of operators. So
the two borders are put into that graph. A hook on the output is called with the output's gradient, before anything of
the module runs backward. At the input a node is added that hands the values on and does nothing else. Its backward is
the module's last: a node waits for the gradients of all that used its output, and of the nodes that wait no more
autograd takes the one that was made last. (A parameter's gradient it adds up as soon as it is known.)

Where no input needs a gradient (an embedding is given token ids) there is no path to such a node. That use ends when
the whole backward does; `end` says so.

The call is caught by giving the module another class. A forward hook would do, but hooks are part of what
`module.compile()` compiles, and what happens at a border (memory comes and goes, ranks exchange) must stay outside.
It is one class for all modules of a kind: code compiled for one layer is used for the next if their classes are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Use:
    """One place of a forward pass where a module is called.

    Args:
        module: returns a tensor, or a tuple or list with tensors in it.
        before_forward, after_forward, before_backward, after_backward: called at the four borders.

    A forward inside the module's own backward (activations that are computed again) passes no border.
    """

    def __init__(
        self, module: nn.Module, *, before_forward: Callable[[], None], after_forward: Callable[[], None],
        before_backward: Callable[[], None], after_backward: Callable[[], None],
    ) -> None:  # fmt: skip
        self.before_forward, self.after_forward = before_forward, after_forward
        self.before_backward, self.after_backward = before_backward, after_backward
        self.reached = False  # whether the backward comes by, as the last forward has found
        self.running = False  # whether its backward has begun and not ended
        _intercept(module, self._call)

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running:
            return call(*args, **kwargs)
        self.before_forward()
        if torch.is_grad_enabled():
            args, kwargs = self._with_entry(args, kwargs)
        out = call(*args, **kwargs)
        self.after_forward()
        if torch.is_grad_enabled():
            every = out if isinstance(out, tuple | list) else [out]
            ends = [x for x in every if isinstance(x, Tensor) and x.requires_grad]
            self.reached = bool(ends)
            for end in ends:
                end.register_hook(self._begin)
        return out

    def _with_entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        slots = [*args, *kwargs.values()]
        marked = [i for i, x in enumerate(slots) if isinstance(x, Tensor) and x.requires_grad]
        if marked:
            passed = _Entry.apply(self.end, *[slots[i] for i in marked])
            for i, x in zip(marked, passed, strict=True):
                slots[i] = x
        return tuple(slots[: len(args)]), dict(zip(kwargs, slots[len(args) :], strict=True))

    def _begin(self, gradient: Tensor) -> None:
        if not self.running:  # the first of its outputs
            self.running = True
            self.before_backward()

    def end(self) -> None:
        """The backward of this use is over, if it had begun. Autograd calls it, or who called autograd, or both."""
        if self.running:
            self.running = False
            self.after_backward()


class _Entry(Function):
    """Hand the inputs on; say when all of their gradients are known."""

    @staticmethod
    def forward(ctx, end, *inputs):  # type: ignore[no-untyped-def]
        ctx.end = end
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        ctx.end()
        return None, *gradients


def _intercept(module: nn.Module, around: Callable[..., Any]) -> None:
    """Let each call of the module be `around(call, args, kwargs)`."""
    assert "_around" not in vars(module), "a module is one unit"
    vars(module)["_around"] = around  # not by setattr, which asks nn.Module
    kind: Any = type(module)
    module.__class__ = _used(kind)


@cache
def _used(kind: Any) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_around"](lambda *a, **k: kind.__call__(self, *a, **k), args, kwargs)

    return type(f"Used{kind.__name__}", (kind,), {"__call__": __call__})
