"""Engines on a CUDA device."""

import warnings

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.vllm.offline import ask, worker_of
from cacheslide.vllm.options import annotations_of
from harness.backends.reference import ReferenceBackend
from harness.results.provenance import ROOT

PATH, CHUNK = ROOT / "models/tiny-llama-12m", 256
STORES = ["model", "cpu"]


class Cuda:
    """The engine, its worker, and the reference model on the same device."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.core = self.engine.llm_engine.engine_core.engine_core
        self.scheduler, self.worker = self.core.scheduler.connector.scheduler, worker_of()
        self.plans = []
        load = self.worker.load
        self.worker.load = lambda step: (self.plans.extend(step.loads), load(step))[1]
        self.reference = ReferenceBackend(PATH, "float32", "cuda")

    def fresh(self, store: str) -> None:
        """An empty store on `store`, and garbage in every block."""
        self.scheduler.reset()
        self.worker.store.clear()
        self.worker.move_store(store)
        self.poison()

    def poison(self) -> None:
        """No shared blocks, and garbage in all of them."""
        assert self.engine.reset_prefix_cache()
        for paged in self.worker.model.paged:
            paged.cache.normal_()

    def turns(self, example, question: str):
        """The prompt before and now, with the question behind it."""
        before, now = (self.reference.prompt(s, question) for s in (example.previous, example.segments))
        return before, now

    def said(self, answer) -> str:
        """The answer's text before its end token."""
        stop = next(
            (i for i, t in enumerate(answer.token_ids) if t in self.reference.stop_ids()), len(answer.token_ids)
        )
        return self.reference.tokenizer.decode(answer.token_ids[:stop], skip_special_tokens=True).strip()

    def kv(self, rows: int):
        """K and V of the last loaded request."""
        kv = self.worker.model.paged_kv(self.plans[-1].block_ids, self.worker.block_size)
        pairs = [kv.read(i, torch.arange(rows, device="cuda")) for i in range(self.worker.model.num_layers)]
        return torch.stack([k for k, _ in pairs]).float(), torch.stack([v for _, v in pairs]).float()


def run(cuda, prompt, tokens=8, **annotations):
    return ask(cuda.engine, [prompt.token_ids], [annotations_of(prompt, **annotations)], tokens)[0]


def waits_within(monkeypatch, worker, *names: str) -> list[str]:
    """Where this package made the host wait for the device, in these methods of the worker from now on."""
    found = []

    def watched(plain):
        def call(step) -> None:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    plain(step)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            found.extend(f"{w.filename}:{w.lineno}" for w in seen if "cacheslide" in w.filename)

        return call

    for name in names:
        monkeypatch.setattr(worker, name, watched(getattr(worker, name)))
    return found
