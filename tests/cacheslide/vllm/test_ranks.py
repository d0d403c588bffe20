"""Tensor parallelism: two ranks say and report what one says and reports, turn after turn."""

import os

import pytest

pytest.importorskip("vllm")

from harness.robustness.faulty_ranks import SEAMS
from tests.helpers.rank_processes import last_line
from tests.helpers.vllm_turns import answers

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
def test_two_ranks_are_one():
    two, one = two_ranks(), answers(1)
    assert two == one
    assert [t["chunks_hit"] for t in one] == [0, *(t["chunks"] for t in one[1:4]), 0, *(t["chunks"] for t in one[5:])]
    assert [t["history"]["generation"] for t in one] == [0, 1, 2, 0, 0, 0, 0, 0]
    assert all(t["tokens_recomputed"] > 0 for t in one[5:])


@pytest.mark.server
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
def test_two_ranks_find_their_heads_again(tmp_path):
    """Two lives of two ranks over one folder say what two lives of one rank say."""
    shared, alone = str(tmp_path / "shared"), str(tmp_path / "alone")
    first, second = two_ranks(shared), two_ranks(shared)
    assert (first, second) == (answers(1, alone), answers(1, alone))
    assert first[0]["chunks_hit"] == 0 and second[0]["tiers"] == {"file": second[0]["chunks_hit"]} != {}
    assert answers(1, shared)[0]["chunks_hit"] == 0  # one rank's chunks are no rank's of two


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
def test_a_fault_on_one_rank_reaches_both_and_nothing_hangs(rank):
    """While preparing, within the run between a layer's sums, while keeping, while encoding; then all is well."""
    found = last_line("harness.robustness.faulty_ranks", str(rank))
    assert [o["seam"] for o in found] == [seam for seam, _, _ in SEAMS]
    for outcome in found:
        assert not outcome["wrong"] and outcome["faults"][rank] and outcome["reused"] > 0, outcome


def two_ranks(*store: str) -> list[dict]:
    return last_line("tests.helpers.vllm_turns", "2", *store)
