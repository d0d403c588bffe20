"""A folder of the store and its files: plain files of this user, opened without following links.

Everything is opened relative to the folder's descriptor. The configured folder may itself be a link; below it links are
not followed, devices, pipes and sockets are not opened, and other users' files are left alone.
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
    """An object in the store's place that is not the store's: a link, a special file, another user's file."""


class Folder:
    """One folder.

    Parameters
    ----------
    path : Path
    files : Files
        Performs the system calls.
    shared : bool
        Skip the checks of who owns the folder and its files and who may write there or to its parents.
    root : bool
        The folder is the configured one, which may be a link.
    """

    def __init__(self, path: Path, files: Files, *, shared: bool = False, root: bool = False) -> None:
        self.path, self.files, self.shared = Path(path), files, shared
        self._flags = _OPEN if root else _OPEN | os.O_NOFOLLOW
        self._placed = not root  # whether its parents were checked: once, for the configured folder only

    @contextmanager
    def handle(self) -> Iterator[int]:
        """Context with the folder's descriptor; Foreign if the folder is not the store's."""
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
        """Create the folder, private, if it does not exist; its parents must exist."""
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)

    def _check_folder(self, fd: int) -> None:
        if self.shared:
            return
        stats = os.fstat(fd)
        if not trusted(stats.st_uid):
            raise Foreign(f"{self.path} belongs to user {stats.st_uid}: use a folder of your own, or set shared_folder")
        if why := others_may_write(stats, fd):
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

    def ours(self, status: os.stat_result) -> bool:
        """Whether a directory entry with this status is a plain file that this store may read."""
        return stat.S_ISREG(status.st_mode) and (self.shared or trusted(status.st_uid))

    def _check(self, name: str, status: os.stat_result, write: bool) -> None:
        if not self.ours(status):
            kind = "another user's" if stat.S_ISREG(status.st_mode) else _kind(status.st_mode)
            raise Foreign(f"{self.path / name} is {kind}, not a file of the store")
        if write and status.st_nlink > 1:
            raise Foreign(f"{self.path / name} has other names (hard links): it is not written to")

    def open(self, name: str, *, create: bool = False, new: bool = False, write: bool = False, direct: bool = False):
        """A descriptor of a plain file; Foreign for anything else of that name. Flags as in `Files.open`."""
        with self.handle() as folder:
            try:  # checked before opening, since opening a device may have effects
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
        """At most the first `limit` bytes of a file; FileNotFoundError or Foreign if there is none."""
        fd = self.open(name)
        try:
            return os.pread(fd, limit, 0)
        finally:
            self.files.close(fd)

    def entries(self, wanted: Callable[[str], bool]) -> dict[str, os.stat_result]:
        """The store's plain files whose names satisfy `wanted`, with their status."""
        out = {}
        with self.handle() as folder, os.scandir(folder) as scan:
            for e in scan:
                if wanted(e.name):
                    try:
                        status = e.stat(follow_symlinks=False)
                    except FileNotFoundError:  # removed by another process meanwhile
                        continue
                    if self.ours(status):
                        out[e.name] = status
        return out

    def unlink(self, name: str) -> None:
        """Remove a plain file of the store if it exists; anything else of that name stays."""
        with self.handle() as folder:
            try:
                if self.ours(os.stat(name, dir_fd=folder, follow_symlinks=False)):
                    self.files.unlink(name, folder)
            except FileNotFoundError:
                return

    def settle(self, part: str, name: str) -> bool:
        """Rename `part` to `name` unless that exists; returns whether it was free. `part` may remain: unlink it."""
        with self.handle() as folder:
            try:
                os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as refused:  # a file system without hard links: concurrent writers write the same
                if refused.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                with suppress(FileNotFoundError):
                    os.stat(name, dir_fd=folder, follow_symlinks=False)
                    return False
                os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        return True

    def sync(self) -> None:
        """Wait until created and removed names are on the device."""
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
