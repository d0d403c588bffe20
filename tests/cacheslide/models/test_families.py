"""Every family of decoders against transformers, and selective prefill over layers with windows and two RoPE bases."""

import json

import pytest
import torch

from cacheslide.core.encoder import prefill_exact
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import ContentKeying, FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import ModelError
from cacheslide.kernels.row_attention.reference import grouped_attention, masked_attention
from cacheslide.models.adapter import RowGroup
from cacheslide.models.attention import row_attention
from cacheslide.models.cope import CopeLlama
from cacheslide.models.families import parse_config
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.models.weights import load_checkpoint
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import ENCODINGS, Isolated
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.positions.rope import inverse_frequencies
from cacheslide.store import MemoryChunkStore
from harness.backends.answering import answer_branches, branch_room
from tests.helpers.checkpoints import SHAPE
from tests.helpers.families import FAMILIES, WINDOW, save_family, theirs
from tests.helpers.token_ids import random_ids

pytestmark = pytest.mark.slow

TIGHT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a checkpoint of each family."""
    return save_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> ReferenceDecoder:
    """Gemma 3 with windows of 16 tokens and two RoPE bases."""
    return ReferenceDecoder.from_pretrained(save_family(tmp_path_factory.mktemp("gemma"), "gemma3"))


def test_logits_keys_and_values_match_transformers(family):
    """83 tokens: more than a window, and an odd number."""
    ids = random_ids(83, 3)
    want, layers = theirs(family, ids)
    model, rows = ReferenceDecoder.from_pretrained(family), torch.arange(len(ids))
    kv, hidden = model.new_kv(len(ids)), model.embed(torch.tensor(ids))
    for layer, (keys, values) in enumerate(layers):
        q, k, v = model.qkv(layer, hidden, rows)
        kv.write(layer, rows, k, v)
        torch.testing.assert_close(k, keys, **TIGHT)
        torch.testing.assert_close(v, values, **TIGHT)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    torch.testing.assert_close(model.logits(hidden), want, **TIGHT)


def test_bfloat16_stays_beside_transformers(tmp_path):
    """The factor of the embeddings and the norms are rounded where transformers rounds them."""
    from transformers import AutoModelForCausalLM

    save_family(tmp_path, "gemma3")
    ids = torch.tensor(random_ids(40, 3))
    model = ReferenceDecoder.from_pretrained(tmp_path, torch.bfloat16)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        embedded = other.model.embed_tokens(ids)
        normed = other.model.layers[0].input_layernorm(embedded)
    assert torch.equal(model.embed(ids), embedded)
    torch.testing.assert_close(model._rms(embedded, model.layers[0].input_norm), normed, atol=0, rtol=2**-8)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("MixtralForCausalLM", {}, "MixtralForCausalLM"),
        ("Gemma3ForConditionalGeneration", {}, "Gemma3ForConditionalGeneration"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "soft-capped attention"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional"),
        ("Gemma3ForCausalLM", {"hidden_activation": "silu"}, "hidden_activation"),
        ("Gemma3ForCausalLM", {"sliding_window": None}, "no sliding_window"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 1e4}}, "each type of layer"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "wrong kind"),
        ("Qwen2ForCausalLM", {"quantization_config": {"bits": 4}}, "quantised"),
        ("Qwen2ForCausalLM", {"layer_types": ["linear_attention"] * 5}, "linear_attention"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"] * 4}, "names 4 layers"),
        ("Qwen3ForCausalLM", {"num_experts": 8}, "mixture of experts"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 5}, "no sliding_window"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 5}, "layer_types"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial rotation"),
        ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotation"),
        ("LlamaForCausalLM", {"hidden_size": "40"}, "hidden_size must be a count"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "count of at least 1|wrong kind"),
        ("LlamaForCausalLM", {"architectures": True}, "architectures must be a list"),
        ("LlamaForCausalLM", {"num_hidden_layers": 10**30}, "num_layers must be at most 4096"),
        ("LlamaForCausalLM", {"max_position_embeddings": 10**12}, "max_positions must be at most 4194304"),
        ("LlamaForCausalLM", {"rope_parameters": True}, "rope_parameters must be an object"),
        ("LlamaForCausalLM", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        ("LlamaForCausalLM", {"rope_theta": 0}, "base of a rotation"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": float("nan")}}, "base of a rotation"),
        ("LlamaForCausalLM", {"rms_norm_eps": -1}, "rms_norm_eps"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": -1}, "factor of the scores"),
    ],
)
def test_what_a_checkpoint_asks_for_in_vain_is_named_in_one_line(kind, change, named):
    with pytest.raises(ModelError, match=named) as refused:
        parse_config({**SHAPE, "architectures": [kind], **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"factor": 0}, "needs factor, a number above 0, not 0"),
        ({"factor": None}, "needs factor"),
        ({"original_max_position_embeddings": "8192"}, "needs original_max_position_embeddings"),
        ({"low_freq_factor": 4.0}, "low_freq_factor must be below"),
    ],
)
def test_a_scaled_rotation_without_its_numbers_is_refused(change, named):
    whole = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert inverse_frequencies(16, 1e4, {"rope_type": "llama3", **whole}).isfinite().all()
    with pytest.raises(ModelError, match=named):
        inverse_frequencies(16, 1e4, {"rope_type": "llama3", **whole, **change})


def test_what_config_json_leaves_out_is_what_transformers_takes():
    """transformers 4's spelling of Gemma, without layer types; Qwen's windows that are there but off."""
    small = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    old = {"rope_local_base_freq": 3e4, "rope_theta": 7e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    gemma = parse_config({**small, **old, "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2})
    assert gemma.windows == (4096, None, 4096, None, 4096) and gemma.head_dim == 256 and gemma.tie_embeddings
    assert [r.theta for r in gemma.ropes[:2]] == [3e4, 7e5]
    assert [r.scaling for r in gemma.ropes[:2]] == [None, {"rope_type": "linear", "factor": 4.0}]
    qwen = parse_config({**small, "architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "max_window_layers": 0})
    assert qwen.windows == (None,) * 5 and qwen.head_dim == 128
    assert parse_config({**small, "architectures": ["MistralForCausalLM"]}).windows == (4096,) * 5


@pytest.mark.parametrize("window", [1, 3, 16, 300, 699, 700, 5000])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 10), (3, 1, 50)])
@pytest.mark.parametrize("scattered", [True, False])
def test_windowed_attention_equals_masked_softmax_and_reads_nothing_else(window, heads, kv_heads, dim, scattered):
    g, keys = torch.Generator().manual_seed(window), 700
    k, v = torch.randn(2, keys, kv_heads, dim, generator=g)
    rows = torch.unique(torch.randint(0, keys, (40,), generator=g)) if scattered else torch.arange(keys)
    q, at = torch.randn(len(rows), heads, dim, generator=g), torch.arange(keys)
    seen = (at <= rows[:, None]) & (at > rows[:, None] - window)
    full_k, full_v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("nhd,khd->hnk", q, full_k) * 0.3
    want = torch.einsum("hnk,khd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), full_v)
    k[~seen.any(0)] = v[~seen.any(0)] = float("nan")
    torch.testing.assert_close(row_attention(q, k, v, rows, 0.3, window), want, **TIGHT)


def test_masked_attention_is_the_same_in_the_layout_for_a_gpu():
    g = torch.Generator().manual_seed(3)
    q, (k, v) = torch.randn(7, 6, 10, generator=g), torch.randn(2, 40, 2, 10, generator=g)
    mask = torch.rand(7, 40, generator=g) < 0.5
    torch.testing.assert_close(grouped_attention(q, k, v, mask, 0.3), masked_attention(q, k, v, mask, 0.3), **TIGHT)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3"])
def test_cope_serves_no_other_layers_than_llamas(tmp_path, kind):
    config = parse_config(json.loads((save_family(tmp_path, kind) / "config.json").read_text()))
    with pytest.raises(ModelError, match="Llama and Mistral only"):
        CopeLlama(config, {}, "m", [])


def test_cope_keeps_below_a_window(tmp_path):
    """Its attention knows none: within the first window's length there is nothing to know."""
    path = save_family(tmp_path, "mistral")
    config, weights = load_checkpoint(path, torch.float32, "cpu")
    model = CopeLlama(config, weights, "m", [torch.zeros(4, config.head_dim)] * config.num_layers)
    assert model.max_positions == WINDOW < config.max_positions
    with pytest.raises(ModelError, match="exceed"):
        model.new_kv(WINDOW + 1)


