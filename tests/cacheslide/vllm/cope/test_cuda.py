"""CoPE models inside vLLM on a CUDA device: compiled model, whole CUDA graphs, the kernels against the reference.

Run it in a process of its own (`pytest tests/cacheslide/vllm/cope/test_cuda.py`): a process holds one connector at a
time.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tests look into the worker
os.environ.pop("TORCH_COMPILE_DISABLE", None)

import cacheslide
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.kernels.cope import decode as cope_decode
from cacheslide.kernels.cope import forward as cope_forward
from cacheslide.positions.ccpe import slots_in
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.offline import close_engine
from cacheslide.vllm.options import annotations_of, policy_of
from tests.helpers.cuda_cope import BOUNDS, CudaCope, cuda_exact, ids, turn
from tests.helpers.served import logprobs, receipt

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SYSTEMS = {
    "naive_reuse": {},
    "epic": {"recompute_ratio": 0.26},
    "cacheslide": {},
}  # EPIC's own edges would cover these chunks


@pytest.fixture(scope="module", params=BOUNDS)
def cuda(request, tmp_path_factory):
    served = CudaCope(tmp_path_factory.mktemp("cope"), request.param)
    yield served
    close_engine(served.llm)


def test_whole_graphs_are_declared_and_used(cuda):
    config = cuda.llm.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert config.use_v2_model_runner
    backend = cuda.worker.model.layers[0].self_attn.attn.attn_backend
    support = backend.get_builder_cls().get_cudagraph_support(config, None)
    assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE"


def compiled() -> int:
    """Variants of the CoPE kernels that this process has compiled."""
    kernels = cope_forward._cope_attention, cope_decode._scores, cope_decode._attend
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.parametrize("length", [1, 31, 700, 1500])
def test_a_plain_request_is_the_reference_model(cuda, length):
    prompt = Prompt((Segment(ids(length, length), Role.RECOMPUTE),))
    cuda.fresh()
    cuda.assert_follows(cuda.plain(prompt, 12), cuda.live, prompt)


def test_a_batch_that_a_graph_pads(cuda):
    """Five requests that decode together beside ones that come in later: padded graphs, then mixed batches."""
    cuda.fresh()
    before = compiled()
    prompts = [Prompt((Segment(ids(n, n), Role.RECOMPUTE),)) for n in (3, 900, 64, 513, 130)]
    for output, prompt in zip(cuda.ask(prompts, tokens=24), prompts, strict=True):
        cuda.assert_follows(output, cuda.live, prompt, check_kv=False)
    assert compiled() == before > 0  # all of it while the engine started


def test_an_annotated_request_crosses_its_slots_by_their_offsets(cuda):
    prompt = turn(3, 53)
    cuda.fresh()
    output = cuda.one(prompt, policy="recompute")
    cuda.assert_follows(output, cuda.calibrated, prompt, slots_in(prompt))
    live = cuda_exact(cuda.live, list(prompt.token_ids))[2].cpu()
    if cuda.logprob_bound < 0.1:
        assert (logprobs(output) - live).abs().max() > 10 * cuda.logprob_bound
    plain = cuda.plain(prompt)
    cuda.assert_follows(plain, cuda.live, prompt, check_kv=False)


@pytest.mark.parametrize("store", ["model", "cpu"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_reuse_leaves_the_kv_that_the_reference_engine_leaves(cuda, system, store):
    first, second = turn(1, 37), turn(2, 53)
    policy = policy_of(system, **SYSTEMS[system])
    engine = ReuseEngine(cuda.calibrated, policy, MemoryChunkStore(), chunk_size=16)
    engine.build(first)
    want = engine.prefill(second)
    cuda.fresh()
    cuda.worker.move_store(store)
    cuda.one(first, policy=system, **SYSTEMS[system])
    cuda.poison()
    got = receipt(cuda.one(second, 2, policy=system, **SYSTEMS[system]))
    assert got["tokens_reused"] == want.receipt.tokens_reused > 0 and got["chunks_hit"] == want.receipt.chunks_hit
    # Near ties in the ranking may choose other rows in 16 bits: a few rows then differ as a whole.
    ties = system == "cacheslide" and cuda.kv_bound > 1e-2
    cuda.assert_kv((want.kv.k, want.kv.v), len(second), 2 * cuda.kv_bound if ties else None)


def test_a_mixed_batch_says_what_each_request_says_alone(cuda):
    cuda.fresh()
    cuda.one(turn(1, 37))
    prompts = [turn(2, 53), turn(4, 20), turn(5, 70), turn(2, 53)]
    annotations = [
        annotations_of(prompts[0], recompute_ratio=1.0),
        None,
        annotations_of(prompts[2], policy="recompute"),
        None,
    ]
    outputs = cuda.ask(prompts, annotations, 8)
    for output, prompt, mark in zip(outputs, prompts, annotations, strict=True):
        model, slots = (cuda.live, None) if mark is None else (cuda.calibrated, slots_in(prompt))
        cuda.assert_follows(output, model, prompt, slots, check_kv=False)


def test_nothing_waits_for_the_device(cuda):
    """Neither a load nor the attention of a batch with slots."""
    cuda.fresh()
    cuda.worker.move_store("model")
    prompts = [turn(2, 53), turn(4, 20), turn(5, 70)]
    annotations = [annotations_of(prompts[0]), None, annotations_of(prompts[2], policy="recompute")]
    cuda.one(turn(1, 37))
    cuda.ask(prompts, annotations, 4)  # whatever compiles does so now
    cuda.poison()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            outputs = cuda.ask(prompts, annotations, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert receipt(outputs[0])["tokens_reused"] > 0
    ours = str(Path(cacheslide.__file__).parent)
    waits = [f"{w.filename}:{w.lineno}" for w in seen if w.filename.startswith(ours)]
    assert not waits, waits
