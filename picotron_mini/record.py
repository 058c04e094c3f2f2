"""What rank 0 shows and leaves behind: live progress, a line of metrics a step, and at the end weights and summary."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from .data.bigram import bigram_bits_per_byte, unigram_bits_per_byte
from .mesh import coordinates
from .model.costs import flops_per_token, parameters
from .model.generate import generate
from .model.gpt import GPT
from .model.hf import save_hf
from .monitoring.metrics import MetricsWriter, memory_bytes
from .monitoring.peak import peak_flops
from .monitoring.progress import Progress as LiveProgress
from .parallel.parallelize import layout_of
from .parallel.traffic import predict_step
from .ready import ReadyRun, write_json
from .training.step import StepResult

SAMPLE_TOKENS = 120


class Recorder:
    """What rank 0 shows and writes."""

    def __init__(self, ready: ReadyRun, device: torch.device) -> None:
        self.ready, self.device = ready, device
        self.tokenizer = ready.prepared.load_tokenizer()
        self.token_bytes = torch.as_tensor(self.tokenizer.token_bytes())
        run = ready.run
        self.traffic: dict[str, Any] = {}
        self.layout = layout_of(run)
        # validation loss is in nats a token; bits per byte does not depend on the tokenizer
        text = ready.prepared
        self.bits_per_byte_per_nat = text.val_tokens / max(text.val_bytes, 1) / math.log(2)
        self.metrics = MetricsWriter(ready.folder / "metrics.jsonl")
        self.progress = LiveProgress(run.train.steps)

    def __enter__(self) -> Recorder:
        self.metrics.__enter__()
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.metrics.__exit__(*exception)

    def step(self, step: int, result: StepResult, lr: float, seconds: float, sent: Any) -> None:
        speed, memory = result.tokens / seconds, memory_bytes(self.device)
        self.metrics.write(
            step=step, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens=result.tokens,
            tokens_per_second=speed, memory_bytes=memory,
        )  # fmt: skip
        self.progress.step(step, result.loss, speed, memory)
        if step == 1:
            predicted = predict_step(self.ready.run, self.layout, coordinates(self.ready.run.mesh, 0))
            rows = sorted({*predicted, *sent})
            self.traffic = {
                "per_step": [
                    {"axis": a, "op": op, "predicted": predicted[a, op], "counted": sent[a, op]} for a, op in rows
                ]
            }
            write_json(self.ready.folder / "traffic.json", self.traffic | {"steps": self.ready.run.train.steps})
        if result.stop:
            self.progress.say("stopping: saving weights and report")

    def validation(self, step: int, loss: float, bits: float | None = None) -> None:
        bits = loss * self.bits_per_byte_per_nat if bits is None else bits
        self.metrics.write(step=step, val_loss=loss, val_bits_per_byte=bits)
        self.progress.validation(loss, bits)

    def finish(
        self, state: dict[str, torch.Tensor], done: int, last: StepResult | None, val_loss: float, val_tokens: int,
        seen: int, seconds: float, stopped: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Write weights, tokenizer and summary; returns the summary."""
        run, text, folder = self.ready.run, self.ready.prepared, self.ready.folder
        save_hf(state, run.model, folder / "weights")
        self.tokenizer.save(folder / "weights")
        train_tokens, val = text.tokens("train"), text.tokens("val")[: seen + 1]
        skip = text.end if run.train.document_mask else None  # after it nothing is predicted
        targets = val[1:] if skip is None else val[1:][val[:-1] != skip]
        target_bytes = int(self.token_bytes[torch.as_tensor(targets.astype("int64"))].sum())
        bits = val_loss * val_tokens / math.log(2) / max(target_bytes, 1)
        self.validation(done, val_loss, bits)
        speed = run.train.batch_size * run.train.seq_len * done / seconds if done else 0.0
        peak = peak_flops(self.device)
        flops = flops_per_token(run.model, run.train.seq_len) * speed / run.mesh.world_size
        baseline = (train_tokens, val, run.model.vocab_size, self.token_bytes.numpy(), skip)
        summary = {
            "steps_done": done,
            "steps": run.train.steps,
            "stopped": "on request" if stopped else None,
            "final_loss": last.loss if last else None,
            "val_loss": val_loss,
            "val_tokens": val_tokens,
            "val_bits_per_byte": bits,
            "bigram_bits_per_byte": bigram_bits_per_byte(*baseline),
            "unigram_bits_per_byte": unigram_bits_per_byte(*baseline),
            "bits_per_byte_per_nat": self.bits_per_byte_per_nat,
            "tokens": run.train.batch_size * run.train.seq_len * done,
            "seconds": seconds,
            "parameters": parameters(run.model),
            "mfu": flops / peak if peak else None,
            "sample": self._sample(state),
            "data": {"description": text.source, "digest": text.text_sha256, "bytes": text.text_bytes} | asdict(text),
            "peak_memory_bytes": memory_bytes(self.device),
        }
        write_json(folder / "summary.json", summary)
        return summary

    def _sample(self, state: dict[str, torch.Tensor]) -> dict[str, str]:
        model = GPT(self.ready.run.model)
        model.load_state_dict(state | ({"head.weight": state["embed.weight"]} if model.config.tie_embeddings else {}))
        prompt = "def "
        tokens = torch.tensor([self.tokenizer.encode(prompt)])
        model.to(self.device)
        # a run that has diverged has no probabilities to draw from; its summary must be written all the same
        finite = all(bool(weight.isfinite().all()) for weight in state.values())
        out = generate(
            model, tokens.to(self.device), SAMPLE_TOKENS, temperature=0.8 if finite else 0.0,
            stop_token=self.tokenizer.end,
        )[0].tolist()  # fmt: skip
        return {"prompt": prompt, "text": self.tokenizer.decode([t for t in out if t != self.tokenizer.end])}
