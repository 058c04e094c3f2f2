"""Let a trained model write: load its weights, continue a prompt, print each piece of text as it comes."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import UserError
from .data.tokenizer import load_tokenizer
from .model.generate import stream
from .model.gpt import GPT
from .model.hf import load_hf


def load(folder: str | Path, device: str = "cpu") -> GPT:
    """The model of a run's folder (its `weights/`), or of a folder of Hugging Face weights.

    Raises:
        UserError: there are no weights.
    """
    config, state = load_hf(_weights(folder))
    model = GPT(config)
    if config.tie_embeddings:
        state = state | {"head.weight": state["embed.weight"]}
    model.load_state_dict(state)
    return model.to(device).eval()


def _weights(folder: str | Path) -> Path:
    folder = Path(folder)
    weights = folder / "weights" if (folder / "weights").is_dir() else folder
    if not (weights / "config.json").exists() or not list(weights.glob("*.safetensors*")):
        raise UserError(f"{folder} holds no weights; give the folder of a finished run, as runs/my-run")
    return weights


def write(
    folder: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int, device: str = "auto"
) -> None:
    """Print the prompt and what the model makes of it."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("device=cuda, and torch sees no GPU; use --device cpu")
    if device == "auto":
        device = "cuda" if gpu else "cpu"
    model = load(folder, device)
    tokenizer = load_tokenizer(_weights(folder))
    ids = tokenizer.encode(prompt) or [tokenizer.end]
    # A character may be spread over several tokens: print only what is complete.
    shown = len(tokenizer.decode(ids))
    waiting = prompt  # printed with the first piece, so that what cannot work is refused before
    tokens = torch.tensor([ids], device=device)
    for new in stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop_token=tokenizer.end
    ):
        if int(new) == tokenizer.end:
            break
        ids.append(int(new))
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(waiting + text[shown:], end="", flush=True)
            waiting, shown = "", len(text)
    print(waiting + tokenizer.decode(ids)[shown:])  # and what was held back when writing ended
