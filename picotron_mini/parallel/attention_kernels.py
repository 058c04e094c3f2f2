"""Attention on a block of queries and a block of keys, in a form that blocks can be put together from.

Softmax attention over many keys can be computed a block of keys at a time, if each block also returns the logarithm
of its sum of exponentials. With s = q kT / sqrt(Dh) + mask, for one query:

    forward     lse = log sum_j exp(s_j)                   out = sum_j exp(s_j - lse) v_j
    merge       lse = log(exp(lse_1) + exp(lse_2))         out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
    backward    p_j = exp(s_j - lse), with the lse of *all* blocks: the block's true share, computed again
                dv_j = p_j dout     ds_j = p_j (dout . v_j - dout . out)     dq = sum_j ds_j k_j / sqrt(Dh)    ...

So a block's backward needs its own keys, and of all the others nothing but `out` and `lse` (FlashAttention-2,
arXiv 2307.08691). The fused kernels have both halves as operators; which one runs is chosen here and nowhere else:

    cpu         _scaled_dot_product_flash_attention_for_cpu      all there is on the CPU
    cudnn       _scaled_dot_product_cudnn_attention              bf16 or fp16, Dh <= 128, with a mask or without
    flash       _scaled_dot_product_flash_attention              bf16 or fp16 without a mask, where cudnn does not go
    products    of this file: exact, and slow                    all else; a block's scores are written out

cuDNN's backward may add in any order, so with `torch.use_deterministic_algorithms` it is not used.

All take H query heads on Hkv key-value heads without repeating these. A key that a query may not see gets -1e30 added
to its score, not -inf: a query that sees no key of a block then has lse = -1e30, and a weight of 0 in the merge.
(With -inf the CPU kernel says 0 for it, which would be a weight of 1, and others NaN.)

Legend: B batch, H query heads, Hkv key-value heads, Tq, Tk queries and keys of the block, Dh width of a head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MASKED = -1e30  # far below any score, and finite in every dtype but fp16

_aten = torch.ops.aten


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, and the log-sum-exp of its scores.

    Args:
        q: [B, H, Tq, Dh].
        k, v: [B, Hkv, Tk, Dh]; H is a multiple of Hkv.
        causal: query i sees keys 0..i; Tq and Tk are equal then.
        mask: [B, 1, Tq, Tk] bool, true where a query sees a key; not together with `causal`.

    Returns:
        out [B, H, Tq, Dh] in q's dtype, and lse [B, H, Tq] in float32 or float64.
    """
    q, k, v = _ending_in_1(q, k, v)
    kernel = kernel_for(q, k, mask)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=_bias(mask, q))
    elif kernel == "cudnn":
        out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, _bias(mask, q), True, 0.0, causal)[:2]
        lse = lse.squeeze(-1)
    elif kernel == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    else:
        out, lse = _plain(q, k, v, causal, mask)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v.

    Args:
        grad, q, out: [B, H, Tq, Dh]; the gradient of, and the output over *all* keys, not this block's.
        k, v: [B, Hkv, Tk, Dh], this block's.
        lse: [B, H, Tq], over all keys.
        causal, mask: as in `attend_with_lse`.

    Returns:
        Of the shapes of q, k and v, in their dtype.
    """
    kernel, bias = kernel_for(q, k, mask), _bias(mask, q)
    grad, q, k, v, out = _ending_in_1(grad, q, k, v, out)
    if kernel == "cpu":
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias)
        return dq, dk, dv
    if kernel == "products":
        return _plain_backward(grad, q, k, v, out, lse, causal, mask)
    # what the forward returned and a backward without dropout does not read: random state, ragged lengths
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    lengths = None, None, q.shape[2], k.shape[2], 0.0, causal
    if kernel == "flash":
        flash = _aten._scaled_dot_product_flash_attention_backward
        dq, dk, dv = flash(grad, q, k, v, out, lse, *lengths, seed, seed)
    else:
        cudnn = _aten._scaled_dot_product_cudnn_attention_backward
        dq, dk, dv = cudnn(grad, q, k, v, out, lse[..., None], seed[0], seed[1], bias, *lengths)
    return dq, dk, dv


def _ending_in_1(*tensors: Tensor) -> list[Tensor]:
    """The tensors with a last stride of 1: the kernels take it for granted, and read other numbers where it is not.

    Rotary embedding puts two halves of a head together, and where a half is one channel torch lays them out otherwise.
    """
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def kernel_for(q: Tensor, k: Tensor, mask: Tensor | None) -> Literal["cpu", "cudnn", "flash", "products"]:
    """Which of the kernels above takes this block. Arguments as in `attend_with_lse`."""
    if q.device.type == "cpu":
        return "cpu"
    width, repeatable = q.shape[-1], torch.are_deterministic_algorithms_enabled()
    if q.dtype not in (torch.bfloat16, torch.float16) or width % 8:
        return "products"
    if width <= 128 and k.shape[2] > 1 and not repeatable:
        return "cudnn"
    return "flash" if width <= 256 and mask is None else "products"


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores: [B, 1, Tq, Tk] in q's dtype."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, max(MASKED, torch.finfo(q.dtype).min))


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """s [B, Hkv, G Tq, Tk] in float32 or wider: the G queries heads of a key-value head are rows of one product."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    s = _rows(q, k).to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    return s if mask is None else s.masked_fill(~mask.repeat(1, 1, group, 1), MASKED)


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, Tq, ...] -> [B, Hkv, G Tq, ...], G = H / Hkv."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, causal, mask)
    lse = s.logsumexp(-1)  # [B, Hkv, G Tq]
    out = (s - lse[..., None]).exp() @ v.to(s.dtype)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    s = _scores(q, k, causal, mask)
    grad_rows = _rows(grad, k).to(s.dtype)
    p = (s - _rows(lse, k)[..., None]).exp()
    delta = (grad_rows * _rows(out, k)).sum(-1, keepdim=True)  # [B, Hkv, G Tq, 1]
    ds = p * (grad_rows @ v.to(s.dtype).mT - delta) / math.sqrt(q.shape[-1])
    dq, dk, dv = ds @ k.to(s.dtype), ds.mT @ _rows(q, k).to(s.dtype), p.mT @ grad_rows
    return dq.reshape(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