def prompt(updated: int, seed: int) -> Prompt:
    """system | updated | fixed text longer than the window | question."""
    return Prompt(
        (
            Segment(random_ids(6, 0), Role.REUSE),
            Segment(random_ids(updated, seed), Role.RECOMPUTE),
            Segment(random_ids(47, 50), Role.REUSE),
            Segment(random_ids(5, seed + 1), Role.RECOMPUTE),
        )
    )


def engine_of(model, correction, encoding="in_prompt", chunk_size=16) -> ReuseEngine:
    isolated = encoding == "isolated"
    keying, how = (ContentKeying(), Isolated()) if isolated else (FixedChainKeying(), ENCODINGS[encoding])
    policy = ReusePolicy("p", "P", keying, how, Placement(), correction)
    return ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=chunk_size)


def recomputed(model, now: Prompt):
    """Exact KV of a prompt, and the logits behind it."""
    state = ReuseEngine(model, ReusePolicy("r", "R"), MemoryChunkStore()).prefill(now)
    return state.kv, state.logits


def test_exact_keys_at_their_own_positions_give_recompute(family):
    model, now = ReferenceDecoder.from_pretrained(family), prompt(13, 5)
    engine = engine_of(model, NoCorrection())
    engine.build(now)
    done, (kv, logits) = engine.prefill(now), recomputed(model, now)
    assert done.receipt.tokens_reused == 6 + 47
    torch.testing.assert_close(done.logits, logits, **TIGHT)
    torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, **TIGHT)


