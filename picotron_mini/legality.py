"""What may run: the one written predicate that says whether a layout is legal for a model and its training.

Each `*_problems` returns sentences that name the setting, its value and the nearest ones that work; an empty list
means legal. `resolve` fills what was left open (layout, device, number of micro-batches), asks all of them, and
refuses a run with every problem at once, before a process is started. What is legal and gains less than one would think
is a notice: `train`, `bench`, `plan` and `describe` print it.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, lcm
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .config import ConfigError, MeshShape, ModelConfig, MoEConfig, RunConfig, TrainConfig, divisors, nearest
from .expert_legality import expert_problems, recorded_problems
from .model.gpt import parameter_shapes
from .model.legality import model_problems

# By kind of settings: those with a few values, and which. (zero has its own sentence.)
_CHOICES = {
    kind: {n: get_args(h) for n, h in get_type_hints(kind).items() if get_origin(h) is Literal and n != "zero"}
    for kind in (ModelConfig, MoEConfig, TrainConfig)
}


def layout_problems(model: ModelConfig, mesh: MeshShape) -> list[str]:
    """The legality of a layout for a model, in words; an empty list is a legal layout.

    Tensor parallelism splits whole heads and equal parts of the MLP; the vocabulary may be uneven (it is
    padded by the convention of layout.py). Each pipeline stage needs a layer of its own.
    """
    found = model_problems(model)
    if found:
        return found
    fits = nearest(mesh.tp, [tp for tp in fitting_tp(model) if tp <= 4 * mesh.tp])  # what all sentences advise
    wrong = {name: size for name, size in _cut_sizes(model).items() if size % mesh.tp}
    found += [f"tp={mesh.tp} does not divide {name}={size}; tp could be {fits}" for name, size in wrong.items()]
    if not _all_have_rows(model.vocab_size, mesh.tp):
        larger = next(n for n in range(model.vocab_size, model.vocab_size + mesh.tp) if _all_have_rows(n, mesh.tp))
        found.append(
            f"tp={mesh.tp} leaves a rank without any of vocab_size={model.vocab_size}; tp could be {fits}"
            + ("" if wrong else f", or vocab_size={larger}")
        )
    if mesh.pp > model.num_layers:
        found.append(f"pp={mesh.pp} is more than num_layers={model.num_layers}; use pp<={model.num_layers}")
    return found


def _cut_sizes(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism cuts into equal parts."""
    sizes = {name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    if model.moe is not None:
        sizes |= {"expert_size": model.moe.expert_size, "shared_size": model.moe.shared_size}
        if not model.moe.dense_layers:
            del sizes["intermediate_size"]  # no layer has such an MLP
    return sizes


def _all_have_rows(vocab: int, tp: int) -> bool:
    """Whether each of tp ranks has a part of a vocabulary (0: not known yet)."""
    return not vocab or (tp - 1) * -(-vocab // tp) < vocab


def fitting_tp(model: ModelConfig) -> list[int]:
    """Every tp over which a legal model can be cut, ascending."""
    return [tp for tp in divisors(gcd(*_cut_sizes(model).values())) if _all_have_rows(model.vocab_size, tp)]


def context_problems(model: ModelConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """Whether the sequence, and for ulysses the heads, can be shared by cp ranks, in words; empty when they can.

    The ring cuts the sequence in 2 cp equal chunks, ulysses in cp equal parts; ulysses then gives each of the cp * tp
    ranks whole heads, and the key-value heads that these read.
    """
    if mesh.cp == 1 or model_problems(model):
        return []
    sizes = {name: getattr(model, name) for name in ("num_heads", "num_kv_heads")}
    whole = gcd(*sizes.values())
    if train.context == "ulysses" and whole % (mesh.cp * mesh.tp) and not whole % mesh.tp:
        # another cp is needed, which changes what seq_len must be: so the advice counts both
        fits = nearest(mesh.cp, [d for d in divisors(whole // mesh.tp) if not train.seq_len % d])
        ring = "" if train.seq_len % (2 * mesh.cp) else ", or use context=ring"
        wrong = " and ".join(f"{name}={n}" for name, n in sizes.items() if n % (mesh.cp * mesh.tp))
        return [
            f"cp*tp={mesh.cp * mesh.tp} does not divide {wrong}, and context=ulysses gives each rank whole heads; "
            f"cp could be {fits}{ring}"
        ]
    parts, why = (2 * mesh.cp, f"2*cp={2 * mesh.cp}") if train.context == "ring" else (mesh.cp, f"cp={mesh.cp}")
    if not train.seq_len % parts:
        return []
    step = lcm(parts, mesh.cp * mesh.tp) if train.sequence_parallel else parts
    low = train.seq_len - train.seq_len % step
    fits = " or ".join(str(n) for n in (low, low + step) if n)
    return [
        f"{why} does not divide seq_len={train.seq_len}, and context={train.context} cuts equal parts; "
        f"use seq_len={fits}"
    ]


def sequence_problems(model: ModelConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """Whether tp ranks can share the tokens between their layers, in words; empty when they can.

    A length is not judged by a tp that the model refuses: another is needed, which other lengths may fit.
    """
    if not train.sequence_parallel or model_problems(model) or mesh.tp not in fitting_tp(model):
        return []
    parts, why = mesh.cp * mesh.tp, f"tp={mesh.tp}" if mesh.cp == 1 else f"cp*tp={mesh.cp * mesh.tp}"
    if not train.seq_len % parts:
        return []
    step = parts if mesh.cp == 1 or train.context == "ulysses" else lcm(2 * mesh.cp, parts)  # the ring cuts it as well
    fits = nearest(train.seq_len, list(range(step, train.seq_len + step, step)))
    return [f"sequence_parallel: {why} does not divide seq_len={train.seq_len}; seq_len could be {fits}"]


def schedule_problems(model: ModelConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """What keeps a pipeline schedule from running on a layout, in words; `train` has its micro-batches filled."""
    name, chunks = f"schedule={train.schedule}", train.chunks
    if train.schedule != "interleaved" and train.virtual_stages != 2:
        return [
            f"virtual_stages={train.virtual_stages} is for schedule=interleaved; {name} has {chunks} a stage: leave it "
            "out, or at 2, which means nothing then"
        ]
    if chunks < 2 and train.schedule == "interleaved":
        return [f"virtual_stages={chunks} must be at least 2; with 1 it is schedule=1f1b"]
    found = []
    if chunks > 1 and mesh.pp == 1:
        found.append(f"{name} needs a pipeline, and pp=1 is none; use pp>=2, or schedule=1f1b")
    elif chunks * mesh.pp > model.num_layers:
        most = model.num_layers // chunks
        fits = f"use pp<={most}" if most > 1 else f"use num_layers>={chunks * mesh.pp}"
        found.append(
            f"{name} cuts the model into {chunks} * pp={mesh.pp} parts, more than num_layers={model.num_layers}; {fits}"
        )
    if train.schedule == "interleaved" and train.micro_batches % mesh.pp:
        fits = nearest(train.micro_batches, list(range(mesh.pp, train.micro_batches + 2 * mesh.pp, mesh.pp)))
        found.append(
            f"{name} runs micro-batches in groups of pp={mesh.pp}, and micro_batches={train.micro_batches} is no "
            f"multiple of it; it could be {fits}"
        )
    if train.splits_backward:
        for setting, off in (("compile", False), ("recompute", "none"), ("loss_chunks", 1)):
            if (value := getattr(train, setting)) != off:
                found.append(f"{name} splits each backward, and {setting}={value} makes it one; use {setting}={off}")
    return found


def training_problems(mesh: MeshShape, train: TrainConfig) -> list[str]:
    """What is wrong with the settings of the work itself, alone or on this mesh, in words."""
    found = []
    if train.tensor_overlap > 1:
        if mesh.tp == 1:
            found.append(
                f"tensor_overlap={train.tensor_overlap} hides exchanges between tp ranks, and tp=1 has none; "
                "use tp=2 or more, or tensor_overlap=1"
            )
        for setting, clash, use in (("schedule", ("zb-h1", "zb-v"), "1f1b"), ("recompute", ("selective",), "full")):
            if getattr(train, setting) in clash:
                found.append(
                    f"tensor_overlap={train.tensor_overlap} does not go with {setting}={getattr(train, setting)}, "
                    f"which takes a layer's backward apart in its own way; use {setting}={use} or tensor_overlap=1"
                )
    for name, least in (
        ("tensor_overlap", 1),
        ("steps", 1), ("seq_len", 2), ("eval_batches", 1), ("warmup_steps", 0), ("eval_every", 0), ("loss_chunks", 1),
        ("dispatch_parts", 1), ("place_every", 0),
    ):  # fmt: skip
        if getattr(train, name) < least:
            found.append(f"{name}={getattr(train, name)} must be at least {least}")
    tokens = train.micro_batch_size * train.seq_len // mesh.cp
    if mesh.ep > 1 and train.dispatch_parts > tokens > 0:
        found.append(
            f"dispatch_parts={train.dispatch_parts} is more than the {tokens} tokens that a rank has of a micro-batch; "
            f"use at most {tokens}"
        )
    if train.recompute == "selective" and train.compile:
        found.append(
            "recompute=selective does not go with compile: a compiled layer already computes its elementwise steps "
            "again; use recompute=full or recompute=none"
        )
    for name in ("lr", "bucket_mb"):
        if not 0 < getattr(train, name) < float("inf"):
            found.append(f"{name}={getattr(train, name)} must be a number above 0")
    for name in ("clip_norm", "weight_decay"):
        if not 0 <= getattr(train, name) < float("inf"):
            found.append(f"{name}={getattr(train, name)} must be 0 (off) or above")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            found.append(f"{name}={getattr(train, name)} must lie between 0 and 1, below 1")
    if not 0 <= train.min_lr_ratio <= 1:
        found.append(f"min_lr_ratio={train.min_lr_ratio} must lie between 0 and 1")
    if not 0 <= train.seed < 2**63:
        found.append(f"seed={train.seed} must be 0 or above, and below 2**63")
    if train.zero not in (0, 1, 2, 3):
        found.append(f"zero={train.zero} must be 0 (off), 1, 2 or 3")
    elif train.zero and mesh.dp == 1:
        found.append(f"zero={train.zero} cuts over dp, and dp=1 has nothing to cut; use dp=2 or more, or zero=0")
    tokens_travel = mesh.tp > 1 and train.sequence_parallel and train.tensor_overlap > 1
    if train.symmetric_memory and not train.zero and not tokens_travel:
        found.append(
            "symmetric_memory is for what zero cuts, and for tokens that travel between tp ranks with both "
            "sequence_parallel and tensor_overlap=2 or more; this run has neither, use symmetric_memory=False"
        )
    if train.masters != "whole" and train.dtype != "bfloat16":
        found.append(
            f"masters={train.masters} is for dtype=bfloat16; {train.dtype} weights are their own masters: use "
            "masters=whole, or dtype=bfloat16"
        )
    elif train.masters != "whole" and train.zero and train.place_every:
        found.append(
            f"masters={train.masters} does not go with zero={train.zero} where experts move (place_every="
            f"{train.place_every}); use masters=whole, zero=0 or place_every=0"
        )
    if train.compress != "none" and train.zero:
        found.append(f"compress={train.compress} is for whole gradients, and zero={train.zero} cuts them; use zero=0")
    if train.compress == "topk" and train.place_every:
        found.append(
            f"compress=topk keeps what it has not sent yet by slot, and experts change theirs (place_every="
            f"{train.place_every}); use compress=bf16 or none, or place_every=0"
        )
    if not 0 < train.compress_keep <= 1:
        found.append(f"compress_keep={train.compress_keep} must lie above 0 and be at most 1")
    if train.reduce_group:
        found += _reduce_group_problems(mesh, train)
    if train.zero_group and not train.zero:
        found.append(f"zero_group={train.zero_group} says how zero cuts, and zero=0 does not; use zero=1, 2 or 3")
    elif train.zero_group and (train.zero_group < 2 or mesh.dp % train.zero_group):
        groups = [d for d in divisors(mesh.dp) if d > 1 and d * mesh.cp % mesh.ep == 0]
        near = f"zero_group could be {nearest(train.zero_group, groups)}" if groups else "leave it out"
        found.append(f"zero_group={train.zero_group} does not cut dp={mesh.dp} into groups of 2 or more; {near}")
    return found


def _reduce_group_problems(mesh: MeshShape, train: TrainConfig) -> list[str]:
    found, name, ranks = [], f"reduce_group={train.reduce_group}", mesh.dp * mesh.cp
    if train.reduce_group < 2 or ranks % train.reduce_group:
        groups = [d for d in divisors(ranks) if d > 1]
        near = f"reduce_group could be {nearest(train.reduce_group, groups)}" if groups else "leave it out"
        found.append(f"{name} does not cut dp*cp={ranks} into groups of 2 or more; {near}")
    if train.zero:
        found.append(
            f"{name} sums whole gradients on every rank, and zero={train.zero} only what a rank owns; "
            "use reduce_group=0 (zero_group has groups for it), or zero=0"
        )
    if train.compress != "none":
        found.append(
            f"{name} sums a part of each bucket between hosts, and compress={train.compress} exchanges buckets "
            "in a way of its own; use compress=none, or reduce_group=0"
        )
    if mesh.ep > 1:
        found.append(
            f"{name} groups neighbours of dp*cp, and with ep={mesh.ep} the copies of an expert are {mesh.ep} ranks "
            "apart, so that its groups would be others; use ep=1, or reduce_group=0"
        )
    return found


def cuda_graph_problems(model: ModelConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """Whether a step of this model on this device can be recorded, in words; empty when it can."""
    if not train.cuda_graph:
        return []
    found = []
    if train.device == "cpu":
        found.append("cuda_graph records what a GPU does, and device=cpu is none; use device=cuda or cuda_graph=False")
    if train.zero == 3:
        found.append(
            "cuda_graph replays at the addresses of the first time, and zero=3 makes and frees weights all the time; "
            "use zero=2 or cuda_graph=False"
        )
    if train.symmetric_memory and train.zero:
        found.append(
            f"cuda_graph with symmetric_memory and zero={train.zero} was never tried; use symmetric_memory=False or "
            "cuda_graph=False"
        )
    if model.moe is not None:
        found += recorded_problems(model.hidden_size, model.moe, mesh, train)
    return found


def freeze_problems(model: ModelConfig, train: TrainConfig) -> list[str]:
    """What is wrong with `freeze`, in words: a name that is not there (all would be trained), or nothing left over."""
    if not train.freeze or model_problems(model):
        return []
    filled = replace(
        model, vocab_size=model.vocab_size or 1, head_dim=model.head_dim or model.hidden_size // model.num_heads
    )
    names = list(parameter_shapes(filled))
    found = []
    for start in train.freeze:
        if not any(replace(train, freeze=(start,)).freezes(name) for name in names):
            near = [name for name in names if start and name.startswith(start.split(".")[0])] or names
            found.append(
                f"freeze={start!r} begins no parameter's name (whole parts, up to a dot); they are "
                f"{', '.join(near[:3])}, ..."
            )
    if not found and all(train.freezes(name) for name in names):
        found.append(f"freeze={' '.join(train.freeze)} freezes every parameter and leaves nothing to train")
    return found


def notices(run: RunConfig) -> list[str]:
    """What a legal run does not gain, in words; empty when there is nothing to say.

    ZeRO cuts dim 0 of a parameter, which for experts is their number: of too few, each lies whole on one rank.

    Args:
        run: resolved.
    """
    moe, mesh, train = run.model.moe, run.mesh, run.train
    if moe is None or not train.zero:
        return []
    held = moe.num_experts // mesh.ep + train.expert_replicas
    ranks = mesh.edp_inside(train.zero_group) if mesh.ep > 1 else train.zero_group or mesh.dp
    if held >= ranks:
        return []
    same, saves = ("expert", "nothing on it") if held == 1 else (str(held), f"no more than among {held} ranks")
    without = f"{ranks - held} {'goes' if ranks - held == 1 else 'go'} without"
    return [
        f"zero={train.zero} deals out whole experts, and {ranks} ranks hold the same {same} of each layer: who gets "
        f"one saves {saves}, and {without}; only tp cuts an expert itself"
    ]


def _unknown_choices(*groups: Any) -> list[str]:
    """Values that are none of a setting's own, as a caller in Python may give them, in words."""
    found = []
    for group in (each for each in groups if each is not None):
        for name, values in next((_CHOICES[kind] for kind in type(group).__mro__ if kind in _CHOICES), {}).items():
            if (value := getattr(group, name)) not in values:
                found.append(f"{name}={value!r} is not one of {', '.join(map(str, values))}")
        found += _unknown_choices(getattr(group, "moe", None))
    return found


def _batch(train: TrainConfig, mesh: MeshShape) -> tuple[TrainConfig, list[str]]:
    """Fill batch_size = dp * micro_batch_size * micro_batches from those that are set."""
    dp = mesh.dp
    batch, size, number = train.batch_size, train.micro_batch_size, train.micro_batches
    if min(batch, size, number) < 0:
        given = f"batch_size={batch}, micro_batch_size={size}, micro_batches={number}"
        return train, [f"batch sizes cannot be negative: {given}"]
    if not batch:
        size, number = size or 1, number or 1
        batch = dp * size * number
    elif batch % dp:
        return train, [f"batch_size={batch} does not split over dp={dp}; try {batch - batch % dp or dp}"]
    elif not size and not number:
        size, number = batch // dp, 1
    elif not size or not number:
        count, setting = (size, "micro_batch_size") if size else (number, "micro_batches")
        if (batch // dp) % count:
            legal = divisors(batch // dp)
            if setting == "micro_batches" and train.schedule == "interleaved":  # goes through them in groups of pp
                legal = [number for number in legal if number % mesh.pp == 0] or legal
            fits = nearest(count, legal)
            return train, [f"{setting}={count} does not divide the {batch // dp} sequences of a rank; try {fits}"]
        size, number = size or batch // dp // number, number or batch // dp // size
    if dp * size * number != batch:
        return train, [
            f"dp={dp} * micro_batch_size={size} * micro_batches={number} = {dp * size * number}, "
            f"not batch_size={batch}; leave one of them out"
        ]
    return replace(train, batch_size=batch, micro_batch_size=size, micro_batches=number), []


def resolve(run: RunConfig, *, gpus: int = 0) -> RunConfig:
    """Return the run with every open setting filled (layout, device, batch, head_dim), or refuse it.

    Args:
        gpus: how many GPUs there are on this machine; on the CPU ranks are not limited.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    device = run.train.device if run.train.device != "auto" else "cuda" if gpus else "cpu"
    if run.layout == "auto":
        run = replace(run, layout=f"dp={max(gpus, 1)}" if device == "cuda" else "dp=2,tp=2")
    mesh, model, train = run.mesh, run.model, replace(run.train, device=device)
    found = _unknown_choices(train, model)
    if found:
        raise ConfigError("\n".join(found))
    found = layout_problems(model, mesh) + context_problems(model, mesh, train) + expert_problems(model, mesh, train)
    train, batch_problems = _batch(train, mesh)
    found += batch_problems
    if not found:
        found += schedule_problems(model, mesh, train)
    if device == "cuda" and not gpus:
        found.append("device=cuda, and torch sees no GPU; use device=cpu, or install a GPU build of torch")
    elif device == "cuda" and mesh.world_size > gpus:
        found.append(f"layout {mesh} needs {mesh.world_size} GPUs and there are {gpus}; use fewer ranks or device=cpu")
    found += (
        sequence_problems(model, mesh, train)
        + training_problems(mesh, train)
        + freeze_problems(model, train)
        + cuda_graph_problems(model, mesh, train)
    )
    if not 0 < run.data.val_fraction < 1:
        found.append(f"val_fraction={run.data.val_fraction} must lie between 0 and 1")
    if not 0 <= run.data.val_seed < 2**63:
        found.append(f"val_seed={run.data.val_seed} must be 0 or above, and below 2**63")
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    return replace(run, layout=str(mesh), model=replace(model, head_dim=head_dim), train=train)
