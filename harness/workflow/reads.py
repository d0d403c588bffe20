"""Finds files that steps open without declaring them: every job is run and watched.

inotify reports every file opened in the run's own folder, by any library; an audit hook reports files that Python opens
in the repository. Code, its templates and installed packages do not count as inputs: an environment may lie in the
checkout, and a package's metadata beside the package.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError
from harness.results.provenance import ROOT
from harness.workflow.apart import processes
from harness.workflow.paths import Job, jobs_of
from harness.workflow.perform import perform
from harness.workflow.slices import slice_of

OPENED, OVERFLOW, DIRECTORY = 0x20, 0x4000, 0x40000000  # inotify flags
CODE = {".py", ".pyc", ".j2", ".so", ".toml"}
HEAD = struct.Struct("iIII")


def is_code(path: Path) -> bool:
    """Whether a file under the repository is code, a template of code, or part of what is installed or of git's own."""
    metadata = any(part.endswith((".egg-info", ".dist-info")) for part in path.parts)
    return metadata or path.is_relative_to(sys.prefix) or path.suffix in CODE or ".git" in path.parts


class Watch:
    """Records the files opened below a folder, and those opened by Python below the repository, since `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder.resolve(), set[Path]()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._fd < 0:
            raise CacheSlideError(f"inotify: {os.strerror(ctypes.get_errno())}")
        self._folders: dict[int, Path] = {}
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.path.abspath(os.fsdecode(arguments[0])))
            if path.is_relative_to(ROOT) and not is_code(path):
                self.seen.add(path)

    def begin(self) -> set[Path]:
        """Watch all existing folders; returns the existing files."""
        existing = set()
        for folder, _, names in os.walk(self.folder):
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), OPENED)
            self._folders[number] = Path(folder)
            existing |= {Path(folder) / name for name in names}
        self._opened()
        self.seen = set()
        return existing

    def end(self) -> set[Path]:
        """The files opened since `begin`."""
        return self.seen | self._opened()

    def _opened(self) -> set[Path]:
        files = set()
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return files
            at = 0
            while at < len(data):
                number, mask, _, length = HEAD.unpack_from(data, at)
                name = data[at + HEAD.size : at + HEAD.size + length].rstrip(b"\0")
                at += HEAD.size + length
                if mask & OVERFLOW:
                    raise CacheSlideError("inotify: more files were opened than are kept")
                if name and not mask & DIRECTORY:
                    files.add(self._folders[number] / os.fsdecode(name))


def undeclared(config: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    """Run every job of `config` in `folder`; returns the files that each step opens without declaring them.

    Parameters
    ----------
    config : mapping
        A checked configuration whose models are in `folder`, the working folder.
    """
    out: dict[str, list[str]] = {}
    with processes(1) as one:
        for job in jobs_of(config):
            read = one.apply(opened, (folder, job.step.name, slice_of(config, job.step.reads), job.inputs, job.outputs))
            if undeclared_reads := {p for p in read if not _declared(p, job)}:
                shown = {str(p.relative_to(folder if p.is_relative_to(folder) else ROOT)) for p in undeclared_reads}
                out[job.step.name] = sorted({*out.get(job.step.name, ()), *shown})
    return out


def opened(
    folder: Path, name: str, config: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str]
) -> set[Path]:
    """Run one job in `folder`, on one core; returns older files opened there, or by Python in the repository."""
    os.chdir(folder)
    watch = Watch(folder)
    existing = watch.begin()
    for path in outputs:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    perform(name, config, inputs, outputs, threads=1)
    return {p for p in watch.end() if p in existing or p.is_relative_to(ROOT)}


def _declared(path: Path, job: Job) -> bool:
    given = [p for value in job.inputs.values() for p in ([value] if isinstance(value, str) else value)]
    return any(path.is_relative_to(Path(p).resolve()) for p in (*given, *job.outputs))
