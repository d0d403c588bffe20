"""Every way to annotate, in one running engine with a tokenizer: same spans, same reuse, plain requests untouched."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.frontend.chat import annotate_messages
from cacheslide.vllm.offline import beam_search, close_engine
from tests.helpers.annotated import CHAT_ANNOTATIONS, MODEL, SEPARATOR, joined, messages
from tests.helpers.chat_template import TEMPLATE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.fixture(scope="module")
def engine():
    extra = {"chunk_size": 32, "encode": "now", "separator": SEPARATOR, "span_tokens": 16}
    llm = LLM(
        MODEL,
        dtype="float32",
        max_model_len=1024,
        block_size=32,
        enforce_eager=True,
        max_num_seqs=16,
        kv_transfer_config={"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra},
    )
    yield llm
    close_engine(llm)


def side_of(engine):
    """The connector's scheduler half."""
    return engine.llm_engine.engine_core.engine_core.scheduler.connector.scheduler


@pytest.fixture
def fresh(engine):
    """The engine as after a start, its blocks full of garbage."""
    side_of(engine).reset()
    assert engine.reset_prefix_cache()
    g = torch.Generator().manual_seed(0)
    for paged in get_kv_transfer_group().worker.model.paged:  # not NaN: masked rows enter the CPU kernel with weight 0
        paged.cache.copy_(torch.randn(paged.cache[:1].shape, generator=g).expand_as(paged.cache))
    return engine


def sampling(annotations=None, tokens: int = 3) -> SamplingParams:
    extra = None if annotations is None else {"kv_transfer_params": {"cacheslide": annotations}}
    return SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True, extra_args=extra)


def said(output) -> list[tuple[int, float]]:
    """Generated tokens with their log-probabilities."""
    first = output.outputs[0]
    return [(t, p[t].logprob) for t, p in zip(first.token_ids, first.logprobs, strict=True)]


def receipt(output) -> dict:
    return output.kv_transfer_params["cacheslide"]


COUNTED = ("tokens", "tokens_reused", "tokens_recomputed", "chunks", "chunks_hit", "bytes_loaded", "fallback")


def by_separator(turn: int, **annotations):
    return lambda llm: llm.generate(joined(turn), sampling({"separator": SEPARATOR, **annotations}), use_tqdm=False)[0]


def by_messages(turn: int, **annotations):
    settings = sampling(CHAT_ANNOTATIONS | annotations)
    return lambda llm: llm.chat(messages(turn), settings, chat_template=TEMPLATE, use_tqdm=False)[0]


def by_ids(turn: int, **annotations):
    """The same prompt as ids with a separator of ids."""

    def ask(llm):
        tokenizer = llm.get_tokenizer()
        parts = [tokenizer.encode(p, add_special_tokens=False) for p in joined(turn).split(SEPARATOR)]
        ids = [tokenizer.bos_token_id, *parts[0]]
        for part in parts[1:]:
            ids += [3, 3, 4, *part]
        settings = sampling(
            {"separator": [3, 3, 4], "roles": ["reuse", "recompute", "reuse", "recompute"], **annotations}
        )
        return llm.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0]

    return ask


def as_segments(output, segments, **annotations):
    """The same tokens, annotated by offsets."""
    return lambda llm: llm.generate(
        {"prompt_token_ids": output.prompt_token_ids},
        sampling({"segments": [list(s) for s in segments], **annotations}),
        use_tqdm=False,
    )[0]


