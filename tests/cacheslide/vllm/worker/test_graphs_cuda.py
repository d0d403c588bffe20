"""Replayed layers on a CUDA device: the KV and the answers of launched ones, in every kind of step.

Run it in a process of its own (`pytest tests/cacheslide/vllm/worker/test_graphs_cuda.py`): a process holds one
connector. A replayed layer runs the same kernels over padded rows, whose products may be summed in another order: equal
up to bfloat16.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the test looks into the worker
os.environ.pop("TORCH_COMPILE_DISABLE", None)

from vllm import SamplingParams

from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.vllm.offline import ask, close_engine, open_engine
from cacheslide.vllm.options import annotations_of
from cacheslide.vllm.worker.graphs import RECORD_AT, GraphedPrefill
from harness.robustness.seams import GRAPH_SEAMS, raising
from harness.tasks.synthetic import examples
from tests.helpers.cuda import CHUNK, PATH, STORES, Cuda, run, waits_within
from tests.helpers.graphed import BATCHES, Served, everything
from tests.helpers.requests import requests

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

KNOWN = {"epic": {"recompute_ratio": 0.1}, "naive_reuse": {}}  # tokens known before the start


class Graphed(Cuda):
    """The engine, and runs with and without graphs."""

    @property
    def graphs(self):
        return self.worker.graphs

    def launched(self, prompt, **annotations):
        """One request whose layers are launched: its answer and its KV."""
        self.graphs.enabled = False
        try:
            self.poison()
            answer = run(self, prompt, **annotations)
        finally:
            self.graphs.enabled = True
        return answer, self.kv(len(prompt) - 1)

    def replayed(self, prompt, **annotations):
        """The same, replayed."""
        for _ in range(RECORD_AT):
            self.poison()
            run(self, prompt, **annotations)
        before = self.graphs.replayed
        self.poison()
        answer = run(self, prompt, **annotations)
        assert self.graphs.replayed == before + 1, self.graphs.eager
        return answer, self.kv(len(prompt) - 1)


@pytest.fixture(scope="module")
def cuda():
    options = {"chunk_size": CHUNK, "encode": "now", "store_device": "model"}
    settings = {"max_model_len": 2048, "gpu_memory_utilization": 0.2, "skip_tokenizer_init": True}
    engine = open_engine(
        str(PATH), options, **settings, async_scheduling=False
    )  # a step ends what it began: preemption
    try:
        yield Graphed(engine)
    finally:
        close_engine(engine)


@pytest.fixture(scope="module")
def prompts():
    return {n: list(examples("hotpotqa", "sparse", "test", 3, 8, n)) for n in (448, 512, 1024)}


def close(mine, theirs) -> None:
    """K and V [layers, rows, ...] equal up to bfloat16 in every layer."""
    for name, x, y in zip("kv", mine, theirs, strict=True):
        for layer, (a, b) in enumerate(zip(x, y, strict=True)):
            assert (a - b).norm() / b.norm() < 0.02, f"{name} of layer {layer}"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("system", KNOWN)
def test_replayed_layers_leave_the_kv_and_the_answer_of_launched_ones(cuda, prompts, system, store):
    example = prompts[1024][0]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh(store)
    run(cuda, before, policy=system)
    want, expected = cuda.launched(now, policy=system, **KNOWN[system])
    got, kv = cuda.replayed(now, policy=system, **KNOWN[system])
    assert got.receipt["tokens_reused"] == want.receipt["tokens_reused"] > 0 and not got.receipt["fallback"]
    for name in ("tokens_recomputed", "tokens_per_layer", "compute_fraction"):
        assert got.receipt[name] == want.receipt[name]
    close(kv, expected)
    assert cuda.said(got) == cuda.said(want)


def test_prompts_of_several_sizes_share_the_buffers(cuda, prompts):
    """In turns, so that each finds what another has left there."""
    cases = [prompts[n][1] for n in (1024, 448, 512)]
    turns = [cuda.turns(example, example.questions[0].text) for example in cases]
    cuda.fresh("model")
    for before, _ in turns:
        run(cuda, before, policy="epic")
    want = [cuda.launched(now, policy="epic", recompute_ratio=0.1) for _, now in turns]
    for _, now in turns:
        cuda.replayed(now, policy="epic", recompute_ratio=0.1)
    sizes = len(cuda.graphs.recorded)
    for (_, now), (answer, expected) in zip(2 * turns, 2 * want, strict=True):
        before = cuda.graphs.replayed
        cuda.poison()
        got = run(cuda, now, policy="epic", recompute_ratio=0.1)
        assert cuda.graphs.replayed == before + 1
        close(cuda.kv(len(now) - 1), expected)
        assert cuda.said(got) == cuda.said(answer)
    assert len(cuda.graphs.recorded) == sizes > 1


def test_a_batch_with_plain_requests_in_it(cuda, prompts):
    cuda.fresh("cpu")
    pairs = [cuda.turns(p, p.questions[0].text) for p in prompts[1024]]
    for before, _ in pairs:
        run(cuda, before, policy="epic")
    ids = [now.token_ids for _, now in pairs]
    annotations = [
        annotations_of(now, policy="epic", recompute_ratio=0.1) if i % 4 else None for i, (_, now) in enumerate(pairs)
    ]
    cuda.graphs.enabled = False
    alone = [ask(cuda.engine, [x], [m], 8)[0] for x, m in zip(ids, annotations, strict=True)]
    cuda.graphs.enabled = True
    for _ in range(RECORD_AT + 1):
        cuda.poison()
        before = cuda.graphs.replayed
        together = ask(cuda.engine, ids, annotations, 8)
        # What the model says behind its end token is noise, which another batch size may tip.
        assert [cuda.said(a) for a in together] == [cuda.said(a) for a in alone]
    assert cuda.graphs.replayed > before, cuda.graphs.eager
    assert all((a.receipt is None) == (m is None) for a, m in zip(together, annotations, strict=True))
    assert all(a.receipt["tokens_reused"] > 0 for a in together if a.receipt)


def test_reuse_behind_a_prefix_cache_hit(cuda, prompts):
    """Rows below the hit belong to another request: they are read and never written."""
    example = prompts[1024][2]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh("model")
    run(cuda, before, policy="epic")
    head = now.token_ids[: 3 * CHUNK // 2]
    answers, found = [], []
    for on in (False, *[True] * (RECORD_AT + 1)):
        cuda.graphs.enabled, replayed = on, cuda.graphs.replayed
        cuda.poison()
        ask(cuda.engine, [head])
        answers.append(run(cuda, now, policy="epic", recompute_ratio=0.1))
        assert answers[-1].receipt["tokens_prefix_cached"] > 0 < answers[-1].receipt["tokens_reused"]
        found.append(cuda.kv(len(now) - 1))
    assert cuda.graphs.replayed == replayed + 1, cuda.graphs.eager
    close(found[-1], found[0])
    assert cuda.said(answers[-1]) == cuda.said(answers[0])


def test_a_preempted_request_goes_on_where_it_was(cuda, prompts):
    example = prompts[1024][3]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh("model")
    run(cuda, before, policy="epic")
    marks = {"policy": "epic", "recompute_ratio": 0.1}
    want, _ = cuda.replayed(now, **marks)
    cuda.poison()
    engine, done, claimed = cuda.engine.llm_engine, [], len(cuda.plans)
    for i, annotations in enumerate([annotations_of(now, **marks), None]):
        extra = None if annotations is None else {"kv_transfer_params": annotations}
        settings = {"max_tokens": 24, "temperature": 0, "detokenize": False, "ignore_eos": True}
        params = SamplingParams(**settings, extra_args=extra)
        engine.add_request(str(i), {"prompt_token_ids": list(now.token_ids)}, params)
    for step in range(60):
        if step == 9:
            assert cuda.core.scheduler.reset_prefix_cache(reset_running_requests=True)
        done += [o for o in engine.step() if o.finished]
    outputs = {o.request_id: list(o.outputs[0].token_ids) for o in done}
    assert len(cuda.plans) > claimed + 1  # claimed again, since its blocks were gone
    first = SimpleNamespace(token_ids=outputs["0"][: len(want.token_ids)])
    assert cuda.said(first) == cuda.said(want) and len(outputs["0"]) == len(outputs["1"]) == 24


@pytest.mark.parametrize("store", STORES)
def test_a_replayed_load_never_waits_for_the_device(cuda, prompts, store, monkeypatch):
    example = prompts[1024][4]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh(store)
    run(cuda, before, policy="epic")
    cuda.replayed(now, policy="epic", recompute_ratio=0.1)
    waits, replayed = waits_within(monkeypatch, cuda.worker, "load"), cuda.graphs.replayed
    cuda.poison()
    run(cuda, now, policy="epic", recompute_ratio=0.1)
    assert cuda.graphs.replayed == replayed + 1 and not waits, waits


def test_new_weights_and_moved_caches_are_recorded_anew(cuda, prompts):
    example = prompts[512][5]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh("model")
    run(cuda, before, policy="epic")
    want, expected = cuda.replayed(now, policy="epic", recompute_ratio=0.1)
    cuda.graphs.forget()
    assert not cuda.graphs.recorded
    got, kv = cuda.replayed(now, policy="epic", recompute_ratio=0.1)
    close(kv, expected)
    assert cuda.said(got) == cuda.said(want)


@pytest.mark.parametrize("captured", [False, True], ids=["at_once", "in_a_capture"])
@pytest.mark.parametrize("seam", GRAPH_SEAMS)
def test_a_fault_in_the_graphs_costs_no_reuse(cuda, prompts, seam, captured):
    """The run is launched; when the fault is over layers are recorded and replayed again."""
    if captured and not seam.endswith("_step"):
        pytest.skip("runs outside of captures")
    example = prompts[512][6]
    before, now = cuda.turns(example, example.questions[0].text)
    cuda.fresh("model")
    run(cuda, before, policy="epic")
    want, expected = cuda.launched(now, policy="epic", recompute_ratio=0.1)
    cuda.graphs.forget()
    skip = cuda.worker.model.num_layers if captured else 0  # each layer is run once before any is captured
    with raising(seam, "always", RuntimeError, {}, skip) as counts:
        for _ in range(RECORD_AT + 1):
            cuda.poison()
            got = run(cuda, now, policy="epic", recompute_ratio=0.1)
            assert got.receipt["tokens_reused"] == want.receipt["tokens_reused"] and not got.receipt["fallback"]
            close(cuda.kv(len(now) - 1), expected)
            assert cuda.said(got) == cuda.said(want)
    assert counts.raised and cuda.worker.faults.total == {"graphs": counts.raised}
    cuda.worker.faults.total.clear()
    cuda.graphs.forget()
    cuda.graphs.eager.clear()
    got, kv = cuda.replayed(now, policy="epic", recompute_ratio=0.1)
    close(kv, expected)
    assert cuda.said(got) == cuda.said(want)


@pytest.mark.parametrize("rules", BATCHES.values(), ids=BATCHES)
def test_cuda_graphs_over_the_reference_model(checkpoint, rules):
    """Without vLLM, in float32: recorded layers, the row kernel's padded grid, rows placed between replays."""
    model = Served.from_pretrained(checkpoint, device="cuda")
    made = requests(model, rules)
    want = everything(SelectivePrefill(model).run(made), made)
    graphs = GraphedPrefill(model, 400)
    for _ in range(RECORD_AT + 2):
        made = requests(model, rules)
        got = everything(SelectivePrefill(model, graphs).run(made), made)
        assert got[1] == want[1]
        for mine, theirs in zip(got[0], want[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert graphs.replayed == 3 and not graphs.failed


def test_nothing_failed_to_be_recorded(cuda):
    """Runs last: all of the above was replayed where it says so."""
    assert cuda.graphs.replayed > 0 and not cuda.graphs.failed and not cuda.graphs.eager["not recorded"]
    assert not cuda.worker.faults.total
