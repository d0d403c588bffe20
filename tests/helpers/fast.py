"""`pytest --fast` leaves out what is marked slow, vllm, server or gpu: what `make test-fast` runs.

Modules that are marked as a whole are not even imported: importing vLLM takes longer than most tests.
"""

import ast
from pathlib import Path

APART = frozenset({"slow", "vllm", "server", "gpu"})


def module_marks(source: str) -> set[str]:
    """Names of the marks in a module's `pytestmark`."""
    return {
        node.attr
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark"
        for node in ast.walk(statement.value)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }


def pytest_addoption(parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"leave out what is marked {', '.join(sorted(APART))}")


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    if not config.getoption("--fast") or collection_path.suffix != ".py":
        return None
    return True if module_marks(collection_path.read_text()) & APART else None


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--fast"):
        return
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in APART)]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)
