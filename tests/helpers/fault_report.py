"""`pytest --fault-report FILE` writes the outcome of every test marked `fault`, by row of harness/robustness/rows.py.

A test's rows travel with its reports, so the file is the same whether tests run in one process or in several (xdist).
"""

import json
from pathlib import Path

import pytest

from harness.robustness.rows import ROWS

PROPERTY = "fault"
_OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_addoption(parser) -> None:
    parser.addoption("--fault-report", type=Path, help="write the outcome of every test marked `fault` to this file")


def pytest_collection_modifyitems(items) -> None:
    """A mark that names no row of the list is a mistake."""
    for item in items:
        for mark in item.iter_markers("fault"):
            if mark.args[0] not in ROWS:
                raise pytest.UsageError(f"{item.nodeid}: no row {mark.args[0]!r} in harness/robustness/rows.py")
            item.user_properties.append((PROPERTY, mark.args[0]))


def pytest_runtest_logreport(report) -> None:
    for name, row in report.user_properties:
        if name == PROPERTY and (report.when == "call" or report.outcome != "passed"):
            outcomes = _OUTCOMES.setdefault(row, {})
            outcomes[report.nodeid] = "failed" if outcomes.get(report.nodeid) == "failed" else report.outcome


def pytest_sessionfinish(session) -> None:
    if (path := session.config.getoption("--fault-report")) is not None and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps(_OUTCOMES, indent=1, sort_keys=True) + "\n")
