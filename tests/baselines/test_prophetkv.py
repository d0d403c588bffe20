"""ProphetKV against its two stages written out, and at its ends."""

from dataclasses import replace

import pytest
import torch

from baselines.prophetkv import QueryDriven, policy
from cacheslide import ReuseEngine, load_policy
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.store import MemoryChunkStore
from tests.helpers.families import save_family
from tests.helpers.prompts import dense, oracle, placed_cache, prompt, run
from tests.helpers.token_ids import random_ids

BEFORE, NOW, QUERY = prompt(7, 3), prompt(13, 5), 5


@pytest.fixture(scope="module", params=["llama", "gemma3-one-kv-head", "qwen3-windows"])
def decoder(request, tmp_path_factory) -> ReferenceDecoder:
    return ReferenceDecoder.from_pretrained(save_family(tmp_path_factory.mktemp("model"), request.param))


def plain_mass(model, request):
    """Stage one: the query behind the cached text alone, softmax over the context in every layer, all of it summed."""
    placed, n = placed_cache(model, request, torch.arange(len(request.reused))), len(request.reused)
    there = torch.cat((request.reused, torch.arange(len(request.token_ids) - QUERY, len(request.token_ids))))
    positions, total = request.positions[there], torch.zeros(n)
    rows, kv = torch.arange(len(there)), model.new_kv(len(there))
    hidden = model.embed(request.token_ids[there])
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, positions)
        k, v = k.clone(), v.clone()
        k[:n], v[:n] = placed[layer]
        kv.write(layer, rows, k, v)
        keys = k[:n].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = torch.einsum("qhd,khd->hqk", q[n:], keys) * (model.config.attention_scale or model.head_dim**-0.5)
        apart = rows[n:, None] - rows[:n]
        logits = logits.masked_fill(apart >= (model.config.windows[layer] or len(there)), float("-inf"))
        total += logits.softmax(-1).nan_to_num(0.0).mean(dim=(0, 1))
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return total


def test_the_tokens_that_the_query_attends_to_are_recomputed(decoder):
    _, request, done = run(decoder, policy(), BEFORE, NOW)
    want = plain_mass(decoder, request)
    got = QueryDriven().mass(request, decoder, QUERY)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    count = tokens_of_ratio(0.2, len(request.reused))
    assert torch.equal(done.output.selected, request.reused[top_rows(got, count)])
    live = len(NOW) - len(request.reused)
    assert done.receipt.tokens_per_layer == [live + count + QUERY] * decoder.num_layers
    chosen = torch.isin(request.reused, done.output.selected)
    index = (~chosen).nonzero()[:, 0]
    placed = placed_cache(decoder, request, index)
    kv, logits = oracle(decoder, request.token_ids, request.positions, 0, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(NOW)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)


def test_another_query_chooses_other_tokens(model):
    parts = NOW.segments[:-1]
    chosen = []
    for seed in (31, 32):
        now = Prompt((*parts, Segment(random_ids(QUERY, seed), Role.RECOMPUTE)))
        chosen.append(run(model, policy(), BEFORE, now)[2].output.selected.tolist())
    assert chosen[0] != chosen[1] and len(chosen[0]) == len(chosen[1])


def test_everything_recomputed_is_recompute(decoder):
    _, hidden = dense(decoder, torch.tensor(NOW.token_ids), torch.arange(len(NOW)))
    _, _, done = run(decoder, policy().at_ratio(1.0), BEFORE, NOW)
    torch.testing.assert_close(done.logits, decoder.logits(hidden[-1:])[0], atol=1e-4, rtol=1e-4)
    assert done.receipt.tokens_reused == 0 and done.receipt.chunks_hit > 3
    assert done.receipt.tokens_per_layer == [len(NOW)] * decoder.num_layers  # nothing is open, so nothing is asked


def test_without_a_query_the_first_tokens_are_recomputed(model):
    """As in vLLM, whose requests end with the last cached chunk."""
    _, request, _ = run(model, policy(), BEFORE, NOW)
    cut = replace(request, token_ids=request.token_ids[:-QUERY], positions=request.positions[:-QUERY])
    [out] = ReuseEngine(model, policy(), MemoryChunkStore()).executor.run([cut])
    count = tokens_of_ratio(0.2, len(request.reused))
    assert torch.equal(out.selected, request.reused[:count]) and len(set(out.tokens_computed)) == 1


def test_who_asks_says_so():
    assert load_policy("prophetkv") == policy() and policy().asks
    assert policy().recipe == load_policy("cacheblend").recipe  # one cache serves both
    assert [load_policy(name).asks for name in ("cacheblend", "epic", "recompute", "cacheslide")] == [False] * 4
    assert policy().at_layer(3) == policy() and policy().at_ratio(0.3).correction == QueryDriven(0.3)
    with pytest.raises(PolicyError, match=r"recompute_ratio must lie in \[0, 1\], not 2"):
        QueryDriven(2)
