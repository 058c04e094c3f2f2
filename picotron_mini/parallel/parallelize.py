"""Everything that is done to a model before it trains on many ranks, in the one order that works.

    1 pipeline   keep this stage's layers, so that the rest never takes memory
    2 expert     keep this rank's experts, and send tokens to those of others
      tensor     cut the weights of what is left
      context    replace attention by one that sees the whole sequence, of which this rank holds a part
    3 weights    draw each parameter by its global name and keep this rank's part: no layout changes the start
    4 precision  below float32 the weights are rounded copies of float32 masters
    5 compile    the blocks, with the exchanges of 2 inside them, the last norm and the loss
    6 recompute  around what is compiled; and the loss in chunks
    7 data       last, because it takes the parameters as they are now, and cuts them if asked to (ZeRO)

Also here: `layout_of`, which says before any process exists where everything will be (`describe.py` prints it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..collectives import SymmetricMemory
from ..config import ModelConfig, RunConfig, TrainConfig
from ..layout import Layout, Placement, Shard, split
from ..memory.chunked_loss import chunked_loss
from ..memory.masters import SplitMasters
from ..memory.recompute import recompute
from ..mesh import Axis, Mesh, coordinates
from ..model.costs import head_flops, layer_flops
from ..model.gpt import GPT, global_name, initial_weight, parameter_shapes
from ..model.permute import fused
from ..moe.placement import Order, by_number
from .actions import Route, route_of
from .balance import balance
from .compress import compression
from .context import context_parallel
from .cuda_graph import RecordedStep, own_stream
from .data import GradientBuckets
from .deferred import Deferred, halves
from .expert import expert_parallel, expert_shard, is_expert, mixtures, of_one_shape
from .hierarchical import Hierarchical
from .routers import Routers
from .rows import alike
from .several import SeveralBuckets, SeveralSharded, by_axis
from .tensor import is_partial, sharded_dim, tensor_parallel
from .zero import ShardedGradients
from .zero3 import ShardedWeights, empty, head_with_loss

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Parallel:
    """A model made ready on this rank."""

    run: RunConfig
    mesh: Mesh
    layout: Layout
    chunks: tuple[GPT, ...]  # this stage's runs of layers, one or (with virtual stages) more; this rank's slices
    parameters: dict[str, nn.Parameter]  # by global name
    masters: Mapping[str, Tensor]  # what is updated: the parameters themselves, float32 masters, or this rank's rows
    gradients: GradientBuckets | SeveralBuckets | ShardedGradients | SeveralSharded | ShardedWeights
    device: torch.device
    routers: Routers | None = None  # of a mixture of experts
    deferred: Deferred | None = None  # with which a schedule may put off the weight gradients of linear layers
    recorded: RecordedStep | None = None  # with `cuda_graph`

    @property
    def model(self) -> GPT:
        """What this stage holds, where that is one run of layers.

        Raises:
            ValueError: there are several.
        """
        (only,) = self.chunks
        return only

    @property
    def route(self) -> Route:
        """Where the virtual stages are."""
        return route_of(self.run.train.schedule, self.mesh.shape.pp, self.run.train.chunks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the compute."""
        return DTYPES[self.run.train.dtype]

    @property
    def index(self) -> dict[str, int]:
        """The coordinates of this rank."""
        return coordinates(self.mesh.shape, self.mesh.rank)

    @property
    def border_shape(self) -> tuple[int, int, int]:
        """Of hidden states between two stages, [B, T/cp, D]; with sequence parallelism [B, T/cp/tp, D]."""
        train = self.run.train
        shape = self.mesh.shape
        tokens = train.seq_len // shape.cp // (shape.tp if train.sequence_parallel else 1)
        return train.micro_batch_size, tokens, self.run.model.hidden_size

    @property
    def trained(self) -> dict[str, Tensor]:
        """The masters of the parameters that are not frozen: what an optimizer is given."""
        masters = self.masters.held if isinstance(self.masters, SplitMasters) else self.masters
        return {name: master for name, master in masters.items() if self.parameters[name].requires_grad}


