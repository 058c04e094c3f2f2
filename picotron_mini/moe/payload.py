"""In what form rows travel: as they are, rounded to bf16, or in 8 bits with one scale for each row.

A dispatch sends hidden states, and their gradients, four times a layer: rows to the experts and outputs back, gradients
of outputs to the experts and gradients of rows back. Rounded, they weigh less, and the result is another one: this is
lossy, as `parallel/compress.py` is, and `verify` says so.

    form    message of a row [D]                bytes    error of a number
    same    as it is                            D w      none
    bf16    bfloat16                            2 D      2^-9 of it
    fp8     float32 a scale, float8_e4m3fn      4 + D    2^-4 of it, or 2^-10 scale if that is more: small ones vanish

    scale = max |row| / 448: the largest number of a row becomes the largest that e4m3 has

The scale is the row's own, so what arrives is a function of the row alone. It does not depend on the layout, nor on
which other rows travel with it; and a single token with large numbers does not cost the others their digits.

**Which way is narrowed how** (`dispatch_payload=fp8`) follows DeepSeek-V3 (arXiv 2412.19437). What goes *to* experts,
rows forward and gradients of outputs backward, goes in 8 bits: it meets a product there, and where that takes 8 bits
itself, as theirs does, the rounding is made in any case. What comes *back* goes in bf16: it is added up as it is, so
rounding it would be done for the journey alone. The weights beside rows, and which experts they are for, stay exact.

Here experts compute in the dtype of the model, so rounding the rows is an error of its own, and the larger one: in a
layer with random weights 3.7 % of the output's norm, against 2.6 % for 8 bits on the way back alone, and 0.3 % for bf16
both ways (interview_questions/08_moe.md, question 21, measures it).

Legend: D width, w bytes of a number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "bf16", "fp8"]
# by `dispatch_payload`: the form of what goes to experts, and of what comes back from them
FORMS: dict[str, tuple[Form, Form]] = {"same": ("same", "same"), "bf16": ("bf16", "bf16"), "fp8": ("fp8", "bf16")}
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def pack(x: Tensor, form: Form) -> Tensor:
    """The message of rows x [S, D], contiguous: [S, D], with fp8 uint8 [S, 4 + D]: not every backend knows a float8.

    A row with an infinity or a NaN arrives with NaNs: it is not hidden.
    """
    if form == "same":
        return x.contiguous()
    if form == "bf16":
        return x.to(torch.bfloat16).contiguous()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(1, keepdim=True) / LARGEST).float()  # [S, 1]
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays one
    codes = (wide / scale).to(torch.float8_e4m3fn)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1)


def unpack(message: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """The rows [R, D] of a message in this form."""
    if form != "fp8":
        return message.to(dtype)
    # copied even where one row is in order as it is: its strides would not do for a float32
    scale = message[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)  # [R, 1]
    codes = message[:, 4:].view(torch.float8_e4m3fn)
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale).to(dtype)
