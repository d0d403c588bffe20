"""Success rate of tasks that either pass their tests or do not."""

from collections.abc import Iterable
from dataclasses import dataclass

from cacheslide.errors import DataError


@dataclass(frozen=True)
class SuccessRate:
    """Share of attempts that passed.

    Parameters
    ----------
    n : int
        Attempts that were judged.
    successes : int
        Attempts among them that passed.
    errors : int
        Attempts that could not be judged (no container, time-out of the grader); they are not in `n`.
    """

    n: int
    successes: int
    errors: int = 0

    @property
    def rate(self) -> float | None:
        """successes / n in [0, 1]; None when nothing was judged."""
        return self.successes / self.n if self.n else None


def success_rate(outcomes: Iterable[bool | None]) -> SuccessRate:
    """Count outcomes: True passed, False failed, None could not be judged."""
    counts = {True: 0, False: 0, None: 0}
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, bool):
            raise DataError(f"an outcome is True, False or None, not {outcome!r}")
        counts[outcome] += 1
    return SuccessRate(n=counts[True] + counts[False], successes=counts[True], errors=counts[None])