def stage_layers(model: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """Which layers each (virtual) pipeline stage holds, balanced by forward flops, the head's included."""
    costs = [layer_flops(model, seq_len, layer) for layer in range(model.num_layers)]
    return balance(costs, stages, last_extra=head_flops(model))


def layout_of(run: RunConfig) -> Layout:
    """Where every parameter of a model lives on a mesh; a pure function, evaluated before launch.

    With `zero` it is where the master and the gradient live; the weights that compute uses are cut like them by zero=3
    only, and else not over dp.

    Args:
        run: resolved, with the vocabulary's size filled.
    """
    model, mesh, train = run.model, run.mesh, run.train
    route = route_of(train.schedule, mesh.pp, train.chunks)
    parts, first, last = stage_layers(model, route.length, train.seq_len), route.stage(0), route.stage(route.length - 1)
    out = {}
    for name, shape in parameter_shapes(model).items():
        sum_axes: tuple[str, ...] = ("dp", "cp") if mesh.cp > 1 else ("dp",)
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            holders: tuple[int, ...] = (next(route.stage(n) for n, layers in enumerate(parts) if layer in layers),)
        elif name == "embed.weight":
            holders = (first, last) if model.tie_embeddings and first != last else (first,)
        else:
            holders = (last,)
        dim = sharded_dim(name)
        shards: tuple[Shard, ...] = (
            (Shard("tp", dim, split(shape[dim], mesh.tp)),) if dim is not None and mesh.tp > 1 else ()
        )
        order: Order = ()
        rows = shards[0].ranges[0][1] if dim == 0 and shards else shape[0]  # of the longest part
        if mesh.ep > 1 and is_expert(name):
            held = shape[0] // mesh.ep + train.expert_replicas
            shards, sum_axes = (expert_shard(held * mesh.ep, mesh.ep), *shards), ("edp",)
            if train.zero and (inside := mesh.edp_inside(train.zero_group)) > 1:
                shards += (Shard("edp", 0, split(held, inside) * (mesh.edp // inside)),)
            if train.expert_replicas:
                order = by_number(shape[0], mesh.ep, train.expert_replicas)
        elif train.zero and mesh.dp > 1:
            group = train.zero_group or mesh.dp
            shards += (Shard("dp", 0, split(rows, group) * (mesh.dp // group)),)
        if is_partial(name, train.sequence_parallel):
            sum_axes += ("tp",)
        if len(holders) > 1:
            sum_axes += ("pp",)
        out[name] = Placement(shape, holders, shards, sum_axes, order)
    return out


def parallelize(run: RunConfig, mesh: Mesh, device: torch.device) -> Parallel:
    """Build this rank's part of the model.

    Args:
        run: resolved (`legality.resolve`), with the vocabulary's size filled.
    """
    config, train = run.model, run.train
    layout = layout_of(run)
    if train.cuda_graph:
        own_stream(device)

    # 1 pipeline, 2 expert, tensor, context
    chunks = _cut(run, mesh, device)
    # the weight gradients of linear layers on their own, where the schedule does them on their own
    deferred = Deferred(chunks) if train.splits_backward else None

    # 3 weights, 4 precision
    for chunk in chunks:
        if train.zero == 3:  # the whole is never here at once
            chunk._apply(lambda weight: empty(weight, device))
        else:
            chunk.to_empty(device=device)
    if len(chunks) > 1:
        _tie(chunks)
    parameters = {global_name(config, name): p for chunk in chunks for name, p in chunk.named_parameters()}
    masters = _fill(parameters, layout, run, coordinates(mesh.shape, mesh.rank), device)
    routers = None if config.moe is None else Routers(run, mesh, chunks, device)

    # 5 compile
    if train.compile:
        _compile(chunks)

    # 6 recompute
    for chunk in chunks:
        recompute(chunk, train.recompute)
        chunked_loss(chunk, train.loss_chunks)

    # 7 data; without ZeRO, masters in two halves are made, and the whole ones go, before there is room for gradients
    split = train.masters == "split"
    kept: Mapping[str, Tensor] = masters
    gradients: GradientBuckets | SeveralBuckets | ShardedGradients | SeveralSharded | ShardedWeights
    if train.zero:
        gradients = _sharded(chunks, parameters, mesh, train, layout, device)
        owned = {name: gradients.own(parameter) for name, parameter in parameters.items()}
        for name, rows in owned.items():
            rows.copy_(masters[name])
            if rows.dtype == masters[name].dtype:
                masters[name] = rows
        if split:
            kept = SplitMasters(owned, masters, fuse=train.compile)
    else:
        if split:
            kept = SplitMasters(parameters, masters, fuse=train.compile)
        del masters
        gradients = _buckets(parameters, mesh, train)
    recorded = RecordedStep() if train.cuda_graph else None
    return Parallel(run, mesh, layout, tuple(chunks), parameters, kept, gradients, device, routers, deferred, recorded)


def _cut(run: RunConfig, mesh: Mesh, device: torch.device) -> list[GPT]:
    """This rank's part of the model, on the meta device, where tensors have shapes and no memory."""
    config, train = run.model, run.train
    route = route_of(train.schedule, mesh.shape.pp, train.chunks)
    parts = stage_layers(config, route.length, train.seq_len)
    positions = [route.position(mesh["pp"].index, chunk) for chunk in range(route.chunks)]
    with torch.device("meta"):
        chunks = [GPT(config, layers=parts[n], embed=n == 0, head=n == route.length - 1) for n in positions]
    tp, overlap = mesh["tp"], train.tensor_overlap
    shared = train.symmetric_memory and train.sequence_parallel and overlap > 1 and tp.size > 1
    memory = SymmetricMemory(tp, device) if shared else None
    for chunk in chunks:
        replicas, payload = train.expert_replicas, train.dispatch_payload
        expert_parallel(chunk, mesh["ep"], train.dispatch_parts, replicas, device, payload, train.dispatch)
        tensor_parallel(chunk, tp, train.sequence_parallel, overlap, memory)
        context_parallel(chunk, mesh["cp"], train.context)
    return chunks


def _fill(
    parameters: dict[str, nn.Parameter], layout: Layout, run: RunConfig, index: dict[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Draw the weights, freeze some; returns this rank's masters by global name: the parameters where they are such."""
    train, dtype = run.train, DTYPES[run.train.dtype]
    master_dtype = dtype if train.masters == "none" else torch.promote_types(dtype, torch.float32)
    masters: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        place = layout[name]
        whole = initial_weight(run.model, name, place.shape, train.seed, device)
        masters[name] = place.part(whole, index).to(master_dtype, copy=True)
        parameter.requires_grad_(not train.freezes(name))
        if train.zero == 3:
            parameter.data = empty(parameter, device, dtype)
        elif train.zero:
            parameter.data = place.without("dp", "edp").part(whole, index).to(dtype, copy=True)
        else:
            parameter.data = masters[name] if dtype == master_dtype else masters[name].to(dtype)
        if dtype == master_dtype and not train.zero:
            masters[name] = parameter
    return masters


def _compile(chunks: list[GPT]) -> None:
    for module, name in [part for chunk in chunks for block in chunk.layers.values() for part in of_one_shape(block)]:
        setattr(module, name, torch.compile(getattr(module, name), fullgraph=True))
    for moe in [moe for chunk in chunks for moe in mixtures(chunk)]:
        moe.experts.passes = fused()
    for norm in [chunk.norm for chunk in chunks if chunk.norm is not None]:  # else two float32 copies of x are kept
        norm.forward = torch.compile(norm.forward, fullgraph=True)  # type: ignore[method-assign]
    for chunk in chunks:  # fused, the float32 logits are never written
        chunk.cross_entropy = torch.compile(chunk.cross_entropy, fullgraph=True)


def _tie(chunks: list[GPT]) -> None:
    """Where a V brings a tied embedding and the head to one stage, in two chunks, they are one weight there."""
    embed = next((chunk.embed for chunk in chunks if chunk.embed is not None), None)
    head = next((chunk.head for chunk in chunks if chunk.head is not None), None)
    if chunks[0].config.tie_embeddings and embed is not None and head is not None:
        head.weight = embed.get_parameter("weight")


def _buckets(parameters: dict[str, nn.Parameter], mesh: Mesh, train: TrainConfig) -> GradientBuckets | SeveralBuckets:
    """Whole gradients, summed over all ranks that hold the same."""
    size = train.bucket_mb * 2**20
    others = _experts(parameters, mesh)
    groups = by_axis(parameters.values(), lambda p: others.get(p, mesh["dp_cp"]))
    hosts = Hierarchical(*mesh.halves("dp_cp", train.reduce_group)) if train.reduce_group else None
    reducers = [
        (GradientBuckets(group, axis, size, hosts or compression(train.compress, axis, train.compress_keep)), group)
        for axis, group in groups.items()
    ]
    return SeveralBuckets(reducers) if others else reducers[0][0]


def _sharded(
    chunks: list[GPT], parameters: dict[str, nn.Parameter], mesh: Mesh, train: TrainConfig, layout: Layout,
    device: torch.device,
) -> ShardedGradients | SeveralSharded | ShardedWeights:  # fmt: skip
    """Cut over dp what `zero` says."""
    cuts = {p: layout[name].shards[-1:] for name, p in parameters.items()}
    rows = {p: last.ranges[0][1] for p, each in cuts.items() for last in each if last.axis in ("dp", "edp")}
    axis, across = mesh.halves("dp", train.zero_group or mesh.shape.dp)
    copies = {axis: [each for each in (across, mesh["cp"]) if each.size > 1]}
    others = {}
    if mesh.shape.ep > 1:
        inside, apart = mesh.halves("edp", mesh.shape.edp_inside(train.zero_group))
        copies[inside] = [apart] if apart.size > 1 else []
        others = dict.fromkeys(_experts(parameters, mesh), inside)
    memories = {each: SymmetricMemory(each, device) for each in copies if train.symmetric_memory and each.size > 1}
    if train.zero == 3:
        all_units = [[chunk.embed, *chunk.layers.values(), chunk.norm, head_with_loss(chunk)] for chunk in chunks]
        units = [[unit for unit in each if unit is not None] for each in all_units]
        return ShardedWeights(
            [unit for each in units for unit in each], axis, rows=rows, copies=copies, others=others,
            chunks=[len(each) for each in units], counted=train.splits_backward, memories=memories,
        )  # fmt: skip
    start = "last" if train.zero == 1 else "each"
    size, when = train.bucket_mb * 2**20, halves(chunks) if train.zero == 2 and train.splits_backward else {}
    groups = by_axis(parameters.values(), lambda p: others.get(p, axis))
    sharded = [
        (ShardedGradients(alike(group, when), over, start=start, rows=rows, bucket_bytes=size, copies=copies[over],
                          memory=memories.get(over)), group)
        for over, group in groups.items()
    ]  # fmt: skip
    return SeveralSharded(sharded) if others else sharded[0][0]


def _experts(parameters: dict[str, nn.Parameter], mesh: Mesh) -> dict[nn.Parameter, Axis]:
    """The parameters whose gradients are summed over other ranks than all else, and over which."""
    return {p: mesh["edp"] for name, p in parameters.items() if mesh.shape.ep > 1 and is_expert(name)}
