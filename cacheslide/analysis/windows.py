"""Names for windows of k tokens: two names are equal exactly if the windows' tokens are."""

from collections.abc import Sequence

import numpy as np


def window_names(prompts: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """Name every window of `k` tokens of several prompts.

    Windows are named by doubling, as in the construction of a suffix array (Karp, Miller and Rosenberg, 1972): the name
    of a window of 2m tokens is the rank of the pair of names of its halves. No hash is involved.

    Parameters
    ----------
    prompts : sequence of int64 arrays, shapes (n_t,)
        Token ids, at least 0.
    k : int
        Tokens per window, at least 1.

    Returns
    -------
    list of int64 arrays, shapes (max(0, n_t - k + 1),)
        Name, counted from 0, of the window at each position. O(N log N log k) for N tokens in all.
    """
    # A unique token ends each prompt, so that no window across an end equals another.
    parts = [part for i, ids in enumerate(prompts) for part in (ids, np.array([-1 - i], dtype=np.int64))]
    power = _ranks(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
    names, length, width = None, 0, 1
    while width <= k:
        if k & width:
            names, length = (power if names is None else _pairs(names, power, length)), length + width
        width *= 2
        if width <= k:
            power = _pairs(power, power, width // 2)
    out, at = [], 0
    for ids in prompts:
        out.append(names[at : at + max(0, len(ids) - k + 1)])
        at += len(ids) + 1
    return out


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].astype(np.int64).reshape(-1)


def _pairs(left: np.ndarray, right: np.ndarray, length: int) -> np.ndarray:
    """Names of windows whose first `length` tokens are named by `left` and whose rest is named by `right`."""
    rest = right[length:]
    size = min(len(left), len(rest))
    if not size:
        return np.zeros(0, dtype=np.int64)
    return _ranks(left[:size] * (int(right.max()) + 1) + rest[:size])
