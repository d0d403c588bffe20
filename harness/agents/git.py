"""Runs git on folders written by hostile code, without their or the user's configuration, in bounded time and size.

Commands run in the sandbox can change anything inside a worktree, its `.git` file too. Git therefore always gets its
directory explicitly, runs without the user's configuration and hooks, ignores nested repositories, and has time and
size limits.
"""

import os
import selectors
import subprocess
import tempfile
import time
from pathlib import Path

from harness.agents.sandbox import SandboxError

OUTPUT_BYTES, ERROR_BYTES, SECONDS = 8 << 20, 64 << 10, 60.0
_SAFE = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.bigFileThreshold": "1m",  # larger files are compared as binary
    "core.attributesFile": os.devnull,
    "diff.ignoreSubmodules": "all",
    "gc.auto": "0",
    "protocol.allow": "never",
    "submodule.recurse": "false",
}


def git(*args: str, git_dir: Path, tree: Path | None = None, stdin: str | None = None) -> subprocess.CompletedProcess:
    """Run git on an explicit repository, with only that repository's configuration and without hooks.

    Returns
    -------
    CompletedProcess
        stdout and stderr are text. Status 124: it took longer than `SECONDS`; 125: more output than `OUTPUT_BYTES`;
        126: it could not be started in `tree`.
    """
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "GIT_DIR": str(git_dir),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_NAME": "synthetic", f"GIT_{role}_EMAIL": "synthetic@example.invalid"}
        env[f"GIT_{role}_DATE"] = "2026-01-01T00:00:00Z"  # equal files give an equal commit
    if tree is not None:
        env["GIT_WORK_TREE"] = str(tree)
    command = ["git", *(x for name, value in _SAFE.items() for x in ("-c", f"{name}={value}")), *args]
    with tempfile.TemporaryFile() as given:
        given.write((stdin or "").encode(errors="replace"))
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, env=env, cwd=tree, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as unusable:
            return subprocess.CompletedProcess(command, 126, "", str(unusable))
    with process:
        output, errors, ended = _read(process)
    code, why = ended or (process.returncode, "")
    texts = [bytes(part).decode(errors="replace") for part in (output, errors)]
    return subprocess.CompletedProcess(command, code, texts[0], texts[1] + why)


def _read(process: subprocess.Popen) -> tuple[bytearray, bytearray, tuple[int, str] | None]:
    """Output, errors and the reason why git was killed; errors beyond their bound are dropped."""
    output, errors, due = bytearray(), bytearray(), time.monotonic() + SECONDS
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += piece
                elif len(errors) < ERROR_BYTES:
                    errors += piece
            if len(output) > OUTPUT_BYTES:
                process.kill()
                return output[:OUTPUT_BYTES], errors, (125, f"git wrote more than {OUTPUT_BYTES} bytes")
            if time.monotonic() >= due:
                process.kill()
                return output, errors, (124, f"git took longer than {SECONDS:g} s")
    return output, errors, None


def checked(done: subprocess.CompletedProcess) -> str:
    """Its stdout; SandboxError when git failed."""
    if done.returncode:
        raise SandboxError(f"git failed: {done.stderr.strip()}")
    return done.stdout
