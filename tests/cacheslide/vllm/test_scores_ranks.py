"""Scores under tensor parallelism: two ranks have those of one, and a fault on one leaves neither waiting."""

import os

import pytest

pytest.importorskip("vllm")

from tests.helpers.rank_processes import last_line
from tests.helpers.vllm_scores import FAULTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own"),
]
ENTRIES = """[cacheslide.policies]
remembering = tests.helpers.remembering:policy_of
remembering_chain = tests.helpers.remembering:chain_policy
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that makes the systems of `tests/cacheslide/core/test_remembering.py` known to every process that
    imports from it.
    """
    folder = tmp_path_factory.mktemp("installed")
    about = folder / "remembering-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: remembering\nVersion: 0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    return folder


def outcomes(installed, ranks: int) -> dict[str, list]:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", os.getcwd())])
    variables = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": path}
    return last_line("tests.helpers.vllm_scores", str(ranks), variables=variables, ranks=ranks)


@pytest.fixture(scope="module")
def alone(installed):
    return outcomes(installed, 1)["sound"]


@pytest.fixture(scope="module")
def two(installed):
    return outcomes(installed, 2)


def test_two_ranks_score_as_one(alone, two):
    for one, both in zip(alone, two["sound"], strict=True):
        assert one["said"] == both["said"] and both["said"][1][1] > 10
        assert one["faults"] == [0] and both["faults"] == [0, 0]
        [want], (first, second) = one["scores"], both["scores"]
        assert first == second and first.keys() == want.keys() and len(first) > 2
        for key, scores in want.items():
            assert first[key] == pytest.approx(scores, rel=2e-3, abs=1e-5)
        assert max(max(scores) for scores in want.values()) > 0.01


def test_a_fault_on_one_rank_costs_scores_and_nothing_hangs(alone, two):
    assert len(two["faulty"]) == len(FAULTS)
    for fault, systems in zip(FAULTS, two["faulty"], strict=True):
        for outcome, want in zip(systems, alone, strict=True):
            assert outcome["faults"][1] > 0, fault
            assert outcome["said"][0] == want["said"][0], fault  # nothing is reused there: it is exact
            assert outcome["said"][1][2] == want["said"][1][2] > 2, fault  # and every chunk is there afterwards
            assert any(s is None for s in outcome["scores"][1].values()), fault
