"""Shared fixtures: a small random checkpoint, an engine's environment, a calm machine; and reports of faults."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheslide.models.reference import ReferenceDecoder
from harness.robustness.rows import ROWS
from tests.helpers.checkpoints import save_random
from tests.helpers.vllm_variables import VLLM_ENVIRONMENT

pytest_plugins = ["tests.helpers.skips", "tests.helpers.fast"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A 5-layer GQA Llama with odd sizes."""
    return save_random(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(checkpoint) -> ReferenceDecoder:
    """The reference model over `checkpoint`, float32."""
    return ReferenceDecoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    """What an engine of a test module needs to be told by environment variables, for that module only."""
    import torch._dynamo  # has read its variable when it was imported, maybe before

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        for name, value in VLLM_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def environment_after() -> Iterator[None]:
    """What an engine sets up in its process does not reach servers that later tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def nobody_beside() -> Iterator[None]:
    """No timed block of a test counts as disturbed: what a table leaves out is not for the machine of the day to say.

    Tests of what follows from a disturbed block bring readings along; tests/harness/test_quiet.py takes this back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.quiet.judge", lambda reading: "")
        yield


def pytest_addoption(parser) -> None:
    parser.addoption("--fault-report", type=Path, help="write the outcome of every test marked `fault` to this file")


def pytest_collection_modifyitems(items) -> None:
    """A mark that names no row of the list is a mistake."""
    for item in items:
        for mark in item.iter_markers("fault"):
            if mark.args[0] not in ROWS:
                raise pytest.UsageError(f"{item.nodeid}: no row {mark.args[0]!r} in harness/robustness/rows.py")


_FAULTS: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for mark in item.iter_markers("fault"):
        said = _FAULTS.setdefault(mark.args[0], {})
        if report.when == "call" or report.outcome != "passed":
            said[item.nodeid] = "failed" if said.get(item.nodeid) == "failed" else report.outcome
    return report


def pytest_sessionfinish(session) -> None:
    if (path := session.config.getoption("--fault-report")) is not None:
        path.write_text(json.dumps(_FAULTS, indent=1, sort_keys=True) + "\n")
