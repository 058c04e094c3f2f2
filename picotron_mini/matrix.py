"""Which configurations there are to verify: all combinations of techniques, a cover of their pairs, a random sample.

A *combination* is a mesh and the settings that choose a technique: sequence parallelism for tp, a schedule for pp, a
way to attend for cp, a stage of ZeRO for dp, a way to experts for ep. None is written down here. `combinations` tries
every mesh and every value that `TrainConfig` allows, gives the model sizes that the mesh can divide, and lets
`legality.resolve` decide.

There are some hundreds of them on at most 8 ranks. Most bugs that techniques have with each other need two of them,
seldom three at once, so `pairwise` picks a few dozen in which every two values that can meet do meet; of an axis the
values are 1, 2 and more ranks:

    dp=2,tp=2 --zero 1        has the pairs   (dp=2, tp=2)  (dp=2, zero=1)  (tp=2, zero=1)  (pp=1, zero=1)  ...

It is greedy: the combination with the most pairs that are still missing, again and again. The least cover is hard to
find (the problem is set cover); greedy is at most ln(pairs) times larger.

Sizes are another matter: `sample` draws those too, and everything else that a user may switch on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm, prod
from typing import Any, get_args, get_type_hints

from .config import AXES, ConfigError, MeshShape, ModelConfig, MoEConfig, RunConfig, TrainConfig, divisors
from .legality import resolve
from .verify import EXPERTS, MODEL, OPTIMIZERS, TRAIN

MAX_RANKS = 8
# The settings that choose a technique, and the axis without which they do nothing
CHOICES = {
    "zero": "dp", "context": "cp", "sequence_parallel": "tp", "tensor_overlap": "tp", "schedule": "pp",
    "dispatch": "ep",
}  # fmt: skip
_VALUES = {"sequence_parallel": (False, True), "tensor_overlap": (1, 2)}  # the others say theirs by their type
_PLAIN = TrainConfig()


def combinations(max_ranks: int = MAX_RANKS) -> list[RunConfig]:
    """Every legal combination on at most `max_ranks` ranks, resolved, fewest ranks first."""
    out = []
    for mesh in meshes(max_ranks):
        values = [
            _values(name) if getattr(mesh, axis) > 1 else (getattr(_PLAIN, name),) for name, axis in CHOICES.items()
        ]
        for chosen in itertools.product(*values):
            run = legal(mesh, dict(zip(CHOICES, chosen, strict=True)))
            out += [] if run is None else [run]
    return out


def expert_combinations(max_ranks: int = MAX_RANKS) -> list[RunConfig]:
    """Every legal combination again, with a model that has experts (`verify.EXPERTS`), spread over every ep > 1.

    With every way to take tokens to them. Where ep does not divide their number, there are two on a rank.
    """
    out = []
    for run in combinations(max_ranks):
        plain = {name: getattr(run.train, name) for name in CHOICES}
        for ep, way in itertools.product(range(2, run.mesh.dp * run.mesh.cp + 1), _values("dispatch")):
            experts = EXPERTS if EXPERTS.num_experts % ep == 0 else replace(EXPERTS, num_experts=2 * ep)
            model = replace(MODEL, num_layers=1, moe=experts)
            found = legal(replace(run.mesh, ep=ep), plain | {"dispatch": way}, model)
            out += [] if found is None else [found]
    return out


def meshes(max_ranks: int) -> list[MeshShape]:
    """Every mesh of at most `max_ranks` ranks, fewest first."""
    sizes = itertools.product(range(1, max_ranks + 1), repeat=len(AXES))
    shapes = [MeshShape(**dict(zip(AXES, each, strict=True))) for each in sizes if prod(each) <= max_ranks]
    return sorted(shapes, key=lambda mesh: mesh.world_size)


def legal(mesh: MeshShape, settings: Mapping[str, Any], model: ModelConfig = MODEL) -> RunConfig | None:
    """A resolved run of a model that the mesh can divide, with these settings of `TrainConfig`; None if there is none.

    Sizes are the least that fit, and odd where they may be: one layer more than there are parts of the pipeline, a
    vocabulary that no tp divides.
    """
    train = replace(TRAIN, steps=2, batch_size=0, **settings)
    groups = mesh.tp * (mesh.cp if train.context == "ulysses" else 1)
    kv_heads = _up(model.num_kv_heads, groups)
    model = replace(
        model,
        num_layers=max(model.num_layers if model is not MODEL else 0, mesh.pp * train.chunks + 1),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (model.num_heads // model.num_kv_heads),
        intermediate_size=_up(model.intermediate_size, mesh.tp),
    )
    train = replace(
        train,
        seq_len=_up(train.seq_len, lcm(2 * mesh.cp, mesh.cp * mesh.tp if train.sequence_parallel else 1)),
        micro_batches=_up(train.micro_batches, mesh.pp if train.schedule == "interleaved" else 1),
    )
    try:
        return resolve(RunConfig(layout=str(mesh), model=model, train=train))
    except ConfigError:
        return None


def pairwise(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Some of the runs, in which every two values (1, 2 or more ranks of an axis, `CHOICES`) that meet in any meet."""
    pairs = [frozenset(itertools.combinations(_factors(run).items(), 2)) for run in runs]
    missing = frozenset[Any]().union(*pairs)
    out = []
    while missing:
        # of those with as many new pairs the first, which has the fewest ranks
        best = max(range(len(runs)), key=lambda n: len(pairs[n] & missing))
        out.append(runs[best])
        missing -= pairs[best]
    return out


