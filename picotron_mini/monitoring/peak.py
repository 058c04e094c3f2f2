"""What a processor could do at best: the denominator of an MFU."""

from __future__ import annotations

import torch

# Dense bf16, from the makers' data sheets. H100 means the SXM board; the H200 has the same chip with more memory.
PEAK_BF16 = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device | str) -> float | None:
    """Floating-point operations a second in dense bf16 products, or None where it is not known."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
