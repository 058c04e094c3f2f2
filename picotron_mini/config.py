"""Every setting of a run, as frozen dataclasses, checked once before a process is started.

A run is four small groups of settings and a mesh:

    RunConfig = name + mesh (pp x dp x cp x tp ranks) + ModelConfig + DataConfig + TrainConfig

What was left open (the number of micro-batches, the device) is filled by `legality.resolve`, which also refuses
what cannot run, in words, and not as a traceback of rank 3 after a minute.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest varying over the ranks; see mesh.py

Dtype = Literal["float64", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class UserError(Exception):
    """A mistake of the caller, told in one message that names the value and what would work."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot run."""


@dataclass(frozen=True)
class MeshShape:
    """How many ranks each axis has. `pp * dp * cp * tp` is the world size.

    `ep` does not multiply it: experts are spread over ranks that are there already, `ep` of the dp * cp (see mesh.py).
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """How many ranks hold the same experts, where these are spread."""
        return self.dp * self.cp // self.ep

    def edp_inside(self, zero_group: int) -> int:
        """How many of those are in a group of so many dp ranks (`TrainConfig.zero_group`; 0: all ranks are one)."""
        return (zero_group or self.dp) * self.cp // self.ep

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, text: str) -> MeshShape:
        """Read `"dp=2,tp=2,pp=2"`; an axis that is not named has size 1, and `"1"` or `""` is one rank.

        Raises:
            ConfigError: an unknown axis, an axis named twice, or a size that is not a positive integer.
        """
        sizes: dict[str, int] = {}
        for part in [p.strip() for p in text.split(",") if p.strip() not in ("", "1")]:
            match = re.fullmatch(r"([a-z]+)\s*=\s*(\d+)", part)
            if not match:
                raise ConfigError(f"layout {text!r}: {part!r} is not AXIS=SIZE; write for example dp=2,tp=2")
            axis, size = match[1], int(match[2])
            if axis not in (*AXES, "ep"):
                raise ConfigError(f"layout {text!r}: unknown axis {axis!r}; the axes are {', '.join(AXES)}, ep")
            if axis in sizes:
                raise ConfigError(f"layout {text!r}: axis {axis!r} is named twice")
            if size < 1:
                raise ConfigError(f"layout {text!r}: {axis}={size} must be at least 1")
            sizes[axis] = size
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in ("dp", "cp", "tp", "pp", "ep") if getattr(self, axis) > 1]
        return ",".join(named) or "dp=1"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies (arXiv 2407.21783, as `rope_type: llama3` of Hugging Face)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the MLP. The defaults have as many active weights as the laptop's MLP."""

    num_experts: int = 8
    top_k: int = 2  # experts that a token passes; with choice=expert, on average
    expert_size: int = 176  # inner width of an expert
    shared_size: int = 0  # inner width of the shared expert, which every token passes; 0: none
    dense_layers: int = 0  # so many first layers keep their MLP
    choice: Literal["token", "expert"] = "token"  # who chooses whom
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # the weights of a token's experts sum to 1; with softmax: as if it came after the choice
    scale: float = 1.0  # of the experts' sum, before the shared expert is added
    groups: int = 1  # of experts; a token chooses inside its best groups only
    limit_groups: int = 1  # how many groups those are
    capacity: float | None = None  # rows that an expert takes of a sequence, over its even share; None: all that come
    jitter: float = 0.0  # in training the router's input is multiplied by 1 - jitter ... 1 + jitter
    balance: Literal["aux", "bias", "none"] = "aux"  # what keeps experts equally busy
    aux_weight: float = 0.01  # of the auxiliary loss, which is 1 in perfect balance
    aux_scope: Literal["sequence", "global"] = (
        "global"  # balance within each sequence, or each micro-batch of all ranks
    )
    z_weight: float = 0.0  # of the mean squared log-sum-exp of the router's logits
    bias_rate: float = 0.001  # by which balance=bias moves an expert's bias each step


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-style decoder. Defaults are the laptop's model, 0.8 million parameters."""

    vocab_size: int = 0  # 0: as many as the tokenizer has
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2  # fewer than num_heads: grouped-query attention
    head_dim: int = 0  # 0: hidden_size // num_heads
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm on queries and keys, as Qwen3 has it
    max_position: int = 8192  # written to the Hugging Face config; rotary positions have no limit of their own
    moe: MoEConfig | None = None  # experts in place of the MLP; None: a dense model

    @property
    def moe_layers(self) -> range:
        """The layers that have experts; empty in a dense model."""
        return range(self.moe.dense_layers if self.moe else self.num_layers, self.num_layers)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    text: tuple[str, ...] = ()  # files or folders; empty: the documentation and source of CPython
    tokenizer: str = "bytes"  # "bytes", "bpe" (trained on the text, better), or the path of a tokenizer.json
    tokenizer_size: int = 2048  # entries of the trained BPE
    val_fraction: float = 0.05  # share of documents held out
    val_seed: int = 0  # which documents are held out, whatever --seed is; not where a few large files are the text

    @property
    def expected_vocab_size(self) -> int:
        """Entries of the tokenizer before the text was read: exact for bytes, else what was asked for.

        Raises:
            ConfigError: the tokenizer is a file, which only a training run reads.
        """
        if self.tokenizer not in ("bytes", "bpe"):
            raise ConfigError(f"the entries of {self.tokenizer!r} are not known here; give --vocab-size")
        return 257 if self.tokenizer == "bytes" else self.tokenizer_size


