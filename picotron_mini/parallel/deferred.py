"""The two halves of a backward, apart: input gradients at once, weight gradients when there is time.

A linear layer y = x W^T, x [*, in], W [out, in], has two products to do once dL/dy is known:

    dL/dx = dL/dy W           [*, in]      the layer below, and the stage before, wait for it
    dL/dW = (dL/dy)^T x       [out, in]    only the optimizer does

Autograd does both in one sweep. `Deferred` replaces the layer's forward by one whose backward does the first, and puts
x, dL/dy and W aside for the second:

    deferred = Deferred([model])                  every nn.Linear of it; names, weights and hooks stay
    with deferred.collecting() as products:
        loss.backward()                           input gradients; and all gradients of what is no linear layer
    for product in products:
        product.run()                             weight gradients, last layer first

What waits costs memory: x and dL/dy of each linear layer, until `run`. All else that the forward kept is freed by the
backward. Outside of `collecting` the layer is an ordinary one.

`run` hands the product to autograd as the gradient of the leaf W. So it is added up, or reduced over the replicas, by
the same hooks as any other gradient, and no one else has to know: a weight that is used twice (a tied embedding) gets
one gradient from the look-up in the first half, and one from the head in the second.

Paper: zero-bubble pipeline parallelism (arXiv 2401.10241).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

Half = Literal["first", "second", "both"]


class WeightProduct(NamedTuple):
    """A weight gradient that is still to be computed."""

    weight: Tensor  # [out, in], a leaf
    x: Tensor  # [*, in]
    gradient: Tensor  # dL/dy [*, out]

    def run(self) -> None:
        """Compute it, and add it to the weight's gradient as a backward would."""
        with torch.no_grad():
            product = self.gradient.flatten(0, -2).T @ self.x.flatten(0, -2)  # [out, in]
        torch.autograd.backward(self.weight, product)


class Deferred:
    """The linear layers of some modules, whose weight gradients can be put off.

    The weights are read at each call, so they may be replaced.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._products: list[WeightProduct] | None = None  # None: nobody collects
        for linear in [each for module in modules for each in module.modules() if isinstance(each, nn.Linear)]:
            linear.forward = partial(_forward, linear, self)  # type: ignore[method-assign]

    @contextmanager
    def collecting(self) -> Iterator[list[WeightProduct]]:
        """Put off the weight gradients of backwards inside the `with` block, into the list that it is given."""
        self._products = []
        try:
            yield self._products
        finally:
            self._products = None

    def put_off(self, product: WeightProduct) -> None:
        """Keep a product for later, or run it if nobody collects."""
        if self._products is None:
            product.run()
        else:
            self._products.append(product)


def _forward(module: nn.Linear, deferred: Deferred, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and module.weight.requires_grad):
        return F.linear(x, module.weight, module.bias)
    # The weight itself is kept from autograd: else its hooks would run in the first half already, for a gradient of
    # None. The anchor makes y require a gradient even where x does not.
    anchor = torch.empty(0, requires_grad=True)
    y: Tensor = _Linear.apply(x, anchor, module, deferred)
    return y if module.bias is None else y + module.bias


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, module: nn.Linear, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferred = module.weight, deferred
        return F.linear(x, module.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.deferred.put_off(WeightProduct(ctx.weight, x, gradient))
        return gradient @ ctx.weight if ctx.needs_input_grad[0] else None, None, None, None


def halves(modules: Iterable[nn.Module]) -> dict[nn.Parameter, Half]:
    """In which half of a split backward each parameter has its gradients.

    The first, but for weights of linear layers; and both for a table that is the embedding and the head.
    """
    found: dict[nn.Parameter, Half] = {}
    for part in [part for module in modules for part in module.modules()]:
        for name, parameter in part.named_parameters(recurse=False):
            half: Half = "second" if isinstance(part, nn.Linear) and name == "weight" else "first"
            found[parameter] = half if found.get(parameter, half) == half else "both"
    return found


def additions(module: nn.Module, split: bool) -> Counter[nn.Parameter]:
    """How often one backward of a module adds to the gradient of each of its parameters.

    Once, however often it is used, if autograd does it in one sweep. If it is split, once and once more for each linear
    layer whose weight it is.
    """
    products: Counter[nn.Parameter] = Counter()
    swept: set[nn.Parameter] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if split and isinstance(part, nn.Linear) and name == "weight":
                products[parameter] += 1
            else:
                swept.add(parameter)
    return products + Counter(swept)
