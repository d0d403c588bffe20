"""A fault in the connector costs the reuse of one request: at every entry that vLLM calls, against plain vLLM."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from cacheslide.vllm.claims import Claims, Loads
from cacheslide.vllm.connector import CacheSlideConnector
from cacheslide.vllm.frontend import openai_server as servers
from cacheslide.vllm.guard import ENTRIES, Faults, survives
from cacheslide.vllm.offline import close_engine
from cacheslide.vllm.protocol import StepPlan
from cacheslide.vllm.scheduler.metrics import ReuseStats
from cacheslide.vllm.scheduler.setbacks import check_claim
from cacheslide.vllm.worker.ranks import Team, TeamPrefill
from harness.robustness import faulty_rounds
from harness.robustness.faulty_rounds import Rounds, alike, answers, cases, open_plain, open_reusing, truths
from harness.robustness.seams import ENTRY_SEAMS, SEAMS, owner_of, raising
from tests.helpers.scheduling import FIXED_END, TURN, know, request, side, step_output

pytestmark = pytest.mark.slow

# Called once, when the engine starts: what fails there stops it, with the reason.
AT_START = {"__init__", "register_kv_caches", "requires_kv_delivery", "build_kv_connector_stats", "build_prom_metrics"}
NOTHING = {"wait_for_layer_load", "save_kv_layer"}  # do nothing
MADE_OF = {  # guarded in parts
    "build_connector_meta": ("_plan", "_settle"),
    "bind_connector_metadata": ("_begin",),
    "get_finished": ("_encode", "_on_loaded"),
}


def test_every_method_that_vllm_calls_is_guarded():
    """A method that a later vLLM asks for, or that we come to override, cannot be forgotten."""
    known = {name for base in CacheSlideConnector.__mro__[1:] for name in vars(base)}
    ours = {name for name in vars(CacheSlideConnector) if name in known and not name.startswith("__")} | {"__init__"}
    ours -= {"_abc_impl"}
    guarded = {name for name in ours if hasattr(vars(CacheSlideConnector)[name], "entry")}
    assert ours == guarded | AT_START | NOTHING | set(MADE_OF)
    for parts in MADE_OF.values():
        assert all(hasattr(vars(CacheSlideConnector)[part], "entry") for part in parts)
    entries = {getattr(f, "entry", "") for f in vars(CacheSlideConnector).values()} - {""}
    assert entries <= set(ENTRIES)
    # what the rounds below raise at
    assert entries - set(ENTRY_SEAMS) == {"get_finished", "shutdown"}
    assert issubclass(CacheSlideConnector, KVConnectorBase_V1)


# --- rounds in an engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounds(vllm_environment, tmp_path_factory):
    truth = truths(open_plain())
    made = Rounds(open_reusing(tmp_path_factory.mktemp("store")), truth)
    yield made
    close_engine(made.engine)


def entry_rounds() -> list[tuple[str, str]]:
    return [(seam, "always") for seams in ENTRY_SEAMS.values() for seam in seams]


_SCORER = "cacheslide.vllm.worker.scoring.Scorer"
SCORING = [f"{_SCORER}:run", f"{_SCORER}:_held", f"{_SCORER}:_score", f"{_SCORER}:_one"]
SCORING += ["cacheslide.core.remembering.Contrast:scores", "worker.store:await_no_more"]
INNER_ROUNDS = [  # a store that lies, a plan of another, a run that fails half-way: whatever their own checks say
    pytest.param("scheduler.storage_tier.persistent:where", "always", marks=pytest.mark.fault("lying_store")),
    pytest.param("worker.storage_tier:arrivals", "late", marks=pytest.mark.fault("lying_store")),
    pytest.param("worker.storage_tier.store:fetch", "always", marks=pytest.mark.fault("hostile_store")),
    pytest.param("cacheslide.core.placement.PlacedChunks:layer", "always", marks=pytest.mark.fault("forged_record")),
    pytest.param("scheduler.planner:_member", "always", marks=pytest.mark.fault("family")),
    pytest.param("cacheslide.vllm.worker.ranks.TeamPrefill:compute", "once"),
    pytest.param("worker.store:put", "late"),
    pytest.param("scheduler.retention:reserve", "late"),
    *(pytest.param(seam, "always") for seam in SCORING),
    pytest.param("worker.store:rescore", "late"),
]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("seam", "mode"), [*entry_rounds(), *INNER_ROUNDS])
def test_a_fault_costs_reuse_and_nothing_else(rounds, seam, mode):
    """Annotated, isolated, history, unchanged, plain and preempted requests, from memory and from files."""
    beams = "_member" in seam
    heal = seam in ("worker:load", "scheduler:reset", "worker.store:put", "worker.storage_tier:arrivals")
    out = rounds.round(seam, mode, RuntimeError, beams=beams, heal=heal)
    assert not out.died and not out.wrong, out
    assert out.raised and (out.faults or seam.startswith("worker.storage_tier.store")), out


@pytest.mark.vllm
def test_requests_that_do_not_end_in_time_are_aborted(rounds, monkeypatch):
    """One round that hangs is one failure, not one of every round behind it."""
    asked = cases(rounds.engine.get_tokenizer(), 0)
    with monkeypatch.context() as patch:
        patch.setattr(faulty_rounds, "LIMIT_S", 0.0)
        assert answers(rounds.engine, asked) == {}
    rounds._idle()
    rounds._poison()
    assert answers(rounds.engine, asked).keys() == {case.name for case in asked}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("seam", SCORING[:-1])  # what is done behind it comes too late
def test_a_fault_in_scoring_costs_the_scores_alone(rounds, seam):
    """The chunks are there and are reused; without scores the rule takes a chunk's first tokens."""
    rounds._fresh()
    tokenizer, store = rounds.engine.get_tokenizer(), rounds.worker.store
    for turn, faulty in enumerate((True, False)):
        asked = next(c for c in cases(tokenizer, turn) if c.name == "remembered")
        with raising(seam, "always", OSError, rounds.parts) if faulty else nullcontext() as counts:
            rounds._poison()
            [(said, receipt)] = answers(rounds.engine, [asked]).values()
            rounds._idle()
        assert alike(said, rounds.truth[turn]["remembered"])
        if faulty:
            scores = [store.get(key).scores for key in list(store._chunks)]
            assert counts.raised and scores and not any(s is not None and s.any() for s in scores)
    assert receipt["chunks_hit"] == receipt["chunks"] > 1 and not receipt["fallback"]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_receipt_and_the_counter_say_where(rounds):
    with raising("scheduler:claim", "always", MemoryError, rounds.parts):
        found = answers(rounds.engine, cases(rounds.engine.get_tokenizer(), 1))
    for name, (_, receipt) in found.items():
        if name in ("marked", "isolated", "unchanged"):
            assert receipt["fallback"] == "fault at get_num_new_matched_tokens" and receipt["tokens_reused"] == 0
    assert found["plain"][1] is None
    assert rounds.scheduler.faults.total["get_num_new_matched_tokens"] > 0


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_guard_counts_and_speaks_once(caplog):
    class Guarded:
        faults = Faults()

        @survives("retain", lambda self, x: x[1], last="last")
        def first(self, x):
            return x[0]

    guarded = Guarded()
    assert guarded.first("ab") == "a"
    with caplog.at_level("ERROR", "vllm.cacheslide"):
        assert guarded.first({1: "other"}) == "other"  # KeyError, then what stands in for it
        assert guarded.first({2: 0}) == guarded.first({}) == "last"
    assert guarded.faults.total == {"retain": 5}
    assert len(caplog.records) == 1 and "KeyError" in caplog.text and "wait to be retained" in caplog.text
    assert guarded.faults.take() == {"faults.retain": 5} and guarded.faults.take() == {}
    stats = ReuseStats(data={"faults.retain": 1})
    stats.count({"faults.retain": 5})
    assert stats.reduce() == {"faults.retain": 6}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_guard_does_not_hold_up_the_end(stop):
    class Guarded:
        faults = Faults()

        @survives("retain")
        def first(self):
            raise stop

    with pytest.raises(stop):
        Guarded().first()


