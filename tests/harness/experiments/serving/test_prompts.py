"""Prompts around fixed chunks, the arms that are sent with them, and the receipts that count as reuse."""

import pytest

from harness.experiments.serving.arms import Arm
from harness.experiments.serving.engine_ttft import as_served, asked_of, check_reused
from harness.experiments.serving.prompts import CHUNKS, Prompts


@pytest.mark.parametrize("reused", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("system", [0, 96])
def test_prompts_have_their_length_and_share_of_fixed_text_which_moves(reused, system):
    prompts = Prompts(2048, 90, 1, reused, system)
    turns = [prompts.turn() for _ in range(20)]
    for ids, spans in turns:
        assert len(ids) == 2048 and len(spans) == CHUNKS + bool(system)
        assert sum(b - a for a, b in spans) == pytest.approx(reused * 2048, abs=CHUNKS)
        assert [ids[a:b] for a, b in spans][-CHUNKS:] == prompts.chunks
    updated = (1 - reused) * 2048
    starts = {spans[-CHUNKS][0] - system for _, spans in turns}
    assert len(starts) > 5 and 0.4 * updated - 1 <= min(starts) and max(starts) <= 0.6 * updated
    assert len(prompts.shared_prefix()) == 2048


def test_systems_that_change_the_prompt_are_sent_the_changed_one():
    ids, spans = Prompts(1024, 90, 1, 0.9, 96).turn()
    assert as_served("epic", ids, spans) == (ids, spans)
    moved, first = as_served("reorder", ids, spans)
    assert sorted(moved) == sorted(ids) and first[0] == [0, 96] and first[1][0] == 96
    padded, at = as_served("window_padding", ids, spans)
    assert at[1][0] - at[0][1] == 96 and len(padded) != len(ids)


def test_an_arm_without_a_ratio_leaves_the_systems_own():
    assert (
        Arm.parse("cacheblend") == Arm("cacheblend") and Arm("cacheblend", graphs=False).name == "cacheblend+launched"
    )
    assert Arm.parse("cacheblend+launched") == Arm("cacheblend", None, False)
    assert "recompute_ratio" not in asked_of(Arm("epic"), [[0, 4]])["cacheslide"]
    assert asked_of(Arm("epic", 0.05), [[0, 4]])["cacheslide"]["recompute_ratio"] == 0.05


def test_chunks_in_the_prefix_cache_count_as_reused_and_missing_ones_do_not():
    receipt = {"measured": True, "chunks": 3, "chunks_hit": 2, "fallback": "", "tokens_prefix_cached": 16}
    spans = [[0, 16], [20, 40], [40, 60]]
    assert check_reused(receipt, spans) is receipt
    for wrong in ({"tokens_prefix_cached": 15}, {"chunks_hit": 1}, {"fallback": "a fault"}, {"measured": False}):
        with pytest.raises(RuntimeError, match="reuse did not happen"):
            check_reused(receipt | wrong, spans)
    with pytest.raises(RuntimeError, match="reuse did not happen"):
        check_reused(receipt)
    assert check_reused(receipt | {"chunks_hit": 0}, exact=True)
    with pytest.raises(RuntimeError, match="reuse did not happen"):
        check_reused(receipt | {"chunks_hit": 0, "tokens_prefix_cached": 0}, exact=True)
