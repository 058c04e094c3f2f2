"""Bug museum, room 04: tensor parallelism, where a forward pass can be right and its gradient a part of itself."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ... import collectives
from ...layout import Placement
from ...parallel import parallelize, tensor
from ..museum import MODEL, TRAIN, Exhibit


def copy_to_without_backward() -> None:
    """Entering a tensor-parallel layer copies the input and forgets that its gradient has parts on all ranks."""
    tensor.copy_to = lambda x, axis: x


def reduce_from_sums_again() -> None:
    """The backward of a sum over ranks sums over ranks once more."""
    real = tensor.reduce_from
    # identity forward and sum backward, behind sum forward and identity backward: sum both ways
    tensor.reduce_from = lambda x, axis: real(collectives.copy_to(x, axis), axis)


def slice_zero_for_all() -> None:
    """Every tensor-parallel rank starts from the first slice of the weights that are cut into equal parts."""
    real = Placement.slices

    def slices(self: Placement, index: Mapping[str, int]) -> tuple[slice, ...]:
        lengths = {stop - start for shard in self.shards for start, stop in shard.ranges}
        return real(self, {**index, "tp": 0} if len(lengths) == 1 else index)

    Placement.slices = slices


def head_norms_not_summed() -> None:
    """The norm on queries and keys keeps the gradient of this rank's own heads."""
    parallelize.is_partial = lambda name, sequence_parallel=False: False


def token_norms_not_summed() -> None:
    """With sequence parallelism each norm keeps the gradient of this rank's own tokens."""
    real = parallelize.is_partial
    parallelize.is_partial = lambda name, sequence_parallel=False: real(name)


EXHIBITS = [
    Exhibit(
        id="04.copy_to_without_backward",
        title="The entry that forgot its way back",
        story="A tensor-parallel layer reads one input on all ranks, and each rank's slice contributes its part to the "
        "input's gradient. The entry is the identity forward, so leaving it out changes no output. Everything "
        "below the layer then learns from one rank's part of the gradient (Megatron-LM calls this pair f and g).",
        symptom="the first loss is right to the last digit; from the final norm down, each gradient is a part.",
        patch=copy_to_without_backward,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="04.reduce_from_sums_again",
        title="A gradient times the number of ranks",
        story="The derivative of a sum hands each term the gradient as it is. An all_reduce that is differentiated by "
        "rule gets an all_reduce as its backward, which is right if the ranks' losses are to be added, and wrong "
        "here, where all ranks compute one and the same loss. torch.distributed.nn.functional.all_reduce is of "
        "that kind.",
        symptom="each exit that a gradient passes multiplies it by tp: with tp=2 the final norm's gradient is "
        "doubled and those of the last MLP are quadrupled; further down, terms with different factors mix.",
        patch=reduce_from_sums_again,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="04.slice_zero_for_all",
        title="Every rank got the first slice",
        story="When picotron loads weights, every tensor-parallel rank takes slice 0 of q, k and v. A later "
        "re-initialisation of all loaded weights hides it, which is a bug as well. Here it is the initial weights.",
        symptom="each rank computes the same heads; the loss is a little worse and nothing fails.",
        patch=slice_zero_for_all,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="04.head_norms_not_summed",
        title="Norms that see half of the heads",
        story="A norm on queries and keys is one small weight that all heads share, so each rank holds it whole, and "
        "computes the gradient from its own heads. It looks like the other norms, which need no sum.",
        symptom="copies of one weight that drift apart between tensor-parallel ranks, very slowly.",
        patch=head_norms_not_summed,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
        model=replace(MODEL, qk_norm=True),
    ),
    Exhibit(
        id="04.token_norms_not_summed",
        title="Norms that see half of the tokens",
        story="Sequence parallelism leaves each rank a part of the tokens between the layers, and the norms are "
        "there. Their weights are copies, as they were, but their gradients have become parts of a sum. Turning the "
        "option on changes no shape of any weight, so nothing asks for the sum.",
        symptom="copies of a norm's weight that drift apart between tensor-parallel ranks, with the option only.",
        patch=token_norms_not_summed,
        killed_on=("tp=2",),
        survives_on=("dp=1", "dp=2"),
        train=replace(TRAIN, sequence_parallel=True),
    ),
]
