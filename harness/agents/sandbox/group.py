"""A control group of one run: memory, swap and processes bounded together by the kernel, where one can be made.

Version 2 is used where an ancestor of this process's group is writable and delegates the memory and pids controllers;
version 1 where both hierarchies are writable (usually root). The machine's own groups are not changed: a run gets child
groups, which are removed after it or, where their owner was killed, when the next process of the harness starts.
Without control groups the watcher counts (watch.py).
"""

import logging
import os
import re
import secrets
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.agents.sandbox import usage

_NEEDED = {"memory", "pids"}
_REMOVE_S = 2.0
_NAME = re.compile(r"sandbox-(?P<pid>\d+)-(?:(?P<space>\d+)-)?[0-9a-f]{8}")  # process, its PID namespace, random digits
_ENTERED_S = 60.0  # an older group without a process belongs to no starting run
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where child groups are made: one folder in version 2, the memory and the pids hierarchy in version 1."""

    version: int
    memory: Path
    pids: Path

    @property
    def parents(self) -> tuple[Path, ...]:
        """The folders in which a run's groups are made."""
        return (self.memory,) if self.version == 2 else (self.memory, self.pids)


class Group:
    """Child groups with their bounds; `enter` lists the files in which a process writes 0 to join.

    Parameters
    ----------
    place : Place
    memory : int
        Bytes of all processes together, kernel memory and memory file systems included. No swap.
    processes : int
    """

    def __init__(self, place: Place, memory: int, processes: int) -> None:
        self.place, name = place, f"sandbox-{os.getpid()}-{_space()}-{secrets.token_hex(4)}"
        self.folders: list[Path] = []
        try:
            for parent in place.parents:
                (parent / name).mkdir()
                self.folders.append(parent / name)
            self._bound(memory, processes)
        except OSError:
            self.close()
            raise

    def _bound(self, memory: int, processes: int) -> None:
        first, last = self.folders[0], self.folders[-1]
        if self.place.version == 2:
            (first / "memory.max").write_text(str(memory))
            for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                with suppress(OSError):  # a kernel without swap accounting has no such file
                    (first / name).write_text(value)
        else:
            (first / "memory.limit_in_bytes").write_text(str(memory))
            with suppress(OSError):
                (first / "memory.memsw.limit_in_bytes").write_text(str(memory))
        (last / "pids.max").write_text(str(processes))

    @property
    def enter(self) -> list[str]:
        """Files in which a process writes 0 to join."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        name = "memory.events" if self.place.version == 2 else "memory.oom_control"
        with suppress(OSError):
            for line in (self.folders[0] / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.strip() != "0":
                    return True
        return False

    def refused(self) -> int:
        """Number of processes and threads refused by the bound on them."""
        with suppress(OSError, ValueError, IndexError):
            return int((self.folders[-1] / "pids.events").read_text().split("max ")[1].split()[0])
        return 0

    def close(self) -> None:
        """Kill the remaining processes of the groups and remove them. A group that stays busy is left."""
        if self.place.version == 2 and self.folders:
            with suppress(OSError):
                (self.folders[0] / "cgroup.kill").write_text("1")
        give_up = time.monotonic() + _REMOVE_S
        while self.folders:
            try:
                self.folders[-1].rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < give_up:
                    time.sleep(0.005)
                    continue
            self.folders.pop()


def _space() -> str:
    """The number of this process's PID namespace: elsewhere the same process number names another process."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def sweep(parent: Path) -> None:
    """Remove the groups below `parent` left by killed owners; a group with a process stays."""
    for folder in parent.glob("sandbox-*"):
        named = _NAME.fullmatch(folder.name)
        if not named or usage.alive(f"/proc/{named['pid']}"):
            continue
        with suppress(OSError):
            ours = named["space"] == _space() or time.time() - folder.stat().st_mtime > _ENTERED_S
            if ours and not (folder / "cgroup.procs").read_text().strip():
                folder.rmdir()
                log.info("removed %s, which a killed process left", folder)


@cache
def place() -> Place | None:
    """The place where this process can make groups that bound memory and processes, tried once; None without one.

    Groups left there by killed processes are removed.
    """
    with suppress(OSError, ValueError, IndexError):
        found = _find(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
        for parent in {parent for candidate in found for parent in candidate.parents}:
            sweep(parent)
        return next(filter(_works, found), None)
    return None


def _find(mounts: str, own: str) -> list[Place]:
    """Candidates, best first, from the texts of /proc/self/mountinfo and /proc/self/cgroup."""
    groups = {controller: path for _, names, path in (x.split(":", 2) for x in own.split("\n") if x) for controller in
              names.split(",")}  # fmt: skip
    two: list[Place] = []
    one: dict[str, Path] = {}
    for fields in (line.split(" ") for line in mounts.split("\n") if " - cgroup" in line):
        root, point, kind = fields[3], Path(fields[4]), fields[fields.index("-") + 1]
        for controller in ("",) if kind == "cgroup2" else _NEEDED & set(fields[-1].split(",")):
            if controller not in groups:
                continue
            inner = os.path.relpath(groups[controller], root)
            folder = point if inner.startswith("..") else point / inner
            if kind == "cgroup2":
                two += _ancestors(point, folder)
            else:
                one[controller] = folder
    if set(one) == _NEEDED:
        two.append(Place(1, one["memory"], one["pids"]))
    return two


def _ancestors(point: Path, folder: Path) -> list[Place]:
    """Groups from this process's own up to the mount point that delegate the controllers to their children."""
    found = []
    for at in (folder, *folder.parents):
        with suppress(OSError):
            if set((at / "cgroup.subtree_control").read_text().split()) >= _NEEDED:
                found.append(Place(2, at, at))
        if at == point:
            break
    return found


def _works(candidate: Place) -> bool:
    """Whether a group can be made there and entered."""
    try:
        group = Group(candidate, 64 << 20, 8)
    except OSError:
        return False
    try:
        script = 'for f; do echo 0 > "$f" || exit 1; done'
        done = subprocess.run(["/bin/sh", "-c", script, "sh", *group.enter], capture_output=True, timeout=10)
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        group.close()
