"""Arrival processes. Open loop: given times, independent of the server. Closed loop: one starts when another ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from cacheslide.errors import ConfigError


@dataclass(frozen=True)
class Closed:
    """Keeps `concurrent` episodes running until none is left (the paper's parallel requests)."""

    concurrent: int

    def __post_init__(self) -> None:
        if self.concurrent < 1:
            raise ConfigError(f"a closed loop has at least 1 agent at work, not {self.concurrent}")

    def times(self, n: int) -> None:
        """None: a start waits for an end."""
        return None


@dataclass(frozen=True)
class Steady:
    """One start every 1/`rate` seconds; `rate` in episodes per second."""

    rate: float

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def times(self, n: int) -> list[float]:
        """Start times in seconds, from 0."""
        return [i / self.rate for i in range(n)]


@dataclass(frozen=True)
class Poisson:
    """Independent exponential gaps with a mean of 1/`rate` seconds; the same seed gives the same times."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def times(self, n: int) -> list[float]:
        """Start times in seconds; the first is a gap after 0."""
        rng, now, out = Random(f"arrivals-{self.seed}"), 0.0, []
        for _ in range(n):
            now += rng.expovariate(self.rate)
            out.append(now)
        return out


@dataclass(frozen=True)
class Replayed:
    """Recorded start times in seconds, ascending."""

    starts: Sequence[float]

    def __post_init__(self) -> None:
        if any(b < a for a, b in pairwise(self.starts)) or (self.starts and self.starts[0] < 0):
            raise ConfigError("recorded start times must ascend from 0 or later")

    def times(self, n: int) -> list[float]:
        """The first `n` recorded times; an error if there are fewer."""
        if n > len(self.starts):
            raise ConfigError(f"{n} episodes, but only {len(self.starts)} start times were recorded")
        return list(self.starts[:n])


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise ConfigError(f"an arrival rate is above 0 episodes a second, not {rate}")
