"""Grades a patch as SWE-bench does: applied to a fresh worktree, tests run there, the log read by `swebench`.

Tests and pytest's configuration are the task's own: a patch's changes to files that affect the verdict are dropped,
unless the task's own fix is in such a file. These are folders of tests, pytest's configuration and plugins
(`conftest.py` and the rest), and modules in place of pytest's or Python's own. The run is confined like every other
(swebench's own harness needs docker). The modules under test run in pytest's process: there is no defence against
modules that forge its log.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.agents.git import checked, git
from harness.agents.sandbox import Limits
from harness.agents.tasks.fixes import FixTask
from harness.agents.workspace import Repository, Workspace

_JUDGES = ("tests", "test", "*.dist-info", "*.egg-info")  # folders; the last two can name plugins of pytest
_CONFIGURES = (
    *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "pyproject.toml", "setup.cfg"),
    *("tox.ini", "sitecustomize.py", "usercustomize.py", "*.pth"),
)
_RUNS = sys.stdlib_module_names | {"pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"}
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "tests")


@dataclass(frozen=True)
class Grade:
    """swebench's verdict: `resolved` when every FAIL_TO_PASS and PASS_TO_PASS test passes. `report` is its own."""

    resolved: bool
    applied: bool
    report: dict[str, Any]


def instance(task: FixTask, base: str) -> dict[str, Any]:
    """The task as an instance for `swebench.make_test_spec`."""
    from swebench.harness.constants import EvalType

    return {
        "repo": "synthetic/settings",
        "instance_id": task.id,
        "base_commit": base,
        "patch": "",
        "test_patch": "",
        "problem_statement": task.issue,
        "hints_text": "",
        "created_at": "2026-01-01",
        "version": "0.1",
        "FAIL_TO_PASS": json.dumps(task.fail_to_pass),
        "PASS_TO_PASS": json.dumps(task.pass_to_pass),
        "environment_setup_commit": base,
        "image": "",
        "log_parser": "parse_log_pytest",
        "eval_type": EvalType.PASS_AND_FAIL.value,
        "eval_script": " ".join(PYTEST[1:]),
    }


def judges(files: Sequence[str]) -> list[str]:
    """Patterns of files that affect the verdict in a repository of `files`; `*` matches any characters, `/` too.

    A module with Python's or pytest's name is excepted where the repository itself has one.
    """
    anywhere = [*_JUDGES, *_CONFIGURES, *(f"{folder}/*" for folder in _JUDGES)]  # a folder can be a link
    own = {name.partition("/")[0].partition(".")[0] for name in files}
    replaced = [f"{name}{end}" for name in sorted(_RUNS - own) for end in ("", ".*", "/*")]
    return [pattern for name in anywhere for pattern in (name, f"*/{name}")] + replaced


def _apply(patch: str, workspace: Workspace, kept: str) -> str:
    """Apply the patch without files that affect the verdict; return why it does not apply, "" when it does."""
    files = workspace.files()
    patterns = judges(files)
    where = {"git_dir": workspace.git_dir, "tree": workspace.root}
    options = (f"--include={kept}", *(f"--exclude={pattern}" for pattern in patterns), "--include=*")
    done = git("apply", *options, "-", **where, stdin=patch)
    if done.returncode:
        return done.stderr or "git apply failed"
    # a rename is listed under its new name alone, and can have moved such a file
    if back := [name for name in files if name != kept and any(fnmatchcase(name, p) for p in patterns)]:
        checked(git("--literal-pathspecs", "checkout", "-q", workspace.repository.base, "--", *back, **where))
    return ""


def grade(
    task: FixTask, repository: Repository, patch: str, limits: Limits | None = None, trust_code: bool = False
) -> Grade:
    """Grade `patch` against `task`."""
    from swebench.harness.constants import APPLY_PATCH_FAIL, END_TEST_OUTPUT, START_TEST_OUTPUT, TESTS_TIMEOUT
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import make_test_spec

    workspace = Workspace(repository, limits, trust_code)
    try:
        if why := _apply(patch, workspace, task.path):
            log = f"{APPLY_PATCH_FAIL}:\n{why}"
        else:
            result = workspace.run(*PYTEST)
            ending = f"\n{TESTS_TIMEOUT}" if result.stopped else ""
            log = f"{START_TEST_OUTPUT}\n{result.output}\n{END_TEST_OUTPUT}\n{ending}"
    finally:
        workspace.close()
    prediction = {"instance_id": task.id, "model_name_or_path": "agent", "model_patch": patch}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test_output.txt")
        path.write_text(log)
        spec = make_test_spec(instance(task, repository.base))
        report = get_eval_report(spec, prediction, str(path), include_tests_status=True)[task.id]
    return Grade(bool(report["resolved"]), bool(report["patch_successfully_applied"]), report)
