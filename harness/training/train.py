"""Train the small model: `python -m harness.training.train --config config/training.yaml --out DIR`.

Time-boxed, seeded, with an adaptive curriculum: a stage ends when the deepest links and the questions are right
often enough. Checkpoints, the loss curve and scores are written during the run, so a stopped run can be
continued with `--init DIR`.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from cacheslide.errors import ConfigError
from harness.inventory import read_config
from harness.step import command
from harness.training import checkpoint, evaluate
from harness.training.data import RowSpec, Stream, loader
from harness.training.losses import accuracy, training_loss
from harness.training.model import Trainee, block, llama
from harness.training.tokenizer import BOS, EOS, PAD, build_tokenizer, piece_ids


@dataclass(frozen=True)
class Settings:
    """Settings of a run. `stages` are lists of {weight, ...RowSpec} with the `pass` mark that ends them."""

    stages: list[dict]
    model: dict
    vocab: int = 1280
    seed: int = 0
    minutes: float = 9.0
    steps: int | None = None
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 200
    decay: float = 0.35
    aux: float = 1.0
    schedule: str = "double"
    gather: float = 10.0
    pointers: float = 0.3
    workers: int = 14
    first_stage: int = 0
    depth: int = 9
    log_every: int = 25
    save_seconds: float = 120.0
    eval_prompts: int = 16
    eval_tokens: tuple[int, ...] = (1024,)


def settings(path: Path, changes: list[str]) -> Settings:
    """Read a YAML file; `changes` are key=value strings that override it."""
    raw = read_config(path)
    raw.update({k: yaml.safe_load(v) for k, v in (c.split("=", 1) for c in changes)})
    if unknown := set(raw) - {f.name for f in fields(Settings)}:
        raise ConfigError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
    return Settings(**raw)


def specs(stage: dict) -> list[tuple[float, RowSpec]]:
    """The row specs of a stage with their weights."""
    return [
        (
            r.get("weight", 1.0),
            RowSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items() if k != "weight"}),
        )
        for r in stage["rows"]
    ]


class Run:
    """One training run: the model, its optimiser and the log."""

    new_tokens = 4  # of an answer, for generation_config.json

    def __init__(self, s: Settings, out: Path, init: Path | None):
        torch.manual_seed(s.seed)
        self.s, self.out, self.started = s, out, time.time()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = self.make_tokenizer()
        self.special = {k: self.tokenizer.token_to_id(v) for k, v in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
        self.model = Trainee(llama(s.vocab, **self.special, **s.model))
        if init:
            checkpoint.load(self.model, init)
        self.model.to(self.device)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64  # a few batch shapes, each compiled once
            self.model.block = torch.compile(block, dynamic=False)
        flat = [p for p in self.model.parameters() if p.dim() < 2]
        wide = [p for p in self.model.parameters() if p.dim() > 1]
        groups = [{"params": wide}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay, fused=self.device == "cuda"
        )
        self.step, self.curve, self.switches = 0, [], []

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return build_tokenizer()

    def stream(self, stage: dict, seed: str) -> IterableDataset:
        """A stage's endless batches."""
        return Stream(specs(stage), piece_ids(self.tokenizer), self.special, seed)

    def rate(self) -> float:
        """Learning rate: warm-up by steps, decay over the last share of the time."""
        s, left = self.s, 1 - self.seconds / (60 * self.s.minutes)
        return s.lr * min(1.0, (self.step + 1) / s.warmup) * min(1.0, max(0.02, left / s.decay))

    def train(self) -> None:
        """Go through the stages until the time is up."""
        saved = self.seconds
        for number in range(self.s.first_stage, len(self.s.stages)):
            stage, last = self.s.stages[number], number + 1 == len(self.s.stages)
            stream = self.stream(stage, f"{self.s.seed}-{number}-{self.step}")
            for batch in loader(stream, self.s.workers):
                report = self.update(batch)
                if self.seconds - saved > self.s.save_seconds:
                    self.save()
                    saved = self.seconds
                if self.seconds > 60 * self.s.minutes or self.step == self.s.steps:
                    return
                if report and not last and self.passed(report, stage):
                    self.switches.append({"stage": number + 1, "step": self.step, "seconds": round(self.seconds)})
                    print(f"-> stage {number + 1} at step {self.step}, {self.seconds:.0f} s", flush=True)
                    break

    def passed(self, report: dict, stage: dict) -> bool:
        """Whether the hardest figures (of rows without hints, where there are some) have reached the stage's mark."""
        prefix = "bare " if any(k.startswith("bare ") for k in report) else ""
        deepest = max((k for k in report if k.startswith(prefix + "link")), default=prefix + "question")
        return min(report.get(prefix + k, 0.0) for k in ("question", "second")) > stage["pass"] < report[deepest]

    def update(self, batch: dict) -> dict | None:
        """One optimiser step; returns its figures every `log_every` steps."""
        s = self.s
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        batch, loss, parts = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % s.log_every:
            return None
        report = accuracy(batch, parts["right"])
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(loss.item(), 4)}
        entry |= {"answer": round(parts["answer"].item(), 4), "gather": round(parts["gather"].item(), 4)}
        self.curve.append(entry | {k: round(v, 3) for k, v in report.items()})
        if self.step % (10 * s.log_every) == 0 or self.step <= 4 * s.log_every:
            shape = "x".join(map(str, batch["ids"].shape))
            figures = " ".join(f"{k}={v:.2f}" for k, v in report.items())
            line = f"step {self.step} {self.seconds:.0f}s {shape} loss {entry['loss']} gather {entry['gather']}"
            print(line, figures, flush=True)
        return report

    def backward(self, batch: dict) -> tuple[dict, torch.Tensor, dict]:
        """The gradients of one batch; the batch on the device, its loss, and the loss's parts."""
        s = self.s
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, parts = training_loss(self.model, batch, s.aux, s.schedule, s.gather, s.pointers)
        loss.backward()
        return batch, loss, parts

    def save(self, scores: dict | None = None) -> None:
        """Write the checkpoint and the log."""
        checkpoint.save(self.model, self.tokenizer, self.out, self.new_tokens)
        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        log = {"settings": vars(self.s), "seconds": round(self.seconds), "steps": self.step, "device": device}
        log |= {"torch": torch.__version__, "switches": self.switches, "scores": scores or {}}
        log["curve"] = self.curve[:: max(1, len(self.curve) // 200)]
        (self.out / "training.json").write_text(json.dumps(log, indent=None) + "\n")

    def evaluate(self) -> dict:
        """Scores on validation prompts, in bf16 as shipped."""
        s = self.s
        if not s.eval_prompts:
            return {}
        model = self.model.lm.eval()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return evaluate.table(model, self.tokenizer, "validation", 0, s.eval_prompts, list(s.eval_tokens))


def main(kind: type[Run] = Run, show: Callable[[dict], str] = evaluate.show, about: str | None = __doc__) -> None:
    """Command line for training a `kind` of run; `show` formats its scores."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="continue from this checkpoint, with a fresh optimiser")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    args = parser.parse_args()
    run = kind(settings(args.config, args.set), args.out, args.init)
    run.train()
    run.save()
    print(f"trained {run.step} steps in {run.seconds:.0f} s", flush=True)
    scores = run.evaluate()
    print(show(scores), flush=True)
    run.save(scores)
    print(f"done after {run.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    command(main)
