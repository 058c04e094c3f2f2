"""Generation: the cache changes the work, not the text."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from picotron_mini.config import ConfigError, ModelConfig, UserError
from picotron_mini.model.generate import KeyValueCache, generate, next_logits, sample, stream
from picotron_mini.model.gpt import GPT, init_weights

CONFIG = ModelConfig(
    vocab_size=29, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6
)


@pytest.fixture
def model() -> GPT:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(replace(CONFIG)).double()
    init_weights(model, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5  # sharper choices than those of an untrained model
    return model


@pytest.mark.parametrize("pieces", [(9,), (4, 3, 1, 1), (1,) * 9])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_logits_equal_uncached(model: GPT, pieces: tuple[int, ...], packed: bool) -> None:
    tokens = torch.randint(29, (2, 9))
    documents = torch.tensor([[0] * 6 + [1] * 3, [0] * 2 + [1] * 7]) if packed else None
    cache = KeyValueCache(capacity=9)
    with torch.no_grad():
        parts = [
            model(x, documents=None if documents is None else documents[:, end - x.shape[1] : end], cache=cache)
            for x, end in zip(tokens.split(pieces, dim=1), torch.tensor(pieces).cumsum(0).tolist(), strict=True)
        ]
        cached = model.logits(torch.cat(parts, dim=1))
        plain = model.logits(model(tokens, documents=documents))
    assert cache.length == 9
    assert (cached - plain).abs().max() / plain.abs().max() < 1e-12


def test_greedy_text_is_the_same_with_and_without_cache(model: GPT) -> None:
    prompt = torch.randint(29, (3, 4))
    slow = prompt
    with torch.no_grad():
        for _ in range(12):
            slow = torch.cat([slow, model.logits(model(slow))[:, -1:].argmax(-1)], dim=1)
    assert generate(model, prompt, 12, temperature=0).tolist() == slow.tolist()
    assert len(set(slow[0].tolist())) > 2  # not one token forever, which any bug would also write


def test_decoding_runs_one_token_a_step(model: GPT) -> None:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    generate(model, torch.randint(29, (1, 5)), 4)
    assert seen == [5, 1, 1, 1]


def test_text_depends_on_the_seed_alone(model: GPT) -> None:
    prompt = torch.randint(29, (1, 4))
    torch.manual_seed(1)
    first = generate(model, prompt, 20, temperature=2.0, seed=7)
    torch.manual_seed(2)
    assert generate(model, prompt, 20, temperature=2.0, seed=7).tolist() == first.tolist()
    assert generate(model, prompt, 20, temperature=2.0, seed=8).tolist() != first.tolist()


def test_stream_gives_each_token_as_it_comes(model: GPT) -> None:
    prompt = torch.randint(29, (2, 4))
    pieces = list(stream(partial(next_logits, model), prompt, 6, seed=3))
    assert [piece.shape for piece in pieces] == [(2,)] * 6
    assert torch.stack(pieces, dim=1).tolist() == generate(model, prompt, 6, seed=3)[:, 4:].tolist()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    next(stream(partial(next_logits, model), prompt, 6))
    assert len(calls) == 1


def test_writing_ends_at_the_stop_token(model: GPT) -> None:
    prompt = torch.randint(29, (1, 4))
    free = generate(model, prompt, 12, temperature=0)[0, 4:].tolist()
    stop = free[3]
    end = free.index(stop) + 1
    assert generate(model, prompt, 12, temperature=0, stop_token=stop)[0, 4:].tolist() == free[:end]


def test_a_sequence_that_stopped_waits_for_the_others(model: GPT) -> None:
    prompt = torch.randint(29, (4, 4))
    free = generate(model, prompt, 10, temperature=0)[:, 4:].tolist()
    stop = free[0][2]
    ends = [row.index(stop) + 1 if stop in row else len(row) for row in free]
    assert min(ends) < max(ends)  # they do not all stop together
    want = [row[:end] + [stop] * (max(ends) - end) for row, end in zip(free, ends, strict=True)]
    assert generate(model, prompt, 10, temperature=0, stop_token=stop)[:, 4:].tolist() == want


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int) -> Tensor:
        drawn = sample(logits.expand(20_000, 4), temperature, top_k, generator)
        return drawn.bincount(minlength=4) / 20_000

    torch.testing.assert_close(shares(1.0, 0), logits[0].softmax(0), rtol=0, atol=0.02)
    torch.testing.assert_close(shares(2.0, 9), (logits[0] / 2).softmax(0), rtol=0, atol=0.02)
    torch.testing.assert_close(shares(1.0, 2)[:2], logits[0, :2].softmax(0), rtol=0, atol=0.02)
    assert shares(1.0, 2)[2:].sum() == 0
    assert sample(logits, 0, 0).tolist() == [0]


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"shape \[1, 0\]"),
        (torch.zeros(3, dtype=torch.int64), {}, r"shape \[3\]"),
        (torch.zeros(1, 3, dtype=torch.int64), {"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_impossible_requests_are_refused(model: GPT, tokens: Tensor, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, tokens, 3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_that_are_not_finite_give_no_token(temperature: float) -> None:
    """With finite weights too: a router's logits may overflow."""

    def scores(tokens: Tensor, cache: KeyValueCache) -> Tensor:
        cache.extend(tokens.shape[1], None)
        return torch.full((1, 5), 0.0 if cache.length < 5 else float("nan"))

    written = stream(scores, torch.zeros(1, 3, dtype=torch.int64), 9, temperature=temperature)
    assert len([next(written), next(written)]) == 2
    with pytest.raises(UserError, match="after 5 tokens the model's scores are NaN or infinite"):
        next(written)


def test_a_cache_refuses_what_it_cannot_hold(model: GPT) -> None:
    with pytest.raises(ConfigError, match="5 tokens do not fit a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=KeyValueCache(4))
    cache = KeyValueCache(8)
    x = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        model(x, cache=cache)
        with pytest.raises(ConfigError, match="documents of every cached token"):
            model(x, documents=x, cache=cache)
