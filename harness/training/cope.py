"""Train a CoPE adapter for the small model: `python -m harness.training.cope --config FILE --model DIR --out DIR`.

Continued pretraining on the task's prompts with the backbone frozen. First every layer learns, from the native stack's
layer inputs, to reproduce the native output; then the inputs fade over to the outputs of the preceding layers, and the
whole stack learns to match the native states and to answer. On CUDA, forward and backward use the fused kernel.
Time-boxed: it stops by the clock, writes the adapter and its state every minute, and continues with `--resume`.
"""

import argparse
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from cacheslide.errors import ConfigError
from cacheslide.models.weights import fingerprint
from cacheslide.training.adapter import AdapterSettings, load_adapter, save_adapter
from cacheslide.training.attach import CopeStack
from harness.inventory import read_config
from harness.step import command
from harness.training import evaluate
from harness.training.data import Stream, loader
from harness.training.losses import SHARE
from harness.training.tokenizer import BOS, EOS, PAD, piece_ids
from harness.training.train import specs

LABELLED = 10.0  # weight of a labelled position in the distance to the native states; other tokens have 1


@dataclass(frozen=True)
class CopeSettings:
    """Settings of a run. `rows` are lists of RowSpec with weights, as in a training stage.

    `local` is the share of the time in which layers learn one by one, `fade` the share of the rest in which their
    inputs fade over, `follow` the weight of the distance to the native states in that rest, `joint` the factor of its
    learning rates.
    """

    rows: list[dict]
    adapter: dict
    seed: int = 0
    minutes: float = 6.0
    steps: int | None = None
    lr: float = 2e-3
    table_lr: float = 1e-2
    warmup: int = 50
    decay: float = 0.35
    local: float = 0.6
    fade: float = 0.4
    follow: float = 1.0
    joint: float = 0.3
    workers: int = 14
    log_every: int = 20
    save_seconds: float = 60.0
    checkpointing: bool = False
    eval_prompts: int = 16
    eval_tokens: tuple[int, ...] = (1024,)


def settings(path: Path, changes: list[str]) -> CopeSettings:
    """Read a YAML file; `changes` are key=value strings that override it."""
    raw = read_config(path)
    raw.update({k: yaml.safe_load(v) for k, v in (c.split("=", 1) for c in changes)})
    if unknown := set(raw) - {f.name for f in fields(CopeSettings)}:
        raise ConfigError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
    return CopeSettings(**raw)


def layer_inputs(model, hidden: Tensor, given: list[Tensor] | None = None, own: float = 1.0) -> list[Tensor]:
    """Hidden states [batch, length, width] before every layer and after the last, without the final norm.

    With `given`, layer i's input is own * (output of layer i - 1) + (1 - own) * given[i].
    """
    body, states = model.model, [hidden]
    at = torch.arange(hidden.shape[1], device=hidden.device)[None]
    angles = body.rotary_emb(hidden, at)
    for i, layer in enumerate(body.layers):
        x = states[-1]
        if given is not None and own < 1:
            x = given[i] + own * (x - given[i]) if own else given[i]
        states.append(layer(x, attention_mask=None, position_ids=at, position_embeddings=angles))
    return states


