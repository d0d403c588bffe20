"""What one step's loads hold together: the bound on computed rows, the order of those that wait, nobody for ever."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from cacheslide import ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.scheduler.packing import computed_tokens
from tests.helpers.prompts import prompt
from tests.helpers.scheduling import FIXED_END, TURN, know, request, side, step_output

pytestmark = pytest.mark.slow

COMPUTED = 20 + 8  # of `TURN` under `cacheslide_first` at 10 %: the updated text, and of 77 reused tokens the first
FIRST = {"policy": "cacheslide_first", "recompute_ratio": 0.1}


def scheduler_of(*requests, stored: bool = True, **options):
    """A scheduler's half at which these have arrived."""
    scheduler = side(**options)
    for asked in requests:
        scheduler.arrive(asked)
        if stored and asked.request_id in scheduler.tracked:
            know(scheduler, asked.request_id)
    return scheduler


def several(count: int, **annotations):
    return [request(str(i), **(annotations or FIRST)) for i in range(count)]


def plain(req_id: str = "plain"):
    asked = request(req_id)
    asked.kv_transfer_params = None
    return asked


def begin_all(scheduler, waiting, arriving=()) -> list[list[str]]:
    """Steps until nobody waits, as vLLM plans them: who begins in each. One of `arriving` joins behind every step."""
    waiting, arriving, steps = list(waiting), list(arriving), []
    while waiting:
        began = {}
        for asked in waiting:
            rows = scheduler.claim(asked, 0)
            if rows is not None:
                began[asked.request_id] = rows
                scheduler.allocated(asked, rows)
        step = scheduler.step(step_output(dict.fromkeys(began, 5), began))
        assert [load.req_id for load in step.loads] == [r for r, rows in began.items() if rows]
        waiting = [asked for asked in waiting if asked.request_id not in began]
        if arriving:
            waiting.append(arriving.pop(0))
            scheduler.arrive(waiting[-1])
        steps.append(list(began))
        assert len(steps) < 100, "somebody waits for ever"
    return steps


@pytest.mark.parametrize(
    ("bound", "steps"),
    [
        (1, ["0", "1", "2", "3", "4"]),
        (COMPUTED, ["0", "1", "2", "3", "4"]),
        (2 * COMPUTED - 1, ["0", "1", "2", "3", "4"]),
        (2 * COMPUTED, ["01", "23", "4"]),
        (1024, ["01234"]),
    ],
)
def test_a_step_computes_no_more_rows_than_allowed(bound, steps):
    asked = several(5)
    scheduler = scheduler_of(*asked, computed_tokens_per_step=bound)
    assert ["".join(began) for began in begin_all(scheduler, asked)] == steps


def test_the_bound_on_completed_rows_holds_beside_it():
    asked = several(5)
    assert begin_all(scheduler_of(*asked, tokens_per_step=3 * FIXED_END), asked) == [["0", "1", "2"], ["3", "4"]]


def test_a_small_request_does_not_overtake_a_large_one():
    first, large = several(2)
    small = request("small", turn=Prompt((*TURN.segments[:2], TURN.segments[-1])), **FIRST)
    for bound in ({"computed_tokens_per_step": 2 * COMPUTED - 1}, {"tokens_per_step": 2 * FIXED_END - 1}):
        asked = [first, large, small]
        scheduler = scheduler_of(*asked, **bound)
        assert [scheduler.claim(r, 0) for r in (first, small)] == [FIXED_END, 6]  # beside the first it would fit
        assert begin_all(scheduler_of(*asked, **bound), asked) == [["0"], ["1", "small"]]


def test_no_request_passes_one_that_waits_for_its_turn():
    asked, behind, ahead = several(2), plain(), plain("ahead")
    exact = request("exact", turn=prompt(20, 7))
    scheduler = scheduler_of(*asked, behind, ahead, computed_tokens_per_step=1)
    scheduler.arrive(exact)  # none of its chunks is stored
    queue = [ahead, asked[0], asked[1], behind, exact]
    assert begin_all(scheduler, queue) == [["ahead", "0"], ["1", "plain", "exact"]]
    assert scheduler.tracked["exact"].reason.startswith("no chunk")


def test_requests_that_have_begun_before_go_on():
    """vLLM computes them, whatever waits; rows that reuse completes again count as those of any other request."""
    asked, behind = several(3), plain()
    scheduler = scheduler_of(*asked, computed_tokens_per_step=1)
    behind.status = asked[2].status = RequestStatus.PREEMPTED
    assert [scheduler.claim(r, 0) for r in asked] == [FIXED_END, None, None]
    assert scheduler.claim(behind, 0) == 0
    scheduler.step(step_output({}, {}))
    assert begin_all(scheduler, asked[1:]) == [["1"], ["2"]]


