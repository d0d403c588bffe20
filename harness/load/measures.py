"""Throughput and latency of a load test: pure functions of start and end times."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from cacheslide.errors import DataError


@dataclass(frozen=True)
class Done:
    """One finished piece of work, a request or an episode.

    Attributes
    ----------
    due, start, end : float
        Due, actual start and end time, in seconds on the run's clock.
    correct : bool
    ttft_s : float or None
        Time to first token of a request; for an episode, the maximum.
    tokens : int
        Output tokens.
    """

    due: float
    start: float
    end: float
    correct: bool
    ttft_s: float | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        if not self.due <= self.start <= self.end:
            raise DataError(f"times must ascend: due {self.due}, start {self.start}, end {self.end}")

    @property
    def latency_s(self) -> float:
        """Seconds from due time to end; a late start counts as waiting."""
        return self.end - self.due


def span(done: Sequence[Done]) -> float:
    """Seconds from the first due time to the last end."""
    if not done:
        raise DataError("nothing was done: there is no rate of it")
    seconds = max(d.end for d in done) - min(d.due for d in done)
    if seconds <= 0:
        raise DataError("the run took no time: there is no rate")
    return seconds


def qps_correct(done: Sequence[Done]) -> float:
    """The paper's QPS: correctly completed pieces of work per second."""
    return sum(d.correct for d in done) / span(done)


def goodput(done: Sequence[Done], ttft_s: float | None = None, latency_s: float | None = None) -> float:
    """Correct pieces of work per second within the bounds (an unknown TTFT is outside any bound)."""

    def kept(d: Done) -> bool:
        fast = ttft_s is None or (d.ttft_s is not None and d.ttft_s <= ttft_s)
        return d.correct and fast and (latency_s is None or d.latency_s <= latency_s)

    return sum(map(kept, done)) / span(done)


def series(done: Sequence[Done], bin_s: float = 1.0, correct_only: bool = False) -> list[float]:
    """Completions per second in bins of `bin_s` seconds from the first due time to the last end.

    The last bin's count is divided by the part of the bin within the run. A run that ends on an edge counts there.
    """
    if bin_s <= 0:
        raise DataError(f"bins are longer than 0 seconds, not {bin_s}")
    seconds, begin = span(done), min(d.due for d in done)
    bins = max(1, ceil(seconds / bin_s))
    counts = [0] * bins
    for d in done:
        if d.correct or not correct_only:
            counts[min(bins - 1, int((d.end - begin) / bin_s))] += 1
    widths = [bin_s] * (bins - 1) + [seconds - bin_s * (bins - 1)]
    return [n / width for n, width in zip(counts, widths, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over bins (population), as in Fig. 13's σ."""
    mean = sum(values) / len(values)
    return sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def concurrency(done: Sequence[Done]) -> int:
    """Maximum number of pieces running at the same time; an end precedes a start at the same moment."""
    changes = sorted([(d.start, 1) for d in done] + [(d.end, -1) for d in done])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def summary(done: Sequence[Done], bin_s: float = 1.0) -> dict[str, float]:
    """Summary figures of the run: rates per second, waiting in seconds."""
    rates = series(done, bin_s)
    return {
        "n": len(done),
        "seconds": span(done),
        "qps": len(done) / span(done),
        "qps_correct": qps_correct(done),
        "tokens_per_s": sum(d.tokens for d in done) / span(done),
        "throughput_std": spread(rates),
        "mean_wait_s": sum(d.start - d.due for d in done) / len(done),
        "concurrency": concurrency(done),
    }