@pytest.mark.parametrize("way", [by_separator, by_messages, by_ids])
def test_a_way_to_mark_is_what_its_offsets_are(fresh, way):
    way(0)(fresh)
    assert fresh.reset_prefix_cache()
    got = way(1)(fresh)
    assert receipt(got)["chunks_hit"] == receipt(got)["chunks"] > 5 and receipt(got)["tokens_reused"] > 100
    assert not receipt(got)["fallback"]
    tokenizer = fresh.get_tokenizer()
    if way is by_messages:
        annotated = annotate_messages(tokenizer, messages(1), {"updated": [1]}, chat_template=TEMPLATE)
        ids, segments = annotated.token_ids, annotated.segments
    else:
        parts = [tokenizer.encode(p, add_special_tokens=False) for p in joined(1).split(SEPARATOR)]
        parts[0] = [tokenizer.bos_token_id, *parts[0]]
        ids = [t for p in parts for t in p]
        two = len(parts[0]) + len(parts[1])
        segments = [(0, len(parts[0])), (two, two + len(parts[2]))]
    assert got.prompt_token_ids == ids
    assert fresh.reset_prefix_cache()
    want = as_segments(got, segments)(fresh)
    assert said(got) == said(want)
    assert {k: receipt(got)[k] for k in COUNTED} == {k: receipt(want)[k] for k in COUNTED}


def test_what_was_seen_before_is_found(fresh):
    plain = fresh.generate(joined(1, ""), sampling(), use_tqdm=False)[0]
    assert plain.kv_transfer_params is None
    first = fresh.generate(joined(0, ""), sampling({"find": True}), use_tqdm=False)[0]
    assert "seen before" in receipt(first)["fallback"]
    second = fresh.generate(joined(1, ""), sampling({"find": True}), use_tqdm=False)[0]
    assert "no chunk" in receipt(second)["fallback"] and receipt(second)["chunks"] > 3  # known, but not encoded yet
    assert fresh.reset_prefix_cache()
    third = fresh.generate(joined(2, ""), sampling({"find": True, "recompute_ratio": 0.3}), use_tqdm=False)[0]
    assert receipt(third)["chunks_hit"] > 3 and receipt(third)["tokens_reused"] > 80
    salted = {"prompt": joined(1, ""), "cache_salt": "other tenant"}
    other = fresh.generate(salted, sampling({"find": True}), use_tqdm=False)[0]
    assert "seen before" in receipt(other)["fallback"]
    assert fresh.reset_prefix_cache()
    again = fresh.generate(joined(1, ""), sampling(), use_tqdm=False)[0]
    assert said(again) == said(plain) and again.kv_transfer_params is None


def test_a_server_may_look_for_spans_by_itself(fresh, monkeypatch):
    planner = side_of(fresh).planner
    monkeypatch.setattr(planner, "options", replace(planner.options, find_spans=True))
    plain = fresh.generate(joined(1, ""), sampling({"find": False}), use_tqdm=False)[0]
    assert plain.kv_transfer_params is None and not planner.memory.held
    for hit in (False, False, True):
        assert fresh.reset_prefix_cache()
        output = fresh.generate(joined(1, ""), sampling(), use_tqdm=False)[0]
        assert (receipt(output)["chunks_hit"] > 0) is hit
    beams = fresh.beam_search([{"prompt": joined(1, "")}], BeamSearchParams(beam_width=2, max_tokens=3))
    assert len(beams[0].sequences) == 2 and not side_of(fresh).tracked


BEAMS = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)


