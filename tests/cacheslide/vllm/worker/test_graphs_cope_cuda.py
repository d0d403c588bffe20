"""Replayed layers of CoPE models on a CUDA device: the KV and the answers of launched ones, with and without slots.

Run it in a process of its own (`pytest tests/cacheslide/vllm/worker/test_graphs_cope_cuda.py`): a process holds one
connector.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the test looks into the worker
os.environ.pop("TORCH_COMPILE_DISABLE", None)

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.vllm.offline import close_engine
from cacheslide.vllm.options import annotations_of
from cacheslide.vllm.worker.graphs import RECORD_AT, GraphedPrefill
from tests.helpers.checkpoints import save_random_adapter
from tests.helpers.cope_served import CopeServed
from tests.helpers.cuda import waits_within
from tests.helpers.cuda_cope import CudaCope, ids, turn
from tests.helpers.graphed import BATCHES, everything
from tests.helpers.graphed_cope import KINDS
from tests.helpers.requests import requests
from tests.helpers.served import logprobs, receipt, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SYSTEMS = {"epic": {"recompute_ratio": 0.26}, "naive_reuse": {}, "cacheslide_first": {}}  # known before the start
# Of KV by layer, and of log-probabilities: in bfloat16 sums of gates pass rounding on
# (tests/cacheslide/vllm/cope/test_cuda.py).
BOUNDS = {"bfloat16": (0.1, 0.6), "float32": (1e-4, 1e-3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", BATCHES.values(), ids=BATCHES)
def test_cuda_graphs_over_the_reference_model(checkpoint, tmp_path, rules, kind):
    """Without vLLM, in float32: ragged batches in one recording, slots in fixed memory."""
    adapter = save_random_adapter(tmp_path / "adapter", checkpoint, tables=1.0)
    model = CopeServed.made(checkpoint, adapter, *KINDS[kind], device="cuda")
    made = requests(model, rules)
    want = everything(SelectivePrefill(model).run(made), made)
    graphs = GraphedPrefill(model, 400)
    for _ in range(RECORD_AT + 2):
        made = requests(model, rules)
        got = everything(SelectivePrefill(model, graphs).run(made), made)
        assert got[1] == want[1]
        for mine, theirs in zip(got[0], want[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert graphs.replayed == 3 and not graphs.failed and not graphs.faults.total
    assert {size.variant for size in graphs.recorded} == {"slots" if KINDS[kind][0] else ""}


class GraphedCope(CudaCope):
    """The engine, and runs with and without graphs."""

    def __init__(self, folder, dtype: str) -> None:
        super().__init__(folder, dtype)
        self.kv_bound, self.logprob_bound = BOUNDS[dtype]

    @property
    def graphs(self) -> GraphedPrefill:
        return self.worker.graphs

    def reused(self, prompt, enabled: bool, **annotations):
        """One request from cached chunks in poisoned blocks: its output and its KV."""
        self.graphs.enabled = enabled
        try:
            self.poison()
            output = self.one(prompt, 4, **annotations)
        finally:
            self.graphs.enabled = True
        assert receipt(output)["tokens_reused"] > 0 and not receipt(output)["fallback"]
        return output, self.left(len(prompt))

    def replayed(self, prompt, **annotations):
        for _ in range(RECORD_AT):
            self.reused(prompt, True, **annotations)
        before = self.graphs.replayed
        out = self.reused(prompt, True, **annotations)
        assert self.graphs.replayed == before + 1, self.graphs.eager
        return out

    def assert_alike(self, mine, theirs) -> None:
        assert tokens(mine) == tokens(theirs) or self.logprob_bound > 0.1
        assert (logprobs(mine) - logprobs(theirs)).abs().max() < self.logprob_bound


@pytest.fixture(scope="module", params=BOUNDS)
def cuda(request, tmp_path_factory):
    served = GraphedCope(tmp_path_factory.mktemp("cope"), request.param)
    yield served
    close_engine(served.llm)


@pytest.mark.parametrize("store", ["model", "cpu"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_replayed_layers_leave_the_kv_and_the_answer_of_launched_ones(cuda, system, store):
    first, second = turn(1, 37), turn(2, 53)
    cuda.fresh()
    cuda.worker.move_store(store)
    cuda.one(first, policy=system, **SYSTEMS[system])
    want, expected = cuda.reused(second, False, policy=system, **SYSTEMS[system])
    got, kv = cuda.replayed(second, policy=system, **SYSTEMS[system])
    for name in ("tokens_reused", "tokens_recomputed", "tokens_per_layer", "compute_fraction"):
        assert receipt(got)[name] == receipt(want)[name]
    for mine, right in zip(kv, expected, strict=True):
        for layer, (x, y) in enumerate(zip(mine.float(), right.float(), strict=True)):
            assert (x - y).norm() / y.norm() < cuda.kv_bound, f"layer {layer}"
    cuda.assert_alike(got, want)
    assert any(size.variant == "slots" for size in cuda.graphs.recorded)


def test_a_prompt_without_updated_text_before_its_fixed_text_has_no_slots(cuda):
    fixed = Segment(ids(500, 7), Role.REUSE)
    prompts = [Prompt((fixed, Segment(ids(40 + n, 900 + n), Role.RECOMPUTE))) for n in range(2)]
    cuda.fresh()
    cuda.worker.move_store("model")
    cuda.one(prompts[0], policy="epic")
    want, expected = cuda.reused(prompts[1], False, policy="epic", recompute_ratio=0.26)
    before = set(cuda.graphs.recorded)
    got, kv = cuda.replayed(prompts[1], policy="epic", recompute_ratio=0.26)
    assert {size.variant for size in set(cuda.graphs.recorded) - before} == {""}
    for mine, right in zip(kv, expected, strict=True):
        assert (mine.float() - right.float()).norm() / right.float().norm() < cuda.kv_bound
    cuda.assert_alike(got, want)


def test_a_ragged_batch_is_replayed_together(cuda):
    cuda.fresh()
    cuda.worker.move_store("model")
    cuda.one(turn(1, 37), policy="epic")
    prompts = [turn(2, 53), turn(4, 20), turn(5, 70), turn(6, 9)]
    marks = [annotations_of(p, policy="epic", recompute_ratio=0.26) if i != 1 else None for i, p in enumerate(prompts)]
    cuda.graphs.enabled = False
    cuda.poison()
    want = cuda.ask(prompts, marks, 4)
    cuda.graphs.enabled = True
    for _ in range(RECORD_AT + 1):
        cuda.poison()
        before = cuda.graphs.replayed
        got = cuda.ask(prompts, marks, 4)
        for mine, theirs in zip(got, want, strict=True):
            cuda.assert_alike(mine, theirs)
    assert cuda.graphs.replayed > before, cuda.graphs.eager


def test_a_replayed_load_never_waits_for_the_device(cuda, monkeypatch):
    cuda.fresh()
    cuda.worker.move_store("model")
    cuda.one(turn(1, 37), policy="epic")
    cuda.replayed(turn(2, 53), policy="epic", recompute_ratio=0.26)
    waits, replayed = waits_within(monkeypatch, cuda.worker, "load"), cuda.graphs.replayed
    cuda.reused(turn(2, 53), True, policy="epic", recompute_ratio=0.26)
    assert cuda.graphs.replayed == replayed + 1 and not waits, waits


def test_nothing_failed_to_be_recorded(cuda):
    """Runs last: all of the above was replayed where it says so."""
    assert cuda.graphs.replayed > 0 and not cuda.graphs.failed and not cuda.graphs.eager["not recorded"]
    assert not cuda.worker.faults.total
