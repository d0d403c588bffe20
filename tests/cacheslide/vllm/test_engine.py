"""The connector inside a running vLLM (CPU): parity with the reference engine, batches, prefix cache, preemption."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from cacheslide import ReuseEngine
from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.core.static_prefill import StaticPrefill
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies import registry
from cacheslide.policies.boundary import BoundaryTokens
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.registry import load_policy
from cacheslide.policies.shrinking import ShrinkingTokens
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.options import annotations_of, policy_of
from cacheslide.vllm.scheduler.retention import BEHIND
from tests.helpers.adapter_protocol import check
from tests.helpers.checkpoints import save_random
from tests.helpers.late_copies import LateCopies
from tests.helpers.prompts import prompt
from tests.helpers.served import (
    BLOCK,
    CHUNK,
    FIRST,
    FIXED,
    SECOND,
    SHAPE,
    Served,
    assert_same,
    logprobs,
    receipt,
    tokens,
)
from tests.helpers.served import reference as reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("vllm"), **SHAPE)


@pytest.fixture(scope="module")
def vanilla(path):
    """What vLLM without the connector says to both turns; run first, since a process has one connector."""
    with closing(Served(path, connector=False)) as engine:
        return [*engine.ask([FIRST, SECOND]), engine.plain(SECOND)]


@pytest.fixture(scope="module")
def served(path, vanilla):
    with closing(Served(path)) as engine:
        yield engine


@contextmanager
def exact_turns(served, path) -> Iterator[None]:
    """vLLM's rotation tables, which the reference model shares, from float64 angles for the length of a test.

    A key turned by p is a key turned by p + s and back by s only as far as the tables' angles add up. vLLM rounds each
    angle to float32, which is off by up to 2^-24 of it: at 511 positions 3e-5 a table entry, three of them in a way
    there and back. How much of it shows depends on which powers and products a processor rounds up. From float64
    angles entries are off by 2^-25, and so is what is compared.
    """
    exact = ReferenceDecoder.from_pretrained(path).rotaries[0]
    tables = {id(t): t for t in (layer.self_attn.rotary_emb.cos_sin_cache for layer in served.worker.model.layers)}
    kept = {name: table.clone() for name, table in tables.items()}
    for table in tables.values():
        table.copy_(torch.cat((exact.cos, exact.sin), dim=-1))
    try:
        yield
    finally:
        for name, table in tables.items():
            table.copy_(kept[name])


SYSTEMS = {
    "context_cache": {},
    "reorder": {},
    "prompt_cache": {},
    "prompt_cache_joint": {},
    "cacheblend": {},
    "cacheblend_stale": {"layer": 2},
    "cacheblend_gradual": {"recompute_ratio": 0.4},
    "cacheblend_code": {"layer": 2},
    "epic": {"recompute_ratio": 0.26},  # its 64 edge rows would cover these chunks whole
    "epic_stale": {"recompute_ratio": 0.26},
    "epic_0": {},
    "epic_8": {},
    "window_padding": {},
    "naive_reuse": {},
    "cacheslide": {},
    "cacheslide_first_turn": {"layer": 3},
    "cacheslide_promote": {},
    "cacheslide_first": {},
    "cacheslide_remember": {"recompute_ratio": 0.4},
    "cacheslide_overlap": {"recompute_ratio": 0.3},
    "cacheslide_mixed": {"recompute_ratio": 0.4},
}
SCHEMAS = ("prompt_cache", "prompt_cache_joint")  # text lies at other positions than its rows


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_leaves_the_kv_that_the_reference_engine_leaves(served, reference, path, system):
    # Only a schema's positions are turned back: everything else is compared with the tables that vLLM made.
    with exact_turns(served, path) if system in SCHEMAS else nullcontext():
        check_the_kv(served, reference, system)


RULES = {"boundary": BoundaryTokens(0.3), "shrinking": ShrinkingTokens(0.6, 0.2, 1), "budget": DeviationBudget(0, 0.4)}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_leaves_the_kv_that_the_reference_engine_leaves(served, reference, monkeypatch, name):
    made = replace(load_policy("cacheslide_first_turn"), name=name, correction=RULES[name])
    monkeypatch.setattr(registry, "_own", {name: lambda: made})
    check_the_kv(served, reference, name)


def test_a_rule_that_looks_at_the_question_takes_the_first_tokens(served, reference, monkeypatch):
    """vLLM computes what stands behind the last chunk by itself: the request that is completed ends there."""
    rules = {"asking": QuestionAware(0.3, 2), "first": FirstTokens(0.3)}
    kv = []
    for name, rule in rules.items():
        made = replace(load_policy("cacheslide_first_turn"), name=name, correction=rule)
        monkeypatch.setattr(registry, "_own", {name: lambda made=made: made})
        served.fresh()
        served.one(FIRST, policy=name)
        served.poison()
        said = receipt(served.one(SECOND, policy=name))
        assert said["tokens_recomputed"] > 0 and not said["fallback"] and len(set(said["tokens_per_layer"])) == 1
        kv.append(served.kv(len(SECOND) - 5))
    assert all(torch.equal(a, b) for a, b in zip(*kv, strict=True))


def check_the_kv(served, reference, system) -> None:
    """Both turns under `system`, in vLLM and in the reference engine: same receipt, K, V and log-probabilities."""
    changes = SYSTEMS.get(system, {})
    policy = policy_of(system, **changes)
    first, second = policy.transform(FIRST), policy.transform(SECOND)
    engine = ReuseEngine(reference, policy, MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(first)
    want = engine.prefill(second)
    served.fresh()
    assert receipt(served.one(first, policy=system, **changes))["chunks_hit"] == 0
    served.poison()
    output = served.one(second, 1, policy=system, **changes)
    got = receipt(output)
    for name in ("tokens_reused", "tokens_recomputed", "chunks_hit", "bytes_loaded"):
        assert got[name] == getattr(want.receipt, name), name
    assert got["compute_fraction"] == pytest.approx(want.receipt.compute_fraction)
    assert got["measured"] and not got["fallback"] and got["tokens_reused"] > 0
    rows = min(len(second), BLOCK * len(served.plans[-1].block_ids))  # those behind the last chunk are vLLM's own
    k, v = served.kv(rows)
    shift = want.next_position - len(second)  # a schema's positions run ahead of vLLM's by as much
    assert (shift > 0) is (system in SCHEMAS)
    if shift:
        k = torch.stack([reference.rotaries[0].rotate(x, torch.full((rows,), shift)) for x in k])
    assert_same(k, want.kv.k[:, :rows])
    assert_same(v, want.kv.v[:, :rows])
    torch.testing.assert_close(logprobs(output), want.logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_the_adapter_is_complete(served):
    check(served.worker.model)


def test_requests_without_annotations_get_the_bits_of_vanilla_vllm(served, vanilla):
    served.fresh()
    for got, want in zip([*served.ask([FIRST, SECOND]), served.plain(SECOND)], vanilla, strict=True):
        assert tokens(got) == tokens(want) and got.kv_transfer_params is None
        assert all(torch.equal(logprobs(got, i), logprobs(want, i)) for i in range(4))


@pytest.mark.parametrize("system", ["cacheslide", "cacheblend", "epic"])
def test_share_one_is_plain_vllm_and_share_zero_is_not(served, system):
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST, policy=system)
    served.poison()
    full = served.one(SECOND, policy=system, recompute_ratio=1.0)
    assert tokens(full) == tokens(truth) and receipt(full)["tokens_reused"] == 0 < receipt(full)["chunks_hit"]
    torch.testing.assert_close(logprobs(full), logprobs(truth), atol=1e-4, rtol=1e-4)
    served.poison()
    none = served.one(SECOND, policy=system, recompute_ratio=0.0)
    assert receipt(none)["tokens_recomputed"] == 0 < receipt(none)["tokens_reused"]
    assert (logprobs(none) - logprobs(truth)).abs().max() > 1e-2


@pytest.mark.parametrize("system", ["epic", "naive_reuse"])
def test_static_layers_leave_the_bits_of_the_layer_loop(served, monkeypatch, system):
    """Two requests of different lengths in one packed run, through the packed cache's writes."""
    third, settings = prompt(41, 9, question=17, fixed=FIXED), {"policy": system, **SYSTEMS[system]}

    def bits():
        served.fresh()
        served.one(FIRST, **settings)
        served.poison()
        outputs = served.ask([SECOND, third], [annotations_of(p, **settings) for p in (SECOND, third)])
        assert all(receipt(o)["tokens_reused"] > 0 and not receipt(o)["fallback"] for o in outputs)
        plans = {plan.req_id: plan for plan in served.plans[-2:]}
        assert len(plans) == 2
        kept = []
        for plan, p in zip(sorted(plans.values(), key=lambda x: x.rows), (SECOND, third), strict=True):
            assert plan.rows == len(p)
            kv, rows = served.worker.model.paged_kv(plan.block_ids, BLOCK), torch.arange(plan.end)
            kept += [x for layer in range(5) for x in kv.read(layer, rows)]
        return kept, [logprobs(o) for o in outputs]

    static = bits()
    monkeypatch.setattr(ActiveTokens, "static_from", property(lambda self: self.model.num_layers))
    monkeypatch.setattr(StaticPrefill, "run", None)
    looped = bits()
    for mine, theirs in zip(static, looped, strict=True):
        assert all(map(torch.equal, mine, theirs)) and not any(x.isnan().any() for x in mine)


