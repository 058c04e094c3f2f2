"""What may run with experts, of what `legality.py` asks: the part that only a mixture has."""

from __future__ import annotations

from .config import MeshShape, ModelConfig, MoEConfig, TrainConfig, divisors, nearest


def expert_problems(model: ModelConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """What keeps experts from being spread over ep ranks, in words; empty when nothing does."""
    if mesh.ep == 1:
        off = {
            "dispatch": "alltoall", "dispatch_parts": 1, "dispatch_payload": "same", "place_every": 0,
            "expert_replicas": 0,
        }  # fmt: skip
        or_ep = ", or ep=2" if model.moe else ""
        return [
            f"{name}={getattr(train, name)} is for experts on several ranks, and ep=1; use {name}={value}{or_ep}"
            for name, value in off.items()
            if getattr(train, name) != value
        ]
    if model.moe is None:
        return [f"ep={mesh.ep} spreads experts, and this model has none; use ep=1, or give it experts (model.moe)"]
    found, ranks, number = [], mesh.dp * mesh.cp, model.moe.num_experts
    if ranks % mesh.ep:
        fits = [d for d in divisors(ranks) if number % d == 0]
        found.append(
            f"ep={mesh.ep} does not divide dp*cp={ranks}, and experts are spread over those ranks; "
            f"ep could be {nearest(mesh.ep, fits)}"
        )
    if number % mesh.ep:
        fits = [d for d in divisors(number) if ranks % d == 0]
        found.append(
            f"ep={mesh.ep} does not divide num_experts={number}; ep could be {nearest(mesh.ep, fits)}, or "
            f"num_experts={nearest(number, [number - number % mesh.ep or mesh.ep, number + -number % mesh.ep])}"
        )
    elif not 0 <= train.expert_replicas <= number - number // mesh.ep:
        here = number // mesh.ep
        found.append(
            f"expert_replicas={train.expert_replicas} must be 0 to {number - here}: a rank has {here} of the {number} "
            "experts, and none twice"
        )
    if train.dispatch_payload == "bf16" and train.dtype == "bfloat16":
        found.append(
            "dispatch_payload=bf16 narrows nothing with dtype=bfloat16, in which tokens travel as they are; "
            "use dispatch_payload=fp8 or same"
        )
    if train.dispatch == "allgather" and train.dispatch_payload != "same":
        found.append(
            f"dispatch=allgather adds up what experts make on its way back, and dispatch_payload="
            f"{train.dispatch_payload} packs it in a form that has no sum; use dispatch_payload=same, or "
            "dispatch=alltoall"
        )
    group = train.zero_group * mesh.cp
    if group and not ranks % mesh.ep and mesh.dp % train.zero_group == 0 and group % mesh.ep:
        fits = [d for d in divisors(mesh.dp) if not d * mesh.cp % mesh.ep]
        why = f"zero_group={train.zero_group}" if mesh.cp == 1 else f"zero_group*cp={group}"
        found.append(
            f"{why} ranks of a group are no multiple of the ep={mesh.ep} that hold all experts between them; "
            f"zero_group could be {nearest(train.zero_group, fits)}"
        )
    for name in ("place_every", "expert_replicas"):
        if 0 < train.zero_group < mesh.dp and getattr(train, name):
            found.append(
                f"{name}={getattr(train, name)} trades rows of experts between the ranks that own them, and with "
                f"zero_group={train.zero_group} every group has owners of its own; use zero_group=0 or {name}=0"
            )
    return found


def recorded_problems(width: int, moe: MoEConfig, mesh: MeshShape, train: TrainConfig) -> list[str]:
    """Where the host reads something in a step with experts, or hands it a number that changes with the step."""
    reasons = {
        f"ep={mesh.ep}": (
            mesh.ep > 1
            and train.dispatch == "alltoall"
            and "ranks ask each other how many rows come (none does with dispatch=allgather)"
        ),
        f"place_every={train.place_every}": train.place_every > 0 and "experts move to other slots",
        f"expert_replicas={train.expert_replicas}": (
            train.expert_replicas > 0 and "the host picks the rows of copies whose gradients are summed"
        ),
        f"choice={moe.choice}": (
            moe.choice == "expert" and mesh.ep == 1 and "the host reads how many tokens were taken"
        ),
        f"dtype={train.dtype}": train.dtype != "bfloat16" and "experts are a loop, for which the host reads their rows",
        f"hidden_size={width}, expert_size={moe.expert_size}, tp={mesh.tp}": (
            (width % 8 or moe.expert_size // mesh.tp % 8)
            and "experts are a loop where width or inner width is no multiple of 8"
        ),
        f"jitter={moe.jitter}": moe.jitter > 0 and "each step has noise of its own",
    }
    return [
        f"cuda_graph records a step in which the host neither reads nor changes anything, and with {setting} {why}; "
        "use cuda_graph=False"
        for setting, why in reasons.items()
        if why
    ]
