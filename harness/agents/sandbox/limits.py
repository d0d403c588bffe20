"""The bounds of a run, and its outcome."""

from dataclasses import dataclass

from cacheslide.errors import CacheSlideError

# Beyond the run's own bounds: queued signals and POSIX timers, message queues, core dumps.
_FIXED = {"NOFILE": 256, "SIGPENDING": 256, "MSGQUEUE": 0, "CORE": 0}
_CONFINE = 2  # confine.py's own processes


class SandboxError(CacheSlideError, RuntimeError):
    """The kernel supports no sandbox, or the sandbox could not start a command."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one command.

    `seconds` of wall time (and of CPU time per process); `memory` in bytes, of each process's address space and of
    all processes, pipes and the scratch folder together; `processes` and threads alive at once; `file_bytes` per
    written file; `disk_bytes` and `files` (names: a hard link counts as a file does) in the root, the scratch folder
    and deleted files together, earlier files included; `output_bytes` kept of stdout and stderr together:
    more ends the command.
    """

    seconds: float = 20.0
    memory: int = 2 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    disk_bytes: int = 1 << 30
    files: int = 50_000
    output_bytes: int = 64 << 10

    @property
    def tasks(self) -> int:
        """`processes`, and those of the sandbox itself."""
        return self.processes + _CONFINE

    def rlimits(self) -> dict[str, int]:
        """For setrlimit, per process. NPROC counts the sandbox's user, allows one too many so that the watcher sees it,
        and does not hold for user 0.
        """
        cpu = max(1, int(self.seconds) + 1)
        return {"AS": self.memory, "CPU": cpu, "FSIZE": self.file_bytes, "NPROC": self.tasks + 1, **_FIXED}

    def tmpfs(self) -> str:
        """Mount options of the scratch folder."""
        return f"size={min(self.disk_bytes, self.memory)},nr_inodes={self.files + 2},mode=700"


@dataclass(frozen=True)
class SandboxResult:
    """`code` is the exit status (128 + n: signal n). `stopped` names the bound that ended it, "" for none.

    The bounds are "time", "output", "processes", "memory" and "disk"; "start" means that the command or its folder
    could not be used (`output` has the reason), which earlier code in the folder can have caused.
    """

    code: int
    output: str
    seconds: float
    stopped: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.code == 0 and not self.stopped