def test_a_load_that_does_nothing_is_noticed(served, monkeypatch):
    """The control of the tests above: with the run left out, the poisoned blocks show."""
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST)
    served.poison()
    with monkeypatch.context() as patch:
        patch.setattr(SelectivePrefill, "run", lambda self, requests: [])
        patch.setattr(served.worker, "load", lambda step: [served.worker.loads.done(p.req_id) for p in step.loads])
        broken = served.one(SECOND, recompute_ratio=1.0)
    assert (logprobs(broken) - logprobs(truth)).abs().max() > 1e-2


def test_a_mixed_batch_equals_its_requests_one_by_one(served):
    """Systems, shares, first sights and plain requests in one step: corrected in one packed run, beside the rest."""
    served.fresh()
    for system in ("cacheslide", "epic", "cacheslide_mixed"):  # the last one's chunks are first_turn's too
        served.one(FIRST, policy=system)
    third, fourth = prompt(9, 8, question=11, fixed=FIXED[:2]), prompt(44, 21, fixed=FIXED)
    cut = prompt(20, 70, fixed=(40,))  # its last chunk is new
    batch = [
        (SECOND, annotations_of(SECOND)),
        (SECOND, None),
        (third, annotations_of(third, policy="epic", recompute_ratio=0.3)),
        (third, annotations_of(third, policy="cacheslide_first_turn", recompute_ratio=0.5)),
        (fourth, annotations_of(fourth, recompute_ratio=0.7)),
        (cut, annotations_of(cut, encode="off")),
        (fourth, annotations_of(fourth, policy="cacheslide_mixed")),
        (third, None),
    ]
    alone = []
    for p, annotations in batch:
        served.poison()
        alone += served.ask([p], [annotations])
    served.poison()
    served.plans.clear()
    runs = served.worker.executor.run
    sizes = []
    served.worker.executor.run = lambda requests: (sizes.append(len(requests)), runs(requests))[1]
    try:
        together = served.ask([p for p, _ in batch], [m for _, m in batch])
    finally:
        served.worker.executor.run = runs
    assert sizes == [1, 5]  # the first step's tokens went to the exact prefill behind its first request
    for got, want, (_, annotations) in zip(together, alone, batch, strict=True):
        assert tokens(got) == tokens(want)
        torch.testing.assert_close(logprobs(got), logprobs(want), atol=1e-4, rtol=1e-4)
        if annotations is not None:
            for name in ("tokens_reused", "tokens_recomputed", "chunks_hit", "fallback"):
                assert receipt(got)[name] == receipt(want)[name]


