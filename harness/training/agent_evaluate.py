"""Closed-loop success of a model in training: many episodes at once, their requests answered in batches.

The loops are the real ones (`harness.agents.loop`); SWE-Agent works on files in memory. These scores steer
training; reported figures come from the engine and, for SWE-Agent, the sandbox (`harness.experiments.agents.success`).
"""

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from random import Random
from threading import Thread

import torch
from tokenizers import Tokenizer

from harness.agents.completer import Completion, Request
from harness.agents.dry import DrySWEAgent
from harness.agents.loop import Episode, Stops, run_episode
from harness.agents.oracle import NoContext
from harness.agents.registry import AGENTS
from harness.training.agent_rows import STATES, Encoder, RowsOf, rows
from harness.training.agent_tasks import Difficulty
from harness.training.data import OUTPUT, collate
from harness.training.model import Trainee, block

BLOCK = 64


class Batched:
    """A completer over a model in training. Waiting requests are answered in one batch, greedily.

    Nothing is cached: every new token is a pass over the whole batch, which is faster on a GPU than single requests of
    a small model.
    """

    def __init__(self, model: Trainee, tokenizer: Tokenizer) -> None:
        self.system, self.model, self.tokenizer = "recompute", model, tokenizer
        self.ends = {tokenizer.token_to_id("</s>"), *tokenizer.encode("\n", add_special_tokens=False).ids}
        self.device = next(model.parameters()).device
        self.waiting: queue.Queue = queue.Queue()
        self.thread = Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the answering thread."""
        self.waiting.put(None)
        self.thread.join()

    def complete(self, request: Request) -> Completion:
        """The greedy continuation."""
        begin, answer = time.perf_counter(), Future()
        ids = self.tokenizer.encode(request.text).ids
        self.waiting.put((ids, request.max_tokens, answer))
        out = answer.result()
        text = self.tokenizer.decode(out)
        seconds = time.perf_counter() - begin
        return Completion(text, None, tuple(out), (seconds,), seconds)

    def _serve(self) -> None:
        while (first := self.waiting.get()) is not None:
            time.sleep(0.03)  # lets the other episodes' requests arrive
            batch = [first]
            while not self.waiting.empty() and len(batch) < 256:
                batch.append(self.waiting.get())
            closed = None in batch
            batch = [b for b in batch if b is not None]
            try:
                for (_, _, answer), out in zip(batch, self._answers(batch), strict=True):
                    answer.set_result(out)
            except Exception as wrong:
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(wrong)
            if closed:
                return

    @torch.no_grad()
    def _answers(self, batch: list) -> list[list[int]]:
        prompts, room = [list(ids) for ids, _, _ in batch], max(m for _, m, _ in batch)
        out: list[list[int]] = [[] for _ in batch]
        going = list(range(len(batch)))
        while going and len(out[going[0]]) < room:
            length = max(len(prompts[i]) for i in going)
            length += -length % BLOCK
            ids = torch.tensor([prompts[i] + [0] * (length - len(prompts[i])) for i in going], device=self.device)
            last = torch.tensor([n * length + len(prompts[i]) - 1 for n, i in enumerate(going)], device=self.device)
            none = ids.new_zeros(0)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                states, _ = self.model(ids, none, none.bool(), none.float(), last)
                tokens = self.model.logits(states[-1]).argmax(-1).tolist()
            still = []
            for i, token in zip(going, tokens, strict=True):
                if token in self.ends or len(out[i]) >= batch[i][1]:
                    continue
                out[i].append(token)
                prompts[i].append(token)
                still.append(i)
            going = still
        return out


def episodes(completer, name: str, split: str, seed: int, count: int, **options) -> list[Episode]:
    """One episode per task, all concurrent."""

    def one(task) -> Episode:
        with closing(DrySWEAgent(task) if name == "swe_agent" else AGENTS[name].agent(task)) as agent:
            return run_episode(agent, completer, Stops(turns=60))

    with ThreadPoolExecutor(max(1, count)) as pool:
        return list(pool.map(one, AGENTS[name].tasks(split, seed, count, **options)))


HARDER = {"reflexion": {"questions": 12}, "memgpt": {"turns": 12}, "swe_agent": {}, "function_calling": {"jobs": 3}}


def success(model: Trainee, tokenizer: Tokenizer, split: str, seed: int, count: int, depth: int) -> dict:
    """Success and mean score by agent: on the measured tasks, on longer episodes and prompts, and without context."""
    compiled, model.block = model.block, block  # shapes differ every time
    completer, out = Batched(model, tokenizer), {}
    try:
        for name in AGENTS:
            chains = {"depth": depth} if name in STATES else {}
            cases = {"": chains, "longer": chains | HARDER[name]}
            if name in STATES:
                cases["1k"] = chains | {"tokens": 1024}
            for case, options in cases.items():
                out[f"{name} {case}".strip()] = _row(episodes(completer, name, split, seed, count, **options))
            out[f"{name} no context"] = _row(episodes(NoContext(completer), name, split, seed, count, **chains))
        return out
    finally:
        model.block = compiled
        completer.close()


@torch.no_grad()
def exact(model: Trainee, tokenizer: Tokenizer, split: str, seed: int, count: int, how: Difficulty) -> dict:
    """Teacher-forced share of the oracles' outputs whose every token is the model's argmax."""
    compiled, model.block = model.block, block
    device, encoder, out = next(model.parameters()).device, Encoder(tokenizer), {}
    for name in AGENTS:
        source = rows(
            Random(f"exact-{name}-{split}-{seed}"), RowsOf({name: 1}, 1600, 1, how, slips=0.0), encoder, split
        )
        right = []
        for row in (next(source) for _ in range(count)):
            batch = {k: v.to(device) for k, v in collate([row], len(row.ids), 0).items()}
            none = batch["scratch"].new_zeros(0)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                states, _ = model(batch["ids"], none, none.bool(), none.float(), batch["pos"])
                hit = model.logits(states[-1]).argmax(-1) == batch["y1"]
            told = zip(batch["pos"].tolist(), hit.tolist(), batch["kind"].tolist(), strict=True)
            said = [(p, h) for p, h, k in told if k == OUTPUT]
            for n, (position, good) in enumerate(said):
                if n and said[n - 1][0] == position - 1:
                    right[-1] &= good
                else:
                    right.append(good)
        out[f"{name} teacher-forced"] = {"exact": sum(right) / len(right), "n": len(right)}
    model.block = compiled
    return out


def _row(done: list[Episode]) -> dict:
    stops: dict[str, int] = {}
    for e in done:
        stops[e.stop] = stops.get(e.stop, 0) + 1
    return {
        "success": sum(e.success for e in done) / len(done),
        "score": round(sum(e.score for e in done) / len(done), 4),
        "n": len(done),
        "stops": stops,
        "failed_steps": sum(len(e.failures) for e in done),
    }


def show(scores: dict) -> str:
    """The scores as lines of text."""
    return "\n".join(f"{name:30s} " + " ".join(f"{k} {_short(v)}" for k, v in s.items()) for name, s in scores.items())


def _short(value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
