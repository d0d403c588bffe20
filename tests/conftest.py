"""Shared fixtures: a small random checkpoint, an engine's environment, a calm machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheslide.models.reference import ReferenceDecoder
from tests.helpers.checkpoints import save_random
from tests.helpers.vllm_variables import VLLM_ENVIRONMENT

pytest_plugins = ["tests.helpers.skips", "tests.helpers.fast", "tests.helpers.fault_report"]


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