def test_a_prefix_that_is_being_computed_in_the_same_step_is_waited_for(served):
    """vLLM shares blocks of a request it schedules in this step; reuse runs before the forward that fills them."""
    served.fresh()
    short = prompt(70, 5, fixed=(20,))  # its head covers two blocks and fits one step
    served.one(prompt(37, 3, fixed=(20,)))
    head = Prompt((Segment(short.token_ids[:66], Role.RECOMPUTE),))
    served.poison()
    served.plain(head)
    want = served.one(short, recompute_ratio=0.0)
    served.poison()
    _, got = served.ask([head, short], [None, annotations_of(short, recompute_ratio=0.0)])
    assert receipt(want)["tokens_prefix_cached"] == receipt(got)["tokens_prefix_cached"] == 64
    torch.testing.assert_close(logprobs(got), logprobs(want), atol=1e-4, rtol=1e-4)


def test_approximate_blocks_serve_no_other_request(served):
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST)
    served.poison()
    first = served.one(SECOND, recompute_ratio=0.0)
    assert receipt(first)["tokens_reused"] > 0
    plain = served.plain(SECOND)
    assert plain.num_cached_tokens == 0 and torch.equal(logprobs(plain), logprobs(truth))
    served.poison()
    served.one(SECOND, recompute_ratio=0.0)
    again = served.one(SECOND, recompute_ratio=1.0)  # nor another annotated request
    assert receipt(again)["tokens_prefix_cached"] == 0
    torch.testing.assert_close(logprobs(again), logprobs(truth), atol=1e-4, rtol=1e-4)


