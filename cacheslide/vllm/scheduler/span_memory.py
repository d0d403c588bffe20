"""Finds text shared with earlier prompts without annotations: content-defined spans, matched in order.

A prompt is cut where a rolling hash over its last tokens decides, so that an insertion moves the cuts around it but not
those behind it. Matches keep the order of the earlier prompt, as RPDC (section 3) requires.
"""

import hashlib
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

_WINDOW = 8  # tokens that decide a cut
_RECENT = 8  # earlier prompts compared for one span
_NOWHERE: OrderedDict[int, None] = OrderedDict()


def content_cuts(token_ids: Sequence[int], least: int, average: int, most: int) -> list[tuple[int, int]]:
    """Half-open spans that cover `token_ids`, each of `least` to `most` tokens (the last one may be shorter)."""
    cuts = _cuts(token_ids, max(1, average - least))
    spans, start, total = [], 0, len(token_ids)
    while start < total:
        end = min(start + most, total)
        first = bisect_left(cuts, start + least)
        if first < len(cuts) and cuts[first] < end:
            end = cuts[first]
        spans.append((start, end))
        start = end
    return spans


def _cuts(token_ids: Sequence[int], rate: int) -> list[int]:
    """Rows before which to cut, on average one in `rate`."""
    x = np.asarray(token_ids, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    rolled = np.zeros(max(0, len(x) - _WINDOW + 1), dtype=np.uint64)
    for i in range(_WINDOW):
        rolled = rolled * np.uint64(0x100000001B3) + x[i : i + len(rolled)]
    rolled ^= rolled >> np.uint64(32)
    return (np.flatnonzero(rolled % np.uint64(rate) == 0) + _WINDOW).tolist()


@dataclass
class _Seen:
    """The spans of an earlier prompt, in order, and which of them were fixed text."""

    tenant: str
    spans: list[bytes]
    fixed: frozenset[int]


class SpanMemory:
    """Remembers hashes of the spans of prompts, the latest `known` spans.

    Parameters
    ----------
    tokens : int
        Average tokens of a span; spans have between a quarter and four times as many.
    known : int
        Spans remembered over all prompts and tenants; the least recently seen prompts are dropped first.
    """

    def __init__(self, tokens: int, known: int) -> None:
        self.sizes, self.known, self.held = (max(1, tokens // 4), tokens, 4 * tokens), known, 0
        self._prompts: OrderedDict[int, _Seen] = OrderedDict()
        self._where: dict[tuple[str, bytes], OrderedDict[int, None]] = {}
        self._next = 0

    def match(self, tenant: str, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Spans of `token_ids` shared with an earlier prompt of `tenant`, in its order; adds the prompt."""
        cuts = content_cuts(token_ids, *self.sizes)
        names = [_name(token_ids[a:b]) for a, b in cuts]
        best = self._most_alike(tenant, names, cuts)
        fixed: list[int] = []
        if best is not None:
            seen = self._prompts[best]
            pairs = _in_order(names, seen.spans)
            fixed = _fixed(pairs, seen.fixed)
            self._prompts.move_to_end(best)
            if len(pairs) == len(seen.spans):  # the prompt has grown: the new entry replaces the old one
                self._forget(best)
        self._learn(tenant, names, frozenset(fixed))
        return [cuts[i] for i in fixed]

    def _most_alike(self, tenant: str, names: Sequence[bytes], cuts: Sequence[tuple[int, int]]) -> int | None:
        """The earlier prompt that shares most tokens, the latest of equals."""
        shared: Counter[int] = Counter()
        for name, (start, end) in zip(names, cuts, strict=True):
            for prompt in islice(reversed(self._where.get((tenant, name), _NOWHERE)), _RECENT):
                shared[prompt] += end - start
        return max(shared, key=lambda prompt: (shared[prompt], prompt)) if shared else None

    def _learn(self, tenant: str, names: list[bytes], fixed: frozenset[int]) -> None:
        if len(names) > self.known:
            return
        prompt, self._next = self._next, self._next + 1
        self._prompts[prompt] = _Seen(tenant, names, fixed)
        self.held += len(names)
        for name in names:
            self._where.setdefault((tenant, name), OrderedDict())[prompt] = None
        while self.held > self.known:
            self._forget(next(iter(self._prompts)))

    def _forget(self, prompt: int) -> None:
        seen = self._prompts.pop(prompt)
        self.held -= len(seen.spans)
        for name in set(seen.spans):
            places = self._where[seen.tenant, name]
            del places[prompt]
            if not places:
                del self._where[seen.tenant, name]

    def clear(self) -> None:
        """Remove all prompts."""
        self._prompts.clear()
        self._where.clear()
        self.held = 0


def _name(token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _fixed(pairs: Sequence[tuple[int, int]], before: frozenset[int]) -> list[int]:
    """The matched spans that count as fixed text.

    Updated text that stays unchanged for one turn would change the keys of all fixed spans behind it. So up to the last
    span that was fixed before, only spans fixed before count; behind it all do.
    """
    last = max((old for _, old in pairs if old in before), default=-1)
    return [new for new, old in pairs if old in before or old > last]


def _in_order(new: Sequence[bytes], old: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of indices into `new` and `old`: a longest common subsequence (Hunt and Szymanski)."""
    places: dict[bytes, list[int]] = {}
    for j, name in enumerate(old):
        places.setdefault(name, []).append(j)
    ends: list[int] = []  # smallest index in `old` at which a subsequence of each length can end
    links: list[tuple[tuple[int, int], object]] = []
    for i, name in enumerate(new):
        for j in reversed(places.get(name, ())):
            at = bisect_left(ends, j)
            link = ((i, j), links[at - 1] if at else None)
            ends[at : at + 1], links[at : at + 1] = [j], [link]
    pairs, link = [], links[-1] if links else None
    while link is not None:
        pairs.append(link[0])
        link = link[1]
    return pairs[::-1]
