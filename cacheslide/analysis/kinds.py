"""Tokens of a session's prompts by kind: cached prefix, reusable in order, reusable out of order, new.

`prefix` is the longest common prefix with the session's previous prompt: what a plain prefix cache serves. Behind it,
a token occurred before if it lies in a run of at least `min_tokens` tokens of an earlier prompt of the session. Runs of
one source in the same order as there are `order_preserving`, moved or not (the heaviest such chain, no source text
twice, nothing from the source's own part of the prefix); other runs are `reordered`; the rest is `new`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cacheslide.analysis.chain import heaviest_chain
from cacheslide.analysis.runs import EarlierPrompts, Run, common_length
from cacheslide.analysis.windows import window_names
from cacheslide.errors import DataError

MIN_TOKENS = 32
KINDS = ("prefix", "order_preserving", "reordered", "new")


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of a prompt that occur `shift` tokens earlier in prompt `source` of the session.

    Overlapping runs are assigned to the first one, and runs are cut where only a part is in order, so a span can be
    shorter than `min_tokens`.
    """

    start: int
    length: int
    source: int
    shift: int
    in_order: bool

    @property
    def place(self) -> int:
        """Position of the first token in the source."""
        return self.start - self.shift


@dataclass(frozen=True)
class TurnKinds:
    """One prompt: its number of tokens, its prefix length, and the spans behind the prefix in order."""

    tokens: int
    prefix: int
    spans: tuple[Span, ...]

    def counts(self, behind: int = 0) -> dict[str, int]:
        """Tokens by kind at positions from `behind` on."""
        out = dict.fromkeys(KINDS, 0)
        out["prefix"] = max(0, self.prefix - behind)
        for span in self.spans:
            kind = "order_preserving" if span.in_order else "reordered"
            out[kind] += max(0, span.start + span.length - max(span.start, behind))
        out["new"] = max(0, self.tokens - behind) - sum(out.values())
        return out


def session_kinds(prompts: Sequence[Sequence[int]], min_tokens: int = MIN_TOKENS) -> list[TurnKinds]:
    """Split every prompt of a session into kinds.

    Parameters
    ----------
    prompts : sequence of sequences of int
        Token ids (at least 0) of successive prompts.
    min_tokens : int
        Minimum length of a run that counts as text that occurred before, at least 1.

    Raises
    ------
    DataError
        If `min_tokens` is below 1.
    """
    if min_tokens < 1:
        raise DataError(f"min_tokens must be at least 1, not {min_tokens}")
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    earlier = EarlierPrompts(window_names(ids, min_tokens))
    out = []
    for t, own in enumerate(ids):
        prefix = common_length(own, ids[t - 1]) if t else 0
        runs = earlier.runs(t, prefix)
        shared = {q: min(prefix, common_length(own, ids[q])) for q in {run.source for run in runs}}
        out.append(TurnKinds(len(own), prefix, _spans(runs, shared, min_tokens)))
        earlier.add(t)
    return out


def _spans(runs: list[Run], shared: dict[int, int], min_tokens: int) -> tuple[Span, ...]:
    """The runs as spans with their order; `shared` maps each source to its tokens in the cached prefix.

    Spans are cut where others begin or end in their source, and at the end of its cached prefix: when only one part of
    a run was used before, only that part counts as a second copy.
    """
    spans, covered = [], 0
    for run in runs:
        start, end = max(run.start, covered), run.start + run.count + min_tokens - 1
        spans.append(Span(start, end - start, run.source, run.start - run.place, False))
        covered = end
    out: list[Span] = []
    for q, n in shared.items():
        pieces = _cut([span for span in spans if span.source == q], n)
        behind = [piece for piece in pieces if piece.place >= n]
        chain = heaviest_chain([(piece.place, piece.place + piece.length, piece.length) for piece in behind])
        ordered = {behind[i].start for i in chain}
        out += [replace(piece, in_order=piece.start in ordered) for piece in pieces]
    return tuple(_joined(sorted(out, key=lambda span: span.start)))


def _cut(spans: list[Span], prefix: int) -> list[Span]:
    """The spans of one source, in order, cut at `prefix` and wherever another of them begins or ends there."""
    cuts = sorted({prefix} | {end for span in spans for end in (span.place, span.place + span.length)})
    return [
        replace(span, start=at + span.shift, length=end - at)
        for span in spans
        for inside in [cuts[bisect_right(cuts, span.place) : bisect_left(cuts, span.place + span.length)]]
        for at, end in pairwise([span.place, *inside, span.place + span.length])
    ]


def _joined(spans: list[Span]) -> list[Span]:
    """Adjacent spans that continue each other, merged."""
    out: list[Span] = []
    for span in spans:
        last = out[-1] if out else None
        if (
            last
            and replace(last, start=span.start, length=span.length) == span
            and last.start + last.length == span.start
        ):
            out[-1] = replace(last, length=last.length + span.length)
        else:
            out.append(span)
    return out
