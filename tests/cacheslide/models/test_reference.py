"""The reference decoder against transformers, and its refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import CacheIdentity
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import ModelError
from cacheslide.models.attention import row_attention
from cacheslide.models.config import Rope
from cacheslide.models.families import parse_config
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.base import ReusePolicy
from cacheslide.store import MemoryChunkStore
from tests.helpers.checkpoints import SHAPE, save_random
from tests.helpers.token_ids import random_ids

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(path, ids):
    engine = ReuseEngine(ReferenceDecoder.from_pretrained(path), ReusePolicy("r", "R"), MemoryChunkStore())
    return engine.prefill(Prompt((Segment(ids, Role.RECOMPUTE),))).logits


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_logits_match_transformers(tmp_path, kind, changes):
    save_random(tmp_path, kind, **changes)
    ids = random_ids(131, 3)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits(tmp_path, ids), want, atol=2e-4, rtol=1e-4)


def test_rope_scaling_in_the_old_spelling():
    raw = {
        **SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 5e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    ropes = parse_config(raw).ropes
    assert ropes == (Rope(5e4, {"type": "linear", "factor": 2.0}),) * SHAPE["num_hidden_layers"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_unsupported_checkpoints_are_refused_by_name(checkpoint, tmp_path, change, named):
    raw = json.loads((checkpoint / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match=named):
        ReferenceDecoder.from_pretrained(tmp_path)


def test_missing_pieces_are_named(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ReferenceDecoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ModelError, match="no weights"):
        ReferenceDecoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ReferenceDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"x", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": ["model.safetensors"]}', "no weight_map"),
        (b'{"weight_map": {"lm_head.weight": 1}}', "a file's name is expected, not 1"),
        (b'{"weight_map": {"lm_head.weight": "../model.safetensors"}}', "a file's name is expected"),
        (b'{"weight_map": {"lm_head.weight": "\\u0000"}}', "a file's name is expected"),
    ],
)
def test_a_damaged_index_of_weights_is_one_line(checkpoint, tmp_path, content, named):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match=named) as refused:
        ReferenceDecoder.from_pretrained(tmp_path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_want_scales_are_not_read_as_numbers(checkpoint, tmp_path, dtype):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    weights, name = load_file(checkpoint / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is of type \w+: quantised"):
        ReferenceDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", [None, 0, 3, 40])
@pytest.mark.parametrize(
    ("keys", "heads", "kv_heads", "dim"), [(1, 1, 1, 2), (7, 6, 2, 10), (300, 4, 4, 8), (700, 3, 1, 50)]
)
def test_row_attention_equals_masked_softmax(keys, heads, kv_heads, dim, first):
    """Scattered rows, and all rows from `first` on."""
    g = torch.Generator().manual_seed(keys)
    k, v = torch.randn(2, keys + 5, kv_heads, dim, generator=g)
    k[keys:] = v[keys:] = float("nan")  # rows beyond the last query must never be read
    rows = torch.unique(torch.randint(0, keys, (max(1, keys // 2),), generator=g))
    rows = torch.unique(torch.cat((rows, torch.tensor([keys - 1]))))
    if first is not None:
        rows = torch.arange(min(first, keys - 1), keys)
    q = torch.randn(len(rows), heads, dim, generator=g)
    full_k, full_v = (t[:keys].repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("nhd,khd->hnk", q, full_k) / dim**0.5
    scores.masked_fill_(torch.arange(keys)[None, None] > rows[None, :, None], float("-inf"))
    want = torch.einsum("hnk,khd->nhd", scores.softmax(-1), full_v)
    torch.testing.assert_close(row_attention(q, k, v, rows), want, atol=1e-5, rtol=1e-5)


def test_identity_separates_models_dtypes_and_tenants():
    base = CacheIdentity("m", "float32")
    others = [
        CacheIdentity("n", "float32"),
        CacheIdentity("m", "bfloat16"),
        CacheIdentity("m", "float32", namespace="t"),
    ]
    assert len({c.digest() for c in [base, *others]}) == 4
