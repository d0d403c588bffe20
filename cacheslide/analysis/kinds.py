"""Tokens of a session's prompts by kind: cached prefix, reusable in order, reusable out of order, new.

`prefix` is the longest common prefix with the session's previous prompt: what a plain prefix cache serves. Behind it, a
token occurred before where it lies in a run of at least `min_tokens` tokens that stands in an earlier prompt of the
session. Runs of one source whose order there is the order here are `order_preserving` (the heaviest such chain, no
source text twice, nothing from the source's own share of the prefix), whether they moved or not; other runs are
`reordered`; the rest is `new`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheslide.analysis.chain import heaviest_chain
from cacheslide.analysis.runs import EarlierPrompts, Run, common_length
from cacheslide.analysis.windows import window_names
from cacheslide.errors import DataError

MIN_TOKENS = 32
KINDS = ("prefix", "order_preserving", "reordered", "new")


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of a prompt that prompt `source` of the session holds `shift` tokens earlier.

    Where two runs overlap the first one has the tokens, so a span can be shorter than `min_tokens`.
    """

    start: int
    length: int
    source: int
    shift: int
    in_order: bool


@dataclass(frozen=True)
class TurnKinds:
    """One prompt: its tokens, those of its prefix, and the spans behind it in order."""

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
    """Split every prompt of a session by kind.

    Parameters
    ----------
    prompts : sequence of sequences of int
        Token ids (at least 0) of successive prompts.
    min_tokens : int
        Shortest run that counts as text that occurred before, at least 1.

    Raises
    ------
    DataError
        When `min_tokens` is below 1.
    """
    if min_tokens < 1:
        raise DataError(f"min_tokens must be at least 1, not {min_tokens}")
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    earlier = EarlierPrompts(window_names(ids, min_tokens))
    out = []
    for t, own in enumerate(ids):
        prefix = common_length(own, ids[t - 1]) if t else 0
        runs = earlier.runs(t, prefix)
        anchors = {q: min(prefix, common_length(own, ids[q])) for q in {run.source for run in runs}}
        out.append(TurnKinds(len(own), prefix, _spans(runs, anchors, min_tokens)))
        earlier.add(t)
    return out


def _spans(runs: list[Run], anchors: dict[int, int], min_tokens: int) -> tuple[Span, ...]:
    covered, pieces = 0, []
    for run in runs:
        start, end = max(run.start, covered), run.start + run.count + min_tokens - 1
        pieces.append((start, end - start))
        covered = end
    by_source: dict[int, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        if run.place >= anchors[run.source]:
            by_source[run.source].append(i)
    ordered = set()
    for members in by_source.values():
        chain = heaviest_chain([(runs[i].place, runs[i].place + runs[i].count, pieces[i][1]) for i in members])
        ordered |= {members[j] for j in chain}
    return tuple(
        Span(start, length, run.source, run.start - run.place, i in ordered)
        for i, (run, (start, length)) in enumerate(zip(runs, pieces, strict=True))
    )
