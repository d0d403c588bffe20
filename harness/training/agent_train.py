"""Train the agents' model: `python -m harness.training.agent_train --config config/training-agents.yaml --out DIR`.

The method is that of `harness.training.train` (hints, deep supervision, a curriculum ended by accuracy, a time box);
the rows are prompts of the agents' loops with the oracles' outputs. Before the time is up the model is scored on
validation tasks, in real loops over its current weights on this device (SWE-Agent on files in memory).
"""

from functools import partial

import torch
from tokenizers import Tokenizer

from harness.step import command
from harness.training import train
from harness.training.agent_data import AgentStream, sources
from harness.training.agent_evaluate import exact, show, success
from harness.training.agent_tasks import Difficulty
from harness.training.agent_words import agent_tokenizer
from harness.training.losses import accuracy


class AgentRun(train.Run):
    """A training run over the agents' rows. Each optimiser step adds up the losses of a batch's parts."""

    new_tokens = 48

    def make_tokenizer(self) -> Tokenizer:
        return agent_tokenizer()

    def stream(self, stage: dict, seed: str) -> AgentStream:
        return AgentStream(sources(stage, self.s.depth), self.tokenizer, self.special["pad"], seed)

    def backward(self, batch: list) -> tuple[dict, torch.Tensor, dict]:
        done = [super(AgentRun, self).backward(part) for part in batch]
        fields = ("kind", "depth", "bare")
        joined = {k: torch.cat([part[k] for part, _, _ in done]) for k in fields}
        joined["ids"] = done[0][0]["ids"]
        parts = {k: sum(p[k] for _, _, p in done) for k in ("answer", "gather")}
        parts["right"] = torch.cat([p["right"] for _, _, p in done])
        if (self.step + 1) % self.s.log_every == 0:  # accuracy per part
            each = [accuracy(part, p["right"]).get("output", 0.0) for part, _, p in done]
            self.outputs = {f"output{i}": x for i, x in enumerate(each)}
        return joined, sum(loss.detach() for _, loss, _ in done), parts

    def update(self, batch: list) -> dict | None:
        report = super().update(batch)
        if report:
            self.curve[-1] |= {k: round(v, 4) for k, v in self.outputs.items()}
            if self.step % (10 * self.s.log_every) == 0:
                print("   ", " ".join(f"{k}={v:.3f}" for k, v in self.outputs.items()), flush=True)
        return report

    def passed(self, report: dict, stage: dict) -> bool:
        """Whether questions and the deepest links without hints have reached the stage's mark, or its time is up.

        `until` is a share of the run's time, at which a stage ends whatever its scores.
        """
        if self.seconds > 60 * self.s.minutes * stage.get("until", 1.0):
            return True
        prefix = "bare " if any(k.startswith("bare question") for k in report) else ""
        deepest = max((k for k in report if k.startswith(prefix + "link")), default=prefix + "question")
        return min(report.get(prefix + "question", 0.0), report[deepest]) > stage["pass"]

    def evaluate(self) -> dict:
        if not self.s.eval_prompts:
            return {}
        out = self.exact(2 * self.s.eval_prompts)
        return out | success(self.model, self.tokenizer, "validation", 0, self.s.eval_prompts, self.s.depth)

    def exact(self, prompts: int) -> dict:
        """Teacher-forced scores on validation rows, printed."""
        how = Difficulty(depth=min(self.s.depth, Difficulty.depth))
        out = exact(self.model, self.tokenizer, "validation", 0, prompts, how)
        print(show(out), flush=True)
        return out

    def save(self, scores: dict | None = None) -> None:
        super().save(scores)
        if scores is None and self.s.eval_prompts:
            self.exact(8)


if __name__ == "__main__":
    command(partial(train.main, AgentRun, show, __doc__))
