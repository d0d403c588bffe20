"""Rules at work in the reference host: the question's attention, sets that shrink, and all of them on poisoned KV."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.request_builder import RequestBuilder
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.boundary import BoundaryTokens
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.deviation import deviation, tokens_of_ratio, top_rows
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.mixed import MixedTokens
from cacheslide.policies.question_aware import QUESTION, QuestionAware, attention_mass
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.shrinking import ShrinkingTokens
from cacheslide.store import MemoryChunkStore
from tests.helpers.families import FAMILIES, save_family
from tests.helpers.prompts import chain, dense, isolated, oracle, placed_cache, prompt, run
from tests.helpers.token_ids import random_ids

pytestmark = pytest.mark.slow

RULES = [
    RememberedDeviation(0.3),
    RememberedDeviation(0.2, boundary=5),
    BoundaryTokens(0.3),
    DeviationBudget(0.4, 0.2),
    MixedTokens(0.3, 0.4, 0.3),
    QuestionAware(0.3, 2),
    ShrinkingTokens(0.5, 0.3, 2),
]
EVERYTHING = [
    RememberedDeviation(1.0, 3),
    DeviationBudget(0.0, 1.0),
    MixedTokens(1.0),
    QuestionAware(1.0, 3),
    ShrinkingTokens(1.0, 1.0),
]
SHRINKING = [ShrinkingTokens(0.5, 0.2, 1), ShrinkingTokens(1.0, 0.0, 2), ShrinkingTokens(0.9, 0.5, 3)]


def twice(first: int, second: int, seed: int, question: int = 5) -> Prompt:
    """system | updated | fixed | updated | two fixed segments | question."""
    fixed = [Segment(random_ids(n, 50 + i), Role.REUSE) for i, n in enumerate((6, 23, 31, 17))]
    new = [Segment(random_ids(n, seed + i), Role.RECOMPUTE) for i, n in enumerate((first, second, question))]
    return Prompt((fixed[0], new[0], fixed[1], new[1], *fixed[2:], new[2]))


TURNS = {"one update": (prompt(7, 3), prompt(13, 5)), "two updates": (twice(7, 4, 3), twice(13, 9, 7))}


@pytest.fixture(scope="module", params=["llama", "gemma3-one-kv-head", "qwen3-windows"])
def decoder(request, tmp_path_factory) -> ReferenceDecoder:
    path = tmp_path_factory.mktemp("model")
    assert request.param in FAMILIES
    return ReferenceDecoder.from_pretrained(save_family(path, request.param))


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("rule", EVERYTHING, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("make", [chain, isolated])
def test_all_tokens_selected_is_recompute(decoder, turns, make, rule):
    before, now = TURNS[turns]
    _, hidden = dense(decoder, torch.tensor(now.token_ids), torch.arange(len(now)))
    _, _, done = run(decoder, make(rule), before, now)
    assert (done.logits - decoder.logits(hidden[-1:])[0]).abs().max() < 1e-4
    # A budget leaves what deviates by nothing: what no update stands in front of, and an isolated chunk's first token.
    exact = done.receipt.tokens_reused
    assert exact <= (6 if isinstance(rule, DeviationBudget) else 0) and done.receipt.chunks_hit > 3
    assert done.receipt.tokens_per_layer == [done.receipt.tokens - exact] * decoder.num_layers


@pytest.mark.parametrize("turns", TURNS)
def test_all_tokens_behind_updates_are_recompute_where_the_prefix_is_exact(decoder, turns):
    before, now = TURNS[turns]
    _, hidden = dense(decoder, torch.tensor(now.token_ids), torch.arange(len(now)))
    _, _, done = run(decoder, chain(BoundaryTokens(1.0), "in_prompt"), before, now)
    assert (done.logits - decoder.logits(hidden[-1:])[0]).abs().max() < 1e-4
    assert done.receipt.tokens_reused == 6


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("rule", RULES[:6], ids=lambda r: type(r).__name__)
def test_equals_the_dense_forward_with_overwritten_rows(decoder, turns, rule):
    before, now = TURNS[turns]
    _, request, done = run(decoder, chain(rule, "in_prompt"), before, now)
    chosen = torch.isin(request.reused, done.output.selected)
    known = rule.known_before_start(request.runs)
    assert known is None or torch.equal(chosen, known)
    index = (~chosen).nonzero()[:, 0]
    placed = placed_cache(decoder, request, index)
    kv, logits = oracle(decoder, request.token_ids, request.positions, 0, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)
    assert 0 < len(done.output.selected) < len(request.reused)


def shrunk(model, request, rule):
    """Plainly: a dense forward in which ever more rows have placed K/V. Logits, rows computed a layer, the last set."""
    n, placed = len(request.token_ids), placed_cache(model, request, torch.arange(len(request.reused)))
    rows, kv, counts = torch.arange(n), model.new_kv(n), []
    chosen = rule.known_before_start(request.runs).nonzero()[:, 0]
    first, hidden = len(chosen), model.embed(request.token_ids)
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, request.positions)
        d = deviation(k[request.reused[chosen]], placed[layer][0][chosen])
        chosen = chosen[top_rows(d, rule.count(layer, first))]
        rest = torch.ones(len(request.reused), dtype=torch.bool)
        rest[chosen] = False
        k, v = k.clone(), v.clone()
        k[request.reused[rest]], v[request.reused[rest]] = placed[layer][0][rest], placed[layer][1][rest]
        kv.write(layer, rows, k, v)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
        counts.append(n - int(rest.sum()))
    return kv, model.logits(hidden[-1:])[0], counts, request.reused[chosen]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("rule", SHRINKING)
@pytest.mark.parametrize("make", [chain, isolated])
def test_a_shrinking_set_equals_its_dense_forward(decoder, turns, make, rule):
    before, now = TURNS[turns]
    if decoder.config.windows[0] == 5:  # behind one such layer most keys differ by rounding alone: no order to compare
        rule = replace(rule, every=max(2, rule.every))
    _, request, done = run(decoder, make(rule), before, now)
    kv, logits, counts, last = shrunk(decoder, request, rule)
    assert done.receipt.tokens_per_layer == counts and counts[0] > counts[-1]
    assert torch.equal(done.output.selected, last)
    torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.kv.v[:, : len(now)], kv.v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)


def plain_mass(model, ids, positions, cached, placed, layer, n):
    """Softmax written out: weights of the last n tokens on rows `cached`, whose K/V are `placed`, at `layer`."""
    rows, kv, hidden = torch.arange(len(ids)), model.new_kv(len(ids)), model.embed(ids)
    for at in range(layer + 1):
        q, k, v = model.qkv(at, hidden, positions)
        k, v = k.clone(), v.clone()
        k[cached], v[cached] = placed[at]
        kv.write(at, rows, k, v)
        if at < layer:
            hidden = model.finish(at, hidden, model.attend(at, q, [RowGroup(kv, rows)]))
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q[-n:], keys) * (model.config.attention_scale or model.head_dim**-0.5)
    apart, window = rows[-n:, None] - rows, model.config.windows[layer] or len(ids)
    logits = logits.masked_fill((apart < 0) | (apart >= window), float("-inf"))
    return logits.softmax(-1).sum(dim=(0, 1))[cached]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("layer", range(5))
def test_mass_is_the_questions_attention_over_cached_text(decoder, turns, layer):
    """Other updated text is not there: what is asked is the prompt without it, at the positions it has."""
    before, now = TURNS[turns]
    _, request, done = run(decoder, chain(QuestionAware(0.3, layer), "in_prompt"), before, now)
    there = torch.cat((request.reused, torch.arange(len(now) - 5, len(now))))
    placed = placed_cache(decoder, request, torch.arange(len(request.reused)))
    cached = torch.arange(len(request.reused))
    want = plain_mass(decoder, request.token_ids[there], request.positions[there], cached, placed, layer, 5)
    got = attention_mass(request, decoder, layer, 5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    count = tokens_of_ratio(0.3, len(request.reused))
    assert torch.equal(done.output.selected, request.reused[top_rows(want, count)])
    live = len(now) - len(request.reused)
    assert done.receipt.tokens_per_layer == [live + count + 5 * (at <= layer) for at in range(5)]


@pytest.mark.parametrize("start", [1, 9])
def test_what_was_complete_before_the_request_is_seen(decoder, start):
    """With exact caches and no other updated text, mass is the attention of recompute."""
    now = Prompt((Segment(random_ids(44, 4), Role.REUSE), Segment(random_ids(3, 5), Role.RECOMPUTE)))
    ids, where = torch.tensor(now.token_ids), torch.arange(47)
    engine = ReuseEngine(decoder, chain(QuestionAware(0.2, 3), "in_prompt"), MemoryChunkStore(), chunk_size=16)
    engine.build(now)
    request, _, _ = engine._prepare(now, 0, 0)
    whole = engine.prefill(now)
    pieces = [replace(p, length=p.length - start, first=start) if i == 0 else p
              for i, p in enumerate(request.source.pieces)]  # fmt: skip
    source = RequestBuilder(decoder).source(pieces, where[start:44], engine.policy.placement, 0, request.correction)
    reused = torch.arange(44 - start)
    late = replace(request, token_ids=ids[start:], positions=where[start:], kv=whole.kv, reused=reused, source=source,
                   start=start)  # fmt: skip
    trace, _ = dense(decoder, ids, where)
    for layer in range(5):
        placed = [(k[:44], v[:44]) for _, k, v in trace]
        want = plain_mass(decoder, ids, where, torch.arange(44), placed, layer, 3)[start:]
        torch.testing.assert_close(attention_mass(late, decoder, layer, 3), want, atol=1e-5, rtol=1e-4)


def test_only_the_end_of_a_long_question_is_asked(model):
    now = prompt(13, 5, question=QUESTION + 20)
    _, request, done = run(model, chain(QuestionAware(0.2, 1)), prompt(7, 3), now)
    live, count = len(now) - len(request.reused), tokens_of_ratio(0.2, len(request.reused))
    assert done.receipt.tokens_per_layer == [live + count + QUESTION] * 2 + [live + count] * 3


def test_a_request_without_a_question_takes_the_first_tokens(model):
    """As vLLM's do, which end with the last cached chunk."""
    _, request, _ = run(model, chain(QuestionAware(0.25, 2)), prompt(7, 3), prompt(13, 5))
    cut = replace(request, token_ids=request.token_ids[:-5], positions=request.positions[:-5])
    [out] = ReuseEngine(model, chain(request.correction), MemoryChunkStore()).executor.run([cut])
    count = tokens_of_ratio(0.25, len(request.reused))
    assert torch.equal(out.selected, request.reused[:count]) and len(set(out.tokens_computed)) == 1


