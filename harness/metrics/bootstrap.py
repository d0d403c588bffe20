"""Percentile bootstrap intervals (Efron & Tibshirani, 1993, chapter 13) for means, quantiles and paired comparisons.

Scores are clustered: several questions share one prompt, so their scores are correlated. The resampled unit is
therefore the cluster (the prompt). Latencies have one value per unit: reduce repeated timings of a prompt to their
median first. For a single unit the interval is None, never NaN.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacheslide.errors import DataError

RESAMPLES = 10_000
BLOCK = 2**22  # numbers in memory at a time while resampling, about 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample with its interval, in the unit of the values.

    Parameters
    ----------
    statistic : str
        "mean", "mean difference", "median", "p95", "ratio of medians", …
    n : int
        Units that were resampled: clusters for means and differences, values for quantiles.
    values : int
        Values behind the statistic (a pair counts once).
    value : float
        The statistic of the sample itself.
    low, high : float or None
        Ends of the percentile interval; None when n is 1.
    level : float
        Nominal coverage of the interval.
    """

    statistic: str
    n: int
    values: int
    value: float
    low: float | None
    high: float | None
    level: float


def mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `values`, shape (values,), resampling clusters.

    A resample of clusters has the mean (sum of their values) / (number of their values), so clusters may differ in
    size. `clusters` gives each value's cluster; without it every value is its own cluster.
    """
    return _clustered_mean("mean", _vector(values), clusters, level, resamples, seed)


def crossed_mean(
    values: ArrayLike,
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` [n] that belong to two crossed groups each, such as a model's seed and a prompt.

    Both groups are resampled, independently (the pigeonhole bootstrap: Owen, 2007, Annals of Applied Statistics 1(2)),
    so that the interval holds the spread between seeds and that between prompts; with few seeds it is rough. `n` of the
    estimate counts the pairs of groups that have values. A group with one member only is not resampled.
    """
    sample = _vector(values)
    if len(first) != len(sample) or len(second) != len(sample):
        raise DataError(f"{len(sample)} values but {len(first)} and {len(second)} group labels")
    (rows, height), (columns, width) = _numbered(first), _numbered(second)
    sums, sizes = np.zeros((height, width)), np.zeros((height, width))
    np.add.at(sums, (rows, columns), sample)
    np.add.at(sizes, (rows, columns), 1)
    draws = None
    if height * width > 1:
        rng = np.random.default_rng(seed)
        down, across = (rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float) for n in (height, width))
        top, bottom = (((down @ table) * across).sum(axis=1) for table in (sums, sizes))
        draws = top[bottom > 0] / bottom[bottom > 0]  # a resample of an incomplete table may be empty
    return _estimate("mean", int((sizes > 0).sum()), len(sample), float(sample.mean()), draws, level)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `a - b`, where a[i] and b[i] are two systems' scores on the same question; see `mean`.

    The pairing removes the differences between questions, which both systems share.
    """
    first, second = _pair(a, b)
    return _clustered_mean("mean difference", first - second, clusters, level, resamples, seed)


def quantile(
    values: ArrayLike, q: float, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The q-quantile of `values`, shape (values,), by linear interpolation.

    An interval of an extreme quantile cannot exceed the largest value of the sample, so it is too narrow for small
    samples: a 95th percentile needs some hundred values.
    """
    sample = _vector(values)
    if not 0 < q < 1:
        raise DataError(f"q must lie between 0 and 1, not {q}")
    draws = _resample(len(sample), resamples, seed, lambda index: np.quantile(sample[index], q, axis=1))
    name = "median" if q == 0.5 else f"p{100 * q:g}"
    return _estimate(name, len(sample), len(sample), float(np.quantile(sample, q)), draws, level)


def median(values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Median of `values`; see `quantile`."""
    return quantile(values, 0.5, level=level, resamples=resamples, seed=seed)


def p95(values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """95th percentile of `values`; see `quantile`."""
    return quantile(values, 0.95, level=level, resamples=resamples, seed=seed)


def ratio_of_medians(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """median(a) / median(b) of paired positive values, for example two systems' latencies on the same prompts.

    Both medians of a resample are taken over the same prompts.
    """
    first, second = _pair(a, b)
    if (first <= 0).any() or (second <= 0).any():
        raise DataError("a ratio of medians needs positive values")
    draws = _resample(
        len(first),
        resamples,
        seed,
        lambda index: np.median(first[index], axis=1) / np.median(second[index], axis=1),
    )
    value = float(np.median(first) / np.median(second))
    return _estimate("ratio of medians", len(first), len(first), value, draws, level)


def _clustered_mean(
    name: str,
    sample: NDArray,
    clusters: Sequence[Hashable] | None,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    labels = range(len(sample)) if clusters is None else clusters
    if len(labels) != len(sample):
        raise DataError(f"{len(sample)} values but {len(labels)} cluster labels")
    cluster_of, count = _numbered(labels)
    sums, sizes = np.bincount(cluster_of, weights=sample), np.bincount(cluster_of)
    draws = _resample(count, resamples, seed, lambda index: sums[index].sum(axis=1) / sizes[index].sum(axis=1))
    return _estimate(name, count, len(sample), float(sample.mean()), draws, level)


def _numbered(labels: Sequence[Hashable]) -> tuple[NDArray, int]:
    """Each label's number, in order of appearance, shape (labels,), and how many there are."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(label, len(number)) for label in labels]), len(number)


def _resample(n: int, resamples: int, seed: int, statistic: Callable[[NDArray], NDArray]) -> NDArray | None:
    """Statistic of each resample, shape (resamples,); `statistic` maps unit indices (rows, n) to (rows,)."""
    if resamples < 1:
        raise DataError(f"resamples must be 1 or more, not {resamples}")
    if n == 1:
        return None
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([statistic(rng.integers(0, n, size=(block, n))) for block in blocks])


def _estimate(name: str, n: int, values: int, value: float, draws: NDArray | None, level: float) -> Estimate:
    if not 0 < level < 1:
        raise DataError(f"level must lie between 0 and 1, not {level}")
    if draws is None:
        return Estimate(name, n, values, value, None, None, level)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(name, n, values, value, float(low), float(high), level)


def _vector(values: ArrayLike) -> NDArray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or sample.size == 0:
        raise DataError(f"expected a list of one value or more, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise DataError("values must be finite; keep failed requests apart")
    return sample


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray, NDArray]:
    first, second = _vector(a), _vector(b)
    if len(first) != len(second):
        raise DataError(f"paired values must have equal lengths, got {len(first)} and {len(second)}")
    return first, second
