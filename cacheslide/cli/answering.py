"""One prompt answered by an engine of the reference host, timed, and its line beside recompute's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cacheslide.core.engine import Prefilled, ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore

WARM_UP = 64  # tokens of the untimed prefill that precedes the first timed one


@dataclass(frozen=True)
class Answer:
    """An answer, the seconds from prompt to first token (tokenization left out), and the completed prompt."""

    text: str
    ttft: float
    state: Prefilled

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable values; `ttft_ms` in milliseconds."""
        return {"text": self.text, "ttft_ms": round(1e3 * self.ttft, 3), "receipt": self.state.receipt.as_dict()}


def recomputing(engine: ReuseEngine) -> ReuseEngine:
    """An engine over the same model that reuses nothing."""
    return ReuseEngine(engine.model, load_policy("recompute"), MemoryChunkStore(), suffix_len=engine.suffix_len)


def warm_up(engine: ReuseEngine, prompt: Prompt) -> None:
    """A short prefill without reuse: the first one of a process pays for what all later ones share."""
    recomputing(engine).prefill(Prompt.from_spans(prompt.token_ids[:WARM_UP], reuse=[]))


def answer(engine: ReuseEngine, prompt: Prompt, tokenizer: Any, max_new_tokens: int, repeats: int = 1) -> Answer:
    """Prefill `prompt` `repeats` times (the median is the TTFT) and answer it greedily."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state = engine.prefill(prompt, room=max_new_tokens)
        state.logits.argmax().item()  # the first token; on a GPU this waits for it
        seconds.append(time.perf_counter() - start)
    stop = frozenset(i for i in [tokenizer.eos_token_id] if i is not None)
    ids = engine.generate(state, state.logits, max_new_tokens, stop)
    return Answer(tokenizer.decode(ids, skip_special_tokens=True), median(seconds), state)


def lines(answers: Sequence[dict[str, Any]]) -> list[str]:
    """A line an answer (`Answer.as_dict`): system, TTFT, and the compute of its prefill as a share of recompute's."""
    rows = [(a["receipt"]["system"], f"{a['ttft_ms']:.1f} ms", 100 * a["receipt"]["compute_fraction"]) for a in answers]
    name, ttft = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"{row[0]:{name}}  TTFT {row[1]:>{ttft}}  compute {row[2]:5.1f} %" for row in rows]


def reuse_line(receipt: dict[str, Any]) -> str:
    """What a prefill took from the store, or why it took nothing."""
    tokens, reused, corrected = (receipt[key] for key in ("tokens", "tokens_reused", "tokens_recomputed"))
    why = receipt["fallback"]
    if not receipt["chunks_hit"]:
        return f"nothing reused: {why or 'the prompt has no fixed segment, or the system reuses none'}"
    return (
        f"reused {reused} of {tokens} tokens ({receipt['chunks_hit']} of {receipt['chunks']} chunks, "
        f"{receipt['bytes_loaded'] / 2**20:.1f} MiB); recomputed {corrected} cached ones and "
        f"{tokens - reused - corrected} others" + (f"; {why}" if why else "")
    )
