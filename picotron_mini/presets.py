"""Named starting points; any flag changes one setting of them.

laptop    0.8 million parameters, 3 to 4 minutes on two CPU cores: what `make train` runs without a GPU
h100      350 million parameters in bf16, compiled, on one GPU
h100x2    the same on two GPUs, data parallel
moe-tiny  a mixture of 8 experts, of which a token passes 2; as many active parameters as laptop has: 3 to 5 minutes
bench     1.8 billion parameters, the sizes that speeds in this repository are quoted for; random weights are
          enough to measure it, so it is for `picotron-mini bench`
bench-moe the same width and depth with 8 experts of 4096, top-2: 5.44 billion parameters, 1.8 of them active
"""

from __future__ import annotations

from dataclasses import replace

from .config import ConfigError, DataConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig

_LAPTOP = RunConfig(
    train=TrainConfig(steps=450, seq_len=256, batch_size=16, lr=6e-3, warmup_steps=30, eval_every=75, eval_batches=4)
)
_MOE_TINY = replace(_LAPTOP, model=ModelConfig(moe=MoEConfig(num_experts=8, top_k=2, expert_size=176, aux_weight=0.01)))
_H100 = RunConfig(
    layout="dp=1",
    model=ModelConfig(hidden_size=1024, intermediate_size=2816, num_layers=24, num_heads=16, num_kv_heads=8),
    data=DataConfig(tokenizer="bpe", tokenizer_size=8192),
    train=TrainConfig(
        steps=200, seq_len=1024, batch_size=64, micro_batch_size=16, lr=1e-3, warmup_steps=40, weight_decay=0.1,
        eval_every=50, eval_batches=2, dtype="bfloat16", device="cuda", compile=True,
    ),
)  # fmt: skip
_BENCH = RunConfig(
    layout="dp=1",
    model=ModelConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_layers=24, num_heads=32, num_kv_heads=32,
        tie_embeddings=False,
    ),
    train=TrainConfig(
        steps=8, seq_len=2048, micro_batch_size=4, micro_batches=4, lr=3e-4, lr_schedule="constant", warmup_steps=0,
        dtype="bfloat16", device="cuda", compile=True,
    ),
)  # fmt: skip

_BENCH_MOE = replace(
    _BENCH, model=replace(_BENCH.model, moe=MoEConfig(num_experts=8, top_k=2, expert_size=4096)),
    train=replace(_BENCH.train, micro_batch_size=2),
)  # fmt: skip

PRESETS: dict[str, RunConfig] = {
    "laptop": _LAPTOP,
    "moe-tiny": _MOE_TINY,
    "h100": _H100,
    "h100x2": replace(_H100, layout="dp=2", train=replace(_H100.train, batch_size=128)),
    "bench": _BENCH,
    "bench-moe": _BENCH_MOE,
}


def preset(name: str) -> RunConfig:
    """The preset of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
