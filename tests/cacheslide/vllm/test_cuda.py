"""The connector on a CUDA device: compiled model, CUDA graphs, the row kernel, both homes of the store.

Run it in a process of its own (`pytest tests/cacheslide/vllm/test_cuda.py`): a process holds one connector. What must
hold to rounding on a CPU holds here up to bfloat16; answers of the shipped model say whether that matters.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the test looks into the worker
os.environ.pop("TORCH_COMPILE_DISABLE", None)

from cacheslide.core.engine import ReuseEngine
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.offline import ask, close_engine, open_engine
from cacheslide.vllm.options import annotations_of, policy_of
from cacheslide.vllm.worker.host_copies import HostCopies
from harness.tasks.synthetic import examples
from tests.helpers.cuda import CHUNK, PATH, STORES, Cuda, run, waits_within

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]


@pytest.fixture(scope="module")
def cuda():
    options = {"chunk_size": CHUNK, "encode": "now", "store_device": "model"}
    engine = open_engine(str(PATH), options, max_model_len=2048, gpu_memory_utilization=0.2, skip_tokenizer_init=True)
    try:
        yield Cuda(engine)
    finally:
        close_engine(engine)


@pytest.fixture(scope="module")
def prompts():
    return list(examples("hotpotqa", "sparse", "test", 3, 10, 1024))


def test_graphs_and_the_second_model_runner_are_on(cuda):
    config = cuda.engine.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert config.use_v2_model_runner


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("system", ["epic", "naive_reuse", "prompt_cache", "cacheblend", "cacheslide", "epic_stale"])
def test_kv_is_the_reference_engines(cuda, prompts, system, store):
    before, now = cuda.turns(prompts[0], prompts[0].questions[0].text)
    cuda.fresh(store)
    run(cuda, before, policy=system)
    cuda.poison()
    got = run(cuda, now, policy=system).receipt
    policy = policy_of(system)
    engine = ReuseEngine(cuda.reference.model, policy, MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(before)
    want = engine.prefill(now)
    assert got["chunks_hit"] == want.receipt.chunks_hit > 0 and got["measured"] and not got["fallback"]
    assert got["tokens_reused"] == want.receipt.tokens_reused
    rows = len(now) - 1
    if policy.placement.slot:
        return  # rows sit at other positions there: the same up to a rotation
    for mine, theirs in zip(cuda.kv(rows), (want.kv.k, want.kv.v), strict=True):
        for layer, (x, y) in enumerate(zip(mine, theirs[:, :rows], strict=True)):
            off = (x - y).norm() / y.norm()
            # Near ties in the ranking may choose other rows in bfloat16: a few rows then differ as a whole.
            assert off < (0.02 if system in ("epic", "naive_reuse", "epic_stale") else 0.1), f"layer {layer}: {off}"


@pytest.mark.parametrize("store", STORES)
def test_every_row_recomputed_is_plain_and_none_is_not(cuda, prompts, store):
    before, now = cuda.turns(prompts[1], prompts[1].questions[0].text)
    cuda.fresh(store)
    run(cuda, before)
    plain = ReuseEngine(cuda.reference.model, policy_of("recompute"), MemoryChunkStore()).prefill(now).kv
    rows, off = len(now) - 1, {}
    for share in (1.0, 0.0):
        cuda.poison()
        run(cuda, now, recompute_ratio=share)
        k, v = cuda.kv(rows)
        off[share] = max(
            float((k - plain.k[:, :rows]).norm() / k.norm()), float((v - plain.v[:, :rows]).norm() / v.norm())
        )
    assert off[1.0] < 0.02 < 0.1 < off[0.0], off


def test_plain_requests_never_see_approximate_rows(cuda, prompts):
    before, now = cuda.turns(prompts[2], prompts[2].questions[0].text)
    cuda.fresh("model")
    logprobs = {"logprobs": 5}
    first = ask(cuda.engine, [now.token_ids], tokens=8, **logprobs)[0]
    cuda.fresh("model")
    run(cuda, before)
    annotated = run(cuda, now, recompute_ratio=0.0)
    assert annotated.receipt["tokens_reused"] > 0
    assert ask(cuda.engine, [now.token_ids], tokens=8, **logprobs)[0].token_ids == first.token_ids


def test_a_mixed_batch_of_packed_and_plain_requests(cuda, prompts):
    cuda.fresh("cpu")
    pairs = [cuda.turns(p, p.questions[0].text) for p in prompts[:8]]
    for before, _ in pairs:
        run(cuda, before)
    annotations = [annotations_of(now) if i % 4 else None for i, (_, now) in enumerate(pairs)]
    alone = [ask(cuda.engine, [now.token_ids], [m], 8)[0] for (_, now), m in zip(pairs, annotations, strict=True)]
    together = ask(cuda.engine, [now.token_ids for _, now in pairs], annotations, 8)
    # What the model says behind its end token is noise, which another batch size may tip.
    assert [cuda.said(a) for a in together] == [cuda.said(a) for a in alone]
    assert all((a.receipt is None) == (m is None) for a, m in zip(together, annotations, strict=True))
    assert all(a.receipt["tokens_reused"] > 0 for a in together if a.receipt)


@pytest.mark.parametrize("store", STORES)
def test_a_load_never_waits_for_the_device(cuda, prompts, store, monkeypatch):
    before, now = cuda.turns(prompts[3], prompts[3].questions[0].text)
    cuda.fresh(store)
    run(cuda, before)
    cuda.poison()
    waits = waits_within(monkeypatch, cuda.worker, "load")
    assert run(cuda, now).receipt["tokens_reused"] > 0
    assert not waits, waits


@pytest.mark.parametrize("store", STORES)
def test_a_save_never_waits_for_the_device(cuda, prompts, store, monkeypatch):
    """Neither what a prefill leaves in its blocks, nor what a finished request leaves as history."""
    before, now = cuda.turns(prompts[4], prompts[4].questions[0].text)
    cuda.fresh(store)
    waits = waits_within(monkeypatch, cuda.worker, "save", "begin")
    run(cuda, before, policy="naive_reuse", history=len(before) - 1)
    run(cuda, now, policy="naive_reuse")  # the step that begins with the history's copy
    assert cuda.worker.store.stats.puts > 0 and not waits, waits


def test_copies_to_the_host_hold_no_more_than_they_may(cuda):
    rows = [torch.randn(1000, 1000, device="cuda") for _ in range(8)]
    copies = HostCopies(torch.device("cuda"), under_way=9_000_000)  # two of them
    sent = []
    for x in rows:
        torch.cuda._sleep(1_000_000)
        sent.append(copies.send([x]))
        assert copies.held <= 9_000_000
    for (held, done), x in zip(sent, rows, strict=True):
        done.synchronize()
        assert held[0].is_pinned() and torch.equal(held[0], x.cpu())
    copies.settle()
    assert copies.held == 0


def score(cuda, prompts, **annotations) -> float:
    """Share of first questions answered right, each prompt served from the chunks of the turn before."""
    right = 0
    for example in prompts:
        question = example.questions[0]
        before, now = cuda.turns(example, question.text)
        cuda.fresh("model")
        run(cuda, before, **annotations)
        answer = run(cuda, now, **annotations)
        assert annotations.get("policy") == "recompute" or answer.receipt["tokens_reused"] > 0
        right += cuda.said(answer) in question.answers
    return right / len(prompts)


def test_answers_survive_reuse(cuda, prompts):
    assert score(cuda, prompts, policy="recompute") >= 0.9
    assert score(cuda, prompts, layer=4) >= 0.9  # the layer chosen for this model on validation prompts
