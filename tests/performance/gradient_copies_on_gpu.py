"""How fast bf16 gradients get into float32, in several ways: `python tests/performance/gradient_copies_on_gpu.py`.

On 24 tensors of a model's sizes, one after the other but where it says "all". Bytes are those read and written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

SHAPES = [(8192, 2048)] * 8 + [(2048, 8192)] * 4 + [(2048, 2048)] * 8 + [(2048,)] * 4


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU is visible to torch; this script times one")
    grads = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in SHAPES]
    sums = [torch.zeros(shape, device="cuda") for shape in SHAPES]

    def each(way: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for into, grad in zip(sums, grads, strict=True):
                way(into, grad)

        return run

    copying, adding = 2 + 4, 2 + 4 + 4
    ways: list[tuple[str, int, Callable[[], object]]] = [
        ("copy_", copying, each(lambda into, grad: into.copy_(grad))),
        ("_foreach_copy_ of one", copying, each(lambda into, grad: torch._foreach_copy_([into], [grad]))),
        ("_foreach_copy_ of all", copying, lambda: torch._foreach_copy_(sums, grads)),
        ("mul by 1, out=", copying, each(lambda into, grad: torch.mul(grad, 1.0, out=into))),
        ("add_", adding, each(lambda into, grad: into.add_(grad))),
        ("_foreach_add_ of one", adding, each(lambda into, grad: torch._foreach_add_([into], [grad]))),
    ]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    numbers = sum(grad.numel() for grad in grads)
    for name, size, run in ways:
        ms = do_bench(run, warmup=50, rep=200)
        print(f"{name:22} {ms:.3f} ms {numbers * size / ms / 1e9:.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
