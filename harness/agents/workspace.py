"""A git worktree that an agent edits. No path leaves it, and git trusts no file in it.

Commands run in the sandbox can leave anything inside: links, pipes, folders too deep for a path or unreadable.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harness.agents.calls import ToolError
from harness.agents.git import checked, git
from harness.agents.sandbox import Limits, Sandbox, SandboxResult, remove

FILE_BYTES = 1 << 20
log = logging.getLogger(__name__)


def _removed(folder: Path) -> None:
    """Delete a folder with its contents; anything that cannot be deleted is logged."""
    try:
        remove(folder)
    except OSError as stays:
        log.warning("%s could not be removed: %s", folder, stays)


def with_line(content: str, name: str, line: int, text: str) -> str:
    """`content` of the file `name` with `text` in place of line `line`, counted from 1."""
    lines = content.split("\n")
    if not 1 <= line <= len(lines) - (lines[-1] == ""):
        raise ToolError(f"{name} has no line {line}")
    lines[line - 1] = text
    return "\n".join(lines)


class Repository:
    """A repository with one commit of `files`, in a folder of its own."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="repository-")).resolve()
        self.git_dir, tree = self.folder / "main.git", self.folder / "main"
        tree.mkdir()
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        checked(git("init", "-q", git_dir=self.git_dir, tree=tree))
        checked(git("add", "-A", git_dir=self.git_dir, tree=tree))
        checked(git("commit", "-q", "-m", "base", git_dir=self.git_dir, tree=tree))
        self.base = checked(git("rev-parse", "HEAD", git_dir=self.git_dir)).strip()

    def close(self) -> None:
        """Delete it with all its worktrees."""
        _removed(self.folder)


class Workspace:
    """A worktree of `repository` at its base commit.

    Parameters
    ----------
    repository : Repository
    limits : Limits
        Of each command.
    trust_code : bool
        See `Sandbox`.
    """

    def __init__(self, repository: Repository, limits: Limits | None = None, trust_code: bool = False) -> None:
        self.repository = repository
        self.root = Path(tempfile.mkdtemp(prefix="tree-", dir=repository.folder)) / "work"
        checked(git("worktree", "add", "-q", "--detach", str(self.root), repository.base, git_dir=repository.git_dir))
        pointer = (self.root / ".git").read_text().removeprefix("gitdir:").strip()
        self.git_dir = Path(pointer).resolve(strict=True)
        self.sandbox = Sandbox(self.root, limits, trust_code)

    def path(self, name: str) -> Path:
        """The file called `name`; ToolError unless it lies inside, after symbolic links, and outside `.git`."""
        if not name or "\0" in name or len(name) > 500:
            raise ToolError("a path is between 1 and 500 characters long")
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or ".git" in parts:
            raise ToolError(f"{name[:80]!r} is outside the worktree")
        try:
            found = (self.root / name).resolve()
        except (OSError, RuntimeError, ValueError) as wrong:
            raise ToolError(f"{name[:80]!r} cannot be resolved: {wrong}") from None
        if not found.is_relative_to(self.root) or ".git" in found.relative_to(self.root).parts:
            raise ToolError(f"{name[:80]!r} is outside the worktree")
        return found

    def read(self, name: str) -> str:
        """A text file of at most `FILE_BYTES`."""
        path = self.path(name)
        try:
            if not path.is_file():
                raise ToolError(f"no file {name[:80]!r}")
            if path.stat().st_size > FILE_BYTES:
                raise ToolError(f"{name[:80]!r} is larger than {FILE_BYTES} bytes")
            return path.read_text()
        except (OSError, UnicodeDecodeError) as wrong:
            raise ToolError(f"{name[:80]!r} cannot be read as text: {wrong}") from None

    def replace_line(self, name: str, line: int, text: str) -> None:
        """Put `text` in place of line `line`, counted from 1."""
        changed = with_line(self.read(name), name, line, text)
        try:
            self.path(name).write_text(changed)
        except (OSError, UnicodeEncodeError) as wrong:
            raise ToolError(f"{name[:80]!r} cannot be written: {wrong}") from None

    def files(self) -> list[str]:
        """The tracked files."""
        args = ("ls-tree", "-r", "-z", "--name-only", self.repository.base)
        return checked(git(*args, git_dir=self.repository.git_dir)).split("\0")[:-1]

    def run(self, *command: str) -> SandboxResult:
        """Run a command in the sandbox."""
        return self.sandbox.run(command)

    def diff(self) -> str:
        """Changes in tracked files since the base commit; ToolError when git can no longer read them."""
        self._check_attributes()
        options = ("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=all")
        done = git("diff", *options, self.repository.base, git_dir=self.git_dir, tree=self.root)
        if done.returncode:
            raise ToolError(f"no diff: {done.stderr.strip()[:200]}")
        return done.stdout

    def _check_attributes(self) -> None:
        """ToolError for a pipe as `.gitattributes`: git opens this file beside each tracked file and would block."""
        for folder in {parent for name in self.files() for parent in Path(name).parents}:
            name = folder / ".gitattributes"
            try:
                kind = os.lstat(self.root / name).st_mode
            except OSError:
                continue
            if not stat.S_ISREG(kind):
                raise ToolError(f"no diff: {str(name)!r} is no file")

    def close(self) -> None:
        """Delete the worktree."""
        _removed(self.root.parent)
        git("worktree", "prune", git_dir=self.repository.git_dir)
