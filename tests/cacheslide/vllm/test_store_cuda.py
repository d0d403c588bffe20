"""The tiered store behind the connector on a CUDA device: pinned landings, both homes of the chunks in use.

Run it in a process of its own (`pytest tests/cacheslide/vllm/test_store_cuda.py`): a process holds one connector.
"""

import gc
import os
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the test looks into the worker

from cacheslide.store.pages import side_by_side
from cacheslide.vllm.offline import ask, close_engine, open_engine, worker_of
from cacheslide.vllm.options import annotations_of
from harness.backends.reference import ReferenceBackend
from harness.results.provenance import ROOT
from harness.tasks.synthetic import examples

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

PATH, CHUNK = ROOT / "models/tiny-llama-12m", 256
HOMES = {"cpu": {"host_gib": 1.0}, "model": {"device_gib": 1.0, "host_gib": 1.0}}


@contextmanager
def life(folder, home):
    """An engine with garbage in every block, over a store in `folder`, until it is closed."""
    store = {"path": str(folder), "file_gib": 1.0, "shards": 2} | HOMES[home]
    engine = open_engine(
        str(PATH), {"chunk_size": CHUNK, "encode": "now"}, store=store, max_model_len=2048,
        gpu_memory_utilization=0.2, skip_tokenizer_init=True, enforce_eager=True,
    )  # fmt: skip
    for paged in worker_of().model.paged:
        paged.cache.normal_()
    try:
        yield engine
    finally:
        close_engine(engine)
        gc.collect()
        torch.cuda.empty_cache()


def rows_of(engine, prompt) -> tuple[dict, torch.Tensor]:
    """The receipt of an annotated prompt, and K and V of its rows as they lie in its blocks."""
    worker, plans = worker_of(), []
    load = worker.load
    worker.load = lambda step: (plans.extend(step.loads), load(step))[1]
    receipt = ask(engine, [prompt.token_ids], [annotations_of(prompt, policy="naive_reuse")], 1)[0].receipt
    worker.load = load
    if not plans:
        return receipt, torch.empty(0)
    kv = worker.model.paged_kv(plans[-1].block_ids, worker.block_size)
    rows = torch.arange(plans[-1].end, device="cuda")
    pairs = [kv.read(layer, rows) for layer in range(worker.model.num_layers)]
    return receipt, torch.stack([torch.stack(pair) for pair in pairs]).clone()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal up to the rounding of computed rows; garbage left in a row is far beyond it."""
    return bool((got - want).abs().max() <= 2e-2 * want.abs().max())


def test_chunks_come_back_from_files_into_either_home(tmp_path):
    example = next(iter(examples("hotpotqa", "sparse", "test", 3, 10, 1024)))
    backend = ReferenceBackend(PATH, "float32", "cuda")
    before, now = (backend.prompt(s, example.questions[0].text) for s in (example.previous, example.segments))
    with life(tmp_path / "s", "cpu") as engine:
        assert rows_of(engine, before)[0]["chunks_hit"] == 0
        assert engine.reset_prefix_cache()  # else a block at the front is shared, and the chunk in it is not asked for
        warm, want = rows_of(engine, now)
        assert warm["chunks_hit"] == warm["chunks"] > 1 and set(warm["tiers"]) == {"host"}
    for home, tier in (("cpu", "host"), ("model", "device")):
        with life(tmp_path / "s", home) as engine:
            from_disk, got = rows_of(engine, now)
            assert from_disk["tiers"] == {"file": warm["tiers"]["host"]} and "store_failures" not in from_disk
            assert close(got, want)
            held = list(worker_of().store._chunks.values())
            assert not worker_of().memory.elsewhere
            if home == "cpu":
                assert held and all(c.k.is_pinned() and side_by_side(c.k, c.v) is not None for c in held)
            else:
                assert held and all(c.k.is_cuda for c in held)
            assert engine.reset_prefix_cache()
            again, got = rows_of(engine, now)
            assert set(again["tiers"]) == {tier} and close(got, want)
