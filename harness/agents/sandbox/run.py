"""Starts commands in the sandbox and watches them: time, processes, memory and output are bounded."""

import json
import os
import platform
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.agents.sandbox import confine

_CONFINE = Path(confine.__file__)
_POLL_S, _WALK_S = 0.02, 0.25
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ETC = tuple(f"/etc/{n}" for n in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives"))


class SandboxError(CacheSlideError, RuntimeError):
    """The kernel gives no sandbox, or the sandbox could not start a command."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one command.

    `seconds` of wall time (and of CPU time per process); `memory` in bytes, of each process's address space and of
    all resident memory together; `processes` alive at once; `file_bytes` per written file; `disk_bytes` and `files`
    in the root and the scratch folder together, what was there before included; `output_bytes` kept of stdout and
    stderr together: more ends the command.
    """

    seconds: float = 20.0
    memory: int = 2 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    disk_bytes: int = 1 << 30
    files: int = 50_000
    output_bytes: int = 64 << 10

    def rlimits(self) -> dict[str, int]:
        """For setrlimit, per process."""
        cpu = max(1, int(self.seconds) + 1)
        names = ("AS", "CPU", "FSIZE", "NOFILE", "NPROC")
        return dict(zip(names, (self.memory, cpu, self.file_bytes, 256, self.processes), strict=True))


@dataclass(frozen=True)
class SandboxResult:
    """`code` is the exit status (128 + n: signal n). `stopped` names the bound that ended it, "" for none."""

    code: int
    output: str
    seconds: float
    stopped: str = ""

    @property
    def passed(self) -> bool:
        """Ended by itself with status 0."""
        return self.code == 0 and not self.stopped


@cache
def missing() -> str:
    """Why this machine gives no sandbox; "" when it does. Asked once, by starting a command in one."""
    if sys.platform != "linux" or platform.machine() not in confine._DENIED:
        return f"the sandbox needs Linux on x86_64 or aarch64, this is {sys.platform} on {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = _start(["/bin/sh", "-c", "exit 7"], Path(folder), Path(folder), Limits(), confined=True)
        except SandboxError as error:
            return str(error)
    return "" if result.code == 7 else f"a trial command ended with status {result.code}: {result.output.strip()}"


class Sandbox:
    """Runs commands in one folder.

    Parameters
    ----------
    root : Path
        The only folder (beside a scratch folder of each run) that commands can write.
    limits : Limits
    trust_code : bool
        Run without confinement where the kernel gives none. Rlimits and the wall time still hold; nothing else does.
    read : sequence of Path
        Further folders that commands may read.

    Raises
    ------
    SandboxError
        When there is no sandbox and the code is not trusted.
    """

    def __init__(
        self, root: Path, limits: Limits | None = None, trust_code: bool = False, read: Sequence[Path] = ()
    ) -> None:
        self.root, self.limits, self.read = Path(root).resolve(strict=True), limits or Limits(), tuple(read)
        why = missing()
        if why and not trust_code:
            raise SandboxError(
                f"{why}. Code that a model wrote is not run without a sandbox; trust_code=True runs it unconfined"
            )
        self.confined = not why

    def run(self, command: Sequence[str]) -> SandboxResult:
        """Run `command` in the root and wait for it; bounds end it, they do not raise."""
        with tempfile.TemporaryDirectory(prefix="scratch-") as scratch:
            return _start(list(command), self.root, Path(scratch), self.limits, self.confined, self.read)


def _start(command, root, scratch, limits, confined, read=()) -> SandboxResult:
    env = {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")),
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }
    before = None
    if confined:
        python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
        policy = {
            "read": [*_SYSTEM, *_ETC, *sorted(python), *map(str, read)],
            "write": [str(root), str(scratch), "/dev/null"],
            "rlimits": limits.rlimits(),
            "env": env,
        }
        command = [sys.executable, "-I", "-S", str(_CONFINE), json.dumps(policy), *command]
    else:
        before = _rlimits_only(limits)
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before,
        )
    except OSError as unusable:  # earlier hostile code may have made the folder unusable
        return SandboxResult(126, str(unusable), time.monotonic() - begin, "start")
    output, stopped = _watch(process, limits, confined, begin, (root, scratch))
    text = output.decode(errors="replace")
    if process.returncode == confine.FAILED and text.startswith("confine:"):
        raise SandboxError(f"the sandbox did not start ({text.strip().removeprefix('confine: ')})")
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return SandboxResult(code, text, time.monotonic() - begin, stopped)


def _rlimits_only(limits: Limits):
    def apply() -> None:
        for name, value in limits.rlimits().items():
            if name != "NPROC":  # counts every process of the user
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return apply


def _watch(process, limits: Limits, confined: bool, begin: float, folders: tuple[Path, ...]) -> tuple[bytes, str]:
    """Read the output until the command ends or passes a bound; then nothing of it is left running."""
    output, stopped, open_pipe, walked = bytearray(), "", True, begin
    own = os.readlink("/proc/self/ns/pid")
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not stopped and (open_pipe or process.poll() is None):
            if open_pipe and selector.select(_POLL_S):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                open_pipe = bool(piece)
                output += piece
            elif not open_pipe:
                time.sleep(_POLL_S)
            now = time.monotonic()
            stopped = _passed(process.pid, output, limits, now - begin, confined, own)
            if process.poll() is not None and not confined:
                break  # without a PID namespace a stray child may hold the pipe open
            if not stopped and now - walked > _WALK_S:
                stopped, walked = _too_full(folders, limits), time.monotonic()
    if stopped or not confined:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    process.wait()
    process.stdout.close()
    return bytes(output[: limits.output_bytes]), stopped


def _passed(pid: int, output: bytearray, limits: Limits, seconds: float, confined: bool, own: str) -> str:
    if seconds > limits.seconds:
        return "time"
    if len(output) > limits.output_bytes:
        return "output"
    if confined:
        count, resident = _inside(pid, own)
        if count > limits.processes + 2:  # the two of confine.py
            return "processes"
        if resident > limits.memory:
            return "memory"
    return ""


def _too_full(folders: tuple[Path, ...], limits: Limits) -> str:
    """ "disk" when the folders hold more files or bytes than allowed; the walk ends as soon as it knows."""
    count = size = 0
    for folder in folders:
        for parent, inner, names in os.walk(folder):
            count += len(inner) + len(names)
            for name in names:
                with suppress(OSError):
                    size += os.lstat(os.path.join(parent, name)).st_blocks * 512
            if count > limits.files or size > limits.disk_bytes:
                return "disk"
    return ""


def _inside(pid: int, own: str) -> tuple[int, int]:
    """Processes in the PID namespace of `pid`'s children, and their resident bytes. User 0 passes RLIMIT_NPROC."""
    try:
        target = os.readlink(f"/proc/{pid}/ns/pid_for_children")
    except OSError:
        return 0, 0
    if target == own:
        return 0, 0
    count = resident = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, IndexError):
            if os.readlink(f"/proc/{entry}/ns/pid") == target:
                count += 1
                resident += int(Path(f"/proc/{entry}/statm").read_text().split()[1]) * resource.getpagesize()
    return count, resident
