"""What a patch does to the files that judge it counts for nothing; the fix beside it counts."""

from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

from harness.agents.grading import grade, judges
from harness.agents.sandbox import Limits, missing
from harness.agents.tasks.fixes import fix_tasks
from harness.agents.workspace import Repository

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.slow]
TASK = next(t for t in fix_tasks("test", 1, 30) if t.kind == "constant")
TEST = TASK.fail_to_pass[0].split("::")[0]
LIMITS = Limits(seconds=60.0)
HOOK = "import pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True"
PASSED = "\\nPASSED ".join(("", *TASK.fail_to_pass, *TASK.pass_to_pass))
FORGED = f"import os\nos.write(1, b'{PASSED}\\n')\nos._exit(0)"


def new(path: str, text: str, mode: str = "100644") -> str:
    lines = "".join(f"+{line}\n" for line in text.split("\n"))
    head = f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
    end = "\\ No newline at end of file\n" if mode == "120000" else ""
    return f"{head}@@ -0,0 +1,{text.count(chr(10)) + 1} @@\n{lines}{end}"


def changed(path: str, before: str, after: str) -> str:
    old, new = (text.removesuffix("\n").split("\n") for text in (before, after))
    body = "".join([f"-{line}\n" for line in old] + [f"+{line}\n" for line in new])
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,{len(old)} +1,{len(new)} @@\n{body}"


def renamed(path: str, to: str) -> str:
    head = f"diff --git a/{path} b/{to}\nsimilarity index 100%\n"
    return f"{head}rename from {path}\nrename to {to}\n"


def fix() -> str:
    source = TASK.files[TASK.path]
    lines = source.split("\n")
    lines[TASK.line - 1] = TASK.fixed
    return changed(TASK.path, source, "\n".join(lines))


CHEATS = {
    "nothing": new("notes.txt", "x"),
    "hooks beside the tests": new("tests/conftest.py", HOOK),
    "hooks at the top": new("conftest.py", HOOK),
    "a package of tests": new("tests/__init__.py", FORGED),
    "a module beside the tests": new("tests/importlib.py", FORGED),
    "options in pytest.ini": new("pytest.ini", "[pytest]\naddopts = -p helper") + new("helper.py", HOOK),
    "options in setup.cfg": new("setup.cfg", "[tool:pytest]\naddopts = -p helper") + new("helper.py", HOOK),
    "options in tox.ini": new("tox.ini", "[pytest]\naddopts = -p helper") + new("helper.py", HOOK),
    "options in pyproject.toml": new("pyproject.toml", "[tool.pytest.ini_options]\naddopts = '-p helper'")
    + new("helper.py", HOOK),
    "options in .pytest.ini": new(".pytest.ini", "[pytest]\naddopts = -p helper") + new("helper.py", HOOK),
    "a plugin that says it is installed": new("x-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1")
    + new("x-1.dist-info/entry_points.txt", "[pytest11]\nx = helper")
    + new("helper.py", HOOK),
    "pytest itself": new("pytest.py", FORGED),
    "a package of pytest's": new("pluggy/__init__.py", FORGED),
    "a module of Python's": new("argparse.py", FORGED),
    "the test": changed(TEST, TASK.files[TEST], f"def {TASK.fail_to_pass[0].split('::')[1]}():\n    pass\n"),
    "the test in another place": renamed(TEST, "conf/moved.py") + new(TEST, "x"),
    "a link for the tests": "".join(renamed(p, f"conf/{n}.py") for n, p in enumerate(TASK.files) if "tests" in p)
    + new("tests", "mine", "120000")
    + new(f"mine/{TEST.split('/')[1]}", f"def {TASK.fail_to_pass[0].split('::')[1]}():\n    pass"),
}


@pytest.fixture(scope="module")
def repository():
    with closing(Repository(TASK.files)) as made:
        yield made


@pytest.mark.parametrize("name", CHEATS)
def test_a_patch_to_what_judges_does_not_pass(name, repository):
    verdict = grade(TASK, repository, CHEATS[name], LIMITS)
    assert not verdict.resolved
    assert verdict.report["tests_status"]["FAIL_TO_PASS"]["failure"] == list(TASK.fail_to_pass)
    assert verdict.report["tests_status"]["PASS_TO_PASS"]["success"] == list(TASK.pass_to_pass)


@pytest.mark.parametrize("name", ["nothing", "hooks at the top", "the test", "a link for the tests"])
def test_a_fix_passes_whatever_stands_beside_it(name, repository):
    assert grade(TASK, repository, fix() + CHEATS[name], LIMITS).resolved


def test_a_patch_that_does_not_apply_is_said_so(repository):
    verdict = grade(TASK, repository, changed(TASK.path, "not there\n", "x\n"), LIMITS)
    assert not verdict.applied and not verdict.resolved


def test_a_fix_may_be_in_a_file_that_judges_where_the_task_says_so():
    files = dict(TASK.files)
    files["conftest.py"] = "wrong = 1\n"
    files["tests/test_more.py"] = "import conftest\n\n\ndef test_more():\n    assert not hasattr(conftest, 'wrong')\n"
    ids = {"fail_to_pass": ("tests/test_more.py::test_more",), "pass_to_pass": TASK.pass_to_pass}
    task = replace(TASK, files=files, path="conftest.py", line=1, fixed="right = 1", **ids)
    with closing(Repository(files)) as repository:
        patch = changed("conftest.py", "wrong = 1\n", "right = 1\n")
        assert grade(task, repository, patch, LIMITS).resolved
        assert not grade(replace(task, path="conf/set_0.py"), repository, patch, LIMITS).resolved


def test_the_repositorys_own_modules_are_no_judges_for_their_names():
    def matches(name, *files):
        return any(fnmatchcase(name, pattern) for pattern in judges(files))

    assert matches("json.py") and matches("json/a.py") and not matches("json/a.py", "json/__init__.py", "x.py")
    assert not matches("conf/json.py") and not matches("conf/test.py") and matches("conf/tests/a.py")
