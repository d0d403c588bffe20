"""Every model family the connector serves: Mistral, Qwen2 (projection biases) and Qwen3 (norms on q and k)."""

from contextlib import closing

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

pytest.importorskip("vllm")

from tests.helpers.checkpoints import SHAPE as TINY
from tests.helpers.served import CHUNK, FIRST, SECOND, SHAPE, Served, assert_same, logprobs, receipt, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

FAMILIES = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 128, "num_attention_heads": 4}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


@pytest.fixture(params=FAMILIES)
def served(request, tmp_path):
    config, model, changes = FAMILIES[request.param]
    torch.manual_seed(11)
    made = model(config(**(TINY | SHAPE | changes)))
    for name, parameter in made.named_parameters():  # biases and norms that do nothing would hide their absence
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    made.save_pretrained(tmp_path)
    with closing(Served(tmp_path)) as engine:
        yield engine


def test_all_rows_selected_is_plain_vllm_and_none_is_not(served):
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST, policy="cacheslide")
    served.poison()
    full = served.one(SECOND, 1, recompute_ratio=1.0)
    assert receipt(full)["chunks_hit"] > 0 == receipt(full)["tokens_reused"]
    torch.testing.assert_close(logprobs(full), logprobs(truth), atol=1e-4, rtol=1e-4)
    exact = served.kv(len(SECOND))
    served.poison()
    assert tokens(served.one(SECOND, recompute_ratio=1.0)) == tokens(truth)
    served.poison()
    none = served.one(SECOND, recompute_ratio=0.0)
    assert (logprobs(none) - logprobs(truth)).abs().max() > 1e-2
    # the rows vLLM itself computes, read from the cache, are the rows the adapter computes
    served.poison()
    served.one(SECOND, policy="naive_reuse", encode="now")
    stored = [
        served.worker.store._chunks[key] for key in list(served.scheduler.index._sizes)[-len(SECOND.chunks(CHUNK)) :]
    ]
    rows = torch.cat([c.positions for c in stored])
    for got, mine in zip(exact, ("k", "v"), strict=True):
        want = torch.cat([getattr(c, mine) for c in stored], dim=1)
        assert_same(got[:, rows], want, 2e-5)