def sample(number: int, seed: int, max_ranks: int = MAX_RANKS, experts: bool = False) -> list[RunConfig]:
    """Random legal runs of random models: the same for the same seed.

    Besides the technique everything is drawn that may matter to one: heads, widths, layers, vocabulary, tied or not,
    norms on queries and keys, sequence and micro-batches, masks, recompute, parts of the loss, what is frozen,
    clipping, buckets, groups of ZeRO and of the sum of gradients, and whether ranks read each other's memory.

    Args:
        experts: of mixtures, on any ep; how they route and are balanced is drawn as well.
    """
    draw = random.Random(seed)
    shapes = [mesh for mesh in meshes(max_ranks) if mesh.world_size > 1]
    out: list[RunConfig] = []
    while len(out) < number:
        mesh = draw.choice(shapes)
        model, more = _drawn_model(draw, mesh), {}
        if experts:
            mesh = replace(mesh, ep=draw.choice(divisors(mesh.dp * mesh.cp)))
            model, more = replace(model, moe=_drawn_experts(draw, mesh.ep)), _drawn_ways(draw, mesh.ep)
        settings = {n: draw.choice(_values(n)) for n, axis in CHOICES.items() if getattr(mesh, axis) > 1}
        exchanges = settings.get("zero") or (settings.get("sequence_parallel") and settings["tensor_overlap"] > 1)
        more["symmetric_memory"] = bool(exchanges) and draw.random() < 0.5
        run = legal(mesh, settings | _drawn_train(draw, mesh) | more, model)
        out += [run] if run is not None and run not in out else []
    return out


def _drawn_experts(draw: random.Random, ep: int) -> MoEConfig:
    number = ep * draw.randint(1, 3) if ep > 1 else draw.randint(2, 6)
    groups = draw.choice(divisors(number))
    return MoEConfig(
        num_experts=number, top_k=draw.randint(1, number), expert_size=draw.randint(4, 20),
        shared_size=draw.choice((0, 6)), dense_layers=draw.choice((0, 0, 1)), scale=draw.choice((1.0, 2.5)),
        choice=draw.choice(("token", "token", "expert")),
        score=draw.choice(("softmax", "sigmoid")), normalize=draw.random() < 0.5,
        groups=groups, limit_groups=draw.randint(1, groups), capacity=draw.choice((None, None, 0.6, 1.25)),
        jitter=draw.choice((0.0, 0.1)), balance=draw.choice(("aux", "bias", "none")), aux_weight=0.3,
        aux_scope=draw.choice(("sequence", "global")), z_weight=draw.choice((0.0, 0.1)), bias_rate=0.05,
    )  # fmt: skip


def _drawn_ways(draw: random.Random, ep: int) -> dict[str, Any]:
    """What only experts on several ranks have."""
    if ep == 1:
        return {}
    return {"dispatch_parts": draw.choice((1, 1, 2)), "place_every": draw.choice((0, 0, 1)),
            "expert_replicas": draw.choice((0, 0, 1))}  # fmt: skip


