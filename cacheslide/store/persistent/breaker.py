"""Circuit breaker: a failing tier is not used for a while, longer after each failure, so that callers do not wait."""

import time


class Breaker:
    """Open after a failure; uses a monotonic clock, which setting the wall clock does not affect."""

    def __init__(self, first_s: float = 0.5, longest_s: float = 30.0) -> None:
        self.first_s, self.longest_s = first_s, longest_s
        self.failures, self.last_error = 0, ""
        self._until = 0.0

    @property
    def open(self) -> bool:
        """Whether the tier should not be used now."""
        return time.monotonic() < self._until

    def failed(self, error: BaseException) -> None:
        """Record a failure."""
        self.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        self._until = time.monotonic() + min(self.longest_s, self.first_s * 2 ** min(self.failures - 1, 16))

    def worked(self) -> None:
        """Record a success."""
        self.failures, self._until = 0, 0.0