def test_exact_blocks_are_shared_and_never_written(served):
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST)
    served.poison()
    head = Prompt((Segment(SECOND.token_ids[:100], Role.RECOMPUTE),))
    served.plain(head)
    blocks = 96 // BLOCK
    output = served.one(SECOND, recompute_ratio=0.0)
    assert receipt(output)["tokens_prefix_cached"] == 96 and served.plans[-1].start == 96
    shared = served.plans[-1].block_ids[:blocks]
    before = [p.cache[shared].clone() for p in served.worker.model.paged]
    served.one(SECOND, recompute_ratio=1.0)
    assert served.plans[-1].block_ids[:blocks] == shared
    assert all(torch.equal(p.cache[shared], x) for p, x in zip(served.worker.model.paged, before, strict=True))
    plain = served.plain(SECOND)
    assert plain.num_cached_tokens == 96
    torch.testing.assert_close(logprobs(plain), logprobs(truth), atol=1e-4, rtol=1e-4)


def test_a_prefix_hit_inside_a_chunk_reuses_the_rest_of_it(served, reference):
    """Rows behind the hit: all selected equals plain; none selected equals the engine's cached rows, moved."""
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST, policy="naive_reuse")
    served.poison()
    served.plain(Prompt((Segment(SECOND.token_ids[:100], Role.RECOMPUTE),)))
    output = served.one(SECOND, 1, policy="naive_reuse")
    found = receipt(output)
    assert found["tokens_prefix_cached"] == 96 and found["tokens_reused"] == 6 + sum(FIXED) - (96 - 53)
    engine = ReuseEngine(reference, policy_of("naive_reuse"), MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(FIRST)
    want = engine.prefill(SECOND)
    k, v = served.kv(len(SECOND) - 1)
    reused = torch.arange(96, 59 + sum(FIXED))
    assert_same(k[:, reused], want.kv.k[:, reused])
    assert_same(v[:, reused], want.kv.v[:, reused])
    torch.testing.assert_close(logprobs(served.plain(SECOND)), logprobs(truth), atol=1e-4, rtol=1e-4)


def test_a_schema_does_not_read_blocks_whose_keys_sit_elsewhere(served):
    served.fresh()
    served.one(FIRST, policy="prompt_cache")
    served.poison()
    want = served.one(SECOND, policy="prompt_cache")
    served.poison()
    served.plain(Prompt((Segment(SECOND.token_ids[:100], Role.RECOMPUTE),)))
    got = served.one(SECOND, policy="prompt_cache")
    assert receipt(got)["tokens_prefix_cached"] == 0
    assert receipt(got)["tokens_reused"] == receipt(want)["tokens_reused"] > 0
    assert torch.equal(logprobs(got), logprobs(want))


@pytest.mark.parametrize("system", ["naive_reuse", "cacheslide", "cacheblend"])
def test_corrected_kv_is_never_stored(served, reference, system):
    """A history that grew: its new chunks are encoded exactly, not copied from the corrected request's blocks."""
    grown = prompt(53, 5, fixed=(*FIXED, 40))
    served.fresh()
    served.one(FIRST, policy=system)
    served.poison()
    output = served.one(grown, policy=system, recompute_ratio=0.0)
    assert 0 < receipt(output)["chunks_hit"] < receipt(output)["chunks"]
    engine = ReuseEngine(reference, policy_of(system), MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(grown)
    new = list(served.scheduler.index._sizes)[-3:]
    want = [engine.store.get(key) for key in engine.plan(grown).keys[-3:]]
    for key, chunk in zip(new, want, strict=True):
        got = served.worker.store.get(key)
        assert torch.equal(got.positions, chunk.positions) and got.generation == 0
        assert_same(got.k, chunk.k)
        assert_same(got.v, chunk.v)


def test_a_preempted_request_goes_on_where_it_was(served):
    served.fresh()
    served.one(FIRST)
    served.poison()
    want = served.one(SECOND, 24, recompute_ratio=0.5)
    served.poison()
    engine, done = served.llm.llm_engine, []
    settings = {"max_tokens": 24, "temperature": 0, "detokenize": False, "ignore_eos": True}
    for i, annotations in enumerate([annotations_of(SECOND, recompute_ratio=0.5), None]):
        extra = None if annotations is None else {"kv_transfer_params": annotations}
        params = SamplingParams(**settings, extra_args=extra)
        engine.add_request(str(i), {"prompt_token_ids": list(SECOND.token_ids)}, params)
    for step in range(60):
        if step == 9:
            before = len(served.plans)
            assert served.core.scheduler.reset_prefix_cache(reset_running_requests=True)
        done += [o for o in engine.step() if o.finished]
    outputs = {o.request_id: o for o in done}
    assert len(served.plans) > before  # claimed again, since its blocks were gone
    assert tokens(outputs["0"]) == tokens(want)
    assert tokens(outputs["1"]) == tokens(served.plain(SECOND, 24))
    assert not served.scheduler.tracked and not served.scheduler.prefilling


def test_aborted_requests_leave_nothing_behind(served):
    served.fresh()
    served.one(FIRST)
    engine = served.llm.llm_engine
    params = SamplingParams(max_tokens=50, detokenize=False, extra_args={"kv_transfer_params": annotations_of(SECOND)})
    for name, steps in (("waiting", 0), ("running", 2)):
        engine.add_request(name, {"prompt_token_ids": list(SECOND.token_ids)}, params)
        for _ in range(steps):
            engine.step()
        engine.abort_request([name])
        engine.step()
    assert not served.scheduler.tracked and not served.scheduler.prefilling and not served.scheduler.box


@pytest.mark.parametrize("system", ["cacheslide", "cacheblend", "epic"])
def test_chunks_are_used_only_once_their_copies_are_done(served, monkeypatch, system):
    """Copied out of the blocks, and encoded: a load that read before the copy would find NaN."""
    served.fresh()
    served.one(FIRST, policy=system)
    served.poison()
    want = served.one(SECOND, policy=system, recompute_ratio=0.3)
    served.fresh()
    monkeypatch.setattr(served.worker.store, "copies", late := LateCopies())
    served.one(FIRST, policy=system)
    assert late.sent and not any(copy.query() for copy in late.sent)
    served.poison()
    got = served.one(SECOND, policy=system, recompute_ratio=0.3)
    assert tokens(got) == tokens(want) and torch.equal(logprobs(got), logprobs(want))
    assert receipt(got)["chunks_hit"] == receipt(want)["chunks_hit"] > 0


def test_several_samples_of_one_prompt(served):
    served.fresh()
    served.one(FIRST)
    served.poison()
    [output] = served.ask([SECOND], [annotations_of(SECOND, recompute_ratio=1.0)], n=3, temperature=1.0, seed=5)
    truth = served.plain(SECOND)
    assert len(output.outputs) == 3
    for sample in output.outputs:
        found = torch.tensor([sample.logprobs[0][t].logprob for t in sorted(sample.logprobs[0])])
        torch.testing.assert_close(found, logprobs(truth), atol=1e-4, rtol=1e-4)


def test_prompt_logprobs_are_computed_exactly(served):
    served.fresh()
    [want] = served.ask([SECOND], prompt_logprobs=0)
    served.one(FIRST)
    [got] = served.ask([SECOND], [annotations_of(SECOND)], prompt_logprobs=0)
    assert "prompt_logprobs" in receipt(got)["fallback"] and receipt(got)["chunks_hit"] == 0
    pick = [[next(iter(x.values())).logprob for x in o.prompt_logprobs[1:]] for o in (got, want)]
    assert pick[0] == pick[1] and len(pick[0]) == len(SECOND) - 1


def test_namespaces_and_salts_keep_tenants_apart(served):
    served.fresh()
    served.one(FIRST, namespace="a")
    served.poison()
    assert receipt(served.one(SECOND, namespace="b"))["chunks_hit"] == 0
    served.poison()
    assert receipt(served.one(SECOND, namespace="a"))["chunks_hit"] > 0
    served.poison()
    inputs = {"prompt_token_ids": list(SECOND.token_ids), "cache_salt": "tenant"}
    extra = {"kv_transfer_params": annotations_of(SECOND, namespace="a")}
    params = SamplingParams(max_tokens=2, detokenize=False, extra_args=extra)
    [output] = served.llm.generate([inputs], params, use_tqdm=False)
    assert receipt(output)["chunks_hit"] == 0 and "no chunk" in receipt(output)["fallback"]


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        ([[0, 10]], "must be an object"),
        ({}, "'segments' is missing"),
        ({"segments": [[0, 10], [5, 20]]}, "overlaps"),
        ({"segments": [[0, 10_000]]}, "outside the prompt"),
        ({"segments": [[0, 10]], "policy": "magic"}, "unknown system 'magic'"),
        ({"segments": [[0, 10]], "polcy": "epic"}, "unknown key polcy"),
        ({"segments": [[0, 10]], "recompute_ratio": 1.5}, "recompute_ratio must lie in"),
        ({"segments": [[6, 59], [70, 80]], "policy": "window_padding"}, "rewrites prompts"),
        ({"segments": [[0, 10]], "policy": "kvcomm"}, "kvcomm keeps notes beside its chunks"),
    ],
)
def test_malformed_annotations_are_refused_at_the_door(served, annotations, reason):
    with pytest.raises(VLLMValidationError, match=reason):
        served.ask([SECOND], [{"cacheslide": annotations}])
    assert not served.scheduler.tracked and not served.llm.llm_engine.has_unfinished_requests()


