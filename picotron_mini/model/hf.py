"""Weights in Hugging Face's folder form, to and from `transformers`' Llama, Qwen3, Mixtral and Qwen3-MoE.

    folder/config.json                        the architecture, see hf_config.py
    folder/model.safetensors                  the weights, or when they are large:
    folder/model-00001-of-00003.safetensors   ...
    folder/model.safetensors.index.json       which tensor lies in which file

The two programs compute the same function, so conversion is renaming only: both turn channel pairs (i, i + Dh/2), and
no weight is permuted. Experts, which are one tensor here, are many there (`hf_experts.py`). A safetensors file is a
length, a JSON header and the raw numbers. The older `pytorch_model.bin` is a pickle, which can run code when it is
read, and is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from picotron_mini.config import ConfigError, ModelConfig, UserError
from picotron_mini.model.gpt import bias_shapes, global_name, parameter_shapes
from picotron_mini.model.hf_config import config_from_hf, config_to_hf
from picotron_mini.model.hf_experts import OWN, from_files, moe_kind, to_files

INDEX = "model.safetensors.index.json"

# ours: theirs; `layers.{i}` is `model.layers.{i}` over there
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def hf_name(name: str) -> str:
    """The name over there of one of our parameters: `layers.0.mlp.up.weight` is `model.layers.0.mlp.up_proj.weight`."""
    module = name.removesuffix(".weight")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    return f"{_OUTER[module]}.weight"


def save_hf(
    model: nn.Module | Mapping[str, Tensor], config: ModelConfig, folder: str | Path, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write a folder that `transformers` and `load_hf` read. It appears whole or not at all.

    The files are written beside the folder and renamed into place at the end.

    Args:
        model: a whole single-device model, or its tensors by global name, in any float dtype, which is kept.
        folder: must not exist, or be empty; nothing is overwritten.
        max_shard_bytes: a file holds at most this many bytes of weights (one tensor at least).

    Raises:
        ConfigError: a tensor is missing, unexpected or of a wrong shape or dtype.
        UserError: the folder holds something, or cannot be written.
    """
    given = model
    if isinstance(model, nn.Module):
        given = dict(model.named_parameters()) | dict(model.named_buffers())
    assert not isinstance(given, nn.Module)
    state = _checked(config, given, "the weights to save")
    folder = Path(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty, and nothing is overwritten; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    try:
        part.chmod(0o755)  # mkdtemp makes it private
        _write_weights(config, state, part, max_shard_bytes)
        dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
        (part / "config.json").write_text(json.dumps({**config_to_hf(config), "dtype": dtype}, indent=2) + "\n")
        part.rename(folder)  # replaces an empty folder too
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # already gone when it was renamed


def _tensors(kind: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our tensors as a file has it: by itself, or expert by expert."""
    return dict(to_files(kind, name, tensor)) or {hf_name(name): tensor}


def _write_weights(config: ModelConfig, state: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    kind = moe_kind(config) if config.moe else ""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        theirs = (_tensors(kind, name, state[name].detach().cpu()) for name in names)
        shard = {name: tensor.contiguous() for tensors in theirs for name, tensor in tensors.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a folder: its configuration, and its tensors on the CPU by global name, in model order and stored dtype.

    Raises:
        UserError: a file is missing or damaged.
        ConfigError: the architecture is not supported, or a tensor is missing, unexpected or of a wrong shape or dtype.
    """
    folder = Path(folder)
    described = _read_json(folder / "config.json")
    config = config_from_hf(described)
    dense = [name for name in parameter_shapes(config) if not list(to_files(OWN, name, torch.empty(0)))]
    ours = {hf_name(name): name for name in [*dense, "head.weight"]}
    state: dict[str, Tensor] = {}
    for file, names in _contents(folder).items():
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                found = set(tensors.keys())
                if names and found != names:
                    odd = ", ".join(sorted(found ^ names)[:5])
                    raise UserError(f"{folder / file} and {INDEX} disagree about {odd}; fetch both again")
                for name in sorted(found):
                    # frequencies that older releases stored; they follow from the configuration
                    if not name.endswith("rotary_emb.inv_freq"):
                        state[ours.get(name, name)] = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / file}: {error}") from error
    return config, _checked(config, from_files(str(described["model_type"]), state), str(folder))


def _contents(folder: Path) -> dict[str, set[str]]:
    """Weight file -> the tensors that the index puts there; none where there is no index."""
    if not (folder / INDEX).exists():
        if not (folder / "model.safetensors").exists():
            raise UserError(f"{folder} has no model.safetensors and no {INDEX}; only safetensors is read, not pickles")
        return {"model.safetensors": set()}
    files: dict[str, set[str]] = {}
    weight_map = _read_json(folder / INDEX).get("weight_map")
    for name, file in (weight_map if isinstance(weight_map, dict) else {}).items():
        if not isinstance(file, str) or Path(file).name != file:  # an index must not point out of its folder
            raise UserError(f"{folder / INDEX} puts {name} into {file!r}, which is not a file name")
        files.setdefault(file, set()).add(name)
    if not files:
        raise UserError(f"{folder / INDEX} has no weight_map; fetch it again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _checked(config: ModelConfig, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors in model order, or every misfit by name."""
    shapes = parameter_shapes(config) | bias_shapes(config)
    tied = given.get("head.weight") if global_name(config, "head.weight") != "head.weight" else None
    unexpected = [name for name in given if global_name(config, name) not in shapes]
    found = [f"{name} is missing" for name in shapes if name not in given]
    found += [f"{name} is not a tensor of this model" for name in unexpected]
    for name in shapes.keys() & given.keys():
        if tuple(given[name].shape) != shapes[name]:
            found.append(f"{name} has shape {list(given[name].shape)}, not {list(shapes[name])}")
        elif not given[name].is_floating_point() or given[name].itemsize < 2:
            found.append(f"{name} has dtype {given[name].dtype}; it must be float64, float32, bfloat16 or float16")
    if tied is not None and "embed.weight" in given and not torch.equal(tied, given["embed.weight"]):
        found.append("head.weight differs from embed.weight, and the configuration ties them")
    if found:
        more = f"\nand {len(found) - 10} more" if len(found) > 10 else ""
        raise ConfigError(f"{where} does not fit its configuration:\n" + "\n".join(sorted(found)[:10]) + more)
    return {name: given[name] for name in shapes}
