"""SWE-Agent without a worktree, for training prompts in bulk: files are in memory and no code is run.

Prompts equal those of the real agent byte for byte as long as no test fails: pytest's failure output is not
reproduced. A patch counts as right when the files equal those of the right fix.
"""

from collections.abc import Mapping

from harness.agents.calls import ToolError
from harness.agents.swe_agent import SWEAgent
from harness.agents.workspace import with_line


class DryWorkspace:
    """The files of a repository in memory, with the messages of `Workspace`."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.before, self.now = dict(files), dict(files)

    def read(self, name: str) -> str:
        """A file's text; ToolError when there is none."""
        if name not in self.now:
            raise ToolError(f"no file {name[:80]!r}")
        return self.now[name]

    def replace_line(self, name: str, line: int, text: str) -> None:
        """Put `text` in place of line `line`, counted from 1."""
        self.now[name] = with_line(self.read(name), name, line, text)

    def files(self) -> list[str]:
        """The tracked files, sorted."""
        return sorted(self.now)

    def diff(self) -> str:
        """The names of the changed files: not a patch, but empty when nothing changed."""
        return "\n".join(name for name, text in self.now.items() if text != self.before[name])


class DrySWEAgent(SWEAgent):
    """The agent of `SWEAgent` on a `DryWorkspace`; its own verdict is no result to report."""

    def _check_out(self) -> None:
        self.workspace = DryWorkspace(self.task.files)

    def score(self) -> float:
        return float(bool(self.patch) and self._right())

    def close(self) -> None:
        return None

    def _right(self) -> bool:
        task, files = self.task, self.workspace
        return files.now == {
            **task.files,
            task.path: with_line(task.files[task.path], task.path, task.line, task.fixed),
        }

    def _test(self) -> str:
        passed = "passed" if self._right() else "failed"
        self.test_output = f"\nTests: {passed}"
        return passed