def test_a_chunk_the_worker_lost_is_recomputed(served):
    served.fresh()
    served.one(FIRST)
    truth = served.plain(SECOND)
    served.poison()
    key = next(iter(served.worker.store._chunks))
    served.worker.store.drop([key])
    output = served.one(SECOND, recompute_ratio=1.0)
    assert "was not in the worker's store" in receipt(output)["fallback"] and key not in served.scheduler.index
    torch.testing.assert_close(logprobs(output), logprobs(truth), atol=1e-4, rtol=1e-4)


def test_a_small_store_evicts_and_stays_bounded(served, monkeypatch):
    served.fresh()
    capacity = 9 * served.scheduler.planner.geometry.chunk_bytes(CHUNK, 0)
    monkeypatch.setattr(served.scheduler.index, "capacity", capacity)
    for seed in (3, 5, 7):
        p = prompt(20, seed, fixed=(40 + seed, 20))
        served.one(p, policy="epic", recompute_ratio=0.3)
        assert served.scheduler.index.nbytes == served.worker.store.nbytes <= capacity
        assert set(served.scheduler.index._sizes) == set(served.worker.store._chunks)
    assert served.worker.store.stats.evictions > 0


def test_encoding_later_happens_in_a_following_step(served):
    served.fresh()
    served.one(FIRST, 1, encode="later")
    assert (
        len(served.scheduler.retention.jobs) == 1 and served.core.scheduler.has_requests()
    )  # a server goes on stepping
    for _ in range(BEHIND):  # the first of them may be planned before anybody has seen the token
        served.core.step_fn()
    assert not served.scheduler.retention.jobs and not served.core.scheduler.has_requests()
    served.poison()
    assert receipt(served.one(SECOND))["chunks_hit"] > 0
