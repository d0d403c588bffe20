"""Hostile request bodies in process: intake, vLLM's transport and the scheduler's planner, a million in minutes.

Counted as faults: exceptions other than validation errors (`non_400`), plans with wrong tokens, rows or tenants
(`wrong_plans`), and bodies whose check takes more processor time than `SLOW` allows (`slow_bodies`).
"""

import gc
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.robustness.annotations import Annotations

PROCESSES = 2
ROWS, LIMIT, LAYERS = 160, 256, 8
SLOW = 0.05, 0.005  # seconds, and seconds per kB
EXAMPLES = 8
_CHAT = [{"role": role, "content": "some words ."} for role in ("system", "user", "assistant", "user")]


@dataclass(frozen=True)
class Template:
    """The part of vLLM's chat parameters that the intake reads."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    return_assistant_tokens_mask: bool = False


class Renderer:
    """A cheap tokenizer and chat template: one token per character."""

    def __init__(self) -> None:
        self.tokenizer = self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3 + ord(c) % 500 for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + t % 26) for t in ids)

    def render_messages(self, messages: list[dict[str, str]], _) -> tuple[list, dict[str, Any]]:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return messages, {"prompt_token_ids": self.encode(text)}


class Trial:
    """Sends bodies through intake, transport and planner, one after another, and counts faults."""

    def __init__(self, seed: int) -> None:
        from cacheslide.vllm.geometry import Geometry
        from cacheslide.vllm.options import ServerOptions
        from cacheslide.vllm.scheduler.planner import Planner

        self.make = Annotations(seed, ROWS, ([7], "|", "##", "[7]"))
        random = self.make.random
        self.ids = [random.randrange(8, 1200) for _ in range(ROWS)]
        self.ids[50] = self.ids[110] = 7
        self.text = "You answer . | notes ## of today | a document ## that stays | question ?"
        self.extra, self.renderer = {"chunk_size": 16, "separator": "[7]", "span_tokens": 16}, Renderer()
        geometry = Geometry("m", "torch.float32", LAYERS, 6, 64, 384, 4, LIMIT)
        self.planner = Planner(ServerOptions.from_extra_config(self.extra), geometry)
        self.owners: dict[str, tuple[str, str]] = {}
        self.counts = dict.fromkeys(("bodies_tried", "refused", "planned", "non_400", "wrong_plans", "slow_bodies"), 0)
        self.examples: list[str] = []

    def one(self) -> None:
        """Send the next body."""
        import msgspec

        from cacheslide.vllm.frontend.intake import VLLMValidationError
        from cacheslide.vllm.frontend.misplaced import misplaced

        params, salt = self.make.params(), self.make.salt()
        prompt, ids = self._prompt(params)
        sampling = SimpleNamespace(extra_args={"kv_transfer_params": params}, prompt_logprobs=None)
        request = SimpleNamespace(prompt_token_ids=ids, mm_features=None, sampling_params=sampling, cache_salt=salt)
        begun = time.process_time()
        try:
            misplaced("/v1/completions", {"prompt": "x", "kv_transfer_params": params})
            self._admit(request, prompt)
            sent = msgspec.msgpack.decode(msgspec.msgpack.encode(sampling.extra_args))
            wrong = self._planned(request, sent["kv_transfer_params"], params, salt)
        except VLLMValidationError as refused:
            self.counts["refused"] += 1
            wrong = "" if _sayable(str(refused)) else "non_400: the reason cannot be sent"
        except Exception as error:
            wrong = f"non_400: {type(error).__name__}: {str(error)[:120]}"
        took = time.process_time() - begun
        if not wrong and took > SLOW[0] and took > SLOW[0] + SLOW[1] * len(json.dumps(params)) / 1024:
            wrong = f"slow_bodies: {took:.3f} s"
        self.counts["bodies_tried"] += 1
        if wrong:
            self.counts[wrong.split(":")[0]] += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(f"{wrong} | {ascii(params)[:300]}")

    def _admit(self, request, prompt) -> None:
        from cacheslide.vllm.frontend.admission import Limits, admit

        admit(request, prompt, self.renderer, self.extra, Limits(LIMIT, LAYERS))

    def _prompt(self, params: Any) -> tuple[dict[str, Any], list[int]]:
        from cacheslide.vllm.frontend.admission import CHAT

        annotations = params.get("cacheslide")
        if isinstance(annotations, dict) and "messages" in annotations:
            _, rendered = self.renderer.render_messages(_CHAT, None)
            return rendered | {CHAT: (_CHAT, Template())}, rendered["prompt_token_ids"]
        if isinstance(annotations, dict) and isinstance(annotations.get("separator"), str):
            ids = self.renderer.encode(self.text)
            return {"prompt": self.text, "prompt_token_ids": ids}, ids
        return {"prompt_token_ids": self.ids}, self.ids

    def _planned(self, request, params: Any, asked: Any, salt: str | None) -> str:
        """Description of an error in the scheduler's plan of the request; "" without one."""
        ids = request.prompt_token_ids
        tracked = self.planner.plan(
            SimpleNamespace(
                kv_transfer_params=params,
                sampling_params=request.sampling_params,
                prompt_token_ids=ids,
                num_prompt_tokens=len(ids),
                cache_salt=request.cache_salt,
                request_id="r",
                _block_hasher=None,
                skip_reading_prefix_cache=False,
            )
        )
        self.counts["planned"] += 1
        annotations = asked.get("cacheslide")
        if isinstance(annotations, dict) and "family" in annotations:
            return "wrong_plans: a family was let in"
        if tracked is None or tracked.plan is None:
            return ""
        if tracked.plan.prompt.token_ids != tuple(ids) or tracked.rows != len(ids) or len(ids) >= LIMIT:
            return f"wrong_plans: {tracked.rows} rows for a prompt of {len(ids)}"
        owner = (annotations.get("namespace", ""), salt or "")
        for key in tracked.plan.keys:
            if len(self.owners) < 200_000 and self.owners.setdefault(key, owner) != owner:
                return f"wrong_plans: {owner} has a chunk of {self.owners[key]}"
        return ""


def _sayable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return len(text) < 5000


def _tried(job: tuple[int, float]) -> tuple[dict[str, int], list[str]]:
    seed, seconds = job
    trial, until = Trial(seed), time.monotonic() + seconds
    gc.collect()
    gc.freeze()  # a collection over all objects of vLLM would count as a slow body
    while time.monotonic() < until:
        for _ in range(100):
            trial.one()
    return trial.counts, trial.examples


def run(minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """Send bodies for about `minutes` in `PROCESSES` processes; `faults` is the sum of all faults."""
    import cacheslide.vllm.frontend.intake  # noqa: F401 (vLLM, once, before the processes part)

    jobs = [(seed * PROCESSES + i, 60 * minutes) for i in range(PROCESSES)]
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        results = pool.map(_tried, jobs)
    counts = {name: sum(c[name] for c, _ in results) for name in results[0][0]}
    examples = [e for _, found in results for e in found][:EXAMPLES]
    faults = sum(counts[name] for name in ("non_400", "wrong_plans", "slow_bodies"))
    return {**counts, "examples": examples, "processes": PROCESSES, "minutes": minutes, "faults": faults}
