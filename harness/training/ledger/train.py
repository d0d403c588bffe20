"""Train the ledger model: `python -m harness.training.ledger.train --config config/training-ledger.yaml --out DIR`.

Time-boxed and seeded, with a curriculum whose stages end at a share of right answers. DIR holds a model to serve,
written every `save_seconds`, and the run's state: the same command with `--resume` continues, for the remaining time.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from cacheslide.errors import ConfigError
from harness.step import command
from harness.training.ledger import checkpoint
from harness.training.ledger.data import Stream
from harness.training.ledger.evaluate import words_right
from harness.training.ledger.losses import Plan, training_loss
from harness.training.ledger.model import LedgerModel
from harness.training.ledger.settings import Settings, read_settings
from harness.training.ledger.tokens import ledger_tokenizer


class Run:
    """One training run: the model, its optimiser and the log."""

    def __init__(self, s: Settings, out: Path, resume: bool = False) -> None:
        torch.manual_seed(s.seed)
        self.s, self.out = s, out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LedgerModel(s.size()).to(self.device)
        self.plan = Plan.of(self.model.size.layers)
        wide = [p for p in self.model.parameters() if p.dim() > 1]
        flat = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": wide}, {"params": flat, "weight_decay": 0.0}]
        fused = {"fused": True} if self.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(groups, s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay, **fused)
        self.step, self.stage, self.tokens, self.spent = 0, 0, 0, 0.0
        self.curve: list[dict] = []
        self.switches: list[dict] = []
        if resume:
            self._resume()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64  # a few batch shapes, each compiled once
            self.model.compile()
        self.started = time.monotonic() - self.spent

    def _resume(self) -> None:
        if not (self.out / checkpoint.STATE).is_file():
            raise ConfigError(f"nothing to resume in {self.out}: {checkpoint.STATE} is missing")
        kept = checkpoint.load_state(self.model, self.optimizer, self.out)
        if "run" not in kept:
            raise ConfigError(f"{self.out / checkpoint.STATE} does not say how far its run was")
        told = json.loads(kept["run"])
        self.step, self.stage, self.tokens, self.spent = (told[k] for k in ("step", "stage", "tokens", "seconds"))
        self.curve, self.switches = told["curve"], told["switches"]
        if self.stage >= len(self.s.stages):
            raise ConfigError(f"the run in {self.out} is at stage {self.stage} of a configuration with more stages")

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before a resumption."""
        return time.monotonic() - self.started

    def rate(self) -> float:
        """Learning rate: warm-up by steps, decay over the last share of the time."""
        s, left = self.s, 1 - self.seconds / self.s.seconds
        return s.lr * min(1.0, (self.step + 1) / s.warmup) * min(1.0, max(0.02, left / s.decay))

    def over(self) -> bool:
        """Whether time or steps are up."""
        return self.seconds > self.s.seconds or (self.s.steps is not None and self.step >= self.s.steps)

    def train(self) -> None:
        """Go through the stages until the time is up."""
        saved = self.seconds
        while not self.over():
            last = self.stage + 1 == len(self.s.stages)
            for batch in self._batches():
                report = self.update(batch)
                if self.seconds - saved > self.s.save_seconds:
                    self.save()
                    saved = self.seconds
                if self.over():
                    return
                if report and not last and self.passed(report):
                    self.stage += 1
                    told = {"stage": self.stage, "step": self.step, "seconds": round(self.seconds)}
                    self.switches.append(told | {"tokens": self.tokens})
                    print(f"-> stage {self.stage} at step {self.step}, {self.seconds:.0f} s", flush=True)
                    break

    def passed(self, report: dict) -> bool:
        """Whether the stage ends, by its share of right answers or by the clock."""
        stage = self.s.stages[self.stage]
        return report["answer"] > stage["pass"] or self.seconds > stage.get("by", 1.0) * self.s.seconds

    def _batches(self) -> DataLoader:
        s = self.s
        stream = Stream(s.specs(self.stage), self.model.size.vocab, f"{s.seed}-{self.stage}-{self.step}", s.again)
        extra = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if s.workers else {}
        return DataLoader(stream, batch_size=None, num_workers=s.workers, pin_memory=self.device == "cuda", **extra)

    def update(self, batch: dict) -> dict | None:
        """One optimiser step; every `log_every` steps the shares that are right."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, right = training_loss(self.model, batch, self.plan, self.s.pointers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += batch["ids"].numel()
        if self.step % self.s.log_every:
            return None
        report = {k: (hits / n.clamp_min(1)).item() for k, (hits, n) in right.items() if n}
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "tokens": self.tokens, "loss": loss.item()}
        self.curve.append({k: round(v, 4) for k, v in (entry | report).items()})
        if self.step % (4 * self.s.log_every) == 0:
            shape = "x".join(map(str, batch["ids"].shape))
            figures = " ".join(f"{k}={v:.2f}" for k, v in report.items())
            print(f"step {self.step} {self.seconds:.0f}s {shape} loss {loss.item():.3f} {figures}", flush=True)
        return report

    def save(self, scores: dict | None = None) -> None:
        """Write the model, the state and the log."""
        checkpoint.export(self.model, ledger_tokenizer()[0], self.out)
        told = {"step": self.step, "stage": self.stage, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        kept = told | {"curve": self.curve, "switches": self.switches}
        if self.s.state:
            checkpoint.save_state(self.model, self.optimizer, self.out, {"run": json.dumps(kept)})
        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        log = {"settings": vars(self.s), **told, "device": device, "torch": torch.__version__}
        log |= {"switches": self.switches, "scores": scores or {}}
        log["curve"] = self.curve[:: max(1, len(self.curve) // 150)]
        (self.out / "training.json").write_text(json.dumps(log) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="of training, in place of the configuration's")
    parser.add_argument("--seed", type=int, help="in place of the configuration's")
    parser.add_argument("--resume", action="store_true", help="go on from what is in OUT")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    args = parser.parse_args(argv)
    given = {k: v for k, v in (("seconds", args.seconds), ("seed", args.seed)) if v is not None}
    settings = read_settings(args.config, [*args.set, *(f"{k}={v}" for k, v in given.items())])
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(settings, args.out, args.resume)
    run.train()
    run.save()
    print(f"trained {run.step} steps, {run.tokens / 1e6:.1f}M tokens in {run.seconds:.0f} s", flush=True)
    scores = {n: words_right(run.model, n, settings.eval_prompts) for n in settings.eval_tokens}
    for tokens, told in scores.items():
        print(f"{tokens} tokens: {told['right']:.3f} of {told['n']} words right, by depth {told['depth']}", flush=True)
    run.save(scores)


if __name__ == "__main__":
    command(main)
