"""Rows to experts and back: against plain indexing, with gradients against differences; eager, and compiled once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from picotron_mini.model import permute
from picotron_mini.model.permute import PLAIN, combine, fused, gated, gather, sort, take

N, K, E, D = 7, 3, 4, 5


def choices(dropped: float = 0.3, number: int = E) -> Tensor:
    chosen = torch.rand(N, number).topk(K).indices
    return chosen.masked_fill(torch.rand(N, K) < dropped, -1)


@pytest.mark.parametrize("number", [E, 300])
def test_rows_are_sorted_by_expert_and_then_by_token(number: int) -> None:
    chosen = choices(number=number)
    order, token, place, counts = sort(chosen, number, rest=False)
    want = sorted((e, t * K + k) for t, row in enumerate(chosen.tolist()) for k, e in enumerate(row) if e >= 0)
    rows = len(want)
    assert order[:rows].tolist() == [choice for _, choice in want]
    assert torch.equal(token, order // K)
    assert counts.tolist() == [sum(e == expert for e, _ in want) for expert in range(number)]
    for m, (_, choice) in enumerate(want):
        assert place[choice // K, choice % K] == m
    assert torch.equal(place < 0, chosen < 0) and int((place >= 0).sum()) == rows


def test_choices_of_nobody_may_pass_the_last_expert() -> None:
    chosen = choices()
    order, _, place, counts = sort(chosen, E, rest=True)
    assert counts.sum() == N * K and torch.equal(place < 0, chosen < 0)
    ends = counts.cumsum(0).tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        found = chosen.flatten()[order[start:end]]
        assert ((found == expert) | (found < 0) & (expert == E - 1)).all()


def ways(chosen: Tensor, rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], and order, token, place with as many rows as there are."""
    order, token, place, counts = sort(chosen, E, rest)
    rows = int(counts.sum())
    return torch.randn(N, D, dtype=torch.float64), order[:rows], token[:rows], place


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_what_is_taken_added_and_weighed(dropped: float, rest: bool) -> None:
    chosen = choices(dropped)
    x, order, token, place = ways(chosen, rest)
    rows = take(x, token, place)
    assert torch.equal(rows, x[token])
    weights = torch.rand(N, K, dtype=torch.float64)
    here = (chosen >= 0).double()
    torch.testing.assert_close(gather(rows, token, place), x * here.sum(1, keepdim=True))
    torch.testing.assert_close(
        combine(rows, weights, order, token, place), x * (weights * here).sum(1, keepdim=True), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_gradients_are_those_of_differences(dropped: float) -> None:
    x, order, token, place = ways(choices(dropped), False)
    rows = torch.randn(len(token), D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: take(x, token, place), x)
    assert torch.autograd.gradcheck(lambda rows: gather(rows, token, place), rows)
    assert torch.autograd.gradcheck(lambda *args: combine(*args, order, token, place), (rows, weights))
    gate, up = (torch.randn(6, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated, (gate, up))


def test_rows_of_no_expert_have_no_gradient() -> None:
    """What passes the last expert for nothing must not teach it, whatever weight stands beside it."""
    chosen = choices(0.5)
    _, order, token, place = ways(chosen, True)
    rows = torch.randn(N * K, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    combine(rows, weights, order, token, place).sum().backward()
    nobody = chosen.flatten()[order] < 0
    assert rows.grad is not None and weights.grad is not None and nobody.any()
    assert not rows.grad[nobody].any() and rows.grad[~nobody].all()
    assert torch.equal(weights.grad != 0, chosen >= 0)


def test_the_gradient_of_taking_needs_the_right_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        permute, "PLAIN", PLAIN._replace(add_up=lambda rows, place: PLAIN.add_up(rows, place.roll(1, 0)))
    )
    x, _, token, place = ways(choices(), False)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: take(x, token, place, permute.PLAIN), x.requires_grad_())


def test_without_rows_all_is_zeros() -> None:
    chosen = torch.full((N, K), -1)
    x, order, token, place = ways(chosen, False)
    weights = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    rows = take(x.requires_grad_(), token, place)
    y = combine(rows, weights, order, token, place)
    (y.sum() + gather(rows, token, place).sum()).backward()
    assert rows.shape == (0, D) and y.shape == (N, D) and not y.any()
    assert x.grad is not None and not x.grad.any() and weights.grad is not None and not weights.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_keep_their_dtype_and_sums_are_rounded_once(dtype: torch.dtype) -> None:
    x, order, token, place = ways(choices(0.0), False)
    rows, weights = take(x.to(dtype), token, place), torch.rand(N, K)
    y = combine(rows, weights, order, token, place)
    assert rows.dtype == y.dtype == gather(rows, token, place).dtype == dtype
    exact = (x.to(dtype).double()[:, None] * weights.double()[..., None]).sum(1)
    assert (y.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


@pytest.mark.slow
def test_compiled_they_compute_the_same_and_are_compiled_once() -> None:
    """For every number of rows, none and one included, and every layer: a version for each new number would be lost."""
    from torch._dynamo.utils import counters

    def all_of(chosen: Tensor, rest: bool, passes: permute.Passes) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(len(chosen), D, requires_grad=True)
        weights = torch.rand(chosen.shape, requires_grad=True)
        order, token, place, counts = passes.sort(chosen, E, rest)
        rows = int(counts.sum())
        order, token = order[:rows], token[:rows]
        taken = take(x, token, place, passes)
        y = combine(gated(taken, taken.flip(1), passes), weights, order, token, place, passes)
        y = y + gather(taken, token, place, passes)
        return [y.detach(), *torch.autograd.grad((y**2).sum(), [x, weights])]

    warnings.simplefilter("ignore")  # the compiler makes some of its own
    torch._dynamo.reset()
    counters.clear()
    # 8 tokens with 1.. rows; where two sizes happen to be equal the compiler may take them for one: not at first
    for turn, dropped in enumerate((0.4, 0.2, 0.6, 0.5, 0.97, 1.0)):
        for number in (N, N + 4, N + 9, 2):
            chosen = torch.rand(number, E).topk(K).indices
            chosen = chosen.masked_fill(torch.rand(number, K) < dropped, -1)
            got, want = (all_of(chosen, False, passes) for passes in (fused(), PLAIN))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if turn == 0:
            first = counters["stats"]["unique_graphs"]
    assert 0 < first <= len(PLAIN) + 2
    assert counters["stats"]["unique_graphs"] == first, "a new number of rows was compiled for"
