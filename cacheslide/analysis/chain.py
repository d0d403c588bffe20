"""The heaviest chain of runs that keep the order of their source, in O(s log s) for s runs."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


def heaviest_chain(runs: Sequence[tuple[int, int, int]]) -> list[int]:
    """Indices of the heaviest chain of runs in which every run's source lies behind that of the one before.

    Weighted longest increasing subsequence, by a Fenwick tree of maxima over the ends in the source.

    Parameters
    ----------
    runs : sequence of (start, end, weight)
        Half-open ranges in the source, in the order of the runs in the prompt; weights above 0.
    """
    ends = sorted({end for _, end, _ in runs})
    tree: list[tuple[int, int]] = [(0, -1)] * (len(ends) + 1)  # weight of the best chain, and its last run
    before = [-1] * len(runs)
    for i, (start, end, weight) in enumerate(runs):
        best, at = (0, -1), bisect_right(ends, start)  # ends at or before this start
        while at:
            best = max(best, tree[at])
            at -= at & -at
        before[i] = best[1]
        reached, at = (best[0] + weight, i), bisect_left(ends, end) + 1
        while at <= len(ends):
            tree[at] = max(tree[at], reached)
            at += at & -at
    best, at = (0, -1), len(ends)
    while at:
        best = max(best, tree[at])
        at -= at & -at
    chain, i = [], best[1]
    while i >= 0:
        chain.append(i)
        i = before[i]
    return chain[::-1]