def test_moved_keys_are_those_of_their_new_positions_in_layer_0(gemma):
    """Its first layer slides with a base of its own; a rotation by the other base would be far off."""
    assert gemma.rotaries[0] is gemma.rotaries[1] is not gemma.rotaries[2]
    before, now = prompt(7, 3), prompt(30, 5)
    engine = engine_of(gemma, NoCorrection())
    engine.build(before)
    done, (kv, _) = engine.prefill(now), recomputed(gemma, now)
    assert done.receipt.tokens_reused == 6 + 47
    torch.testing.assert_close(done.kv.k[0, : len(now)], kv.k[0], **TIGHT)
    assert (done.kv.k[4, : len(now)] - kv.k[4]).abs().max() > 1e-2  # deeper keys hold the other context


@pytest.mark.parametrize("shift", [1, 40])
def test_every_layer_turns_by_its_own_base(gemma, shift):
    """A chunk alone, moved: RoPE is relative and the context is the same, so that every layer must be exact."""
    ids = random_ids(30, 9)
    alone, there = prefill_exact(gemma, ids), prefill_exact(gemma, ids, first_position=shift)
    here = torch.arange(30)
    for layer, rotary in enumerate(gemma.rotaries):
        torch.testing.assert_close(
            rotary.move(alone.k[layer], here, here + shift), there.k[layer], atol=5e-5, rtol=1e-5
        )
    wrong = gemma.rotaries[2].move(alone.k[0], here, here + shift)
    assert (wrong - there.k[0]).abs().max() > 1e-2


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain", "isolated"])
def test_everything_recomputed_is_recompute(family, encoding):
    model, now = ReferenceDecoder.from_pretrained(family), prompt(30, 5)
    engine = engine_of(model, TopDeviation(1.0, 1), encoding)
    engine.build(prompt(7, 3))
    done, (kv, logits) = engine.prefill(now), recomputed(model, now)
    assert done.receipt.compute_fraction == 1.0 and done.receipt.chunks_hit
    torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, **TIGHT)
    torch.testing.assert_close(done.kv.v[:, : len(now)], kv.v, **TIGHT)
    torch.testing.assert_close(done.logits, logits, **TIGHT)


def test_cached_keys_outside_of_every_window_are_never_read(tmp_path):
    """All layers slide: of a prompt's reused rows only those within the windows of computed ones may matter."""
    model, now = ReferenceDecoder.from_pretrained(save_family(tmp_path, "mistral")), prompt(30, 5)
    engine = engine_of(model, NoCorrection(), chunk_size=8)
    engine.build(now)
    want = engine.prefill(now)
    # Computed are rows 6 to 35 and those behind row 82, with windows of 16: rows 36 to 67 are in none of them.
    for key, chunk in engine.plan(now).keyed:
        held = engine.store.get(key)
        outside = torch.arange(chunk.start, chunk.end)
        outside = (outside >= 36) & (outside < 83 - WINDOW + 1)
        held.k[:, outside] = held.v[:, outside] = float("nan")
    done = engine.prefill(now)
    assert done.kv.k.isnan().any() and done.kv.v.isnan().any()
    torch.testing.assert_close(done.logits, want.logits, atol=0, rtol=0)


def test_branches_keep_to_the_windows(family):
    """Several questions in one decode give what each gives alone, behind a context longer than the window."""
    model = ReferenceDecoder.from_pretrained(family)
    engine, context = ReuseEngine(model, ReusePolicy("r", "R"), MemoryChunkStore()), prompt(13, 5)
    questions, new = [random_ids(n, 60 + n) for n in (21, 2, 9)], 12
    state = engine.prefill(context, room=branch_room(questions, new))
    found = answer_branches(model, state, questions, new, frozenset())
    for question, answer in zip(questions, found, strict=True):
        alone = engine.prefill(context, room=len(question) + new)
        assert answer == engine.generate(alone, engine.extend(alone, question), new, frozenset())


def test_a_config_of_one_type_of_rope_a_layer_is_written_as_transformers_writes_it(tmp_path):
    raw = json.loads((save_family(tmp_path, "gemma3-one-kv-head") / "config.json").read_text())
    config = parse_config(raw)
    assert [rope.theta for rope in config.ropes] == [2e4, 5e5, 5e5, 2e4, 5e5]
    assert config.windows == (5, None, None, 5, None) and config.attention_scale == 31**-0.5