def test_requests_of_all_rules_run_packed(model):
    """What one request asks beforehand or drops on the way is nobody else's affair."""
    before, now = TURNS["two updates"]
    states, engines = [], []
    for rule in [*RULES, FirstTokens(0.2)]:
        engine = ReuseEngine(model, chain(rule, "in_prompt"), MemoryChunkStore(), chunk_size=16)
        engine.build(before)
        engines.append(engine)
        states.append(engine.prefill(now))
    requests = [engine._prepare(now, 0, 0)[0] for engine in engines]
    for out, alone, request in zip(engines[0].executor.run(requests), states, requests, strict=True):
        torch.testing.assert_close(request.kv.k, alone.kv.k, atol=1e-5, rtol=1e-4)
        assert out.tokens_computed == alone.receipt.tokens_per_layer


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, QuestionAware)], ids=lambda r: type(r).__name__)
def test_cached_kv_of_a_recomputed_token_reaches_nothing(model, rule):
    """The question alone looks at all cached KV beforehand."""
    before, now = TURNS["two updates"]
    engine, request, clean = run(model, chain(rule, "in_prompt"), before, now)
    at = torch.isin(request.reused, clean.output.selected).split([p.length for p in request.source.pieces])
    for piece, poisoned in zip(request.source.pieces, at, strict=True):
        piece.chunk.k[:, piece.rows][:, poisoned] = float("nan")
        piece.chunk.v[:, piece.rows][:, poisoned] = float("nan")
    again = engine.prefill(now)
    assert torch.equal(again.logits, clean.logits) and len(clean.output.selected) > 3
    piece.chunk.v[:, piece.rows][:, ~poisoned] = float("nan")
    assert engine.prefill(now).logits.isnan().all()  # what stays is read


def test_bad_arguments_of_the_question_are_refused(model):
    for make, why in (
        (lambda: QuestionAware(1.5), r"recompute_ratio must lie in \[0, 1\], not 1.5"),
        (lambda: QuestionAware(0.1, -1), "layer must be at least 0, not -1"),
        (lambda: QuestionAware(0.1, 5).check("p", 5), "p selects at layer 5, but the model has layers 0 to 4"),
    ):
        with pytest.raises(PolicyError, match=why):
            make()
    one = QuestionAware(0.1, 2)
    assert one.at_ratio(0.3).at_layer(4) == QuestionAware(0.3, 4) and one.total_ratio == 0.1
    assert (one.selection_layer, one.first_layer, one.needs_scores) == (2, 0, False)
