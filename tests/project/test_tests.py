"""Tests mirror the tree: a folder of tests for every folder of code, helpers apart, and marks say what is not fast."""

import ast
from pathlib import Path

import pytest

from tests.helpers.fast import APART, module_marks
from tests.helpers.places import ROOT

TESTS = ROOT / "tests"
MIRRORED = ("cacheslide", "baselines", "harness")
FREE = ("data", "helpers", "project", "workflows")


def with_code(package: str) -> set[Path]:
    """Folders of a package that hold modules, relative to the root."""
    files = (ROOT / package).rglob("*.py")
    return {path.parent.relative_to(ROOT) for path in files if path.name not in ("__init__.py", "__main__.py")}


def python_files() -> list[Path]:
    """The tests' Python files, relative to tests/."""
    return sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize("package", MIRRORED)
def test_every_folder_of_code_has_its_tests(package):
    folders = with_code(package)
    assert folders
    assert not [str(folder) for folder in sorted(folders) if not list((TESTS / folder).glob("test_*.py"))]


def test_every_folder_of_tests_mirrors_code():
    above = {parent for package in MIRRORED for folder in with_code(package) for parent in (folder, *folder.parents)}
    wrong = {path.parent for path in python_files() if path.parent not in above and path.parts[0] not in FREE}
    assert not wrong and not list(TESTS.glob("test_*.py"))


def test_what_is_no_test_is_a_helper():
    others = [path for path in python_files() if not path.name.startswith("test_") and path.parts[0] != "helpers"]
    assert {path.name for path in others} <= {"__init__.py", "conftest.py"}
    helpers = [path for path in python_files() if path.parts[0] == "helpers"]
    assert len(helpers) > 10 and not [path for path in helpers if path.name.startswith("test_")]
    tests = [(path, node.name) for path in helpers for node in functions(path) if node.name.startswith("test_")]
    assert not tests


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse((TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)]


def test_no_test_imports_another():
    """What two files need is a helper: then a file of tests can be moved, renamed and run alone."""
    wrong = [
        f"{path}:{node.lineno} {node.module}"
        for path in python_files()
        for node in ast.walk(ast.parse((TESTS / path).read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "tests"
        and not f"{node.module}.".startswith("tests.helpers.")
    ]
    assert not wrong


def test_what_imports_vllm_is_not_fast():
    """Importing vLLM takes seconds: such a module says by a mark that it is left out of `make test-fast`."""
    fast = [path for path in python_files() if not module_marks((TESTS / path).read_text()) & APART]
    wrong = [
        str(path)
        for path in fast
        if path.parts[0] != "helpers"
        for node in ast.parse((TESTS / path).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] == "vllm" for name in [getattr(node, "module", None) or node.names[0].name])
    ]
    assert not wrong


def test_marks_of_modules_are_read():
    assert module_marks("import pytest\npytestmark = [pytest.mark.slow, pytest.mark.skipif(x, reason='y')]") == {
        "slow",
        "skipif",
    }
    assert module_marks("pytestmark = pytest.mark.fault('row')") == {"fault"}
    assert module_marks("@pytest.mark.slow\ndef test(): ...") == set()