@dataclass(frozen=True)
class TrainConfig:
    """The work of one run. Sizes are in sequences; a step's tokens are batch_size * seq_len."""

    steps: int = 300
    seq_len: int = 256
    context: Literal["ring", "ulysses"] = "ring"  # how cp ranks attend: keys go round, or heads are traded
    batch_size: int = 0  # sequences a step over all ranks; 0: micro_batch_size * micro_batches * dp
    micro_batch_size: int = 0  # sequences a rank works on at once; 0: from the other two
    micro_batches: int = 0  # micro-batches a step on each rank; 0: from the other two
    schedule: Literal["1f1b", "afab", "interleaved", "zb-h1", "zb-v"] = "1f1b"  # order of the work in a pipeline
    virtual_stages: int = 2  # runs of layers that each stage holds, with schedule=interleaved
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0  # 0: do not clip
    freeze: tuple[str, ...] = ()  # parameters that stay as they are, by the first parts of their names, as layers.0
    bucket_mb: float = 25.0  # gradients are reduced in buckets of this many MiB; 0: chosen from this machine's links
    compress: Literal["none", "bf16", "topk"] = "none"  # how gradients travel over dp: as they are, or lossy
    compress_keep: float = 0.01  # share of each gradient's entries that compress=topk sends
    reduce_group: int = 0  # dp (and cp) ranks of one host, which sum gradients before hosts do; 0: all ranks at once
    zero: Literal[0, 1, 2, 3] = 0  # cut over dp: 1 optimizer state and masters, 2 gradients too, 3 weights too
    dispatch: Literal["alltoall", "allgather"] = "alltoall"  # of tokens to experts on other ranks: as needed, or all
    dispatch_parts: int = 1  # of the tokens on their way to experts on other ranks: one computes, the next travels
    dispatch_payload: Literal["same", "bf16", "fp8"] = "same"  # how tokens travel to experts: as they are, or lossy
    place_every: int = 0  # steps after which experts are spread over ep anew, by their load; 0: they stay
    expert_replicas: int = 0  # experts more than E/ep that each ep rank holds: copies of the busiest, with place_every
    zero_group: int = 0  # dp ranks that share one copy of what zero cuts; 0: all of them, fewer: HSDP
    # ranks of one host read what zero or tensor_overlap exchanges out of each other's memory; on GPUs by copy engines,
    # which take no multiprocessor from the compute
    symmetric_memory: bool = False
    eval_every: int = 100  # steps between validations; 0: only at the end
    eval_batches: int = 8
    seed: int = 0
    dtype: Dtype = "float32"  # of the compute; weights below float32 keep float32 masters
    # what bf16 weights have beside them: whole: float32 masters; split: the halves of those that the weights are not;
    # none: nothing, and a bf16 state of the optimizer. A parameter's weight and masters take 6, 4 or 2 bytes.
    masters: Literal["whole", "split", "none"] = "whole"
    device: Device = "auto"  # auto: cuda if there is one, else cpu
    compile: bool = False  # torch.compile on each block
    cuda_graph: bool = False  # record a step's forward and backward once, and launch the recording: for a busy host
    document_mask: bool = False  # a token attends inside its own document only, and predicts nothing outside it
    recompute: Literal["none", "selective", "full"] = "none"  # what backward computes again: nothing, MLPs, layers
    loss_chunks: int = 1  # parts of the sequence whose logits exist at once; 1: all
    tensor_overlap: int = 1  # parts in which exchanges between tp ranks travel behind products; 1: all is waited for
    sequence_parallel: bool = False  # between tensor-parallel layers each tp rank keeps a part of the tokens only

    @property
    def chunks(self) -> int:
        """How many runs of layers a pipeline stage holds."""
        return self.virtual_stages if self.schedule == "interleaved" else 2 if self.schedule == "zb-v" else 1

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule does a backward in two halves: input gradients, and weight gradients later."""
        return self.schedule in ("zb-h1", "zb-v")

    def freezes(self, name: str) -> bool:
        """Whether a parameter stays as it is: layers.1 freezes layers.1.mlp.up.weight, and not layers.10."""
        return any(f"{name}.".startswith(f"{start.rstrip('.')}.") for start in self.freeze)


@dataclass(frozen=True)
class RunConfig:
    """All of one run, as `picotron-mini train --help` lists it."""

    layout: str = "auto"  # ranks on each axis, as dp=2,tp=2,pp=2; auto: dp over all GPUs, else dp=2,tp=2 on the CPU
    name: str = ""  # of the run's folder; empty: made from the date
    out: str = "runs"  # the folder that holds the run folders
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def mesh(self) -> MeshShape:
        """The ranks on each axis; the layout must not be "auto" any more (see `legality.resolve`)."""
        return MeshShape.parse(self.layout)


@dataclass(frozen=True)
class PlanConfig:
    """What `picotron-mini plan` is asked, beside the run."""

    ranks: int = 0  # 0: the layout's, else the GPUs or cores of this machine
    machine: str = "this"  # this one, measured; or h100, h100-cluster, or a file that was measured elsewhere
    measure: bool = False  # measure this machine also if it is known
    memory_gib: float = 0.0  # of each rank; 0: the machine's
    link_gb_s: float = 0.0  # gigabytes a second between ranks of a host; 0: the machine's
    host_link_gb_s: float = 0.0  # ... between hosts, for each rank
    ranks_per_host: int = 0  # 0: the machine's
    skew: str = "1"  # the busiest rank's load of experts over the even one, after placement; or the folder of a run
    dry_run: bool = False  # run the layout's ranks without memory, and compare their bytes with the prediction


def nearest(value: int, ok: list[int]) -> str:
    """The two of `ok` that lie nearest to a value, in words: `"4 or 8"`."""
    return " or ".join(str(v) for v in sorted(sorted(ok, key=lambda v: abs(v - value))[:2]))


def divisors(n: int) -> list[int]:
    """All that divide n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration dataclass from plain data (a TOML, YAML or JSON file), refusing unknown names.

    Raises:
        ConfigError: a name that the dataclass does not have, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"settings are names with values, not {values!r}")
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            has = f"{where.rstrip('.') or 'the top level'} has {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown setting '{where}{key}'; {has}")
        out[key] = _read(hints[key], value, f"{where}{key}")
    return cls(**out)


def _read(hint: Any, value: Any, name: str) -> Any:
    """The value of the setting `name` in the type that its dataclass asks for."""
    choices = get_args(hint)
    for group in (hint, *choices):
        if is_dataclass(group):
            if value is None and type(None) in choices:
                return None
            if not isinstance(value, dict):
                raise ConfigError(f"{name}={value!r} must be a group of settings: {', '.join(get_type_hints(group))}")
            return from_dict(group, value, f"{name}.")  # type: ignore[arg-type]
    if type(None) in choices and len(choices) == 2:  # a scalar that may be left open, as float | None
        if value is None:
            return None
        hint = next(choice for choice in choices if choice is not type(None))
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name}={value!r} must be a list of str")
        return tuple(value)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        trap = "; YAML takes 3e-3 for text, write 3.0e-3" if hint is float and isinstance(value, str) else ""
        raise ConfigError(f"{name}={value!r} must be of type {hint.__name__}{trap}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The plain data of a configuration, as it is written to `config.json`; `from_dict` reads it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
