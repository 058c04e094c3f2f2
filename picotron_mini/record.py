"""What rank 0 shows and leaves behind: live progress, a line of metrics a step, and at the end weights and summary."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from .config import UserError
from .data.bigram import bigram_bits_per_byte, unigram_bits_per_byte
from .mesh import coordinates
from .model.costs import flops_per_token, parameters
from .model.generate import generate
from .model.gpt import GPT
from .model.hf import save_hf
from .monitoring.experts import specialisation
from .monitoring.metrics import MetricsWriter, memory_bytes
from .monitoring.peak import peak_flops
from .monitoring.progress import Progress as LiveProgress
from .parallel.expert_traffic import Rows
from .parallel.parallelize import layout_of
from .parallel.traffic import predict_step
from .ready import ReadyRun, write_json
from .training.migrate import Migration
from .training.step import StepResult

SAMPLE_TOKENS = 120
SPECIALISATION_TOKENS = 8192  # of the held-out text, to see which expert gets what


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
        self.told = False  # of routers that diverged

    def __enter__(self) -> Recorder:
        self.metrics.__enter__()
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.metrics.__exit__(*exception)

    def step(
        self, step: int, result: StepResult, lr: float, seconds: float, sent: Any, rows: Rows | None = None
    ) -> None:
        speed, memory = result.tokens / seconds, memory_bytes(self.device)
        routing = result.routing.metrics() if result.routing else {}
        self.metrics.write(
            step=step, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens=result.tokens,
            tokens_per_second=speed, memory_bytes=memory, **routing,
        )  # fmt: skip
        if (odd := routing.get("moe_not_finite", 0)) and not self.told:
            self.told = True
            self.progress.say(
                f"step {step}: routers gave {odd} tokens logits that are not finite; the run has diverged"
            )
        self.progress.step(step, result.loss, speed, memory)
        if step == 1:
            predicted = predict_step(self.ready.run, self.layout, coordinates(self.ready.run.mesh, 0), rows)
            keys = sorted({*predicted, *sent})
            self.traffic = {
                "per_step": [
                    {"axis": a, "op": op, "predicted": predicted[a, op], "counted": sent[a, op]} for a, op in keys
                ]
            }
            write_json(self.ready.folder / "traffic.json", self.traffic | {"steps": self.ready.run.train.steps})
        if result.stop:
            self.progress.say("stopping: saving weights and report")

    def moved(self, step: int, what: Migration) -> None:
        """Tell of experts that changed their ranks, of a layer of the first stage."""
        self.metrics.write(step=step, placed_layer=what.layer, placed_before=what.before, placed_after=what.after)
        self.progress.say(
            f"step {step}, layer {what.layer}: {what.moved} experts changed their rank; the busiest rank had "
            f"{what.before:.2f} times the mean load, and would have had {what.after:.2f}"
        )

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
        model = self._model(state)
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
            "sample": self._sample(model),
            "data": {"description": text.source, "digest": text.text_sha256, "bytes": text.text_bytes} | asdict(text),
            "peak_memory_bytes": memory_bytes(self.device),
        }
        if run.model.moe is not None:
            summary |= {"active_parameters": parameters(run.model, active=True), "experts": self._experts(model)}
        write_json(folder / "summary.json", summary)
        return summary

    def _model(self, state: dict[str, torch.Tensor]) -> GPT:
        model = GPT(self.ready.run.model)
        model.load_state_dict(state | ({"head.weight": state["embed.weight"]} if model.config.tie_embeddings else {}))
        return model.to(self.device)

    def _sample(self, model: GPT) -> dict[str, str]:
        prompt, moe = "def ", model.config.moe
        if moe is not None and moe.choice == "expert":
            return {"prompt": "", "text": "(experts that choose tokens look ahead, so this model cannot write)"}
        tokens = torch.tensor([self.tokenizer.encode(prompt)])
        try:
            out = generate(model, tokens.to(self.device), SAMPLE_TOKENS, stop_token=self.tokenizer.end)[0].tolist()
        except UserError as error:  # a run that has diverged; its summary must be written all the same
            return {"prompt": "", "text": f"({error})"}
        return {"prompt": prompt, "text": self.tokenizer.decode([t for t in out if t != self.tokenizer.end])}

    def _experts(self, model: GPT) -> dict[str, Any]:
        """What the experts have specialised in, on a few held-out sequences."""
        length = self.ready.run.train.seq_len
        ids = torch.as_tensor(self.ready.prepared.tokens("val")[:SPECIALISATION_TOKENS].astype("int64"))
        rows = ids[: len(ids) // length * length].view(-1, length) if len(ids) >= length else ids[None]
        return specialisation(model, rows.to(self.device), lambda token: self.tokenizer.decode([token]))
