"""The attention kernels: blocks that merge into the whole, on the CPU, by plain products, and on a GPU if there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from picotron_mini.parallel import attention_kernels
from picotron_mini.parallel.attention_kernels import attend_backward, attend_with_lse, kernel_for
from picotron_mini.parallel.context import _merge

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["kernels", "products"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the device has, or the products that stand in where it has nothing."""
    if request.param == "products":
        plain, backward = attention_kernels._plain, attention_kernels._plain_backward
        monkeypatch.setitem(
            globals(), "attend_with_lse", lambda q, k, v, causal=False, mask=None: plain(q, k, v, causal, mask)
        )
        monkeypatch.setitem(
            globals(), "attend_backward", lambda *tensors, causal, mask: backward(*tensors, causal, mask)
        )
    yield request.param


def tensors(dtype: torch.dtype, device: str, tokens: int = 12, width: int = 8) -> list[Tensor]:
    """q [2, 6, T, Dh], k and v [2, 2, T, Dh], a gradient [2, 6, T, Dh]; strided as the model's are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, width) for heads in (6, 2, 2, 6)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).transpose(1, 2) for x in drawn]


def truth(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor) -> list[Tensor]:
    """Output, lse and the three gradients, from the definition, in float64 by autograd."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = q @ k.repeat_interleave(3, 1).mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE[dtype], f"{error.item():.1e}"


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("which", ["full", "causal", "masked"])
@pytest.mark.parametrize(("tokens", "width"), [(12, 8), (192, 64), (160, 128)])
def test_one_block(kind: str, tokens: int, width: int, which: str, dtype: torch.dtype, device: str) -> None:
    """Also as wide as heads are in training, of more tokens than a tile of a kernel has."""
    q, k, v, grad = tensors(dtype, device, tokens, width)
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device=device)
    if which != "full":
        seen = seen.tril()
    if which == "masked":
        ends = torch.tensor([[5, tokens], [1, tokens - 2]], device=device)  # of all documents but the last
        documents = (torch.arange(tokens, device=device)[None, :, None] >= ends[:, None]).sum(-1)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    how = {"causal": which == "causal", "mask": seen if which == "masked" else None}
    want = truth(q, k, v, grad, seen)
    out, lse = attend_with_lse(q, k, v, **how)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    grads = attend_backward(grad, q, k, v, out, lse, **how)
    assert all(g.dtype == dtype for g in grads)
    for got, expected in zip((out, lse, *grads), want, strict=True):
        close(got, expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "width", "keys", "masked", "repeatable", "kernel"),
    [
        (torch.bfloat16, 64, 8, False, False, "cudnn"),
        (torch.float16, 128, 8, True, False, "cudnn"),
        (torch.bfloat16, 4, 8, False, False, "products"),  # no multiple of 8
        (torch.bfloat16, 192, 8, False, False, "flash"),
        (torch.bfloat16, 192, 8, True, False, "products"),
        (torch.bfloat16, 264, 8, False, False, "products"),
        (torch.bfloat16, 64, 1, False, False, "flash"),  # one key
        (torch.bfloat16, 64, 8, False, True, "flash"),  # cuDNN's backward may differ from run to run
        (torch.bfloat16, 64, 8, True, True, "products"),
        (torch.float32, 64, 8, False, False, "products"),
    ],
)
def test_which_kernel_takes_a_block_on_a_gpu(
    dtype: torch.dtype, width: int, keys: int, masked: bool, repeatable: bool, kernel: str
) -> None:
    q, k = (torch.empty(1, 2, tokens, width, dtype=dtype, device="meta") for tokens in (8, keys))
    mask = torch.empty(1, 1, 8, keys, dtype=torch.bool, device="meta") if masked else None
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(repeatable)
    try:
        assert kernel_for(q, k, mask) == kernel
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_last_dim_that_is_strided(device: str) -> None:
    """As rotary embedding leaves queries of heads of two channels; kernels that are handed it read other numbers."""
    dense = tensors(torch.float64, device)
    strided = [torch.stack([x, x.new_full(x.shape, float("nan"))], -1)[..., 0] for x in dense]
    assert all(x.stride(-1) == 2 for x in strided)
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=device).tril()
    q, k, v, grad = strided
    out, lse = attend_with_lse(q, k, v, causal=True)
    got = (out, lse, *attend_backward(grad, q, k, v, out, lse, causal=True, mask=None))
    for found, expected in zip(got, truth(*dense, seen), strict=True):
        close(found, expected, torch.float64)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_blocks_make_the_whole_though_rows_are_masked_whole(kind: str, dtype: torch.dtype, device: str) -> None:
    """Keys in three uneven blocks; many queries see nothing of the last one, and some nothing of the first."""
    q, k, v, grad = tensors(dtype, device)
    documents = torch.tensor([[0] * 6 + [1] * 6, [0] * 4 + [1] * 8], device=device)
    seen = torch.ones(12, 12, dtype=torch.bool, device=device).tril() & (
        documents[:, None, :, None] == documents[:, None, None, :]
    )
    want = truth(q, k, v, grad, seen)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=device)
    blocks = [slice(0, 4), slice(4, 9), slice(9, 12)]
    wholly_masked = 0
    for block in blocks:
        part, part_lse = attend_with_lse(q, k[:, :, block], v[:, :, block], mask=seen[..., block])
        nothing = ~seen[..., block].any(-1).expand(part_lse.shape)
        wholly_masked += int(nothing.sum())
        assert (part_lse[nothing] < -1e29).all(), "a row without keys must weigh nothing"
        _merge(out, lse, part, part_lse)
    assert wholly_masked > 50
    dq = torch.zeros_like(out)
    dk, dv = torch.zeros(k.shape, dtype=wide, device=device), torch.zeros(v.shape, dtype=wide, device=device)
    for block in blocks:
        grads = attend_backward(
            grad, q, k[:, :, block], v[:, :, block], out.to(dtype), lse, causal=False, mask=seen[..., block]
        )
        for total, more in zip((dq, dk[:, :, block], dv[:, :, block]), grads, strict=True):
            total.add_(more)
    for got, expected in zip((out, lse, dq, dk, dv), want, strict=True):
        close(got, expected, dtype)


def test_heads_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is handed keys and values as they are, with their own number of heads and their own memory."""
    handed: list[Tensor] = []
    real: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Aten:
        @staticmethod
        def _scaled_dot_product_flash_attention_for_cpu(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
            handed.extend(args[:3])
            return real(*args, **kwargs)

    monkeypatch.setattr(attention_kernels, "_aten", Aten)
    q, k, v, _ = tensors(torch.float32, "cpu")
    attention_kernels.attend_with_lse(q, k, v, causal=True)
    assert [x.data_ptr() for x in handed] == [x.data_ptr() for x in (q, k, v)]
