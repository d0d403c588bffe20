"""The engine over whole prompts: who hits, who falls back, and what receipts say."""

import pytest
import torch

from cacheslide import Prompt, ReuseEngine, Role, Segment, load_policy, policy_names
from cacheslide.errors import ModelError, PolicyError, PromptError
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import FixedChain
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from tests.helpers.prompts import prompt
from tests.helpers.token_ids import random_ids

SYSTEMS = [
    "recompute",
    "context_cache",
    "reorder",
    "prompt_cache",
    "prompt_cache_joint",
    "prompt_cache_joint_16",
    "prompt_cache_joint_32",
    "prompt_cache_joint_64",
    "prompt_cache_joint_128",
    "cacheblend",
    "cacheblend_stale",
    "cacheblend_gradual",
    "cacheblend_code",
    "epic",
    "epic_stale",
    "epic_0",
    "epic_8",
    "epic_16",
    "epic_32",
    "window_padding",
    "cacheslide",
    "cacheslide_first_turn",
    "cacheslide_promote",
    "cacheslide_first",
    "cacheslide_remember",
    "cacheslide_overlap",
    "cacheslide_mixed",
    "naive_reuse",
    "kvcomm",
    "prophetkv",
    "cache_craft",
]


def test_every_system_is_registered():
    assert set(SYSTEMS) <= set(policy_names())
    for name in SYSTEMS:
        assert load_policy(name).name == name


def test_unknown_systems_are_named_with_the_known_ones():
    with pytest.raises(PolicyError, match=r"unknown system 'magic'.*cacheslide"):
        load_policy("magic")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_serves_a_turn(model, tmp_path, name):
    policy = load_policy(name)
    engine = ReuseEngine(model, policy, DirectoryChunkStore(tmp_path), chunk_size=16)
    built = engine.build(prompt(7, 3))
    assert bool(built) is policy.reuses
    assert engine.build(prompt(7, 3)) == 0
    done = engine.prefill(prompt(13, 5))
    receipt = done.receipt
    assert done.logits.isfinite().all()
    assert not done.kv.k[:, : done.length].isnan().any()
    assert receipt.tokens_reused + receipt.tokens_recomputed <= receipt.tokens
    fixed = 6 + 23 + 31 + 17
    hits = {"recompute": 0, "context_cache": 6}.get(name, fixed)
    assert receipt.tokens_reused + receipt.tokens_recomputed == hits
    if hits == fixed and name not in ("epic", "epic_stale"):  # EPIC's 64 rows cover these short chunks
        assert receipt.compute_fraction < 1.0


@pytest.mark.parametrize("name", ["context_cache", "epic", "cacheslide"])
def test_exact_where_it_must_be(model, name):
    """Prefix caching is always exact; EPIC on chunks shorter than its edges recomputes everything."""
    full = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(prompt(13, 5))
    engine = ReuseEngine(model, load_policy(name), MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    same = torch.allclose(engine.prefill(prompt(13, 5)).logits, full.logits, atol=1e-4)
    assert same is (name != "cacheslide")


def test_an_empty_store_falls_back_to_exact_compute_and_says_so(model):
    full = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(prompt(13, 5))
    done = ReuseEngine(model, load_policy("cacheslide"), MemoryChunkStore()).prefill(prompt(13, 5))
    torch.testing.assert_close(done.logits, full.logits, atol=1e-4, rtol=1e-4)
    assert "no chunk" in done.receipt.fallback and done.receipt.compute_fraction == 1.0


def test_a_damaged_chunk_is_recomputed_not_served(model, tmp_path):
    engine = ReuseEngine(model, load_policy("cacheslide"), DirectoryChunkStore(tmp_path), chunk_size=16)
    engine.build(prompt(7, 3))
    victim = engine.plan(prompt(13, 5)).keys[2]
    file = tmp_path / f"{victim}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    done = engine.prefill(prompt(13, 5))
    assert done.receipt.chunks_hit == done.receipt.chunks - 1
    assert "cannot be read" in done.receipt.fallback
    assert done.logits.isfinite().all()


def test_namespaces_do_not_share(model):
    store = MemoryChunkStore()
    ReuseEngine(model, load_policy("cacheslide"), store, namespace="a").build(prompt(7, 3))
    other = ReuseEngine(model, load_policy("cacheslide"), store, namespace="b")
    assert other.prefill(prompt(13, 5)).receipt.chunks_hit == 0


def test_canonical_encoding_does_not_depend_on_the_turn(model):
    stores = [MemoryChunkStore(), MemoryChunkStore()]
    for store, turn in zip(stores, (prompt(7, 3), prompt(30, 77)), strict=True):
        ReuseEngine(model, load_policy("cacheslide"), store).build(turn)
    keys = ReuseEngine(model, load_policy("cacheslide"), stores[0]).plan(prompt(7, 3)).keys
    for key in keys:
        assert torch.equal(stores[0].get(key).k, stores[1].get(key).k)


def test_a_grown_history_encodes_only_its_tail_and_exactly(model):
    engine = ReuseEngine(model, load_policy("cacheslide"), MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3, fixed=(23, 31)))
    assert engine.build(prompt(7, 3, fixed=(23, 31, 17))) == 2
    fresh = ReuseEngine(model, load_policy("cacheslide"), MemoryChunkStore(), chunk_size=16)
    fresh.build(prompt(7, 3, fixed=(23, 31, 17)))
    for key in fresh.plan(prompt(7, 3, fixed=(23, 31, 17))).keys:
        torch.testing.assert_close(engine.store.get(key).k, fresh.store.get(key).k, atol=1e-5, rtol=1e-5)


def test_prompts_longer_than_the_model(model):
    engine = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore())
    with pytest.raises(PromptError, match="513 positions"):
        engine.prefill(Prompt((Segment(random_ids(513, 1), Role.RECOMPUTE),)))
    with pytest.raises(ModelError, match="exceed"):
        engine.prefill(Prompt((Segment(random_ids(510, 1), Role.RECOMPUTE),)), room=9)


def test_contradicting_policies_are_refused():
    with pytest.raises(PolicyError, match="fixed-chain"):
        ReusePolicy("x", "X", encoding=FixedChain())
    policy = load_policy("cacheslide_promote").at_layer(3)
    assert policy.correction.layer == 3 and policy.probe_layers == {3}
    assert load_policy("epic").at_ratio(0.26).correction.edges(256) == (34, 33)
    assert load_policy("cacheblend").at_ratio(0.26).correction == TopDeviation(0.26)
    scaled = load_policy("cacheslide_promote").at_ratio(0.5).correction
    assert scaled.recompute_ratio + sum(p.recompute_ratio for p in scaled.promote) == pytest.approx(0.5)
    assert scaled.recompute_ratio / scaled.promote[0].recompute_ratio == pytest.approx(0.10 / 0.16)
    assert (
        scaled
        != load_policy("cacheslide_promote").at_ratio(0.26).correction
        == load_policy("cacheslide_promote").correction
    )
