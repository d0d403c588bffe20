"""A limit on an experiment's time: it ends by itself, with what it has measured by then."""

import argparse
import math
import time


class Limit:
    """So many minutes from now on; None: no limit."""

    def __init__(self, minutes: float | None = None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether nothing more should be begun."""
        return not self.left


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """The option `--minutes`, for `Limit`."""
    parser.add_argument("--minutes", type=float, help="end after this time, with what is measured by then")