def test_a_request_that_waits_for_storage_holds_up_nobody_and_is_first_when_it_may():
    asked = several(3)
    scheduler = scheduler_of(*asked, computed_tokens_per_step=1)
    reading, looked = {"0"}, []

    def waits(tracked, wanted) -> bool:
        looked.append(name := next(r for r, t in scheduler.tracked.items() if t is tracked))
        return name in reading

    view = SimpleNamespace(waits=waits, release=lambda tracked: None, take=lambda: ([], []))
    scheduler.storage_tier = view
    assert [scheduler.claim(r, 0) for r in asked] == [None, FIXED_END, None]
    assert looked == ["0", "1", "2"]  # reads begin while a request waits for its turn
    scheduler.allocated(asked[1], FIXED_END)
    scheduler.step(step_output({"1": 5}, {"1": FIXED_END}))
    reading.clear()
    assert begin_all(scheduler, [asked[0], asked[2]]) == [["0"], ["2"]]


def test_a_request_that_waits_for_blocks_of_this_step_holds_up_nobody():
    asked, filling = several(2), plain()
    scheduler = scheduler_of(*asked, computed_tokens_per_step=1)
    filling.block_hashes = asked[0].block_hashes = [b"0", b"1"]
    asked[1].block_hashes = [b"2", b"3"]
    scheduler.allocated(filling, 0)
    assert [scheduler.claim(r, 32) for r in asked] == [None, FIXED_END - 32]


def test_nobody_waits_for_ever():
    """New requests keep coming; each begins within as many steps as requests stood in front of it."""
    waiting, coming = several(3), [request(f"new{i}", **FIRST) for i in range(20)]
    scheduler = scheduler_of(*waiting, computed_tokens_per_step=1)
    steps = begin_all(scheduler, waiting, coming)
    assert [name for began in steps for name in began] == [r.request_id for r in (*waiting, *coming)]


def test_one_that_goes_away_while_it_waits_leaves_nothing_behind():
    asked = several(3)
    scheduler = scheduler_of(*asked, computed_tokens_per_step=1)
    assert [scheduler.claim(r, 0) for r in asked] == [FIXED_END, None, None]
    assert scheduler.finish(asked[1])["tokens_reused"] == 0
    scheduler.allocated(asked[0], FIXED_END)
    assert [load.req_id for load in scheduler.step(step_output({"0": 5}, {"0": FIXED_END})).loads] == ["0"]
    assert scheduler.claim(asked[2], 0) == FIXED_END and set(scheduler.tracked) == {"0", "2"}


def test_chunks_of_requests_that_wait_stay():
    """Room is made by dropping what was used longest ago: not what somebody in line is about to read."""
    asked, other = several(2), request("other", turn=prompt(20, 7, fixed=(40,)), **FIRST)
    scheduler = scheduler_of(*asked, other, computed_tokens_per_step=1)
    assert [scheduler.claim(r, 0) for r in asked] == [FIXED_END, None]
    scheduler.index.capacity = scheduler.index.nbytes
    evicted = scheduler.index.reserve({"new": 1})
    assert evicted and set(evicted) <= set(scheduler.tracked["other"].plan.keys)


RULES = {
    "naive": load_policy("naive_reuse").correction,
    "first": FirstTokens(0.3),
    "edges": replace(load_policy("epic").correction, head=3, tail=2),
    "early": load_policy("cacheslide").correction,
    "late": load_policy("cacheslide").correction.at_layer(3).at_ratio(0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_the_estimate_is_what_the_engine_computes(model, name):
    policy = replace(load_policy("cacheslide_first_turn"), correction=RULES[name])
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(37, 3))
    said = engine.prefill(TURN).receipt
    plan = engine.plan(TURN)
    got = computed_tokens(policy.correction, plan.keyed, range(len(TURN)), len(TURN) - 1, model.num_layers)
    assert said.tokens_reused > 0 and abs(got - sum(said.tokens_per_layer) / model.num_layers) <= 1


def test_the_estimate_counts_what_is_left_behind_the_prefix_cache():
    chunks = load_policy("cacheslide_first"), TURN.chunks(16)
    keyed = tuple((str(i), c) for i, c in enumerate(chunks[1]))
    rule = FirstTokens(0.5)
    assert computed_tokens(rule, keyed, range(FIXED_END), 101, 5) == 20 + 39
    assert computed_tokens(rule, keyed, range(60, FIXED_END), 101, 5) == 19  # of 37 reused tokens; no updated text
    assert computed_tokens(rule, keyed, range(FIXED_END), 87, 5) == 20 + 10 + 34  # rows behind the limit are computed
    assert computed_tokens(DeviationBudget(), keyed, range(FIXED_END), 101, 5) == FIXED_END  # scores decide: maybe all
    asking = QuestionAware(0.5, 2)  # a rule that looks first is taken at its ratio
    assert computed_tokens(asking, keyed, range(FIXED_END), 101, 5) == 20 + 39
