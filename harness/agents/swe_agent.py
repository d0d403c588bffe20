"""SWE-Agent: look at files, edit lines, run the tests, submit a patch that is graded in a fresh worktree."""

import sys

from harness.agents.agent import Agent, describe
from harness.agents.calls import Call, Tool, ToolError
from harness.agents.grading import grade
from harness.agents.sandbox import Limits
from harness.agents.tasks.fixes import FixTask
from harness.agents.template import Slot, Template
from harness.agents.workspace import Repository, Workspace

WINDOW = 40
HITS = 20


class SWEAgent(Agent):
    """Updated and fixed slots interleave: state, issue, file window, tree, test output, history.

    Raises
    ------
    SandboxError
        When the machine gives no sandbox and `trust_code` is False.
    """

    name = "swe_agent"
    solved_by = "tests"
    template = Template(
        (
            Slot("system", "reuse"),
            Slot("state", "recompute"),
            Slot("issue", "reuse"),
            Slot("window", "recompute"),
            Slot("tree", "reuse"),
            Slot("history", "reuse", grows=True),
            Slot("tests", "recompute"),
            Slot("cue", "recompute"),
        )
    )

    def __init__(self, task: FixTask, limits: Limits | None = None, trust_code: bool = False) -> None:
        super().__init__(task.id)
        self.task, self.limits, self.trust_code = task, limits or Limits(), trust_code
        self._check_out()
        self.tree = self.workspace.files()
        self.open_path, self.test_output = "", ""
        self.history: list[str] = []
        self.patch = ""
        self.solved: float | None = None

    def _check_out(self) -> None:
        self.repository = Repository(self.task.files)
        try:
            self.workspace = Workspace(self.repository, self.limits, self.trust_code)
        except BaseException:
            self.repository.close()
            raise

    def make_tools(self) -> list[Tool]:
        return [
            Tool("search", ("word",), self._search),
            Tool("open", ("path",), self._open),
            Tool("edit", ("line", "text"), self._edit, rest=True),
            Tool("test", (), self._test),
            Tool("submit", (), self._submit),
        ]

    def slots(self):
        return {
            "system": "\nFix the issue with one edit ." + describe(list(self.tools.values())),
            "state": f"\nOpen: {self.open_path}" if self.open_path else "\nOpen: nothing",
            "issue": f"\nIssue: {self.task.issue}",
            "window": self._window(),
            "tree": "\nFiles:" + "".join(f"\n{path}" for path in self.tree),
            "history": self.history,
            "tests": self.test_output,
            "cue": "\nCall:",
        }

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.history.append(f"\nCall: {' '.join((call.tool, *call.args))}\nResult: {result}")

    def score(self) -> float:
        """1.0 when the tests pass on the submitted patch, graded once."""
        if self.solved is None:
            self.solved = 0.0
            if self.patch:
                verdict = grade(self.task, self.repository, self.patch, self.limits, self.trust_code)
                self.solved = float(verdict.resolved)
        return self.solved

    def close(self) -> None:
        self.workspace.close()
        self.repository.close()

    def _window(self) -> str:
        if not self.open_path:
            return ""
        try:
            lines = self.workspace.read(self.open_path).split("\n")[:WINDOW]
        except ToolError as gone:
            return f"\nWindow: {gone}"
        return "\nWindow:" + "".join(f"\n{i} {line[:200]}" for i, line in enumerate(lines, 1) if line)

    def _search(self, word: str) -> str:
        hits = []
        for path in self.tree:
            try:
                lines = self.workspace.read(path).split("\n")
            except ToolError:
                continue
            hits += [f"{path} {i}" for i, line in enumerate(lines, 1) if word in line]
        return "\n".join(hits[:HITS]) or f"nothing with {word[:80]}"

    def _open(self, path: str) -> str:
        self.workspace.read(path)
        self.open_path = path
        return "opened"

    def _edit(self, line: str, text: str) -> str:
        if not self.open_path:
            raise ToolError("open a file first")
        if not line.isascii() or not line.isdigit() or len(line) > 6:
            raise ToolError(f"{line[:20]!r} is not a line number")
        self.workspace.replace_line(self.open_path, int(line), text)
        return "edited"

    def _test(self) -> str:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "--no-header", "tests")
        result = self.workspace.run(*command)
        if result.stopped:
            raise ToolError(f"the tests were ended: {result.stopped}")
        passed = "passed" if result.code == 0 else "failed"
        tail = "\n".join(x for x in result.output.split("\n") if x.startswith(("E ", "FAILED", "ERROR")))[:600]
        self.test_output = f"\nTests: {passed}" + (f"\n{tail}" if tail else "")
        return passed

    def _submit(self) -> str:
        self.patch = self.workspace.diff()
        self.finished = True
        return "submitted" if self.patch else "an empty patch was submitted"
