"""A folder of the store, and what in it is the store's: plain files of its own user, reached without following links.

Everything is opened relative to the folder's descriptor. The folder that the configuration names may itself be a
link; below it no link is followed, no device, pipe or socket is opened, and other users' files are left alone.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cacheslide.errors import StoreError
from cacheslide.store.files import Files
from cacheslide.store.permissions import others_may_write, trusted, writable_parent

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Foreign(StoreError):
    """Something in the store's place that is not the store's: a link, a special file, another user's."""


class Folder:
    """One folder.

    Parameters
    ----------
    path : Path
    files : Files
        Makes the system calls.
    shared : bool
        Do not ask who owns the folder and its files, nor who else may write there or to its parents.
    root : bool
        The configured folder itself, which may be a link.
    """

    def __init__(self, path: Path, files: Files, *, shared: bool = False, root: bool = False) -> None:
        self.path, self.files, self.shared = Path(path), files, shared
        self._flags = _OPEN if root else _OPEN | os.O_NOFOLLOW
        self._placed = not root  # whether its parents have been asked: once, and for the configured folder alone

    @contextmanager
    def handle(self) -> Iterator[int]:
        """The folder's descriptor for as long as the block runs; Foreign when it is not the store's."""
        try:
            fd = os.open(self.path, self._flags)
        except OSError as wrong:
            if wrong.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Foreign(f"{self.path} is a symbolic link or no folder") from None
            raise
        try:
            self._check_folder(fd)
            yield fd
        finally:
            os.close(fd)

    def make(self) -> None:
        """Create the folder, private, unless it is there; its parents must be."""
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)

    def _check_folder(self, fd: int) -> None:
        if self.shared:
            return
        found = os.fstat(fd)
        if not trusted(found.st_uid):
            raise Foreign(f"{self.path} belongs to user {found.st_uid}: use a folder of your own, or set shared_folder")
        if why := others_may_write(found, fd):
            raise Foreign(
                f"{self.path} may be written by others ({why}): "
                "make it private (chmod go-w, setfacl -b), or set shared_folder"
            )
        if not self._placed and (parent := writable_parent(self.path)):
            raise Foreign(
                f"{self.path} may be moved away by others, who may write to {parent}: "
                "use a folder elsewhere, or set shared_folder"
            )
        self._placed = True

    def ours(self, found: os.stat_result) -> bool:
        """Whether a directory entry's status is that of a plain file that this store may read."""
        return stat.S_ISREG(found.st_mode) and (self.shared or trusted(found.st_uid))

    def _check(self, name: str, found: os.stat_result, write: bool) -> None:
        if not self.ours(found):
            kind = "another user's" if stat.S_ISREG(found.st_mode) else _kind(found.st_mode)
            raise Foreign(f"{self.path / name} is {kind}, not a file of the store")
        if write and found.st_nlink > 1:
            raise Foreign(f"{self.path / name} has other names (hard links): it is not written to")

    def open(self, name: str, *, create: bool = False, new: bool = False, write: bool = False, direct: bool = False):
        """A descriptor of a plain file; Foreign for anything else under that name. Flags: see `Files.open`."""
        with self.handle() as folder:
            try:  # before it is opened: opening a device may do something
                self._check(name, os.stat(name, dir_fd=folder, follow_symlinks=False), write)
            except FileNotFoundError:
                if not (create or new):
                    raise
            try:
                fd = self.files.open(name, create=create, new=new, write=write, direct=direct, folder=folder)
            except OSError as wrong:
                if wrong.errno == errno.ELOOP:
                    raise Foreign(f"{self.path / name} is a symbolic link, not a file of the store") from None
                raise
        try:
            self._check(name, os.fstat(fd), write)
        except BaseException:
            self.files.close(fd)
            raise
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """At most the first `limit` bytes of a file; FileNotFoundError or Foreign when there is none."""
        fd = self.open(name)
        try:
            return os.pread(fd, limit, 0)
        finally:
            self.files.close(fd)

    def entries(self, wanted: Callable[[str], bool]) -> dict[str, os.stat_result]:
        """Plain files of the store whose names are wanted, and their status."""
        out = {}
        with self.handle() as folder, os.scandir(folder) as found:
            for e in found:
                if wanted(e.name):
                    try:
                        status = e.stat(follow_symlinks=False)
                    except FileNotFoundError:  # removed by another process in between
                        continue
                    if self.ours(status):
                        out[e.name] = status
        return out

    def unlink(self, name: str) -> None:
        """Remove a plain file of the store if it is there; anything else under that name stays."""
        with self.handle() as folder:
            try:
                if self.ours(os.stat(name, dir_fd=folder, follow_symlinks=False)):
                    self.files.unlink(name, folder)
            except FileNotFoundError:
                return

    def settle(self, part: str, name: str) -> bool:
        """Rename `part` unless something has the name already; whether it was free. `part` may remain: unlink it."""
        with self.handle() as folder:
            try:
                os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as refused:  # a file system without hard links: two writers at once write the same
                if refused.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                with suppress(FileNotFoundError):
                    os.stat(name, dir_fd=folder, follow_symlinks=False)
                    return False
                os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        return True

    def sync(self) -> None:
        """Wait until new and removed names are on the device."""
        with self.handle() as folder:
            os.fsync(folder)


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_one, name in kinds if is_one(mode)), "a device")
