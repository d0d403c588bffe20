"""A run's processes, memory and disk usage, read from /proc by the process that started it.

With control groups (group.py), only the disk is counted here. Hostile code can evade a simple count: a process whose
first thread has ended shows nothing under its own number, so any remaining thread is read instead; a deleted file still
exists in descriptors and mappings.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from harness.agents.sandbox import tree

PIPE_BYTES = 1 << 16
_COUNTED = ("RssAnon:", "RssFile:", "VmSwap:", "VmPTE:")


def _socket_bytes() -> int:
    try:
        return int(Path("/proc/sys/net/core/wmem_default").read_text())
    except (OSError, ValueError):
        return 212_992


SOCKET_BYTES = _socket_bytes()


def namespace(pid: int) -> str:
    """The PID namespace of the children of `pid`; "" while it is still the caller's own, or unknown."""
    with suppress(OSError):
        found = os.readlink(f"/proc/{pid}/ns/pid_for_children")
        if found != os.readlink("/proc/self/ns/pid"):
            return found
    return ""


def members(target: str) -> list[str]:
    """A folder of /proc for each process in the PID namespace `target`; unreaped ended processes included."""
    return [folder for entry in os.listdir("/proc") if entry.isdigit() and (folder := _member(entry, target))]


def alive(folder: str) -> bool:
    """Whether the thread of a folder of /proc is alive: it still has a working folder."""
    try:
        os.readlink(f"{folder}/cwd")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


def _member(pid: str, target: str) -> str:
    folder = f"/proc/{pid}"
    with suppress(OSError):
        if os.readlink(f"{folder}/ns/pid") == target:
            if not alive(folder):  # the first thread has ended; others can be alive
                for thread in os.listdir(f"{folder}/task"):
                    if alive(f"{folder}/task/{thread}"):
                        return f"{folder}/task/{thread}"
            return folder
    return ""


def processes_and_memory(folders: list[str]) -> tuple[int, int]:
    """Threads, and bytes of private, file, swapped and page-table memory; shared pages count for each process.

    Memory file systems are left out: the only one that the sandbox can write is counted whole.
    """
    count = size = 0
    for folder in folders:
        with suppress(OSError, ValueError, IndexError):
            for line in Path(folder, "status").read_text().splitlines():
                if line.startswith("Threads:"):
                    count += int(line.split()[1])
                elif line.startswith(_COUNTED):
                    size += int(line.split()[1]) << 10
    return count, size


class Held:
    """Usage by descriptors and mappings: deleted files (bytes, number), and the kernel's buffers in pipes and sockets.

    Parameters
    ----------
    folders : list of str
        From `members`.
    skip : int or None
        The device of the scratch folder, which is counted whole.
    largest : int
        Bytes that a deleted file counts where only its mapping is seen and its size cannot be read.
    """

    def __init__(self, folders: list[str], skip: int | None, largest: int) -> None:
        self.deleted: dict[tuple[int, int], int] = {}
        self.pipes: set[tuple[int, int]] = set()
        self.sockets: set[tuple[int, int]] = set()
        self.skip, self.largest = skip, largest
        for folder in folders:
            with suppress(OSError):
                for name in os.listdir(f"{folder}/fd"):
                    with suppress(OSError):
                        self._descriptor(os.stat(f"{folder}/fd/{name}"))
            with suppress(OSError):
                self._mapped(folder, Path(folder, "maps").read_bytes())

    @property
    def buffers(self) -> int:
        """Bytes that pipes and sockets can hold."""
        return len(self.pipes) * PIPE_BYTES + len(self.sockets) * SOCKET_BYTES

    def _descriptor(self, found: os.stat_result) -> None:
        key = found.st_dev, found.st_ino
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and found.st_dev != self.skip:
            self.deleted[key] = found.st_blocks * 512
        elif stat.S_ISFIFO(found.st_mode):
            self.pipes.add(key)
        elif stat.S_ISSOCK(found.st_mode):
            self.sockets.add(key)

    def _mapped(self, folder: str, text: bytes) -> None:
        if b"(deleted)" not in text:
            return
        for line in text.splitlines():
            if not line.endswith(b"(deleted)"):
                continue
            where, _, _, device, inode, *_ = line.split(None, 5)
            major, minor = (int(n, 16) for n in device.split(b":"))
            key = os.makedev(major, minor), int(inode)
            if key in self.deleted or key[0] == self.skip:
                continue
            try:
                found = os.stat(f"{folder.partition('/task/')[0]}/map_files/{where.decode()}")
            except OSError:  # needs user 0
                self.deleted[key] = self.largest
            else:
                if found.st_nlink == 0:
                    self.deleted[key] = found.st_blocks * 512


def folder_usage(top: Path, files: int, size: int, ended: bool = False) -> tuple[int, int, bool]:
    """Names and bytes on disk below `top`, and whether all of it was seen; stops where they pass `files` or `size`.

    Every name counts, a further one of the same file too (it takes room in its folder and time to walk and remove);
    a file's bytes count once. With `ended` no process is left: folders that their owner cannot read are then made
    readable.
    """
    count = held = 0
    linked: set[tuple[int, int]] = set()
    try:
        for entry in tree.entries(top, ended):
            count += 1
            key = entry.st_dev, entry.st_ino
            if key not in linked:
                held += entry.st_blocks * 512
            if entry.st_nlink > 1 and not stat.S_ISDIR(entry.st_mode):
                linked.add(key)
            if count > files or held > size:
                break
    except OSError:
        return count, held, False
    return count, held, True


def memory_folder_usage(pid: int, path: Path) -> tuple[int, int, int | None]:
    """Files, bytes and device of the memory file system that `pid` sees at `path`; 0, 0, None before it is mounted."""
    inside = f"/proc/{pid}/root{path}"
    with suppress(OSError):
        device = os.stat(inside).st_dev
        if device != os.stat(path).st_dev:
            found = os.statvfs(inside)
            return found.f_files - found.f_ffree, (found.f_blocks - found.f_bfree) * found.f_frsize, device
    return 0, 0, None
