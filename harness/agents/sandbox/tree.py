"""Walks and deletes a folder filled by hostile code: any depth, any names, any modes, no link followed.

One folder is open at a time. The way down is by name from the open folder, the way up is `..`, and both must lead to
the intended folder. Neither the longest path nor the number of open files nor the stack bounds the depth.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Incomplete(OSError):
    """Not everything was seen: the tree changed below the walk, or something in it cannot be read."""


@dataclass
class _Level:
    """One folder on the way down: its identity, the folders in it still to be entered, its own name."""

    identity: tuple[int, int]
    inner: list[str] = field(default_factory=list)
    name: str = ""


class _Position:
    """The folder that is open, and the way back up."""

    def __init__(self, top: Path | str) -> None:
        self.fd = os.open(top, _FOLDER)
        self.levels = [_Level(self._identity())]

    def _identity(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino

    def _go(self, name: str) -> None:
        fd = os.open(name, _FOLDER, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = fd

    def down(self, name: str) -> None:
        self._go(name)
        self.levels.append(_Level(self._identity(), name=name))

    def up(self) -> None:
        self._go("..")
        self.levels.pop()
        if self._identity() != self.levels[-1].identity:
            raise Incomplete(f"a folder moved while it was walked, at depth {len(self.levels)}")

    def close(self) -> None:
        os.close(self.fd)


def entries(top: Path | str, open_up: bool = False) -> Iterator[os.stat_result]:
    """lstat of everything below `top`, `top` itself left out.

    Parameters
    ----------
    top : Path
    open_up : bool
        Make folders readable that their owner cannot read; only when no process can change the tree.

    Raises
    ------
    Incomplete
        When running code moves folders below the walk; at the end, when a folder could not be read.
    """
    at, hidden = _Position(top), 0
    try:
        while True:
            level = at.levels[-1]
            with os.scandir(at.fd) as listed:
                for entry in listed:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    except OSError:
                        hidden += 1
                        continue
                    if stat.S_ISDIR(found.st_mode) and found.st_dev == level.identity[0]:
                        if open_up:
                            _open_up(entry.name, at.fd)
                        level.inner.append(entry.name)
                    yield found
            while True:
                entered, refused = _enter(at)
                hidden += refused
                if entered or len(at.levels) == 1:
                    break
                at.up()
            if not entered:
                break
    except OSError as moved:
        raise Incomplete(str(moved)) from None
    finally:
        at.close()
    if hidden:
        raise Incomplete(f"{hidden} entries could not be read")


def _enter(at: _Position) -> tuple[bool, int]:
    """Enter the next inner folder that can be opened: whether there was one, and how many could not be opened."""
    inner, refused = at.levels[-1].inner, 0
    while inner:
        try:
            at.down(inner.pop())
            return True, refused
        except FileNotFoundError:
            continue
        except OSError:
            refused += 1
    return False, refused


def remove(top: Path | str) -> None:
    """Delete `top` and all below it, when no process can change it any more; modes are changed where needed.

    Raises
    ------
    OSError
        When something cannot be deleted: the first reason.
    """
    top = Path(top)
    failed: list[OSError] = []
    if not top.is_symlink() and top.is_dir():
        _open_up(top)
        at = _Position(top)
        try:
            _empty_all(at, failed)
        finally:
            at.close()
        _tried(failed, os.rmdir, top)
    elif os.path.lexists(top):
        _tried(failed, os.unlink, top)
    if failed:
        raise failed[0]


def _empty_all(at: _Position, failed: list[OSError]) -> None:
    _empty(at, failed)
    while True:
        if _enter(at)[0]:
            _empty(at, failed)
            continue
        if len(at.levels) == 1:
            return
        name = at.levels[-1].name
        at.up()
        _tried(failed, os.rmdir, name, dir_fd=at.fd)


def _empty(at: _Position, failed: list[OSError]) -> None:
    """Unlink entries that are not folders, make each folder enterable and record it."""
    with os.scandir(at.fd) as listed:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listed]
    for name, folder in found:
        if folder:
            _open_up(name, at.fd)
            at.levels[-1].inner.append(name)
        else:
            _tried(failed, os.unlink, name, dir_fd=at.fd)


def _open_up(name: Path | str, within: int | None = None) -> None:
    """Give the owner all rights on a folder (checked by lstat, and no process can replace it)."""
    with suppress(OSError):
        if os.stat(name, dir_fd=within, follow_symlinks=False).st_mode & 0o700 != 0o700:
            os.chmod(name, 0o700, dir_fd=within)


def _tried(failed: list[OSError], action, *args, **options) -> None:
    try:
        action(*args, **options)
    except FileNotFoundError:
        pass
    except OSError as error:
        failed.append(error)
