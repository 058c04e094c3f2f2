"""ZeRO 1 around any torch optimizer: every rank has all weights and gradients, and updates its share of them.

For a model that is not cut otherwise: gradients are summed already (`GradientBuckets`), and equal on all ranks. Then N
ranks would make the same update N times over, with N copies of its state. Here each rank makes an N-th of it:

    parameters       |---- a ----|-- b --|------- c -------|    one behind the other
    element by element   rank 0      |     rank 1    |  rank 2  cut anywhere: equal shares
    whole parameters     a: rank 1     b: rank 1      c: rank 0 largest first, to the rank that has least

AdamW, SGD and their kin treat every element by itself, so a parameter may be cut in the middle. Others look at all of
a parameter: Muon makes a matrix orthogonal, Adafactor keeps a mean of each row and column. They get whole parameters.
LBFGS looks at all parameters together, for the scalar products of its directions: no rank can do its share alone.

Memory: 1/N of the optimizer's state. Cost a step: an all_gather of the share, 1/N of the weights (of the largest share,
where parameters stay whole).

Paper: ZeRO (arXiv 1910.02054), its first stage. PyTorch's own: torch.distributed.optim.ZeroRedundancyOptimizer, which
always gives out whole parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, optim

from ..collectives import all_gather
from ..config import ConfigError
from ..layout import split
from ..mesh import Axis

ELEMENTWISE = {
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
}  # fmt: skip
REFUSED = {
    optim.LBFGS: "needs the scalar products of whole gradients, which no rank can compute from its share",
    optim.SparseAdam: "updates the rows that a sparse gradient names, and shares are of dense gradients",
}


class ShardedOptimizer:
    """Update weights that all ranks of an axis hold, each rank its share, and hand the results round.

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, mesh["dp"], lr=1e-3)
        buckets.finish()     # p.grad is the sum, on every rank
        optimizer.step()

    Args:
        parameters: or groups of them, as torch's optimizers take; contiguous.
        kind: a class of `torch.optim`, or one's own, which must look at one parameter at a time.
        axis: the ranks that hold the same weights.
        elementwise: whether `kind` treats every element by itself, so that its parameters may be cut anywhere. None: as
            is known of torch's own; of others not, so they get whole parameters.
        options: of `kind`.

    Raises:
        ConfigError: `kind` cannot be shared out, or not element by element, or a parameter is not contiguous.
    """

    def __init__(
        self, parameters: Iterable[Any], kind: type[optim.Optimizer], axis: Axis, *, elementwise: bool | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        for refused, reason in REFUSED.items():
            if issubclass(kind, refused):
                raise ConfigError(f"{kind.__name__} cannot be shared out over {axis.name}={axis.size}: it {reason}")
        if elementwise not in (None, True, False):
            raise ConfigError(f"elementwise={elementwise!r} must be True, False or None")
        if elementwise and kind.__module__.startswith("torch.optim") and kind not in ELEMENTWISE:
            raise ConfigError(f"{kind.__name__} looks at whole parameters, so it is not elementwise; leave that out")
        given = list(parameters)
        groups: list[dict[str, Any]] = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        groups = [group | {"params": list(group["params"])} for group in groups]
        self.axis = axis
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        if any(not p.is_contiguous() for p in self.parameters):
            raise ConfigError("a parameter is not contiguous; its elements have no order to be cut in")
        sizes = [p.numel() for p in self.parameters]
        # shares[r]: (number of the parameter, first element, end) for each piece that rank r updates
        anywhere = kind in ELEMENTWISE if elementwise is None else elementwise
        self.shares = cut_anywhere(sizes, axis.size) if anywhere else whole(sizes, axis.size)
        self.pieces: list[tuple[int, Tensor]] = []  # this rank's: the parameter's number, and the part as a view
        for number, start, end in self.shares[axis.index]:
            parameter = self.parameters[number].detach()
            entire = end - start == parameter.numel()
            self.pieces.append((number, parameter if entire else parameter.view(-1)[start:end]))
        local: list[dict[str, Any]] = []
        first = 0
        for group in groups:
            numbers = range(first, first := first + len(group["params"]))
            mine = [piece for number, piece in self.pieces if number in numbers]
            # a rank may own nothing of a group, but has to follow its learning rate
            local.append(group | {"params": mine or [torch.zeros(0, 0)]})
        self.optimizer = kind(local, **options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer of this rank's share: set a learning rate here, on every rank."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update this rank's share, and get the others'. Every rank must call it."""
        for number, piece in self.pieces:
            gradient = self.parameters[number].grad
            if gradient is not None and piece.shape != gradient.shape:
                start, end = next((s, e) for n, s, e in self.shares[self.axis.index] if n == number)
                gradient = gradient.reshape(-1)[start:end]
            piece.grad = gradient
        self.optimizer.step()
        for _, piece in self.pieces:
            piece.grad = None
        if self.axis.size > 1:
            for dtype, device in dict.fromkeys((p.dtype, p.device) for p in self.parameters):
                self._hand_round(dtype, device)

    def _hand_round(self, dtype: torch.dtype, device: torch.device) -> None:
        def views(rank: int) -> list[Tensor]:
            every = [(self.parameters[number].detach(), start, end) for number, start, end in self.shares[rank]]
            return [p.view(-1)[start:end] for p, start, end in every if (p.dtype, p.device) == (dtype, device)]

        shares = [views(rank) for rank in range(self.axis.size)]
        length = max(sum(view.numel() for view in share) for share in shares)
        mine = torch.cat([*shares[self.axis.index], torch.zeros(0, dtype=dtype, device=device)])
        mine = torch.cat([mine, mine.new_zeros(length - len(mine))])  # all_gather wants equal lengths
        gathered = all_gather(mine, self.axis, 0).view(self.axis.size, length)
        for rank, share in enumerate(shares):
            if rank != self.axis.index:
                parts = gathered[rank].split([view.numel() for view in share] + [length - sum(map(len, share))])
                for view, part in zip(share, parts, strict=False):
                    view.copy_(part)


def cut_anywhere(sizes: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    """Equal shares of all elements in order: for each rank (parameter, first element, end)."""
    shares = []
    for low, high in split(sum(sizes), ranks):
        before, share = 0, []
        for number, size in enumerate(sizes):
            start, end = max(low - before, 0), min(high - before, size)
            if start < end:
                share.append((number, start, end))
            before += size
        shares.append(share)
    return shares


def whole(sizes: list[int], ranks: int) -> list[list[tuple[int, int, int]]]:
    """Whole parameters, the largest first, each to the rank that has least: for each rank (parameter, 0, size)."""
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        least = min(range(ranks), key=lambda rank: sum(end for _, _, end in shares[rank]))
        shares[least].append((number, 0, sizes[number]))
    return [sorted(share) for share in shares]
