"""Recompute: forget the activations of a layer, and make them again when backward needs them.

    forward    x0 -> layer 0 -> x1 -> layer 1 -> x2 -> layer 2 -> x3       kept: x0 x1 x2, not what is inside
    backward                                    x2 -> layer 2, again, kept this time -> its gradients
                           x1 -> layer 1, again -> ...

Kept of a layer: its input, T D numbers a sequence in place of `costs.layer_activation_bytes`. Price: one more forward
of what is recomputed, so with all layers a step costs about 4/3 (2 + 4 flops a weight and token become 2 + 2 + 4).

    full        each layer as a whole           kept a layer: its input                     flops: + the layer's forward
    selective   each MLP, from its norm's       kept a layer: all but gate, up, silu(gate)  flops: + 6 D F a token
                output on                       and their product, 4 F numbers a token

An exchange inside what is recomputed happens again. In a tensor-parallel layer that is the sum at both exits (and the
gathers of sequence parallelism), so `full` sends more; the MLP is recomputed between its entry and its exit, so
`selective` sends nothing more.

The result is equal to the last bit: the same kernels see the same numbers.

Paper: Chen et al. (arXiv 1604.06174); selective, of attention: Korthikanti et al. (arXiv 2205.05198). PyTorch's own:
`torch.utils.checkpoint.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..model.gpt import GPT

Recompute = Literal["none", "full", "selective"]


def recompute(model: GPT, kind: Recompute) -> None:
    """Let the model's layers forget their activations, in place. Before or after the weights are made; after compiling.

    Args:
        kind: "full" for whole layers, "selective" for their MLPs, "none" for nothing.
    """
    for block in model.layers.values():
        if kind == "full":
            recomputed(block)
        elif kind == "selective":
            recomputed(block.get_submodule("mlp"))


def recomputed(module: nn.Module) -> None:
    """Replace `module.forward` by one that keeps its arguments only. Its value must be one tensor."""
    forward = module.forward

    def forgetful(*args: Any) -> Tensor:
        # the parameters are arguments too: so the result has a gradient also where the input has none
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not torch.is_grad_enabled():
            return forward(*args)
        return _Recompute.apply(forward, parameters, len(args), *args, *parameters)

    module.forward = forgetful


class _Recompute(Function):
    @staticmethod
    def forward(ctx, forward: Callable[..., Tensor], parameters: Sequence[Tensor], number: int, *inputs: Any):  # type: ignore[no-untyped-def]
        args = inputs[:number]
        ctx.run, ctx.parameters = forward, parameters
        ctx.tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))  # so that autograd notices if one is changed
        return forward(*args)  # without grad, as all of a Function's forward

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        args = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor.detach().requires_grad_(ctx.needs_input_grad[3 + i])
        with torch.enable_grad():
            out = ctx.run(*args)
        wanted = [i for i in ctx.tensors if args[i].requires_grad]
        leaves = [args[i] for i in wanted] + list(ctx.parameters)
        gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        of_args: list[Tensor | None] = [None] * len(args)
        for i, gradient in zip(wanted, gradients, strict=False):
            of_args[i] = gradient
        return None, None, None, *of_args, *gradients[len(wanted) :]
