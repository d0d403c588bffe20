"""CoPE models inside vLLM (CPU): parity with the reference model, reuse, batches, prefix cache, ranks, refusals."""

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.engine import ReuseEngine
from cacheslide.store import MemoryChunkStore
from cacheslide.training.load import load_cope
from cacheslide.vllm.cope_setting import overrides
from cacheslide.vllm.params import policy_of
from tests.conftest import save_random, save_random_adapter
from tests.test_cope_model import dense
from tests.test_vllm_engine import BLOCK, CHUNK, FIRST, SECOND, SHAPE, Served, assert_same, logprobs, receipt, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

SYSTEMS = {
    "cacheslide": {"layer": 2},
    "cacheslide_promote": {},
    "cacheblend": {},
    "prompt_cache": {},
    "epic": {"share": 0.26},
    "naive_reuse": {},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("base"), **SHAPE)


@pytest.fixture(scope="module")
def adapter(path, tmp_path_factory):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), path)


@pytest.fixture(scope="module")
def served(path, adapter):
    engine = Served(path, engine={"hf_overrides": overrides(adapter)})
    yield engine
    engine.core.shutdown()


@pytest.fixture(scope="module")
def live(path, adapter):
    return load_cope(path, adapter, live=True)


def exact(model, prompt, slots=None):
    """K, V [layers, rows, kv_heads, head_dim] and the last row's log-probabilities of a plain forward."""
    hidden, kv = dense(model, prompt, slots)
    return kv.k[:, : len(prompt)], kv.v[:, : len(prompt)], model.logits(hidden[-1][-1:])[0].log_softmax(-1)


def paged(served, slots, rows):
    """K and V of a request's blocks."""
    kv = served.worker.model.paged_kv(slots, BLOCK)
    pairs = [kv.read(layer, torch.arange(rows)) for layer in range(served.worker.model.num_layers)]
    return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def test_a_plain_request_is_the_reference_model(served, live):
    served.fresh()
    output = served.plain(SECOND)
    k, v, want = exact(live, SECOND)
    torch.testing.assert_close(logprobs(output), want, atol=1e-4, rtol=1e-5)
    longer = SECOND.token_ids
    for i, token in enumerate(tokens(output)):
        assert token == int(want.argmax())
        longer = (*longer, token)
        want = exact(live, longer)[2]
        if i < 3:
            torch.testing.assert_close(logprobs(output, i + 1), want, atol=1e-4, rtol=1e-5)
