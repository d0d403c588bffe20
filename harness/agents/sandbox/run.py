"""Starts commands in the sandbox: readable and writable folders, and handling of failed starts."""

import base64
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from harness.agents.sandbox import confine, seccomp, tree
from harness.agents.sandbox.group import Group, place
from harness.agents.sandbox.limits import Limits, SandboxError, SandboxResult
from harness.agents.sandbox.watch import Watch

_CONFINE = Path(confine.__file__)
# Not /dev/zero: a shared mapping of it is memory outside any process's size.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/dev/null", "/dev/random", "/dev/urandom")
_ETC = tuple(f"/etc/{n}" for n in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives"))
_NOT_STARTED = 126
log = logging.getLogger(__name__)


@cache
def missing() -> str:
    """Why this machine has no sandbox; "" when it has one. Tested once, by starting a command."""
    if sys.platform != "linux" or platform.machine() not in seccomp.ARCH:
        return f"the sandbox needs Linux on x86_64 or aarch64, this is {sys.platform} on {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = Runner(Path(folder).resolve(), Limits(), True, ()).run(["/bin/sh", "-c", "exit 7"])
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
        Run without confinement where the kernel has none. Only rlimits and the wall time still hold.
    read : sequence of Path
        Further folders that commands can read.

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
        """Run `command` in the root and wait for it; any behaviour becomes the result.

        Raises
        ------
        SandboxError
            When the kernel cannot confine, which no command can cause.
        """
        return Runner(self.root, self.limits, self.confined, self.read).run(list(command))


class Runner:
    """One run: a scratch folder, control groups where there are any, the process and its watch."""

    def __init__(self, root: Path, limits: Limits, confined: bool, read: Sequence[Path]) -> None:
        self.root, self.limits, self.confined, self.read = root, limits, confined, read

    def run(self, command: list[str]) -> SandboxResult:
        scratch = Path(tempfile.mkdtemp(prefix="scratch-")).resolve()
        group = self._group()
        try:
            return self._started(command, scratch, group)
        finally:
            if group is not None:
                group.close()
            try:
                tree.remove(scratch)
            except OSError as stays:
                log.warning("the scratch folder %s could not be removed: %s", scratch, stays)

    def _group(self) -> Group | None:
        where = place() if self.confined else None
        if where is not None:
            with suppress(OSError):
                return Group(where, self.limits.memory, self.limits.tasks)
        return None

    def _started(self, command: list[str], scratch: Path, group: Group | None) -> SandboxResult:
        begin = time.monotonic()
        env = _environment(scratch)
        reader, writer = os.pipe()
        if self.confined:
            command = self._confined(command, scratch, group, env, writer)
        try:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(writer,) if self.confined else (),
                    preexec_fn=None if self.confined else _rlimits_only(self.limits),
                )
            except (OSError, ValueError) as unusable:
                return SandboxResult(_NOT_STARTED, str(unusable), time.monotonic() - begin, "start")
            finally:
                os.close(writer)
            watch = Watch(process, self.limits, self.root, scratch, self.confined, group, reader)
            watch.run(begin)
        finally:
            os.close(reader)
        return self._result(watch, group, time.monotonic() - begin)

    def _result(self, watch: Watch, group: Group | None, seconds: float) -> SandboxResult:
        if watch.reported:
            said = json.loads(watch.reported)
            if not said["command"]:
                raise SandboxError(f"the sandbox did not start ({said['error']})")
            return SandboxResult(_NOT_STARTED, said["error"], seconds, "start")
        code, stopped = watch.process.returncode, watch.stopped
        if not stopped and group is not None and group.out_of_memory():
            stopped = "memory"
        text = bytes(watch.output[: self.limits.output_bytes]).decode(errors="replace")
        return SandboxResult(code if code >= 0 else 128 - code, text, seconds, stopped)

    def _confined(
        self, command: list[str], scratch: Path, group: Group | None, env: dict[str, str], report: int
    ) -> list[str]:
        python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
        policy = {
            "root": str(self.root),
            "scratch": str(scratch),
            "tmpfs": self.limits.tmpfs(),
            "groups": group.enter if group is not None else [],
            "read": [*_SYSTEM, *_ETC, *sorted(python), *map(str, self.read)],
            "write": [str(self.root), str(scratch), "/dev/null"],
            "rlimits": self.limits.rlimits(),
            "filter": base64.b64encode(seccomp.program(platform.machine())).decode(),
            "env": env,
            "report": report,
        }
        return [sys.executable, "-I", "-S", str(_CONFINE), json.dumps(policy), *command]


def _environment(scratch: Path) -> dict[str, str]:
    return {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")),
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "GIT_CONFIG_NOSYSTEM": "1",  # it is unreadable, and git would not start
        "OMP_NUM_THREADS": "1",  # threads count as processes do
        "OPENBLAS_NUM_THREADS": "1",
    }


def _rlimits_only(limits: Limits):
    def apply() -> None:
        for name, value in limits.rlimits().items():
            if name != "NPROC":  # counts every process of the user
                kind = getattr(resource, f"RLIMIT_{name}")
                hard = resource.getrlimit(kind)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (value, value))

    return apply