def _drawn_model(draw: random.Random, mesh: MeshShape) -> ModelConfig:
    kv_heads = draw.randint(1, 4)
    return ModelConfig(
        vocab_size=draw.randint(29, 130), hidden_size=draw.choice((12, 20, 32)), num_kv_heads=kv_heads,
        num_heads=kv_heads * draw.randint(1, 3), head_dim=draw.choice((2, 4, 6)),
        num_layers=draw.randint(1, mesh.pp + 3), intermediate_size=draw.randint(5, 60),
        tie_embeddings=draw.random() < 0.5, qk_norm=draw.random() < 0.5,
    )  # fmt: skip


def _drawn_train(draw: random.Random, mesh: MeshShape) -> dict[str, Any]:
    frozen = draw.choice([(), (), ("embed",), ("layers.0.attention",), ("embed", "layers.0"), ("norm", "layers.0.mlp")])
    return {
        "seq_len": draw.randint(2, 20), "micro_batch_size": draw.randint(1, 3), "micro_batches": draw.randint(1, 6),
        "document_mask": draw.random() < 0.5, "recompute": draw.choice(_values("recompute")), "freeze": frozen,
        "loss_chunks": draw.choice((1, 1, 3)), "clip_norm": draw.choice((0.0, 0.5)), "seed": draw.randrange(1000),
        "bucket_mb": draw.choice((0.001, 0.01, 25.0)), "zero_group": draw.choice((0, 0, 2)),
        "reduce_group": draw.choice((0, 0, 2)),
    }  # fmt: skip


def default_matrix() -> list[RunConfig]:
    """What `picotron-mini verify` runs when it is asked for nothing else.

    Every technique alone, on two ranks, and then the first twelve combinations of a cover of all pairs: those with the
    most pairs. On two cores it takes about a minute.
    """
    runs = combinations()
    alone = [run for run in runs if run.mesh.world_size == 2 and sum(_differs(run).values()) <= 1]
    together = [run for run in pairwise(runs) if sum(getattr(run.mesh, axis) > 1 for axis in AXES) > 1]
    return alone + together[:12]


def optimizers_of(run: RunConfig) -> list[RunConfig]:
    """The run with each optimizer that `verify` tries: a job of `verify.verify_together`."""
    return [replace(run, train=replace(run.train, optimizer=name)) for name in OPTIMIZERS]  # type: ignore[arg-type]


def flags(run: RunConfig) -> str:
    """What follows `picotron-mini verify` to ask for this run: its layout and all that is not verify's default."""
    plain, moe = replace(TRAIN, batch_size=0), run.model.moe
    words = [str(run.mesh)]
    groups: list[tuple[Any, Any]] = [(replace(run.model, moe=None), MODEL)]
    if moe and (moe != EXPERTS or run.mesh.ep == 1):  # else those that verify gives by itself
        groups.append((moe, MoEConfig()))
    for group, default in (*groups, (replace(run.train, batch_size=0, steps=plain.steps), plain)):
        for name, value in vars(default).items():
            if (mine := getattr(group, name)) != value:
                flag = name.replace("_", "-")
                if isinstance(mine, bool):
                    words.append(f"--{flag}" if mine else f"--no-{flag}")
                else:
                    words.append(f"--{flag} {' '.join(mine) if isinstance(mine, tuple) else mine}")
    return " ".join(words)


def technique(run: RunConfig) -> str:
    """The layout with the flags that choose a technique, without sizes."""
    words = [str(run.mesh)]
    for name, different in _differs(run).items():
        if different:
            value = getattr(run.train, name)
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def _differs(run: RunConfig) -> dict[str, bool]:
    return {name: getattr(run.train, name) != getattr(_PLAIN, name) for name in CHOICES}


def _factors(run: RunConfig) -> dict[str, Any]:
    """What meets what: of an axis whether it has 1, 2 or more ranks, and each choice."""
    sizes = {axis: min(getattr(run.mesh, axis), 3) for axis in (*AXES, *(["ep"] if run.mesh.ep > 1 else []))}
    return sizes | {name: getattr(run.train, name) for name in CHOICES}


def _values(name: str) -> tuple[Any, ...]:
    return _VALUES.get(name) or get_args(get_type_hints(TrainConfig)[name])


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
