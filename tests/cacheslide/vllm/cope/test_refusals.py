"""What CoPE models inside vLLM do not do is refused at the start, by name: another base, altered files, settings."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.errors import ConfigError, ModelError
from cacheslide.training.load import find_cope
from cacheslide.vllm.cope.setting import overrides
from cacheslide.vllm.support import check_cope, check_spans
from tests.helpers.checkpoints import save_random
from tests.helpers.vllm_cope import SHAPE, SLOTS, Cope, save_base, save_setup

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


def test_another_base_and_a_changed_adapter_are_refused(tmp_path):
    adapter = save_setup(tmp_path / "adapter", save_base(tmp_path / "base"))
    other = save_random(tmp_path / "other", "mistral", **SHAPE, sliding_window=None, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="belongs to the base model"):
        Cope(other, adapter)
    found = find_cope(adapter).adapter
    changed = replace(found, base="0" * 64)
    (tmp_path / "changed").mkdir()
    for name in ("cope.safetensors", "cope.json"):
        (tmp_path / "changed" / name).write_bytes((adapter / name).read_bytes())
    text = (tmp_path / "changed/cope.json").read_text().replace(found.base, changed.base)
    (tmp_path / "changed/cope.json").write_text(text)
    with pytest.raises(ModelError, match="altered"):
        overrides(tmp_path / "changed")
    with pytest.raises(ModelError, match="no CoPE adapter"):
        overrides(tmp_path)
    with pytest.raises(ConfigError, match="architecture"):
        overrides(adapter, others={"architectures": ["X"]})


def settings(**changes) -> SimpleNamespace:
    """What `check_cope` reads of vLLM's configuration; `a__b` changes b of a."""
    parts = {
        "model_config": {"dtype": torch.bfloat16, "quantization": None, "get_sliding_window": lambda: None},
        "parallel_config": {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1},
        "cache_config": {"cache_dtype": "auto", "sliding_window": None},
    }
    rest = {"quant_config": None, "speculative_config": None, "lora_config": None}
    config = SimpleNamespace(model_type="llama")
    for name, value in changes.items():
        where, _, what = name.rpartition("__")
        if where == "hf":
            setattr(config, what, value)
        else:
            (parts[where] if where else rest)[what] = value
    parts["model_config"]["hf_config"] = config
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in parts.items()}, **rest)


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("cache_config__cache_dtype", "fp8", "KV cache type fp8"),
        ("cache_config__cache_dtype", "float16", "KV cache type float16"),
        ("cache_config__sliding_window", 4096, "sliding windows"),
        ("speculative_config", {}, "speculative decoding"),
        ("lora_config", {}, "LoRA"),
        ("quant_config", {}, "quantisation"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("hf__model_type", "qwen2", "qwen2"),
        ("hf__llama_4_scaling", {"beta": 1}, "llama_4_scaling"),
    ],
)
def test_what_does_not_work_is_named_at_the_start(change, value, said):
    check_spans(True, 0)
    with pytest.raises(ConfigError, match="template"):
        check_spans(True, SLOTS)
    check_cope(settings())
    check_cope(settings(cache_config__cache_dtype="bfloat16"))
    with pytest.raises((ConfigError, ModelError), match=said):
        check_cope(settings(**{change: value}))
