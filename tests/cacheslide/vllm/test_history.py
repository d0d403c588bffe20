"""Generated text as the next turn's history: retained where its KV lies, or encoded anew; generations rise and fall."""

from contextlib import closing

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide import ReuseEngine
from cacheslide.core.precompute import ahead, pregenerate
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.default import DEFAULT_SYSTEM
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.options import policy_of
from tests.helpers.checkpoints import save_random
from tests.helpers.served import CHUNK, SHAPE, Served, assert_same, logprobs, receipt
from tests.helpers.talks import BLOCKS, Talk, assert_exact, last_chunks
from tests.helpers.token_ids import random_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

LIMIT = 2  # generations retained


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("history"), **SHAPE)


@pytest.fixture(scope="module")
def served(path):
    settings = {"num_gpu_blocks_override": BLOCKS, "max_model_len": 320}
    with closing(Served(path, engine=settings, max_generation=LIMIT)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(path, served):
    model = ReferenceDecoder.from_pretrained(path)
    cos, sin = served.worker.model.layers[0].self_attn.rotary_emb.cos_sin_cache.chunk(2, dim=-1)
    model.rotaries[0].cos, model.rotaries[0].sin = cos, sin
    return model


@pytest.mark.parametrize("system", ["naive_reuse", "cacheslide_first_turn"])
def test_retained_history_is_hit_and_its_generation_rises_until_it_is_encoded_anew(served, reference, system):
    served.fresh()
    talk = Talk(served, policy=system)
    generations = []
    for turn in range(7):
        expected = 1 + sum(-(-len(p) // CHUNK) for p in talk.pieces)
        got, ids = talk.say()
        assert got["chunks"] == expected and got["chunks_hit"] == (expected if turn else 0)
        retained = got["history"]
        generations.append(retained["generation"] if retained["from"] == "blocks" else "anew")
        if generations[-1] in (0, "anew"):
            assert_exact(served, reference, ids, retained["start"], retained["end"])
        held = {key: served.worker.store.get(key).generation for key in served.scheduler.index._sizes}
        assert held == {key: served.scheduler.index.generation(key) for key in held}
        assert max(held.values()) <= LIMIT and (generations[-1] != "anew" or not any(held.values()))
    assert generations == [0, 1, 2, "anew", 1, 2, "anew"]


def test_canonical_chunks_are_always_encoded_exactly(served, reference):
    served.fresh()
    talk, engine = Talk(served), ReuseEngine(reference, policy_of("cacheslide"), MemoryChunkStore(), chunk_size=CHUNK)
    for turn in range(6):
        got, _ = talk.say(recompute_ratio=0.5)
        assert got["chunks_hit"] == (got["chunks"] if turn else 0)
        assert got["generation"] == got["history"]["generation"] == 0 and got["history"]["from"] == "encode"
    prompt, _ = talk.prompt()
    engine.build(prompt)
    for key, want in zip(engine.plan(prompt).keys[-2:], last_chunks(served, 2), strict=True):
        chunk = engine.store.get(key)
        assert_same(want.k, chunk.k, 2e-5)
        assert_same(want.v, chunk.v, 2e-5)


@pytest.mark.parametrize("system", ["cacheslide", DEFAULT_SYSTEM])
def test_a_tools_result_is_encoded_ahead_of_the_turn_that_shows_it(served, reference, system):
    """The server's side of `pregenerate`: the history so far and the result, sent as a request of one token."""
    served.fresh()
    head, result, other = (Segment(random_ids(n, seed), Role.REUSE) for n, seed in ((40, 1), (50, 2), (50, 3)))

    def turn(n: int, *results: Segment) -> Prompt:
        notes, question = (Segment(random_ids(7 + n, seed + n), Role.RECOMPUTE) for seed in (300, 400))
        return Prompt((head, notes, *results, question))

    def said(prompt: Prompt, tokens: int = 4) -> dict:
        served.poison()  # and vLLM's own prefix cache is empty
        return receipt(served.one(prompt, tokens=tokens, policy=system))

    first, later = turn(0), turn(4, result)
    said(first)
    early = said(ahead(first, [result]), tokens=1)
    assert early["chunks"] > early["chunks_hit"] == -(-40 // CHUNK)
    engine = ReuseEngine(reference, policy_of("cacheslide"), MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(first)
    done = pregenerate(engine, first, [result])
    assert done.computed == -(-50 // CHUNK) and done.chunks == early["chunks"]
    for key, want in zip(engine.plan(later).keys[-done.computed :], last_chunks(served, done.computed), strict=True):
        assert_same(want.k, engine.store.get(key).k, 2e-5)
        assert_same(want.v, engine.store.get(key).v, 2e-5)
    got = said(later)
    assert got["chunks_hit"] == got["chunks"] == done.chunks and got["generation"] == 0 and not got["fallback"]
    unseen = said(turn(5, other))
    assert unseen["chunks_hit"] == -(-40 // CHUNK) < unseen["chunks"]


@pytest.mark.parametrize("system", ["cacheblend", "epic", "cacheslide_promote", "recompute", "prompt_cache"])
def test_every_other_encoding_is_looked_up_where_it_was_left(served, system):
    served.fresh()
    talk = Talk(served, policy=system)
    for turn in range(2):
        prompt, start = talk.prompt()
        if system == "recompute":  # nothing to keep, and nothing to fall over
            annotations = {"cacheslide": {"segments": [[0, 6]], "history": start, "policy": system}}
            assert receipt(served.ask([prompt], [annotations])[0])["history"] is None
            continue
        got, _ = talk.say()
        assert got["history"]["from"] == "encode" and got["chunks_hit"] == (got["chunks"] if turn else 0)
        assert bool(got["chunks"]) and got["generation"] == 0


def test_history_is_copied_before_the_next_step_gives_its_blocks_away(served, reference):
    """The pool holds little more than one request: those that wait take the blocks in the very next step."""
    served.fresh()
    talk = Talk(served, policy="naive_reuse")
    waiting = [Prompt.from_spans(random_ids(250, 300 + i), []) for i in range(3)]
    seen = []
    begin = served.worker.begin
    served.worker.begin = lambda step: (
        seen.append((step.history_saves, served.scheduler.running.copy())),
        begin(step),
    )[1]
    try:
        got, ids = talk.say(beside=waiting)
    finally:
        del served.worker.begin
    [(saves, running)] = [(saves, running) for saves, running in seen if saves]
    taken = served.core.scheduler.kv_cache_manager
    assert saves[0].block_ids and running  # another request was given blocks in the step that copies
    assert taken.block_pool.num_gpu_blocks == BLOCKS
    assert_exact(served, reference, ids, got["history"]["start"], got["history"]["end"])


def test_a_limit_of_nought_keeps_no_corrected_kv(served, reference, monkeypatch):
    served.fresh()
    options = type(served.scheduler.options)(**{**vars(served.scheduler.options), "max_generation": 0})
    monkeypatch.setattr(served.scheduler.retention, "options", options)
    talk = Talk(served, policy="naive_reuse")
    kinds = [talk.say()[0]["history"]["from"] for _ in range(3)]
    assert kinds == ["blocks", "encode", "encode"]
    assert not any(served.scheduler.index.generation(key) for key in served.scheduler.index._sizes)


def test_a_prefix_cache_policy_copies_exact_rows_without_ageing(served, reference):
    """Where only an equal prefix matches, reused KV is exact, and so is what is built on it."""
    served.fresh()
    first = Prompt.from_spans(random_ids(40, 1), [(0, 40)])
    annotations = {"cacheslide": {"segments": [[0, 40]], "history": 40, "policy": "context_cache"}}
    [one] = served.ask([first], [annotations], tokens=20)
    ids = first.token_ids + tuple(one.outputs[0].token_ids)
    end = receipt(one)["history"]["end"]
    while served.core.scheduler.has_requests():
        served.core.step_fn()
    served.poison()
    second = Prompt.from_spans(ids + random_ids(9, 2), [(0, 40), (40, end)])
    annotations = {"cacheslide": {"segments": [[0, 40], [40, end]], "history": end, "policy": "context_cache"}}
    [two] = served.ask([second], [annotations], tokens=6)
    assert receipt(two)["chunks_hit"] == receipt(two)["chunks"] == 5 and receipt(two)["history"]["generation"] == 0
    while served.core.scheduler.has_requests():
        served.core.step_fn()
    whole = second.token_ids + tuple(two.outputs[0].token_ids)
    assert_exact(served, reference, whole, end, len(whole) - 1)
    served.poison()
    torch.testing.assert_close(logprobs(two), logprobs(served.plain(second)), atol=1e-4, rtol=1e-4)


def test_nothing_is_retained_of_what_was_not_generated(served):
    served.fresh()
    talk = Talk(served, policy="recompute")
    prompt, start = talk.prompt()
    annotations = {"cacheslide": {"segments": [[0, 6]], "history": start}}
    [output] = served.ask([prompt], [{"cacheslide": annotations["cacheslide"] | {"policy": "recompute"}}])
    assert receipt(output)["history"] is None
    [output] = served.ask([prompt], [{"cacheslide": annotations["cacheslide"] | {"encode": "off"}}])
    assert receipt(output)["history"] is None  # its encoding needs a prefill, which the request forbids
    engine = served.llm.llm_engine
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=50, detokenize=False, extra_args={"kv_transfer_params": annotations})
    engine.add_request("gone", {"prompt_token_ids": list(prompt.token_ids)}, params)
    engine.abort_request(["gone"])
    engine.step()
    assert (
        not served.scheduler.retention.history_saves
        and not served.scheduler.retention.jobs
        and not served.scheduler.running
    )
