"""Estimates as JSON objects, and a ratio of sums, which `harness.metrics.bootstrap` lacks."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from harness.metrics import bootstrap
from harness.metrics.bootstrap import Estimate

LEVEL = 0.95


def as_json(estimate: Estimate, scale: float = 1.0) -> dict[str, Any]:
    """`estimate` for a table: value, interval (None for one unit), number `n` of resampled units and of `values`."""

    def scaled(x: float | None) -> float | None:
        return None if x is None else x * scale

    return {
        "value": scaled(estimate.value),
        "low": scaled(estimate.low),
        "high": scaled(estimate.high),
        "n": estimate.n,
        "values": estimate.values,
    }


def mean(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Mean with its interval, resampling clusters."""
    return as_json(bootstrap.mean(values, clusters, level=LEVEL))


def median(values: ArrayLike) -> dict[str, Any]:
    """Median with its interval."""
    return as_json(bootstrap.median(values, level=LEVEL))


def p95(values: ArrayLike) -> dict[str, Any]:
    """95th percentile with its interval."""
    return as_json(bootstrap.p95(values, level=LEVEL))


def p99(values: ArrayLike) -> dict[str, Any]:
    """99th percentile with its interval; below some hundred values it is about the largest of them."""
    return as_json(bootstrap.quantile(values, 0.99, level=LEVEL))


def points_lost(reference: ArrayLike, values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Paired mean of `reference - values` in points (0 to 100): positive if the reference is better."""
    return as_json(bootstrap.paired_difference(reference, values, clusters, level=LEVEL), scale=100.0)


def ratio_of_sums(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable],
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """sum(a) / sum(b) of paired values, resampling clusters: two systems' mean scores, or requests and seconds.

    The value is None if sum(b) is 0; the interval is None if it is 0 in a resample.
    """
    number: dict[Hashable, int] = {}
    at = np.array([number.setdefault(label, len(number)) for label in clusters])
    tops = np.bincount(at, weights=np.asarray(a, dtype=float))
    bottoms = np.bincount(at, weights=np.asarray(b, dtype=float))
    n, total = len(number), float(bottoms.sum())
    out = {"value": float(tops.sum()) / total if total else None, "low": None, "high": None, "n": n, "values": len(at)}
    if n == 1 or not total:
        return out
    rng, draws, rows = np.random.default_rng(seed), [], max(1, bootstrap.BLOCK // n)
    for start in range(0, resamples, rows):
        index = rng.integers(0, n, size=(min(rows, resamples - start), n))
        below = bottoms[index].sum(axis=1)
        if not below.all():
            return out
        draws.append(tops[index].sum(axis=1) / below)
    low, high = np.quantile(np.concatenate(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return out | {"low": float(low), "high": float(high)}
