"""Let a trained model write: load its weights, continue a prompt, print each piece of text as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import ConfigError, MeshShape, RunConfig, TrainConfig, UserError
from .data.tokenizer import Tokenizer, load_tokenizer
from .launch import first_rank, launch, under_torchrun
from .legality import resolve
from .mesh import Mesh
from .model.generate import KeyValueCache, check_draws, next_logits, stream
from .model.gpt import GPT
from .model.hf import load_hf
from .parallel import generate as spread


def load(folder: str | Path, device: str = "cpu") -> GPT:
    """The model of a run's folder (its `weights/`), or of a folder of Hugging Face weights.

    Raises:
        UserError: there are no weights, or some are NaN or infinite.
    """
    config, state = load_hf(_weights(folder))
    broken = [name for name, weight in state.items() if not weight.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise UserError(
            f"NaN or infinite numbers are in {broken[0]}{more} of {folder}: that run has diverged; train again with a "
            "lower --lr"
        )
    model = GPT(config)
    if config.tie_embeddings:
        state = state | {"head.weight": state["embed.weight"]}
    model.load_state_dict(state)
    return model.to(device).eval()


def _weights(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        near = sorted(each.parent.name for each in folder.parent.glob("*/weights")) if folder.parent.is_dir() else []
        there = f"; {folder.parent} has {', '.join(near[:5])}" if near else "; `picotron-mini train` makes one"
        raise UserError(f"there is no folder {folder}{there}")
    weights = folder / "weights" if (folder / "weights").is_dir() else folder
    if not (weights / "config.json").exists() or not list(weights.glob("*.safetensors*")):
        raise UserError(f"{folder} holds no weights; give the folder of a finished run, as runs/my-run")
    return weights


@dataclass(frozen=True)
class Wish:
    """What to write, and how each token is chosen (see `model.generate.stream`)."""

    prompt: str
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def write(folder: str, wish: Wish, device: str = "auto", layout: str = "1", dtype: str = "float32") -> None:
    """Print the prompt and what the model makes of it. Under `torchrun` every rank calls it, and rank 0 prints.

    Args:
        layout: over how many ranks the model is spread, as "tp=2,pp=2"; "1" is one device.

    Raises:
        UserError: the wish cannot be met, the folder holds no whole model, or it does not fit the layout or machine.
    """
    check_draws(wish.temperature, wish.top_k, wish.max_new_tokens, wish.seed)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("device=cuda, and torch sees no GPU; use --device cpu")
    device = device if device != "auto" else "cuda" if gpus else "cpu"
    model = load(folder)
    tokenizer = load_tokenizer(_weights(folder))
    # cp ranks are replicas here: the sequence of a training step, which they would share, has a length that fits
    train = TrainConfig(device=device, dtype=dtype, seq_len=2 * MeshShape.parse(layout).cp)  # type: ignore[arg-type]
    run = resolve(RunConfig(layout, model=model.config, train=train), gpus=gpus)
    room = model.config.max_position - max(len(tokenizer.encode(wish.prompt)), 1)
    if wish.max_new_tokens > room:
        raise ConfigError(
            f"max_new_tokens={wish.max_new_tokens} does not fit: of the model's "
            f"max_position={model.config.max_position} the prompt leaves {max(room, 0)}"
        )
    if run.mesh.world_size == 1 and not under_torchrun():
        model.to(device, getattr(torch, dtype))
        _print(partial(next_logits, model), tokenizer, wish, torch.device(device))
    else:
        del model  # it was whole, and is to be spread
        launch(_on_rank, run, folder, wish, world_size=run.mesh.world_size, device=device, timeout=None, output="live")


def _on_rank(run: RunConfig, folder: str, wish: Wish) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if run.train.device == "cuda" else torch.device("cpu")
    config, state = load_hf(_weights(folder))
    parallel = spread.load_parallel(run, config, state, Mesh.build(run.mesh), device)
    _print(partial(spread.next_logits, parallel), load_tokenizer(_weights(folder)), wish, device)


def _print(
    scores: Callable[[Tensor, KeyValueCache], Tensor], tokenizer: Tokenizer, wish: Wish, device: torch.device
) -> None:
    ids = tokenizer.encode(wish.prompt) or [tokenizer.end]
    # A character may be spread over several tokens: print only what is complete.
    shown = len(tokenizer.decode(ids))
    waiting = wish.prompt  # printed with the first piece, so that what cannot work is refused before
    tokens = torch.tensor([ids], device=device)
    speaks = first_rank()  # all ranks of `torchrun` have the same text
    for new in stream(
        scores, tokens, wish.max_new_tokens, temperature=wish.temperature, top_k=wish.top_k, seed=wish.seed,
        stop_token=tokenizer.end,
    ):  # fmt: skip
        if int(new) == tokenizer.end:
            break
        ids.append(int(new))
        text = tokenizer.decode(ids)
        if speaks and not text.endswith("\ufffd"):
            print(waiting + text[shown:], end="", flush=True)
            waiting, shown = "", len(text)
    if speaks:
        print(waiting + tokenizer.decode(ids)[shown:])  # and what was held back when writing ended
