"""Text of a prompt that occurs in earlier prompts of its session, as maximal runs of equal windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CANDIDATES = 64  # occurrences of a window compared in its source; repetitive text has thousands


@dataclass(frozen=True)
class Run:
    """Windows [start, start + count) of a prompt, equal to those of prompt `source` from `place` on."""

    start: int
    count: int
    source: int
    place: int


class EarlierPrompts:
    """The windows of a session's earlier prompts; finds the runs that a later prompt shares with them.

    A window's source is the latest earlier prompt that contains it. At a prompt's first unmatched window with a source,
    the longest run among its occurrences there is taken; of equally long ones the nearest at or behind the end of the
    last run from that source, then the first from that source's start. Every window with a source lies in exactly one
    run. Time is linear in the windows, times `CANDIDATES` in the worst case.

    Parameters
    ----------
    names : sequence of int64 arrays
        Window names of all prompts of the session (`window_names`).
    """

    def __init__(self, names: Sequence[np.ndarray]) -> None:
        self.names = names
        kinds = 1 + max((int(n.max()) for n in names if len(n)), default=-1)
        self._latest = np.full(kinds, -1, dtype=np.int64)
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, prompt: int) -> None:
        """Add a prompt's windows to those that later prompts are compared with."""
        self._latest[self.names[prompt]] = prompt

    def runs(self, prompt: int, first: int) -> list[Run]:
        """The runs of `prompt`'s windows from `first` on, in order."""
        names = self.names[prompt]
        source = self._latest[names]
        matched = np.flatnonzero(source[first:] >= 0) + first
        out: list[Run] = []
        reached: dict[int, int] = {}
        at = 0
        while at < len(matched):
            i = int(matched[at])
            q = int(source[i])
            place, count = self._longest(names, i, q, reached.get(q, 0))
            out.append(Run(i, count, q, place))
            reached[q] = place + count
            at = int(np.searchsorted(matched, i + count))
        return out

    def _longest(self, names: np.ndarray, i: int, source: int, behind: int) -> tuple[int, int]:
        """Place and length in windows of the longest run from window `i` on in prompt `source`."""
        source_names = self.names[source]
        if source not in self._sorted:
            order = np.argsort(source_names, kind="stable")
            self._sorted[source] = order, source_names[order]
        order, by_name = self._sorted[source]
        places = order[np.searchsorted(by_name, names[i]) : np.searchsorted(by_name, names[i], "right")]
        split = int(np.searchsorted(places, behind))
        best = (0, 0)
        for place in np.concatenate([places[split : split + CANDIDATES], places[:split]])[:CANDIDATES]:
            count = common_length(names[i:], source_names[int(place) :])
            if count > best[1]:
                best = int(place), count
        return best


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two arrays; time is linear in that length."""
    size, at, step = min(len(a), len(b)), 0, 64
    while at < size:
        end = min(size, at + step)
        differ = a[at:end] != b[at:end]
        if differ.any():
            return at + int(differ.argmax())
        at, step = end, 2 * step
    return size
