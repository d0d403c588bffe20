"""Statistics of sessions: shares by kind, their spread over turns, shifts, and hits of prefix caches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheslide.analysis.counting import TokenCounter
from cacheslide.analysis.kinds import KINDS, TurnKinds, session_kinds
from cacheslide.analysis.prefixes import PrefixCache
from cacheslide.analysis.session import Session

SERVED = ("cached", "on_top", "reordered_on_top")
QUANTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}


@dataclass(frozen=True)
class MeasuredTurn:
    """A prompt's tokens by kind, and the prefix length that a cache over all requests serves."""

    kinds: TurnKinds
    cached: int

    @property
    def record(self) -> dict[str, Any]:
        """Counts of this turn: tokens, tokens by kind, the cached prefix, and earlier text behind it."""
        behind = self.kinds.counts(self.cached)
        own = {"cached": self.cached, "on_top": behind["order_preserving"], "reordered_on_top": behind["reordered"]}
        return {"tokens": self.kinds.tokens, **self.kinds.counts(), **own}


def measure(sessions: Iterable[Session], counter: TokenCounter, min_tokens: int) -> list[list[MeasuredTurn]]:
    """All turns of the sessions. The cache over all requests sees one session after the other and evicts nothing."""
    cache, out = PrefixCache(), []
    for session in sessions:
        prompts = [counter.ids(turn) for turn in session.turns]
        served = [cache.serve(ids.tolist()) for ids in prompts]
        kinds = session_kinds(prompts, min_tokens)
        out.append([MeasuredTurn(k, max(k.prefix, n)) for k, n in zip(kinds, served, strict=True)])
    return out


def summary(sessions: Sequence[Sequence[MeasuredTurn]]) -> dict[str, Any]:
    """Sums and spreads over sessions.

    Returns
    -------
    dict
        `sessions`, `turns`, `prompt_tokens`; `tokens` by kind over all turns, with `cached` (served by a cache over all
        requests), `on_top` and `reordered_on_top` (earlier text behind that); `share`: by kind, the spread of each
        turn's share over turns that follow another; `shift` and `span_tokens`: spreads over order-preserving spans, in
        tokens; `moved`: the share of order-preserving tokens at another position than before; `prompt_length`.
    """
    turns = [turn for session in sessions for turn in session]
    records = [turn.record for turn in turns]
    later = [turn.record for session in sessions for turn in session[1:]]
    spans = [span for turn in turns for span in turn.kinds.spans if span.in_order]
    moved = sum(span.length for span in spans if span.shift)
    total = sum(span.length for span in spans)
    return {
        "sessions": len(sessions),
        "turns": len(turns),
        "prompt_tokens": sum(r["tokens"] for r in records),
        "tokens": {key: sum(r[key] for r in records) for key in (*KINDS, *SERVED)},
        "share": {key: spread(r[key] / r["tokens"] for r in later if r["tokens"]) for key in (*KINDS, "on_top")},
        "shift": spread(span.shift for span in spans),
        "span_tokens": spread(span.length for span in spans),
        "moved": moved / total if total else None,
        "prompt_length": spread(r["tokens"] for r in records),
    }


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Count, mean, extremes and quartiles; None without values."""
    numbers = np.array(list(values), dtype=float)
    if not len(numbers):
        return None
    ends = {name: float(np.quantile(numbers, q)) for name, q in QUANTILES.items()}
    return {"n": len(numbers), "mean": float(numbers.mean())} | ends
