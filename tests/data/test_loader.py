"""Batch n is a pure function of (seed, n), whatever the layout and whatever was asked before."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from picotron_mini.config import ConfigError, DataConfig, UserError
from picotron_mini.data.loader import Batch, Loader, Prepared, data_rows, prepare, row_order


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text("".join(f"{i} and {j}\n" for j in range(10 + i)))
    data = DataConfig(text=(str(folder),), tokenizer="bytes", val_fraction=0.2)
    return prepare(data, tmp_path_factory.mktemp("cache"))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(fields) for fields in zip(*(vars(part).values() for part in parts), strict=True)))


def test_batch_does_not_depend_on_what_was_asked_before(prepared: Prepared) -> None:
    loader = Loader(prepared, "train", seq_len=16, batch_size=8, seed=1)
    forward = [loader.batch(n) for n in range(30)]
    for n in (29, 3, 3, 17, 0):
        assert same(loader.batch(n), forward[n])
        fresh = Loader(pickle.loads(pickle.dumps(prepared)), "train", 16, 8, seed=1)
        row_order.cache_clear()
        assert same(fresh.batch(n), forward[n])
    assert not same(forward[0], forward[1])
    assert not same(Loader(prepared, "train", 16, 8, seed=2).batch(0), forward[0])


@pytest.mark.parametrize(("dp", "micro_batches"), [(1, 1), (2, 1), (1, 4), (2, 3), (4, 2), (6, 4), (24, 1), (1, 24)])
@pytest.mark.parametrize("which", ["first", "across two epochs"])
def test_every_layout_sees_the_same_sequences(prepared: Prepared, dp: int, micro_batches: int, which: str) -> None:
    loader = Loader(prepared, "train", seq_len=16, batch_size=24, seed=1)
    assert loader.num_rows % 24
    n = 0 if which == "first" else loader.num_rows // 24
    parts = [
        loader.batch(n, data_rows(24, dp, rank, micro_batches, k)) for rank in range(dp) for k in range(micro_batches)
    ]
    assert {len(part.tokens) for part in parts} == {24 // dp // micro_batches}
    assert same(joined(parts), loader.batch(n))


def test_each_row_is_used_once_an_epoch(prepared: Prepared) -> None:
    loader = Loader(prepared, "train", seq_len=16, batch_size=24, seed=1)
    rows = np.concatenate([loader.rows(n) for n in range(3 * loader.num_rows)]).reshape(-1, loader.num_rows)
    assert len(rows) == 72  # 3 N batches of 24 rows are 72 epochs of N
    assert (np.sort(rows, axis=1) == np.arange(loader.num_rows)).all()
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 72  # each in an order of its own
    assert rows[5].tolist() == row_order(1, 5, loader.num_rows).tolist()
    assert loader.num_rows == (prepared.train_tokens - 1) // 16
    assert loader.num_batches == loader.num_rows // 24


def test_order_is_fixed_for_ever() -> None:
    """A run that resumes under another release of anything must find the same order."""
    assert row_order(0, 0, 10).tolist() == ORDER_0
    assert row_order(0, 1, 10).tolist() != row_order(1, 0, 10).tolist() != row_order(0, 0, 10).tolist()


def test_order_is_a_fair_shuffle() -> None:
    orders = np.array([row_order(seed, 0, 8) for seed in range(4000)])
    for place in range(8):
        counts = np.bincount(orders[:, place], minlength=8)
        assert (abs(counts - 500) < 6 * np.sqrt(500 * 7 / 8)).all()  # six standard deviations of a fair draw


def test_validation_covers_every_token_in_order(prepared: Prepared) -> None:
    for seq_len, batch_size in ((16, 5), (100, 4), (10_000, 4)):
        loader = Loader(prepared, "val", seq_len, batch_size, shuffle=False)
        batches = joined([loader.batch(n) for n in range(loader.num_batches)])
        assert len(batches.tokens) == loader.num_batches * batch_size
        targets = batches.targets[batches.targets != -100]
        assert targets.tolist() == prepared.tokens("val")[1:].tolist()
        assert loader.num_rows == -(-len(targets) // seq_len)
        with pytest.raises(IndexError, match=f"batch {loader.num_batches} of"):
            loader.batch(loader.num_batches)


def test_training_targets_are_the_next_tokens(prepared: Prepared) -> None:
    loader = Loader(prepared, "train", seq_len=16, batch_size=8, seed=1)
    batch, stream = loader.batch(2), prepared.tokens("train")
    for row, tokens, targets in zip(loader.rows(2), batch.tokens, batch.targets, strict=True):
        assert tokens.tolist() == stream[16 * row : 16 * row + 16].tolist()
        assert targets.tolist() == stream[16 * row + 1 : 16 * row + 17].tolist()
    with pytest.raises(IndexError):
        loader.batch(-1)


def test_text_shorter_than_one_batch_names_what_would_fit(prepared: Prepared) -> None:
    tokens = prepared.train_tokens
    Loader(prepared, "train", seq_len=tokens - 1, batch_size=1)
    fits = (tokens - 1) // 64
    Loader(prepared, "train", seq_len=64, batch_size=fits)
    with pytest.raises(UserError) as caught:
        Loader(prepared, "train", seq_len=64, batch_size=fits + 1)
    message = str(caught.value)
    assert f"{tokens} tokens" in message and f"needs {64 * (fits + 1) + 1}" in message
    assert f"use batch_size<={fits} or seq_len<={(tokens - 1) // (fits + 1)} or more text" in message
    Loader(prepared, "train", seq_len=(tokens - 1) // (fits + 1), batch_size=fits + 1)
    with pytest.raises(UserError, match=r"\); use more text"):
        Loader(prepared, "train", seq_len=tokens, batch_size=tokens)


def test_uneven_division_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=10 does not split over dp=4 with micro_batches=1"):
        data_rows(10, 4, 0)


def test_prepared_is_small(prepared: Prepared) -> None:
    assert len(pickle.dumps(prepared)) < 2000
    assert replace(prepared) == prepared


ORDER_0 = [5, 0, 7, 4, 8, 2, 1, 3, 6, 9]
