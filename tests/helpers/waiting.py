"""How a test waits for other threads and processes."""

import fcntl
import time
from collections.abc import Callable
from pathlib import Path


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether `holds()` comes true within `seconds`, a limit for what would hang: no test may need most of it."""
    until = time.monotonic() + seconds
    while not (true := holds()) and time.monotonic() < until:
        time.sleep(0.005)
    return true


def released(path: Path) -> bool:
    """Whether nobody holds a lock on the file: the process that took one for as long as it lives has ended."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
