"""SelectivePrefill against a dense forward whose inactive K/V are overwritten by the placed cache."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.deviation import deviation, top_rows
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import Promotion, Swap, TopDeviation
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import chain, dense, isolated, oracle, placed_cache, prompt, run
from tests.helpers.token_ids import random_ids

CASES = [
    (NoCorrection(), 0),
    (EdgeTokens(3, 2), 0),
    (EdgeTokens(recompute_ratio=0.5), 0),
    *[(TopDeviation(share, layer), layer) for share in (0.0, 0.1, 0.26, 0.9) for layer in (0, 1, 3)],
    (TopDeviation(0.26, 2, metric="v"), 2),
    (TopDeviation(0.26, 2, metric="kv"), 2),
]


@pytest.mark.parametrize("make", [chain, isolated], ids=["chain", "isolated"])
@pytest.mark.parametrize("rotation", ["delta", "stored"])
@pytest.mark.parametrize(("correction", "layer"), CASES)
def test_equals_the_dense_forward_with_overwritten_rows(model, make, rotation, correction, layer):
    now = prompt(13, 5)
    _, request, done = run(model, make(correction, rotation=rotation), prompt(7, 3), now)
    chosen = torch.isin(request.reused, done.output.selected)
    index = (~chosen).nonzero()[:, 0]
    placed = placed_cache(model, request, index)
    kv, logits = oracle(model, request.token_ids, request.positions, layer, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(done.kv.v[:, : len(now)], kv.v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)
    assert done.receipt.tokens_reused == len(index) > 0
    assert done.receipt.bytes_loaded > 0


@pytest.mark.parametrize("make", [chain, isolated])
def test_share_one_is_plain_recompute_and_share_zero_is_not(model, make):
    now = prompt(13, 5)
    ids, positions = torch.tensor(now.token_ids), torch.arange(len(now))
    trace, hidden = dense(model, ids, positions)
    _, _, full = run(model, make(TopDeviation(1.0, 1)), prompt(7, 3), now)
    for layer, (_, k, v) in enumerate(trace):
        torch.testing.assert_close(full.kv.k[layer, : len(now)], k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(full.kv.v[layer, : len(now)], v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.logits, model.logits(hidden[-1:])[0], atol=1e-4, rtol=1e-4)
    assert full.receipt.compute_fraction == 1.0
    _, _, none = run(model, make(TopDeviation(0.0, 1)), prompt(7, 3), now)
    assert (none.logits - full.logits).abs().max() > 1e-2  # a load that did nothing would pass for recompute


def test_selection_takes_the_largest_deviations(model):
    now = prompt(13, 5)
    _, request, done = run(model, chain(TopDeviation(0.3, 2), "in_prompt"), prompt(7, 3), now)
    trace, _ = dense(model, request.token_ids, request.positions)
    ck, _ = request.source.layer(2)
    d = deviation(trace[2][1][request.reused], ck)
    want = request.reused[top_rows(d, len(done.output.selected))]
    assert torch.equal(done.output.selected, want)


def test_deviation_is_zero_where_keys_do_not_depend_on_context(model):
    now = prompt(13, 5)
    _, request, _ = run(model, chain(NoCorrection(), "in_prompt"), prompt(7, 3), now)
    trace, _ = dense(model, request.token_ids, request.positions)
    first, second = (deviation(trace[i][1][request.reused], request.source.layer(i)[0]) for i in (0, 1))
    assert first.max() < 1e-8 < 1e-4 < second.max()


@pytest.mark.parametrize("shift", [0, 1, 40])
def test_a_moved_chunk_is_exact_when_its_context_is(model, shift):
    """A chunk encoded behind the same context but other positions: delta rotation alone must make it exact."""
    ids = random_ids(30, 9)
    engine = ReuseEngine(model, isolated(NoCorrection()), MemoryChunkStore())
    engine.build(Prompt((Segment(ids, Role.REUSE),)))
    [key] = engine.plan(Prompt((Segment(ids, Role.REUSE),))).keys
    chunk = engine.store.get(key)
    target = torch.arange(shift, shift + 30)
    trace, _ = dense(model, torch.tensor(ids), target)  # RoPE is relative: the same context at other positions
    moved = model.rotaries[4].move(chunk.k[4], chunk.positions, target)
    torch.testing.assert_close(moved, trace[4][1], atol=1e-4, rtol=1e-4)


def test_packed_requests_equal_single_ones(model):
    policy = chain(TopDeviation(0.26, 2))
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    prompts = [prompt(13, 5), prompt(2, 8, question=9), prompt(40, 11, fixed=(23,))]
    for got, p in zip(engine.prefill_batch(prompts), prompts, strict=True):
        want = engine.prefill(p)
        torch.testing.assert_close(got.kv.k, want.kv.k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.output.selected, want.output.selected)


def test_promotion_restarts_rows_from_cached_layer_inputs(model):
    """With exact cached inputs and every row promoted, later layers equal plain recompute."""
    now = prompt(13, 5)
    exact = chain(TopDeviation(0.0, 1, promote=(Promotion(1, 1.0),)), "in_prompt")
    _, _, done = run(model, exact, now, now)
    _, _, full = run(model, chain(TopDeviation(1.0, 1), "in_prompt"), now, now)
    torch.testing.assert_close(done.kv.k, full.kv.k, atol=1e-5, rtol=1e-5)
    assert done.receipt.tokens_recomputed == len(done.output.selected) > 0
    stale = chain(TopDeviation(0.0, 1, promote=(Promotion(1, 0.3), Promotion(3, 0.3))), "in_prompt")
    _, request, some = run(model, stale, prompt(7, 3), now)
    assert len(some.output.selected) == pytest.approx(0.6 * len(request.reused), abs=2)
    assert some.receipt.tokens_per_layer[1] == len(now)  # probing counts as computing
    _, _, zero = run(model, chain(TopDeviation(0.0, 1), "in_prompt"), prompt(7, 3), now)
    assert (some.kv.k[4] - zero.kv.k[4]).abs().max() > 1e-3


def test_promotion_without_cached_inputs_says_so(model):
    policy = chain(TopDeviation(0.1, 1, promote=(Promotion(2, 0.1),)))
    engine = ReuseEngine(model, replace(policy, correction=TopDeviation(0.1, 1)), MemoryChunkStore())
    engine.build(prompt(7, 3))
    other = ReuseEngine(model, policy, engine.store)
    with pytest.raises(PolicyError, match="layer inputs"):
        other.prefill(prompt(13, 5))


@pytest.mark.parametrize("fusion", ["paper", "wiener", "constant"])
def test_fusion_mixes_cached_and_fresh(model, fusion):
    now = prompt(13, 5)
    kw = {"constant": 0.75} if fusion == "constant" else {}
    _, request, done = run(model, chain(TopDeviation(0.5, 1, fusion=fusion, **kw), "in_prompt"), prompt(7, 3), now)
    _, _, plain = run(model, chain(TopDeviation(0.5, 1), "in_prompt"), prompt(7, 3), now)
    rows = done.output.selected
    assert torch.equal(rows, plain.output.selected)  # selection happens before the first fusion
    index = torch.searchsorted(request.reused, rows)
    ck, _ = request.source.layer(1, index)
    fresh, mixed = plain.kv.k[1][rows], done.kv.k[1][rows]
    alpha = ((mixed - ck) * (fresh - ck)).sum((1, 2)) / (fresh - ck).square().sum((1, 2)).clamp_min(1e-12)
    assert alpha.min() >= -1e-3 and alpha.max() <= 1 + 1e-3
    assert float(alpha.mean()) == pytest.approx(done.receipt.alpha[1], abs=0.02)
    if fusion == "constant":
        torch.testing.assert_close(alpha, torch.full_like(alpha, 0.75), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("reading", "tau", "leave"), [("distance", 2.1, True), ("distance", 0.0, False), ("literal", -1.1, False)]
)
def test_swap_exchanges_converged_rows(model, reading, tau, leave):
    rule = TopDeviation(0.2, 1, swap=Swap(tau, every=2, reading=reading))
    now = prompt(13, 5)
    _, _, done = run(model, chain(rule, "in_prompt"), prompt(7, 3), now)
    _, _, plain = run(model, chain(TopDeviation(0.2, 1), "in_prompt"), prompt(7, 3), now)
    first, last = plain.output.selected, done.output.selected
    assert len(first) == len(last)
    # everything converged: all leave at layer 3 and the next ones by deviation take their place
    assert torch.isin(first, last).any().item() is not leave
    assert not done.kv.k[:, : len(now)].isnan().any()


def swap_oracle(model, request, rule, inputs):
    """Alg. 2, step 3, with Python sets over a dense forward: the KV buffer and the rows recomputed in the end.

    `inputs[layer]` [reused, hidden_size] are the chunks' cached layer inputs.
    """
    ids, positions, reused = request.token_ids, request.positions, request.reused
    kv, rows = model.new_kv(len(ids)), torch.arange(len(ids))
    hidden, chosen, candidates = model.embed(ids), [], set()
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, positions)
        cached = request.source.layer(layer)
        if layer == rule.layer:
            d = deviation(k[reused], cached[0])
            ranked = d.argsort(descending=True, stable=True).tolist()
            chosen, stopped = ranked[: round(rule.recompute_ratio * len(reused))], hidden.clone()
            candidates = set(ranked)
        elif layer > rule.layer and (layer - rule.layer) % rule.swap.every == 0:
            fresh, old = k[reused], cached[0]
            alike = torch.nn.functional.cosine_similarity(fresh, old, dim=-1).mean(-1)
            gone = [i for i in chosen if 1 - alike[i] < rule.swap.tau]
            new = [i for i in ranked if i in candidates and i not in chosen][: len(gone)]
            candidates -= set(gone)
            chosen = [i for i in chosen if i not in gone] + new
            start = stopped[reused[new]] if rule.swap.start == "stopped" else inputs[layer][new]
            hidden = hidden.index_copy(0, reused[new], start)
            q, k, v = model.qkv(layer, hidden, positions)
        if layer >= rule.layer:
            resting = [i for i in range(len(reused)) if i not in chosen]
            k, v = (x.index_copy(0, reused[resting], c[resting]) for x, c in zip((k, v), cached, strict=True))
        kv.write(layer, rows, k, v)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return kv, sorted(reused[chosen].tolist())


@pytest.mark.parametrize("start", ["stopped", "inputs"])
@pytest.mark.parametrize(("share", "tau"), [(0.2, 2.1), (0.45, 2.1), (0.3, 0.05), (0.3, 0.0)])
def test_what_has_converged_never_comes_back(model, start, share, tau):
    """Three swaps in a row; at 0.45 of the rows the third finds nobody left to enter."""
    rule = TopDeviation(share, 1, swap=Swap(tau, every=1, start=start))
    now, store = prompt(13, 5), MemoryChunkStore()
    engine = ReuseEngine(model, chain(rule, "in_prompt"), store, chunk_size=16, capture=frozenset(range(1, 5)))
    engine.build(prompt(7, 3))
    request, plan, _ = engine._prepare(now, 0, 0)
    inputs = {i: torch.cat([store.get(key).layer_inputs[i] for key in plan.keys]) for i in range(1, 5)}
    done = engine.prefill(now)
    kv, chosen = swap_oracle(model, request, rule, inputs)
    assert done.output.selected.tolist() == chosen
    rows = slice(0, len(now))
    torch.testing.assert_close(done.kv.k[:, rows], kv.k[:, rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(done.kv.v[:, rows], kv.v[:, rows], atol=1e-4, rtol=1e-4)


def test_a_swap_from_layer_inputs_needs_them(model):
    rule = TopDeviation(0.2, 1, swap=Swap(2.1, every=2, start="inputs"))
    with pytest.raises(PolicyError, match="hold none"):
        run(model, chain(rule, "in_prompt"), prompt(7, 3), prompt(13, 5))


class OneOfTwo(ReferenceDecoder):
    """A rank whose twin holds the same heads: every sum over ranks doubles, and nothing that is chosen may change."""

    ranks = 2

    def reduce_scores(self, scores):
        return 2 * scores


@pytest.mark.parametrize(
    "rule",
    [
        TopDeviation(0.3, 1, fusion="paper"),
        TopDeviation(0.3, 1, fusion="wiener"),
        TopDeviation(0.2, 1, swap=Swap(0.02, every=1)),
        TopDeviation(0.1, 1, promote=(Promotion(1, 0.2),)),
    ],
    ids=["paper", "wiener", "swap", "promote"],
)
def test_what_ranks_compare_is_summed_over_all_of_them(model, checkpoint, rule):
    twin = OneOfTwo.from_pretrained(checkpoint)
    one, two = (run(m, chain(rule, "in_prompt"), prompt(7, 3), prompt(13, 5))[2] for m in (model, twin))
    assert torch.equal(one.output.selected, two.output.selected)
    assert one.receipt.alpha == pytest.approx(two.receipt.alpha)
    torch.testing.assert_close(one.logits, two.logits)


def test_two_steps_equal_one(model):
    """Prefilling a context and appending the question gives what prefilling both at once gives."""
    whole = prompt(13, 5)
    context = Prompt(whole.segments[:-1])
    question = whole.segments[-1].token_ids
    engine = ReuseEngine(model, chain(TopDeviation(0.26, 2)), MemoryChunkStore(), suffix_len=3)
    engine.build(prompt(7, 3))
    once = engine.prefill(whole, room=4)
    state = engine.prefill(context, following=len(question), room=4)
    logits = engine.extend(state, question)
    torch.testing.assert_close(logits, once.logits, atol=1e-4, rtol=1e-4)
    assert engine.generate(state, logits, 4, frozenset()) == engine.generate(once, once.logits, 4, frozenset())


def test_suffix_is_always_recomputed(model):
    ends_fixed = Prompt(prompt(13, 5).segments[:-1])
    engine = ReuseEngine(model, chain(NoCorrection()), MemoryChunkStore(), suffix_len=9)
    engine.build(ends_fixed)
    request, _, _ = engine._prepare(ends_fixed, 0, 0)
    assert int(request.reused[-1]) == len(ends_fixed) - 10
    assert engine.prefill(ends_fixed).logits is not None


@pytest.mark.parametrize(
    "bad", [{"recompute_ratio": 1.2}, {"recompute_ratio": 0.1, "layer": -1}, {"recompute_ratio": 0.1, "constant": 2.0}]
)
def test_settings_out_of_range(bad):
    with pytest.raises(PolicyError):
        TopDeviation(**bad)


def test_selection_beyond_the_model(model):
    engine = ReuseEngine(model, chain(TopDeviation(0.1, 5)), MemoryChunkStore())
    engine.build(prompt(7, 3))
    with pytest.raises(PolicyError, match="the model has layers 0 to"):
        engine.prefill(prompt(13, 5))
