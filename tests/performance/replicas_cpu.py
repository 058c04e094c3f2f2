"""Placement and copies of experts under a skewed load: balance and bytes, predicted and counted, on the CPU.

    python tests/performance/replicas_cpu.py

A step of 16 experts, of which a token passes 2, on 4 and on 8 ranks of gloo. What the router says is put aside: each
token draws its experts without replacement from a Zipf law, expert number n wanted in proportion to 1 / (1 + place of
n in a random order). A first step measures the load; experts are placed by it; in a second step, with new draws, the
choices that reach each rank's experts are counted. Nothing here is a time, so two runs print the same.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from picotron_mini.collectives import ledger
from picotron_mini.config import MoEConfig, RunConfig
from picotron_mini.launch import launch
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh, coordinates
from picotron_mini.model.routing import Routing, score, weigh
from picotron_mini.moe.dispatch import recording
from picotron_mini.moe.placement import Order, by_number, imbalance
from picotron_mini.parallel.expert import mixtures
from picotron_mini.parallel.expert_traffic import migration_bytes, replica_bytes, rows_of_step
from picotron_mini.parallel.footprint import footprint
from picotron_mini.parallel.parallelize import layout_of, parallelize
from picotron_mini.parallel.traffic import predict_step
from picotron_mini.training.migrate import place_experts
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import apply_gradients, compute_gradients
from picotron_mini.verify import MODEL, TRAIN, _select, make_batches

E, K, WIDTH, INNER = 16, 2, 64, 64
MIXTURE = replace(
    MODEL, hidden_size=WIDTH, num_layers=1,
    moe=MoEConfig(num_experts=E, top_k=K, expert_size=INNER, balance="none"),
)  # fmt: skip
WORK = replace(TRAIN, seq_len=128, micro_batch_size=4, micro_batches=2, dtype="float32", steps=2)


def zipf() -> Tensor:
    order = torch.randperm(E, generator=torch.Generator().manual_seed(0))
    return 1 / (1 + order.float())


def on_rank(run: RunConfig, place: bool) -> dict[str, object]:
    """Two steps, with a placement between them."""
    mesh = Mesh.build(run.mesh)
    parallel = parallelize(run, mesh, torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, run.train)
    draw = torch.Generator().manual_seed(100 + mesh.rank)
    for moe in mixtures(parallel.model):

        def decide(x: Tensor, moe=moe) -> Routing:  # type: ignore[no-untyped-def]
            logits = moe.router(x)
            scores = score(moe.config, logits)
            experts = torch.multinomial(zipf().expand(len(x), E), K, generator=draw)
            chosen = (experts[..., None] == torch.arange(E)).any(1)
            return Routing(experts, weigh(moe.config, scores, experts), logits, scores, chosen)

        moe.decide = decide
    share, size, moved, order = run.train.batch_size // mesh["dp"].size, run.train.micro_batch_size, {}, ()
    first = mesh["dp"].index * share
    for number, batch in enumerate(make_batches(run)):
        mine = [_select(batch, slice(first + k * size, first + (k + 1) * size), torch.device("cpu")) for k in range(2)]
        with ledger.recording() as sent, recording() as decided:
            loss, tokens = compute_gradients(parallel, mine)
            result = apply_gradients(parallel, optimizer, loss, tokens)
        if number == 0:
            assert result.routing is not None
            load = result.routing.counts[0]
            with ledger.recording() as moved:
                if place:
                    place_experts(parallel, optimizer, {0: load})
            order = parallel.layout["layers.0.mlp.experts.up"].order
    return {"load": load.tolist(), "order": order, "moved": moved, "sent": sent, "decided": decided}


def measure(ranks: int, replicas: int, place: bool) -> str:
    run = RunConfig(layout=f"dp={ranks},ep={ranks}", model=MIXTURE, train=replace(WORK, expert_replicas=replicas))
    run = resolve(run)
    results = launch(on_rank, run, place, world_size=ranks, output="hide")
    load, start = results[0]["load"], by_number(E, ranks, replicas)
    order: Order = results[0]["order"] or start
    predicted = imbalance(load, order, ranks)
    held = E // ranks + replicas
    slots = Counter(s // held for r in results for _, chosen in r["decided"] for each in chosen for s in each)
    counted = max(slots.values()) * ranks / sum(slots.values())

    layout = layout_of(run)
    after = {n: replace(p, order=order) if "experts" in n and results[0]["order"] else p for n, p in layout.items()}
    rows = rows_of_step([r["decided"] for r in results], run.mesh, MIXTURE.moe, 2, replicas)  # type: ignore[arg-type]
    moved, summed = [0], [0]
    for rank, result in enumerate(results):
        index = coordinates(run.mesh, rank)
        assert Counter(result["sent"]) == predict_step(run, after, index, rows[rank])
        assert Counter(result["moved"]) == (migration_bytes(run, layout, index, 0, order) if place else Counter())
        moved.append(sum(result["moved"].values()))
        summed.append(replica_bytes(run, after, index)["ep", "replicas"])
    busiest = max(received for row in rows for _, received in row.values())
    exchange = max(result["sent"]["ep", "all_to_all"] for result in results)
    states = footprint(run, layout, coordinates(run.mesh, 0)).total
    how = f"{'by load' if place else 'by number'}, R={replicas}" if replicas else "by load" if place else "by number"
    return (
        f"| {ranks} | {how} | {predicted:.2f} | {counted:.2f} | {busiest:,} | {exchange / 1e6:.2f} | "
        f"{max(summed) / 1e6:.2f} | {max(moved) / 1e6:.2f} | {states / 1e6:.2f} |"
    )


def main() -> None:
    print(f"{platform.system()}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"load {' '.join(f'{os.getloadavg()[i]:.1f}' for i in range(3))}; {E} experts, top-{K}, Zipf")
    shares = (zipf() / zipf().sum()).sort(descending=True).values
    print(f"first choices fall on the busiest expert with {shares[0]:.3f}, on the next with {shares[1]:.3f}")
    print("bytes and rows are of the rank that has most of them, in MB of 10^6; all predicted = counted")
    print("| ranks | placement | busiest over mean, predicted | counted | rows received | dispatch | "
          "copies' gradients | move, once | model states |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for ranks in (4, 8):
        for replicas, place in ((0, False), (0, True), (1, True), (2, True)):
            print(measure(ranks, replicas, place), flush=True)


if __name__ == "__main__":
    main()
