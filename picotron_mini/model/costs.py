"""What a model costs, from its shape alone: parameters, flops, bytes. No torch needed.

    a product [T, D] x [D, F]     2 T D F flops: one multiplication and one addition for each of the T D F pairs
    its backward                  twice that: one product for the input's gradient, one for the weight's
    attention, one token          q kT and p v, each 2 T H Dh: the only part that grows with the sequence

So a training step costs about 6 flops a parameter and token, plus attention:

    flops a token = 6 N + 12 L (H Dh) T          N counts every parameter, embeddings included

Two conventions hide in it, and papers differ in both: causal attention is not halved, although half of its scores are
masked; and the embedding, a look-up without products, is counted. The utilisation (MFU, arXiv 2204.02311) that this
repository prints uses this formula. Balancing pipeline stages needs the real shares instead; `layer_flops` and
`head_flops` count products only.

Memory has two parts. One is there all the time and grows with the parameters (`state_bytes`); the other is made by a
forward, freed by its backward, and grows with the tokens (`activation_bytes`).

Legend: L layers, D width, H query heads, Hkv key-value heads, Dh width of a head, F inner width, V vocabulary,
T tokens.
"""

from __future__ import annotations

from picotron_mini.config import ModelConfig


def _head_dim(config: ModelConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_heads


def mlp_parameters(config: ModelConfig, layer: int = 0, active: bool = False) -> int:
    """Weights of one layer's MLP, 3 D F; of a mixture of experts E D of the router, 3 D I an expert and the shared one.

    Args:
        active: only those that a token is multiplied with: K experts of E.
    """
    if (moe := config.moe) is None or layer not in config.moe_layers:
        return 3 * config.hidden_size * config.intermediate_size
    experts = moe.top_k if active else moe.num_experts
    return config.hidden_size * (moe.num_experts + 3 * (experts * moe.expert_size + moe.shared_size))


def layer_matrix_parameters(config: ModelConfig, layer: int = 0, active: bool = False) -> int:
    """Weights of one layer that are multiplied with: q, o [D, H Dh], k, v [D, Hkv Dh], and `mlp_parameters`."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * _head_dim(config)
    return config.hidden_size * attention + mlp_parameters(config, layer, active)


def layer_parameters(config: ModelConfig, layer: int = 0, active: bool = False) -> int:
    """All parameters of one layer: its matrices, two norms [D], and with `qk_norm` two more [Dh]."""
    norms = 2 * config.hidden_size + (2 * _head_dim(config) if config.qk_norm else 0)
    return layer_matrix_parameters(config, layer, active) + norms


def parameters(config: ModelConfig, active: bool = False) -> int:
    """All parameters of the model; a tied head and embedding are counted once.

    Args:
        active: of each mixture only the experts that one token passes.
    """
    table = config.vocab_size * config.hidden_size
    tables = table if config.tie_embeddings else 2 * table
    layers = sum(layer_parameters(config, layer, active) for layer in range(config.num_layers))
    return tables + layers + config.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward of one token, 6 N + 12 L (H Dh) T: the number that an MFU is computed from.

    N is `parameters`, embeddings included, and of experts the active ones. Causal masking is not credited. H Dh is the
    width unless head_dim is set.
    """
    attention = 12 * config.num_layers * config.num_heads * _head_dim(config) * seq_len
    return 6 * parameters(config, active=True) + attention


def layer_flops(config: ModelConfig, seq_len: int, layer: int = 0) -> int:
    """Forward of one layer for one token: 2 flops a weight, and 4 T H Dh of attention, not halved for the mask."""
    attention = 4 * config.num_heads * _head_dim(config) * seq_len
    return 2 * layer_matrix_parameters(config, layer, active=True) + attention


def head_flops(config: ModelConfig) -> int:
    """Forward of the output head for one token: 2 D V. The embedding is a look-up and costs none."""
    return 2 * config.hidden_size * config.vocab_size


def layer_activation_bytes(config: ModelConfig, bytes_per_number: int = 4, layer: int = 0) -> int:
    """Bytes that one layer keeps for its backward, for one token, run eagerly with fused attention on one document.

    Each product keeps its input, each elementwise step what its derivative reads. In numbers a token: a norm keeps its
    input and the normalised value (D each) and one root, in float32 or wider, and the product that follows keeps its
    output; attention keeps q, k, v, its output (twice: the kernel's, and in the order Wo reads) and one log-sum-exp a
    head; the MLP keeps gate, up, silu(gate) and their product. Nothing grows with T^2: fused attention computes its
    scores again (arXiv 2205.14135). torch.compile keeps less.

    With experts (dropless, softmax, normalised) each of the K rows of a token keeps its input and output (D each) and
    gate, up and their product (3 I: silu(gate) is computed again); the router its scores (E, and E + 1 more for a
    z-loss), the K chosen ones and their weights and two sums, and of each row four int64 indices; where compute is
    narrower than float32 the router keeps its input widened, and the norm's output only a shared expert.
    """
    heads, all_heads, head_dim = config.num_heads, config.num_heads + config.num_kv_heads, _head_dim(config)
    wide = 2 * (2 * config.hidden_size + 1) + heads
    if config.qk_norm:
        wide += (2 * head_dim + 1) * all_heads
    narrow = 2 * config.hidden_size + (2 * all_heads + heads) * head_dim
    if (moe := config.moe) is None or layer not in config.moe_layers:
        return wide * max(4, bytes_per_number) + (narrow + 4 * config.intermediate_size) * bytes_per_number
    narrow += moe.top_k * (2 * config.hidden_size + 3 * moe.expert_size) + 4 * moe.shared_size
    wide += moe.num_experts + 2 * moe.top_k + 2 + (moe.num_experts + 1 if moe.z_weight else 0)
    if bytes_per_number < 4:
        wide += config.hidden_size
        narrow -= 0 if moe.shared_size else config.hidden_size
    return wide * max(4, bytes_per_number) + narrow * bytes_per_number + 32 * moe.top_k


def activation_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes that the whole model keeps for its backward, for one token, loss included; see `layer_activation_bytes`.

    Besides its layers: the cosines and sines (Dh / 2 each, shared by all layers), the final norm as in a layer, and
    the log-probability of every entry of the vocabulary, in float32 or wider. The batch itself is not counted.
    """
    wide = _head_dim(config) + 2 * config.hidden_size + 1 + config.vocab_size
    outer = wide * max(4, bytes_per_number) + config.hidden_size * bytes_per_number
    return sum(layer_activation_bytes(config, bytes_per_number, n) for n in range(config.num_layers)) + outer


def state_bytes(config: ModelConfig, bytes_per_number: int = 4) -> dict[str, int]:
    """Bytes that training with AdamW keeps between steps, on one device, by what they are for.

    Below float32 the weights are rounded copies of float32 masters, and gradients are summed in float32. The few
    counters that come with each tensor (a flag of its gradient, the optimizer's step) are not counted.
    """
    number, wide = parameters(config), max(4, bytes_per_number)
    return {
        "weights": number * bytes_per_number,
        "masters": number * 4 if bytes_per_number < 4 else 0,
        "gradients": number * wide,
        "moments": 2 * number * wide,
    }


def cache_bytes(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values that generation keeps for one token of one sequence: 2 L Hkv Dh numbers."""
    return 2 * config.num_layers * config.num_kv_heads * _head_dim(config) * bytes_per_number
