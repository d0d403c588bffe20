"""A tier that fails is left alone for a while, longer each time, so that nobody waits for it again and again."""

import time


class Breaker:
    """Open after a failure; uses a monotonic clock, so that setting the wall clock changes nothing."""

    def __init__(self, first_s: float = 0.5, longest_s: float = 30.0) -> None:
        self.first_s, self.longest_s = first_s, longest_s
        self.failures, self.last_error = 0, ""
        self._until = 0.0

    @property
    def open(self) -> bool:
        """Whether the tier should be left alone now."""
        return time.monotonic() < self._until

    def failed(self, error: BaseException) -> None:
        """Note a failure."""
        self.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        self._until = time.monotonic() + min(self.longest_s, self.first_s * 2 ** min(self.failures - 1, 16))

    def worked(self) -> None:
        """Note a success."""
        self.failures, self._until = 0, 0.0