def distances(mine: list[Tensor], native: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Per layer ||mine - native||² over ||the layer's change||², weighted over tokens [batch, length]."""
    out = []
    for i in range(1, len(native)):
        error = (mine[i].float() - native[i].float()).square().sum(-1)
        change = (native[i].float() - native[i - 1].float()).square().sum(-1)
        out.append((error * weight).sum() / (change * weight).sum().clamp_min(1e-9))
    return out


def answer_loss(model, last: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy at the labels, weighted by kind as in the base model's training, and which are right."""
    logits = model.lm_head(model.model.norm(last.flatten(0, 1)[batch["pos"]])).float()
    weight = torch.zeros_like(batch["kind"], dtype=torch.float32)
    for kind, share in SHARE.items():
        of_kind = batch["kind"] == kind
        weight = weight + of_kind * (share / of_kind.sum().clamp_min(1))
    loss = F.cross_entropy(logits, batch["y1"], reduction="none")
    return (loss * weight).sum(), logits.argmax(-1) == batch["y1"]


class CopeRun:
    """One run: the two-stack model, the optimiser and the log."""

    def __init__(self, s: CopeSettings, base: Path, out: Path, resume: bool = False) -> None:
        torch.manual_seed(s.seed)
        self.s, self.base, self.out, self.spent = s, base, out, 0.0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
        self.tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.special = {k: self.tokenizer.token_to_id(v) for k, v in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
        self.model = model.to(self.device)
        self.stack = CopeStack(self.model, AdapterSettings(**s.adapter))
        if s.checkpointing:
            newer = getattr(self.model, "activation_checkpointing_enable", None)  # the other name is deprecated
            (newer or self.model.gradient_checkpointing_enable)()
        self.base_hash = fingerprint(base)
        named = self.stack.named()
        tables = [p for n, p in named.items() if n.endswith(".positions")]
        factors = [p for n, p in named.items() if not n.endswith(".positions")]
        groups = [{"params": factors, "rate": s.lr}, {"params": tables, "rate": s.table_lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.curve, self.dtype = 0, [], torch.float32
        if resume:
            self._resume()
        self.started = time.time()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including earlier parts of a resumed run."""
        return self.spent + time.time() - self.started

    @property
    def share(self) -> float:
        """Elapsed share of the run: by the clock, or by steps where those are limited."""
        by_steps = self.step / self.s.steps if self.s.steps else 0.0
        return max(by_steps, self.seconds / (60 * self.s.minutes))

    def train(self) -> None:
        """Train until the time is up."""
        s, saved = self.s, self.seconds
        stream = Stream(specs({"rows": s.rows}), piece_ids(self.tokenizer), self.special, f"cope-{s.seed}-{self.step}")
        self.model.train()
        for batch in loader(stream, s.workers):
            if self.share >= 1:
                break
            self.update({k: v.to(self.device, non_blocking=True) for k, v in batch.items()})
            if self.seconds - saved > s.save_seconds:
                self.save()
                saved = self.seconds
        self.model.eval()

    def schedule(self) -> tuple[bool, float, float]:
        """Whether layers learn one by one, the weight of their own inputs, and the learning rates' factor.

        Both halves end with low rates: the first, so that the second starts from layers that have settled.
        """
        s, share = self.s, self.share
        warm = min(1.0, (self.step + 1) / s.warmup)
        if share < s.local:
            return True, 0.0, warm * min(1.0, max(0.1, (1 - share / s.local) / s.decay))
        done = (share - s.local) / max(1e-9, 1 - s.local)
        own = min(1.0, done / s.fade) if s.fade else 1.0
        return False, own, s.joint * warm * min(1.0, max(0.02, (1 - done) / s.decay))

    def update(self, batch: dict[str, Tensor]) -> None:
        """One optimiser step."""
        s, ids = self.s, batch["ids"]
        weight = (ids != self.special["pad"]).float()
        weight.view(-1)[batch["pos"]] = LABELLED
        local, own, factor = self.schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            hidden = self.model.model.embed_tokens(ids)
            with torch.no_grad(), self.stack.off():
                native = layer_inputs(self.model, hidden)
            mine = layer_inputs(self.model, hidden, native, own)
            apart = distances(mine, native, weight)
            loss, right = sum(apart), None
            if not local:
                answer, right = answer_loss(self.model, mine[-1], batch)
                loss = own * answer + s.follow * loss / len(apart)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.stack.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % s.log_every == 0 or self.step == 1:
            self._log(local, loss, apart, right, batch)

    def _log(self, local: bool, loss: Tensor, apart: list[Tensor], right: Tensor | None, batch: dict) -> None:
        entry: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 1), "local": local}
        entry |= {"loss": round(loss.item(), 4), "apart": [round(x.item(), 4) for x in apart]}
        if right is not None:
            for name, kind in (("link", 1), ("question", 2), ("second", 3)):
                of_kind = batch["kind"] == kind
                entry[name] = round(right[of_kind].float().mean().item(), 4)
        self.curve.append(entry)
        print(json.dumps(entry), flush=True)

    def finish(self) -> None:
        """Round the trained weights to bfloat16, so that the scores are those of the shipped adapter."""
        with torch.no_grad():
            for parameter in self.stack.parameters():
                parameter.copy_(parameter.bfloat16())
        self.dtype = torch.bfloat16

    def save(self, scores: dict | None = None) -> None:
        """Write the adapter, the optimiser's state and the log."""
        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        notes = {"steps": self.step, "seconds": round(self.seconds, 1), "device": device, "torch": torch.__version__}
        save_adapter(self.stack.adapter(self.base_hash, notes, self.dtype), self.out)
        state = {}
        for name, parameter in self.stack.named().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value.detach().cpu().clone()
        save_file(state, self.out / "optimizer.safetensors")
        log = {"settings": vars(self.s), **notes, "curve": self.curve, "scores": scores or {}}
        (self.out / "training.json").write_text(json.dumps(log) + "\n")

    def _resume(self) -> None:
        adapter = load_adapter(self.out, self.base)
        self.stack.load(adapter)
        state = load_file(self.out / "optimizer.safetensors")
        for name, parameter in self.stack.named().items():
            found = {k.split("/")[1]: v for k, v in state.items() if k.startswith(f"{name}/")}
            self.optimizer.state[parameter] = {
                k: v.clone() if k == "step" else v.to(parameter.device) for k, v in found.items()
            }
        log = json.loads((self.out / "training.json").read_text())
        self.step, self.spent, self.curve = log["steps"], float(log["seconds"]), log["curve"]

    def evaluate(self, split: str = "validation") -> dict[str, Any]:
        """Recompute scores of both stacks on held-out prompts, and the adapter's gap in F1 points by cell."""
        s = self.s
        given = (self.model, self.tokenizer, split, 0, s.eval_prompts, list(s.eval_tokens))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            adapted = evaluate.table(*given)
            with self.stack.off():
                native = evaluate.table(*given)
        cells = [c for c in native if "no context" not in c]
        gap = {c: 100 * (native[c]["f1"] - adapted[c]["f1"]) for c in cells}
        mean = sum(gap.values()) / len(gap)
        return {"split": split, "native": native, "cope": adapted, "gap_points": gap, "adapter_f1_gap_points": mean}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    args = parser.parse_args()
    run = CopeRun(settings(args.config, args.set), args.model, args.out, args.resume)
    run.train()
    run.finish()
    run.save()
    print(f"trained {run.step} steps in {run.seconds:.0f} s", flush=True)
    if run.s.eval_prompts:
        scores = run.evaluate()
        print(evaluate.show(scores["cope"]), f"\ngap {scores['adapter_f1_gap_points']:.2f} points", flush=True)
        run.save(scores)


if __name__ == "__main__":
    command(main)
