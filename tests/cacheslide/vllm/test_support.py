"""What cannot be served inside vLLM is refused by name: settings, caches, systems, rotations; weights are named."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig

from cacheslide.errors import ConfigError, ModelError, PolicyError
from cacheslide.positions.rope import inverse_frequencies
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.geometry import weights_id
from cacheslide.vllm.options import policy_of
from cacheslide.vllm.support import check, check_place
from cacheslide.vllm.systems import check_served
from cacheslide.vllm.worker.model_adapter import rotary_of

pytestmark = pytest.mark.slow


def engine_config(**changes):
    """A configuration that is served, with some of its parts changed by dotted name."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"],
            hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            uses_mrope=False,
            runner_type="generate",
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        lora_config=None,
        speculative_config=None,
    )
    for name, value in changes.items():
        *way, last = name.split("__")
        part = config
        for step in way:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


def cache_config(kind: str = "FullAttentionSpec", groups: int = 1, window=None):
    spec = type(kind, (), {"sliding_window": window, "attention_chunk_size": None})()
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups)


def test_a_plain_configuration_is_served():
    check(engine_config(), cache_config())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_config__architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"model_config__architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),  # of the reference host only
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context"),
        ({"cache_config__cache_dtype": "fp8"}, "cache type fp8"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_role"),
        ({"model_config__hf_text_config__rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"model_config__hf_text_config__rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"model_config__hf_text_config__is_causal": False}, "bidirectional"),
        ({"model_config__hf_text_config__llama_4_scaling": {"beta": 1}}, "llama_4_scaling"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, reason):
    with pytest.raises((ModelError, ConfigError), match=reason):
        check(engine_config(**changes), cache_config())


@pytest.mark.parametrize("cache", [cache_config("SlidingWindowSpec"), cache_config(groups=2), cache_config(window=64)])
def test_caches_of_other_attention_are_refused(cache):
    with pytest.raises(ModelError, match=r"full-attention|sliding-window"):
        check(engine_config(), cache)


def test_systems_that_a_model_cannot_run():
    with pytest.raises(PolicyError, match="layer 5, but the model has layers 0 to 4"):
        policy_of("cacheslide", None, 5).check(5)
    policy_of("cacheslide", None, 4).check(5)
    check_served(policy_of("prophetkv"), 5)
    for name, notes in (("kvcomm", "anchors"), ("cache_craft", "attention")):
        with pytest.raises(PolicyError, match=rf"{name} keeps notes beside its chunks \({notes}\).*host only"):
            check_served(policy_of(name), 5)


@pytest.mark.fault("multi_connector")
@pytest.mark.parametrize("deep", [False, True])
def test_a_child_of_another_connector_is_refused_by_name(deep):
    """By vLLM's own way of making connectors: a child's configuration looks like an engine's."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    from cacheslide.vllm.plugin import register

    register()
    ours = {"kv_connector": CONNECTOR, "kv_role": "kv_both"}
    if deep:
        inner = {"kv_connector_extra_config": {"connectors": [ours]}}
        ours = {"kv_connector": "MultiConnector", "kv_role": "kv_both", **inner}
    outer = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": [ours]}
    )
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=True)
    config = engine_config(kv_transfer_config=outer, scheduler_config=scheduler)
    for role in KVConnectorRole:
        with pytest.raises(ConfigError, match="does not work inside MultiConnector"):
            KVConnectorFactory.create_connector(config, role, cache_config())


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
@pytest.mark.fault("multi_connector")
def test_an_engine_with_several_connectors_does_not_start():
    from vllm import LLM

    ours = {"kv_connector": CONNECTOR, "kv_role": "kv_both"}
    other = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
    several = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    several |= {"kv_connector_extra_config": {"connectors": [ours, other]}}
    common = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True}
    with pytest.raises(ConfigError, match="does not work inside MultiConnector"):
        LLM("models/tiny-llama-12m", kv_transfer_config=several, disable_hybrid_kv_cache_manager=True, **common)


@pytest.mark.fault("multi_connector")
def test_only_the_engines_own_connector_behind_the_door_serves():
    own = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=CONNECTOR))
    check_place(own, checked=True)
    with pytest.raises(ConfigError, match="plugin is not loaded"):
        check_place(own, checked=False)
    renamed = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="Derived"))  # a class of somebody else
    with pytest.raises(ConfigError, match="inside Derived"):
        check_place(renamed, checked=True)


@pytest.mark.fault("multi_connector")
def test_offloading_does_not_take_the_connectors_place_silently():
    from vllm.config import VllmConfig

    from cacheslide.vllm.plugin import register

    register()
    for connector, size, refused in ((CONNECTOR, 1.0, True), (CONNECTOR, None, False), ("Other", 1.0, False)):
        asked = SimpleNamespace(
            kv_transfer_config=KVTransferConfig(kv_connector=connector, kv_role="kv_both"),
            cache_config=SimpleNamespace(kv_offloading_size=size, kv_offloading_backend="native"),
        )
        if refused:
            with pytest.raises(ConfigError, match="kv_offloading_size"):
                VllmConfig._post_init_kv_transfer_config(asked)
        else:
            VllmConfig._post_init_kv_transfer_config(asked)


def test_chunks_are_named_by_the_files_the_weights_came_from(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    first = weights_id(str(tmp_path), None, "{}")
    assert first == weights_id(str(tmp_path), None, "{}") != weights_id(str(tmp_path), "main", "{}")
    file.write_bytes(b"12")
    assert weights_id(str(tmp_path), None, "{}") != first


def rotating_model(rope: dict, dtype: torch.dtype, positions: int = 131072):
    """A model whose rotation tables are made as vLLM makes them: angles in float32, rounded to `dtype`."""
    inv = inverse_frequencies(64, rope["rope_theta"], {k: v for k, v in rope.items() if k != "rope_theta"}).float()
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    rotary = SimpleNamespace(head_size=64, cos_sin_cache=table, is_neox_style=True)
    layer = SimpleNamespace(self_attn=SimpleNamespace(rotary_emb=rotary))
    return SimpleNamespace(model=SimpleNamespace(layers=[layer]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_are_compared_before_they_are_trusted(dtype):
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    model = rotating_model(llama3, dtype)
    assert rotary_of(model, SimpleNamespace(rope_parameters=llama3)).max_positions == 131072
    with pytest.raises(ModelError, match="rotates differently"):
        rotary_of(model, SimpleNamespace(rope_parameters=plain))
    model.model.layers[0].self_attn.rotary_emb.is_neox_style = False
    with pytest.raises(ModelError, match="half-split"):
        rotary_of(model, SimpleNamespace(rope_parameters=llama3))
