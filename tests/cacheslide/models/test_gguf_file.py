"""GGUF files, written here from random checkpoints in llama.cpp's names and layouts, are read as the same model."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cacheslide.errors import ModelError
from cacheslide.models.families import parse_config, read_config
from cacheslide.models.gguf_file import GgufFile
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.models.weights import fingerprint
from tests.helpers.checkpoints import save_random
from tests.helpers.gguf_writing import write_gguf

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 3, "spread": 0.2}
CHANGES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
}


def saved(tmp_path: Path, kind: str, **changes) -> Path:
    return save_random(tmp_path, kind, **{**SIZES, **CHANGES[kind], **changes})


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_reads_as_the_checkpoint_that_it_was_made_from(tmp_path, kind):
    path = write_gguf(saved(tmp_path, kind), kind)
    ours, theirs = ReferenceDecoder.from_pretrained(path), ReferenceDecoder.from_pretrained(tmp_path)
    assert ours.config == theirs.config
    assert ours.model_id == fingerprint(path) != theirs.model_id
    for a, b in zip([ours, *ours.layers], [theirs, *theirs.layers], strict=True):
        tensors = {name: x for name, x in vars(b).items() if isinstance(x, torch.Tensor)}
        assert len(tensors) >= 3
        for name, x in tensors.items():
            torch.testing.assert_close(getattr(a, name), x, atol=1e-6, rtol=0)  # norms: 1 + w - 1


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3), ("Q5_0", 0.07)])
def test_types_that_the_package_writes_are_dequantised(tmp_path, kind, bound):
    path = write_gguf(saved(tmp_path, "llama"), "llama", {"ffn_down.weight": kind, "attn_k.weight": kind})
    ours, theirs = ReferenceDecoder.from_pretrained(path), ReferenceDecoder.from_pretrained(tmp_path)
    for part in ("down", "k"):
        exact, read = getattr(theirs.layers[1], part), getattr(ours.layers[1], part)
        assert 0 < (read - exact).abs().max() < bound * exact.abs().max()
    assert torch.equal(ours.layers[1].q, theirs.layers[1].q)


def q4_k(block: bytes) -> list[float]:
    """ggml's block of 256 weights in 4 bits, written down from its definition (`block_q4_K`)."""
    d, least = np.frombuffer(block[:4], np.float16).astype(float)
    packed, nibbles, out = block[4:16], block[16:], []
    for i in range(8):
        if i < 4:
            scale, low = packed[i] & 63, packed[i + 4] & 63
        else:
            scale = (packed[i + 4] & 15) | ((packed[i - 4] >> 6) << 4)
            low = (packed[i + 4] >> 4) | ((packed[i] >> 6) << 4)
        chunk = nibbles[32 * (i // 2) : 32 * (i // 2) + 32]
        out += [d * scale * ((b >> 4) if i % 2 else (b & 15)) - least * low for b in chunk]
    return out


def q6_k(block: bytes) -> list[float]:
    """The same of `block_q6_K`."""
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d, out = float(np.frombuffer(block[208:], np.float16)[0]), [0.0] * 256
    for half in range(2):
        for i in range(32):
            bits = high[32 * half + i]
            parts = (
                low[64 * half + i] & 15,
                low[64 * half + i + 32] & 15,
                low[64 * half + i] >> 4,
                low[64 * half + i + 32] >> 4,
            )
            for k, part in enumerate(parts):
                at = 128 * half + 32 * k + i
                out[at] = d * int(scales[at // 16]) * ((part | ((bits >> (2 * k) & 3) << 4)) - 32)
    return out


@pytest.mark.parametrize(("kind", "size", "direct"), [("Q4_K", 144, q4_k), ("Q6_K", 210, q6_k)])
def test_types_of_256_weights_a_block_are_read_as_ggml_defines_them(tmp_path, kind, size, direct):
    """Blocks of random bits, under scales of our choice, in the place of a projection's weights [32, 256]."""
    folder, g = saved(tmp_path, "llama", hidden_size=256), np.random.default_rng(3)
    blocks = g.integers(0, 256, (32, size), dtype=np.uint8)
    at = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    scales = g.uniform(1e-3, 1e-2, (32, 2)).astype(np.float16).view(np.uint8)
    blocks[:, at] = scales[:, : at.stop - at.start]
    path = write_gguf(folder, "llama", {"blk.1.attn_v.weight": (kind, blocks)})
    read = ReferenceDecoder.from_pretrained(path).layers[1].v
    want = torch.tensor([direct(bytes(b)) for b in blocks], dtype=torch.float32)
    assert want.std() > 0.05
    torch.testing.assert_close(read, want, atol=1e-6, rtol=1e-5)


def test_what_the_metadata_does_not_say_is_what_llama_cpp_takes(tmp_path):
    """Gemma's local base and scale, which no metadata holds; a linear rotation."""
    folder = saved(tmp_path, "gemma3", sliding_window_pattern=6)
    raw = GgufFile(write_gguf(folder, "gemma3")).config
    assert parse_config(raw).ropes[0].theta == 1e4 and raw["sliding_window_pattern"] == 6
    assert parse_config(raw).attention_scale == 16**-0.5  # of head_dim
    linear = {"rope__scaling__type": ("linear", gguf.GGUFValueType.STRING)}
    linear["rope__scaling__factor"] = (4.0, gguf.GGUFValueType.FLOAT32)
    folder = saved(tmp_path / "llama", "llama")
    scaled = parse_config(GgufFile(write_gguf(folder, "llama", **linear)).config)
    assert scaled.ropes[0].scaling == {"rope_type": "linear", "factor": 4.0}
    assert scaled.ropes[0].theta == read_config(folder).ropes[0].theta == 1e4


NUMBER, TEXT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("llama", {"types": {"blk.2.ffn_up.weight": "Q4_0"}}, r"blk\.2\.ffn_up\.weight is of type Q4_0"),
        ("llama", {"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, r"rope_freqs\.weight is not supported"),
        ("llama", {"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, r"blk\.0\.attn_q\.bias"),
        ("qwen3", {"extra": {"blk.0.ffn_gate_exps.weight": np.ones(8, np.float32)}}, "ffn_gate_exps"),
        ("llama", {"extra": {"blk.0.ffn_norm.bias": np.full(64, np.nan, np.float32)}}, r"ffn_norm\.bias"),
        ("llama", {"expert_count": (8, NUMBER)}, "mixture of experts"),
        ("llama", {"rope__dimension_count": (8, NUMBER)}, "partial rotation"),
        ("llama", {"rope__scaling__type": ("yarn", TEXT)}, "yarn"),
        ("llama", {"block_count": (2**28, NUMBER)}, "num_layers must be at most"),
        ("gemma3", {"context_length": (2**31, NUMBER)}, "max_positions must be at most"),
        ("llama", {"rope__freq_base": (float("nan"), gguf.GGUFValueType.FLOAT32)}, "base of a rotation"),
        ("gemma3", {"final_logit_softcapping": (30.0, gguf.GGUFValueType.FLOAT32)}, "soft-capped logits"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, kind, options, named):
    path = write_gguf(saved(tmp_path, kind), kind, **options)
    with pytest.raises(ModelError, match=named) as refused:
        ReferenceDecoder.from_pretrained(path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_no_numbers_are_damage(tmp_path):
    folder = saved(tmp_path, "llama")
    weights = np.ones((64, 96), np.float32)
    weights[3, 4] = np.inf
    path = write_gguf(folder, "llama", {"blk.0.ffn_down.weight": ("F32", weights)})
    with pytest.raises(ModelError, match=r"damaged: blk\.0\.ffn_down"):
        ReferenceDecoder.from_pretrained(path)


def test_files_that_are_none_cut_short_or_of_another_kind_are_one_line(tmp_path):
    path = write_gguf(saved(tmp_path, "llama"), "llama")
    whole = path.read_bytes()
    cases = {
        "missing": (None, "cannot read"),
        "empty": (b"", "no GGUF file"),
        "magic": (b"GGML" + whole[4:], "no GGUF file"),
        "header": (whole[:11], "cut short or damaged"),
        "metadata": (whole[:200], "cut short or damaged"),
        "tensors": (whole[:-5000], "cut short or damaged"),
        "kind": (whole.replace(b"llama", b"bloom"), "bloom is not supported"),
    }
    for name, (content, named) in cases.items():
        file = tmp_path / f"{name}.gguf"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelError, match=named) as refused:
            ReferenceDecoder.from_pretrained(file)
        assert "\n" not in str(refused.value), name


def test_an_altered_byte_of_the_metadata_is_one_line_or_harmless(tmp_path):
    path = write_gguf(saved(tmp_path, "llama"), "llama")
    whole, g, refusals = path.read_bytes(), np.random.default_rng(5), 0
    end = whole.index(b"output_norm.weight") + 4000
    for at in g.integers(4, end, 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(g.integers(1, 256))]) + whole[at + 1 :])
        try:
            ReferenceDecoder.from_pretrained(path)
        except ModelError as refused:
            refusals += 1
            assert "\n" not in str(refused)
    assert refusals > 50


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"cacheslide\[gguf\]"):
        GgufFile(tmp_path / "any.gguf")
