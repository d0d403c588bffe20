"""Watches a started run until it ends or passes a bound, then kills its remaining processes."""

import logging
import os
import selectors
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.agents.sandbox import usage
from harness.agents.sandbox.group import Group
from harness.agents.sandbox.limits import Limits

POLL_S, DISK_POLL_S = 0.02, 0.1
_DISK_SHARE = 5  # walking the folder takes at most 1 / _DISK_SHARE of the time
_HIDDEN = 5  # incomplete walks in a row that count as hiding files
_GONE_S = 10.0
log = logging.getLogger(__name__)


@dataclass
class Watch:
    """One run under watch.

    Parameters
    ----------
    process : Popen
        Leads its own session; stdout is a pipe.
    limits : Limits
    root, scratch : Path
    confined : bool
        It runs in a PID namespace with the scratch folder in memory.
    group : Group or None
        Bounds processes and memory already.
    report : int
        Descriptor for the reason of a failed start; -1 for none.
    """

    process: subprocess.Popen
    limits: Limits
    root: Path
    scratch: Path
    confined: bool
    group: Group | None
    report: int = -1
    output: bytearray = field(default_factory=bytearray)
    reported: bytearray = field(default_factory=bytearray)
    stopped: str = ""
    _namespace: str = ""
    _hidden: int = 0

    def run(self, begin: float) -> None:
        """Returns when the run has ended and been reaped; `stopped` names the bound that ended it."""
        try:
            self._watch(begin)
        finally:
            self._end()
        if not self.stopped:  # it can end between two polls
            self.stopped = self._too_full([], ended=True)

    def _watch(self, begin: float) -> None:
        polled, disk_due, ended, piped = begin, begin + DISK_POLL_S, False, True
        stdout = self.process.stdout.fileno()
        pidfd = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for fd in {stdout, pidfd, self.report} - {-1}:
                    selector.register(fd, selectors.EVENT_READ)
                # without a PID namespace a stray child can hold the pipe open
                while not self.stopped and not (ended and (not piped or not self.confined)):
                    for key, _ in selector.select(POLL_S):
                        if key.fd == pidfd:
                            ended = True
                            selector.unregister(pidfd)
                        elif not self._read(key.fd, self.output if key.fd == stdout else self.reported):
                            piped = piped and key.fd != stdout
                            selector.unregister(key.fd)
                    now = time.monotonic()
                    if now - begin > self.limits.seconds:
                        self.stopped = "time"
                    elif len(self.output) > self.limits.output_bytes:
                        self.stopped = "output"
                    elif now - polled >= POLL_S:
                        self.stopped = self._passed(now >= disk_due)
                        polled = time.monotonic()
                        if now >= disk_due:
                            disk_due = polled + max(DISK_POLL_S, _DISK_SHARE * (polled - now))
                if not self.confined:
                    os.set_blocking(stdout, False)
                    with suppress(BlockingIOError):
                        while len(self.output) <= self.limits.output_bytes and self._read(stdout, self.output):
                            pass
        finally:
            os.close(pidfd)

    @staticmethod
    def _read(fd: int, into: bytearray) -> bool:
        piece = os.read(fd, 1 << 16)
        into += piece
        return bool(piece)

    def _passed(self, disk: bool) -> str:
        """The exceeded bound; "" for none."""
        if not self.confined:
            return self._too_full([]) if disk else ""
        self._namespace = self._namespace or usage.namespace(self.process.pid)
        if self.group is not None:
            if self.group.out_of_memory():
                return "memory"
            if self.group.refused() > self.limits.processes:
                return "processes"  # it keeps starting processes
        if not self._namespace or (self.group is not None and not disk):
            return ""
        folders, memory = usage.members(self._namespace), 0
        if self.group is None:
            passed, memory = self._counted(folders)
            if passed and self._counted(usage.members(self._namespace))[0]:  # the counts are not atomic
                return passed
        return self._too_full(folders, memory) if disk else ""

    def _counted(self, folders: list[str]) -> tuple[str, int]:
        """The exceeded bound on processes or memory, and the bytes of processes and scratch folder."""
        count, resident = usage.processes_and_memory(folders)
        scratch = usage.memory_folder_usage(self.process.pid, self.scratch)[1]
        if count > self.limits.processes + 1:  # the process of confine.py
            passed = "processes"
        else:
            passed = "memory" if resident + scratch > self.limits.memory else ""
        if passed:
            log.info(
                "%s: %d threads, %d bytes in processes, %d in the scratch folder", passed, count, resident, scratch
            )
        return passed, resident + scratch

    def _too_full(self, folders: list[str], memory: int = 0, ended: bool = False) -> str:
        """ "disk" when root, scratch and deleted files together are more than allowed; "memory" for full pipes."""
        limits, device = self.limits, None
        files, size, seen = usage.folder_usage(self.root, limits.files, limits.disk_bytes, ended)
        if self.confined:
            inside = usage.memory_folder_usage(self.process.pid, self.scratch) if folders else (0, 0, None)
            device = inside[2]
        else:
            inside = usage.folder_usage(self.scratch, limits.files, limits.disk_bytes)
            seen = seen and inside[2]
        held = usage.Held(folders, device, limits.file_bytes)
        if self.group is None and memory + held.buffers > limits.memory:
            return "memory"
        self._hidden = 0 if seen else self._hidden + 1
        files += inside[0] + len(held.deleted)
        size += inside[1] + sum(held.deleted.values())
        return "disk" if self._hidden >= _HIDDEN or files > limits.files or size > limits.disk_bytes else ""

    def _end(self) -> None:
        """Kill the remaining processes and wait until they have ended."""
        if self.confined and not self._namespace:
            self._namespace = usage.namespace(self.process.pid)
        if self.stopped or not self.confined or self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, 9)
        self.process.wait()
        self.process.stdout.close()
        give_up = time.monotonic() + _GONE_S
        while self._namespace and any(map(usage.alive, usage.members(self._namespace))) and time.monotonic() < give_up:
            time.sleep(0.002)
