"""Wrapper of every workflow script and command: an expected error ends it with one line."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cacheslide.errors import CacheSlideError


class _Both:
    """Writes to a terminal and a log; the log gets no carriage-return progress updates."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        if not text.startswith("\r"):
            self.log.write(text)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()
        self.log.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()


@contextmanager
def step(log: str | Path, name: str) -> Iterator[None]:
    """Run a workflow step: stderr also goes to `log`; a `CacheSlideError` becomes one line and exit status 1."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("w", encoding="utf-8") as file:
        before, sys.stderr = sys.stderr, _Both(sys.stderr, file)
        try:
            yield
        except CacheSlideError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(1)
        except Exception:
            traceback.print_exc()  # a defect: its trace goes to the log too
            sys.exit(1)
        finally:
            sys.stderr = before


def command(main: Callable[[], Any]) -> NoReturn:
    """Run a module's `main` as a command: an error a user can act on is one line and exit status 2."""
    try:
        main()
    except (CacheSlideError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