def test_a_gpu_that_is_gone_is_not_survived(monkeypatch):
    faults = Faults()
    faults.device = torch.device("cuda", 0)
    waits = [None, RuntimeError("CUDA error: an illegal memory access was encountered")]

    def synchronize(device) -> None:
        if (error := waits.pop(0)) is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    faults.note("start_load_kv", torch.OutOfMemoryError("CUDA out of memory"))
    faults.note("start_load_kv", KeyError("nothing of the device's"))
    with pytest.raises(RuntimeError, match="kernel"):
        faults.note("start_load_kv", RuntimeError("kernel failed"))
    assert faults.total == {"start_load_kv": 2} and not waits


def test_what_was_claimed_and_not_planned_has_failed():
    claims, asked = Claims(16), request()
    claims.allocated(asked, 40)
    asked.num_computed_tokens = 56  # 16 of them from the prefix cache
    output = step_output({"r": 5}, {"r": 56})
    output.kv_connector_block_state.block_ids["r"] = ([7, 8, 9, 10, 11],)
    step = StepPlan()
    claims.settle(step, output)
    assert step.failed == {"r": [8, 9, 10]}
    assert claims.lost({9}) == [asked] and claims.lost({7, 11}) == []
    again = StepPlan()
    claims.settle(again, output)
    assert not again.failed
    claims.forget("r")
    assert claims.lost({9}) == []


