"""Costs by formula against the model itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from picotron_mini.config import Dtype, MeshShape, ModelConfig, RunConfig, TrainConfig
from picotron_mini.legality import resolve
from picotron_mini.mesh import Mesh
from picotron_mini.model import costs
from picotron_mini.model.generate import KeyValueCache
from picotron_mini.model.gpt import GPT, parameter_shapes, rope
from picotron_mini.parallel.parallelize import parallelize
from picotron_mini.training.optimizer import make_optimizer
from picotron_mini.training.step import train_step
from picotron_mini.verify import make_batches

SMALL = ModelConfig(
    vocab_size=37, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16
)
CONFIGS = [SMALL, replace(SMALL, tie_embeddings=False), replace(SMALL, qk_norm=True, num_kv_heads=1, head_dim=10)]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameter_counts_are_those_of_the_model(config: ModelConfig) -> None:
    model = GPT(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    assert costs.layer_parameters(config) == sum(p.numel() for p in model.layers["1"].parameters())


def test_count_of_the_benchmark_model() -> None:
    config = ModelConfig(49_152, 2048, 8192, 24, 32, 32, 64, tie_embeddings=False)
    assert round(costs.parameters(config) / 1e9, 2) == 1.81
    # 33,608 tokens/s is 41.0 % of 989.5 TFLOP/s by this formula
    assert round(33_608 * costs.flops_per_token(config, 2048) / 989.5e12, 3) == 0.410


@pytest.mark.parametrize("config", CONFIGS)
def test_flops_are_those_that_run(config: ModelConfig) -> None:
    tokens = torch.zeros(2, 24, dtype=torch.int64)
    model = GPT(config)
    # the counter does not know the CPU's fused kernel; this one is made of the products it counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model(tokens)
    assert counter.get_total_flops() == tokens.numel() * config.num_layers * costs.layer_flops(config, 24)
    with FlopCounterMode(display=False) as counter:
        model.logits(hidden)
    assert counter.get_total_flops() == tokens.numel() * costs.head_flops(config)


def test_a_head_dim_left_open_is_the_width_over_the_heads() -> None:
    filled = replace(SMALL, head_dim=SMALL.hidden_size // SMALL.num_heads)
    left_open = replace(SMALL, head_dim=0)
    assert costs.flops_per_token(left_open, 64) == costs.flops_per_token(filled, 64)
    assert costs.flops_per_token(filled, 64) == 6 * costs.parameters(filled) + 12 * 3 * 48 * 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_activation_bytes_are_what_autograd_keeps(config: ModelConfig, dtype: torch.dtype) -> None:
    block = GPT(config).layers["0"].to(dtype)
    x = torch.randn(2, 64, config.hidden_size, dtype=dtype, requires_grad=True) * 1
    cos, sin = rope(config, torch.arange(64)[None], dtype)
    owned = {t.untyped_storage().data_ptr() for t in (*block.parameters(), cos, sin)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, cos, sin)
    counted = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert counted == 2 * 64 * costs.layer_activation_bytes(config, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_activation_bytes_of_the_whole_model(config: ModelConfig, dtype: torch.dtype) -> None:
    model = GPT(config).to(dtype)
    tokens = torch.randint(config.vocab_size, (2, 64))
    positions = torch.arange(64).repeat(2, 1)
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), tokens)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in owned:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(model(tokens, positions), tokens)
    counted = sum(t.untyped_storage().nbytes() for t in kept.values())
    # beside what grows with the tokens one scalar, the number of targets that the loss was not divided by
    assert counted == 2 * 64 * costs.activation_bytes(config, dtype.itemsize) + kept[min(kept, key=_size(kept))].nbytes
    assert kept[min(kept, key=_size(kept))].numel() == 1
    loss.backward()


def _size(kept: dict[int, torch.Tensor]) -> Callable[[int], int]:
    return lambda address: kept[address].untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_state_bytes_are_what_the_trainer_holds(config: ModelConfig, dtype: Dtype) -> None:
    train = TrainConfig(seq_len=8, micro_batch_size=1, steps=1, dtype=dtype, device="cpu")
    run = resolve(RunConfig(layout="dp=1", model=config, train=train))
    parallel = parallelize(run, Mesh(MeshShape(), 0), torch.device("cpu"))
    optimizer = make_optimizer(parallel.trained, train)
    train_step(parallel, optimizer, make_batches(run))
    parameters = list(parallel.parameters.values())
    masters = [m for m in parallel.masters.values() if not any(m is p for p in parameters)]
    buckets = parallel.gradients.buckets
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert costs.state_bytes(config, parameters[0].itemsize) == {
        "weights": sum(p.nbytes for p in parameters),
        "masters": sum(m.nbytes for m in masters),
        "gradients": sum(bucket.buffer.nbytes - bucket.flags.nbytes for bucket in buckets),
        "moments": sum(m.nbytes for m in moments),
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_cache_bytes_are_those_of_the_buffers(config: ModelConfig) -> None:
    model = GPT(config).bfloat16()
    cache = KeyValueCache(capacity=20)
    with torch.no_grad():
        model(torch.zeros(3, 5, dtype=torch.int64), cache=cache)
    held = sum(buffer.nbytes for index in model.layers for buffer in cache.layer(index)._buffers or ())
    assert held == 3 * 20 * costs.cache_bytes(config)


def test_shapes_need_no_memory_and_follow_the_model() -> None:
    huge = ModelConfig(128_256, 16_384, 53_248, 126, 128, 8, 128, tie_embeddings=False)  # Llama 3.1 405B
    shapes = parameter_shapes(huge)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == costs.parameters(huge)
    assert round(costs.parameters(huge) / 1e9) == 406