def searched(engine, *asked: tuple, tokens: int = 5):
    """Annotated beam searches, which run together: prompts with annotations."""
    params = BeamSearchParams(beam_width=3, max_tokens=tokens, ignore_eos=True)
    annotations = [None if m is None else {"cacheslide": m} for _, m in asked]
    prompts = [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": p} for p, _ in asked]
    return beam_search(engine, prompts, params, annotations)


def same_beams(got, want) -> bool:
    pairs = list(zip(got, want, strict=True))
    return all(a.tokens == b.tokens and abs(a.cum_logprob - b.cum_logprob) < 1e-3 for a, b in pairs)


def test_unannotated_beams_are_those_of_an_engine_without_reuse(fresh):
    want = fresh.beam_search([{"prompt": joined(1, "")}], BEAMS)[0].sequences
    by_separator(0)(fresh)
    by_separator(1, recompute_ratio=0.0)(fresh)
    searched(fresh, (joined(1), {"separator": SEPARATOR, "recompute_ratio": 0.0}))
    assert same_beams(fresh.beam_search([{"prompt": joined(1, "")}], BEAMS)[0].sequences, want)


@torch.inference_mode()
def spoil_chunks() -> None:
    """Noise in every chunk: where a row of theirs is used as it is, it shows."""
    g = torch.Generator().manual_seed(1)
    for chunk in get_kv_transfer_group().worker.store._chunks.values():
        for x in (chunk.k, chunk.v):
            x.copy_(torch.randn(x.shape, generator=g))


def test_annotated_beams_share_the_rows_that_their_first_step_completed(fresh):
    first = by_separator(1)(fresh)
    want = fresh.beam_search([{"prompt_token_ids": first.prompt_token_ids}], BEAMS)[0].sequences
    for recompute_ratio, same in ((1.0, True), (0.0, False)):
        by_separator(0)(fresh)
        spoil_chunks()
        assert fresh.reset_prefix_cache()
        [found] = searched(fresh, (joined(1), {"separator": SEPARATOR, "recompute_ratio": recompute_ratio}))
        assert same_beams(found.sequences, want) is same
        assert found.receipt["chunks_hit"] == found.receipt["chunks"] > 5 and found.receipt["measured"]
        assert found.receipt["beams"] == {"requests": 13, "completed_by_reuse": 1}
        assert not side_of(fresh).tracked


def test_beams_whose_rows_were_given_away_complete_them_again(fresh, monkeypatch):
    first = by_separator(1)(fresh)
    want = fresh.beam_search([{"prompt_token_ids": first.prompt_token_ids}], BEAMS)[0].sequences
    step, annotations = BeamSearchOfflineMixin._beam_search_step, {"separator": SEPARATOR, "recompute_ratio": 1.0}

    def forgetful(self, *args, **kwargs):
        assert self.reset_prefix_cache()
        return step(self, *args, **kwargs)

    spoil_chunks()
    assert fresh.reset_prefix_cache()
    monkeypatch.setattr(BeamSearchOfflineMixin, "_beam_search_step", forgetful)
    [found] = searched(fresh, (joined(1), annotations))
    assert same_beams(found.sequences, want)
    assert found.receipt["beams"]["completed_by_reuse"] >= 5


def test_searches_of_different_prompts_and_annotations_run_together(fresh):
    alone = []
    by_separator(0)(fresh)
    by_separator(0, policy="prompt_cache")(fresh)
    asked = [
        (joined(1), {"separator": SEPARATOR, "recompute_ratio": 0.3}),
        (joined(1, ""), None),
        (joined(1), {"separator": SEPARATOR, "policy": "prompt_cache"}),
        (joined(2), {"separator": SEPARATOR, "recompute_ratio": 0.3, "history": 0, "encode": "off"}),
        (joined(2), {"separator": SEPARATOR, "policy": "recompute"}),
    ]
    for one in asked:
        assert fresh.reset_prefix_cache()
        alone += searched(fresh, one)
    assert fresh.reset_prefix_cache()
    for got, want in zip(searched(fresh, *asked), alone, strict=True):
        assert same_beams(got.sequences, want.sequences)
        assert got.receipt == want.receipt or got.receipt["tokens_prefix_cached"]
    exact = alone[4].receipt
    assert "reuses nothing" in exact["fallback"] and exact["beams"]["completed_by_reuse"] == 0
    assert alone[3].receipt["history"] is None and "retains no history" in alone[3].receipt["note"]
    assert alone[2].receipt["chunks_hit"] > 0 and alone[2].receipt["beams"]["completed_by_reuse"] == 1
    with pytest.raises(VLLMValidationError, match="is not in the prompt"):
        searched(fresh, (joined(1), {"separator": "@@"}))


def test_sixteen_requests_annotated_in_every_way_at_once(fresh):
    """In one batch: what each of them says and reports is what it says and reports alone."""
    engine = fresh.llm_engine
    tokenizer = fresh.get_tokenizer()
    chat = [annotate_messages(tokenizer, messages(t), {"updated": [1]}, chat_template=TEMPLATE) for t in range(2)]
    for ask in (by_separator(0), by_messages(0), by_ids(0, policy="epic", recompute_ratio=0.3)):
        ask(fresh)
    for _ in range(2):
        fresh.generate(joined(0, ""), sampling({"find": True}), use_tqdm=False)
    jobs = [
        (joined(1), {"separator": True}),
        (joined(1), {"separator": SEPARATOR, "recompute_ratio": 0.5}),
        (joined(1), {"roles": ["recompute", "recompute", "reuse", "recompute"], "policy": "epic"}),
        ({"prompt_token_ids": chat[1].token_ids}, chat[1].params()["cacheslide"]),
        ({"prompt_token_ids": chat[1].token_ids}, chat[1].params(recompute_ratio=0.7)["cacheslide"]),
        (joined(0, ""), {"find": True, "recompute_ratio": 0.4}),
        (joined(1, ""), None),
        (joined(0, ""), {"find": False}),
    ]
    alone = []
    for prompt, annotations in jobs:
        assert fresh.reset_prefix_cache()
        alone.append(fresh.generate(prompt, sampling(annotations), use_tqdm=False)[0])
    assert fresh.reset_prefix_cache()
    for i, (prompt, annotations) in enumerate(2 * jobs):
        engine.add_request(str(i), {"prompt": prompt} if isinstance(prompt, str) else prompt, sampling(annotations))
    with pytest.raises(VLLMValidationError, match="'##!' is not in the prompt"):
        engine.add_request("bad", {"prompt": joined(1)}, sampling({"separator": "##!"}))
    done = {}
    while engine.has_unfinished_requests():
        done |= {int(o.request_id): o for o in engine.step() if o.finished}
    assert len(done) == 16
    compared = 0
    for i, want in enumerate(2 * alone):
        got, annotations = done[i], jobs[i % 8][1]
        assert (
            (got.kv_transfer_params is None)
            is (want.kv_transfer_params is None)
            is (annotations in (None, {"find": False}))
        )
        if got.kv_transfer_params is not None:
            assert receipt(got)["chunks_hit"] > 0 and not receipt(got)["fallback"], jobs[i % 8]
            if receipt(got)["tokens_prefix_cached"]:  # blocks of another one of the batch: other rows are selected
                continue
            assert {k: receipt(got)[k] for k in COUNTED} == {k: receipt(want)[k] for k in COUNTED}
        compared += 1
        assert [t for t, _ in said(got)] == [t for t, _ in said(want)], jobs[i % 8]
        assert [p for _, p in said(got)] == pytest.approx([p for _, p in said(want)], abs=1e-3)
    assert compared >= 9


def test_a_chat_template_without_boundaries_is_computed_exactly_and_says_why(fresh):
    late = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}{{ messages|length }}"
    settings = sampling({"messages": "auto"})
    output = fresh.chat(messages(1), settings, chat_template="{{ messages|length }}" + late, use_tqdm=False)[0]
    assert "differently when others follow" in receipt(output)["fallback"] and receipt(output)["tokens_reused"] == 0
    with pytest.raises(VLLMValidationError, match="3 roles for 5 messages"):
        fresh.chat(messages(1), sampling({"messages": ["reuse"] * 3}), chat_template=TEMPLATE, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="in a chat request only"):
        fresh.generate(joined(1), settings, use_tqdm=False)


def test_a_template_that_refuses_is_asked_once(fresh, monkeypatch):
    """vLLM logs every error of a template with its trace; the same chat must not fill the log."""
    renderer = fresh.llm_engine.input_processor.renderer
    asked, plain = [], renderer.render_messages
    monkeypatch.setattr(renderer, "render_messages", lambda m, p: (asked.append(len(m)), plain(m, p))[1])
    strict = "{% if messages|length < 3 %}{{ raise_exception('too short') }}{% endif %}" + TEMPLATE
    for turn in range(2):
        settings = sampling({"messages": {"updated": [1, 4]}})
        output = fresh.chat(messages(turn), settings, chat_template=strict, use_tqdm=False)[0]
        assert "the first 1 messages alone (too short)" in receipt(output)["note"] and receipt(output)["chunks"] > 3
    assert asked.count(1) == 1 and asked.count(5) == 2