def test_loads_are_open_until_they_are_done():
    load = SimpleNamespace(req_id="a", block_ids=[4, 5, 6, 7], start=16, end=40)
    other = SimpleNamespace(req_id="b", block_ids=[1, 2], start=0, end=32)
    loads = Loads(16)
    loads.begin(StepPlan(loads=[load, other], failed={"c": [9]}))
    loads.done("b")
    assert loads.every() == {1, 2, 5, 6, 9}
    assert loads.errors() == {5, 6, 9} and loads.errors() == set()


@pytest.mark.fault("family")
def test_a_plan_of_another_prompt_claims_nothing():
    """A later member of a family that is shorter than its plan, or another text: whatever the door let in."""
    scheduler, asked = side(), request()
    connector = SimpleNamespace(scheduler=scheduler, faults=scheduler.faults)
    scheduler.arrive(asked)
    know(scheduler)
    claim = CacheSlideConnector.get_num_new_matched_tokens
    assert claim(connector, asked, 0) == (FIXED_END, False)
    for change in ({"num_prompt_tokens": 30}, {"prompt_token_ids": [5, *TURN.token_ids[1:]]}):
        scheduler, asked = side(), request()
        connector = SimpleNamespace(scheduler=scheduler, faults=scheduler.faults)
        connector._claim_nothing = CacheSlideConnector._claim_nothing
        scheduler.arrive(asked)
        know(scheduler)
        vars(asked).update(change)
        with pytest.raises(ValueError, match="prompt"):
            check_claim(scheduler, asked, 0, FIXED_END)
        assert claim(connector, asked, 0) == (0, False)
        assert scheduler.tracked["r"].reason == "fault at get_num_new_matched_tokens"
        assert scheduler.finish(asked)["fallback"] == "fault at get_num_new_matched_tokens"


@pytest.mark.parametrize("broken", ["json", "watch"])
def test_a_stream_goes_on_without_its_receipt(monkeypatch, broken):
    async def generated():
        yield SimpleNamespace(kv_transfer_params={"cacheslide": {"rows": 5}} if broken == "json" else 5)

    async def plain(self, request, result_generator, request_id, model_name):
        async for _ in result_generator:
            yield "data: {}\n\n"
        yield "data: [DONE]\n\n"

    async def events() -> list[str]:
        stream = servers._with_receipt(plain, "text_completion")
        return [event async for event in stream(None, None, generated(), "id", "model")]

    before = servers.SERVER.total["server"]
    if broken == "json":
        assert len(asyncio.run(events())) == 3  # the control
        monkeypatch.setattr(servers, "_event", lambda *args: {"receipt": object()})
    assert asyncio.run(events()) == ["data: {}\n\n", "data: [DONE]\n\n"]
    assert servers.SERVER.total["server"] == before + 1


def test_a_rank_that_fails_before_the_run_says_so_once():
    said = []
    team = Team()
    team.agree = lambda flags: said.append(list(flags)) or list(flags)
    with pytest.raises(OSError), team.unit():
        raise OSError
    assert said == [[False]]
    prefill = TeamPrefill(SimpleNamespace(), team, 8)
    prefill.compute = lambda requests, capture: requests[0]
    with pytest.raises(IndexError), team.unit():
        prefill.run([])
    assert said == [[False]]  # within the run the others have heard from this rank already


def test_a_seam_is_what_it_was_when_the_fault_is_over():
    parts = {"scheduler": side(), "worker": SimpleNamespace()}
    for seam in SEAMS:
        if seam.startswith(("worker", "scheduler.storage_tier")):
            continue
        owner, name = owner_of(seam, parts)
        before = vars(owner).get(name)
        with raising(seam, "always", OSError, parts) as counts:
            assert vars(owner)[name] is not before
        assert vars(owner).get(name) is before and counts.calls == 0
