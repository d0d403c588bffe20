"""Grades a patch as SWE-bench does: applied to a fresh worktree, tests run there, the log read by `swebench`.

The tests are the task's own: what a patch does to files under tests/ is undone before they run. The run is confined
like every other (swebench's own harness needs docker).
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.agents.git import git
from harness.agents.sandbox import Limits
from harness.agents.tasks.fixes import FixTask
from harness.agents.workspace import Repository, Workspace

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "tests")


@dataclass(frozen=True)
class Grade:
    """swebench's verdict: `resolved` when every FAIL_TO_PASS and PASS_TO_PASS test passes. `report` is its own."""

    resolved: bool
    applied: bool
    report: dict[str, Any]


def instance(task: FixTask, base: str) -> dict[str, Any]:
    """The task as an instance that `swebench.make_test_spec` reads."""
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


def grade(
    task: FixTask, repository: Repository, patch: str, limits: Limits | None = None, trust_code: bool = False
) -> Grade:
    """Grade `patch` against `task`."""
    from swebench.harness.constants import APPLY_PATCH_FAIL, END_TEST_OUTPUT, START_TEST_OUTPUT, TESTS_TIMEOUT
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import make_test_spec

    workspace = Workspace(repository, limits, trust_code)
    try:
        done = git("apply", "-", git_dir=workspace.git_dir, tree=workspace.root, stdin=patch)
        if done.returncode:
            log = f"{APPLY_PATCH_FAIL}:\n{done.stderr}"
        else:
            git("checkout", "-q", repository.base, "--", "tests", git_dir=workspace.git_dir, tree=workspace.root)
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
