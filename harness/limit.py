"""A time limit for experiments: a run ends in order and keeps the measurements so far."""

import argparse
import math
import time


class Limit:
    """A limit in minutes from construction; None means no limit."""

    def __init__(self, minutes: float | None = None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds left."""
        return max(0.0, self.end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether the limit is reached and no further work should start."""
        return not self.left


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """Add the option `--minutes`, for `Limit`."""
    parser.add_argument("--minutes", type=float, help="end after this time, with what is measured by then")
