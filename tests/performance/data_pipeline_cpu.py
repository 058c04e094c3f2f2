"""Tokens a second of each part of the data pipeline, and the memory of ranks that map one file.

    python tests/performance/data_pipeline_cpu.py

Not a test: it prints numbers for summary/02_data_pipeline.md. Tokenising is measured once, as it is done; of what is
short, the best and the median of several rounds are given, with the ways measured in turn.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from picotron_mini.bench import bench
from picotron_mini.config import DataConfig
from picotron_mini.data.bigram import bigram_bits_per_byte
from picotron_mini.data.corpus import load_corpus
from picotron_mini.data.loader import Loader, Prepared, prepare, row_order
from picotron_mini.data.packing import Batch
from picotron_mini.data.tokenizer import byte_tokenizer, train_bpe
from picotron_mini.launch import launch
from picotron_mini.presets import preset

ROUNDS, BATCHES = 7, 100


class Rows(Dataset[Batch]):
    """The batches of a `Loader` as PyTorch's DataLoader wants them: item n is batch n."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, n: int) -> Batch:
        return self.loader.batch(n)


def read(loader: Loader) -> None:
    for n in range(BATCHES):
        loader.batch(n)


def first(items: list[Batch]) -> Batch:
    return items[0]


def tokenising() -> None:
    corpus = load_corpus()
    print(f"\ntext: {corpus.source}, {len(corpus.documents)} documents, {corpus.total_bytes:,} bytes")
    start = time.perf_counter()
    bpe = train_bpe(corpus.documents, 2048)
    print(f"training a BPE of 2,048: {time.perf_counter() - start:.1f} s")
    for name, tokenizer in (("bytes", byte_tokenizer()), ("bpe 2,048", bpe)):
        start = time.perf_counter()
        tokens = sum(len(ids) for ids in tokenizer.encode_many(corpus.documents))
        seconds = time.perf_counter() - start
        print(
            f"tokenising, {name:10} {corpus.total_bytes / seconds / 1e6:6.2f} MB/s {tokens / seconds:14,.0f} tokens/s"
        )


def reading(prepared: Prepared) -> None:
    def measured(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    print(f"\nreading {prepared.train_tokens:,} tokens (uint16, mapped), {BATCHES} batches a round, {ROUNDS} rounds")
    for rows, seq_len in ((8, 256), (4, 2048)):
        loader = Loader(prepared, "train", seq_len, rows)
        loader.batch(0)
        ways: dict[str, Callable[[], object]] = {"Loader": partial(read, loader)}
        for workers in (0, 1, 2):
            theirs = DataLoader(
                Rows(loader), batch_size=1, collate_fn=first, num_workers=workers, persistent_workers=workers > 0
            )
            next(iter(theirs))  # starts the workers
            ways[f"DataLoader, {workers} workers"] = partial(list, theirs)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                seconds[name].append(measured(way))
        for name, found in seconds.items():
            tokens = BATCHES * rows * seq_len
            best, median = tokens / min(found), tokens / statistics.median(found)
            print(f"{rows} x {seq_len:<5} {name:22} best {best:14,.0f}  median {median:14,.0f} tokens/s")
    for rows in (10**5, 10**6, 10**7):
        row_order.cache_clear()
        print(f"order of an epoch of {rows:>10,} rows: {1e3 * measured(partial(row_order, 0, 0, rows)):8.1f} ms")


def splits() -> None:
    """What a bigram model is measured at, held out by document and by row of one stream, for five seeds."""
    by_document, by_row = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(5):
            prepared = prepare(DataConfig(tokenizer="bpe", val_seed=seed), folder)
            model = prepared.vocab_size, prepared.load_tokenizer().token_bytes()
            parts = prepared.tokens("train"), prepared.tokens("val")
            by_document.append(bigram_bits_per_byte(*parts, *model))
            stream = np.concatenate(parts)
            rows = stream[: len(stream) // 256 * 256].reshape(-1, 256)
            order, held = row_order(seed, 0, len(rows)), round(0.05 * len(rows))
            by_row.append(bigram_bits_per_byte(rows[order[held:]].ravel(), rows[order[:held]].ravel(), *model))
    for name, found in (("documents", by_document), ("rows of 256", by_row)):
        mean, spread = statistics.mean(found), statistics.stdev(found)
        print(f"bigram, 5% of the {name:11} held out: {mean:.3f} bits a byte, standard deviation {spread:.3f}")


def memory(prepared: Prepared, mapped: bool) -> float:
    """On a rank: bytes of memory that the stream adds to this process, its share of what others map as well."""

    def share() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    torch.distributed.barrier()
    before = share()
    stream = prepared.tokens("train")
    stream = stream if mapped else np.array(stream)
    assert int(stream.max()) < prepared.vocab_size  # touches every page
    torch.distributed.barrier()
    added = share() - before
    torch.distributed.barrier()
    return added


def main() -> None:
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    tokenising()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(DataConfig(tokenizer="bpe"), folder)
        reading(prepared)
        if Path("/proc/self/smaps_rollup").exists():
            print(f"\nmemory that a stream of {2 * prepared.train_tokens / 1e6:.1f} MB adds to each of 4 ranks")
            for mapped in (True, False):
                added = launch(memory, prepared, mapped, world_size=4)
                print(f"{'mapped' if mapped else 'read in'}: " + ", ".join(f"{n / 1e6:.1f}" for n in added) + " MB")
    print()
    splits()
    run = preset("laptop")
    result = bench(replace(run, layout="dp=1", train=replace(run.train, steps=5)), warmup=2)
    speed = result["tokens_per_second_per_rank"]
    print(f"\ntraining the laptop preset on one rank eats {speed:,.0f} tokens/s")
    print(f"load of the machine after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
