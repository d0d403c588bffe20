"""The study inside vLLM: the same answers and the same rows reused as on the reference backend."""

import pytest

pytest.importorskip("vllm")

from cacheslide.errors import PromptError
from harness.backends.client import Request
from harness.backends.reference import EngineSettings
from harness.backends.responders import ReferenceResponder
from harness.backends.vllm import vllm_sessions
from harness.experiments.study import steps as study
from harness.results.records import read_failures, read_records, read_settings
from harness.results.timing import gate
from harness.systems import resolve
from harness.tasks.data import read_examples, write_dataset

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("environment_after")]

SYSTEMS = ["recompute", "vllm", "vllm_prefix_cache", "context_cache", "epic", "window_padding", "cacheslide"]
CONFIG = {
    "run": "test",
    "seed": 0,
    "model": "models/tiny-llama-12m",
    "backend": "vllm",
    "device": "cpu",
    "dtype": "float32",
    "store_dtype": "float32",
    "systems": SYSTEMS,
    "chunk_size": 1024,
    "suffix_len": 1,
    "recompute_ratio": 0.26,
    "vllm": {
        "kv_cache_gib": 0.25,
        "max_model_len": 1024,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "store_gib": 0.5,
    },
    "accuracy": {"questions": 2},
    "latency": {"systems": ["vllm", "recompute", "cacheslide"], "warmups": 0, "repeats": 1},
    "throughput": {"systems": ["cacheslide"], "batches": [2]},
}
LAYER = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "hotpotqa-deep.jsonl"
    write_dataset(path, "hotpotqa-deep", "test", 3, 2, 500)
    return str(path)


def test_answers_and_rows_are_those_of_the_reference_backend(data, tmp_path):
    outputs = [str(tmp_path / f"{name}.jsonl") for name in SYSTEMS]
    study.step_accuracy(CONFIG, data, None, LAYER, outputs, 1)
    examples = read_examples(data, questions=2)
    reference = ReferenceResponder(study.backend_of(CONFIG | {"backend": "reference"}), EngineSettings())
    names = [s for s in SYSTEMS if not s.startswith("vllm")]
    for example in examples:
        reference.fill([example], resolve(names, layer=LAYER))
        for system in resolve(names, layer=LAYER):
            want = reference.respond(system, example, 8)
            [got] = [r for r in read_records(tmp_path / f"{system.name}.jsonl") if r["id"] == example.id]
            assert [q["prediction"] for q in got["questions"]] == want.texts, system.name
            for receipt in got["receipts"]:
                for name in ("tokens_reused", "tokens_recomputed", "chunks", "chunks_hit", "bytes_loaded"):
                    assert receipt[name] == want.receipts[0][name], (system.name, name)
                assert receipt["measured"] and receipt["compute_fraction"] <= 1
    told = {name: list(read_records(tmp_path / f"{name}.jsonl")) for name in SYSTEMS}
    assert not any(read_failures(path) for path in outputs)
    plain = [[q["prediction"] for q in r["questions"]] for r in told["recompute"]]
    for name in ("vllm", "vllm_prefix_cache", "context_cache"):
        assert [[q["prediction"] for q in r["questions"]] for r in told[name]] == plain
    assert all(r["receipt"]["tokens_reused"] > 0 and r["prefill_seconds"] is None for r in told["cacheslide"])
    assert "nothing was reused" in gate(told["vllm"])  # no speed of it may be reported
    assert read_settings(outputs[1])["title"] == "vLLM"


def test_latency_and_throughput_keep_receipts_and_answers(data, tmp_path):
    study.step_latency(CONFIG, data, LAYER, str(tmp_path / "500.jsonl"), 1)
    records = list(read_records(tmp_path / "500.jsonl"))
    assert len(records) == 2
    for record in records:
        assert list(record["systems"]) and set(record["systems"]) == {"vllm", "recompute", "cacheslide"}
        for system in record["systems"].values():
            assert len(system["ttft_seconds"]) == 1 and len(system["questions"]) == 8
        assert record["systems"]["cacheslide"]["receipt"]["tokens_reused"] > 0
        assert not gate([record["systems"]["cacheslide"]]) and gate([record["systems"]["recompute"]])
    study.step_throughput(CONFIG, data, LAYER, str(tmp_path / "t.jsonl"), 1)
    [record] = read_records(tmp_path / "t.jsonl")
    assert record["id"] == "cacheslide-2" and len(record["requests"]) == 2
    assert all(r["receipt"]["tokens_reused"] == r["tokens_reused"] > 0 for r in record["requests"])
    finished = [r["finished_seconds"] for r in record["requests"]]
    assert finished == sorted(finished) and finished[-1] <= record["elapsed_seconds"]


def test_vllm_by_itself_shares_a_prefix_only_where_it_may(data):
    backend = study.backend_of(CONFIG, 1)
    [off, on] = resolve(["vllm", "vllm_prefix_cache"])
    [example, other] = read_examples(data, questions=1)
    for responder, _ in vllm_sessions(backend, [off, on], EngineSettings()):
        engine, ids = responder.engine, backend.prompt(example.segments).token_ids
        blocks = len(ids) // 32 * 32
        engine.run([Request("first", ids, 1)])
        [again] = engine.run([Request("again", ids, 1)])
        assert again.cached_tokens in (blocks, blocks - 32) and again.receipt is None
        receipt = responder._receipt(on, again)
        assert receipt["tokens_reused"] == again.cached_tokens > 0 and receipt["compute_fraction"] < 0.2
        [declined] = engine.run([Request("declined", ids, 1, read_prefix_cache=False)])
        assert declined.cached_tokens == 0
        # a response sees the turn before and nothing else, however often it is asked for
        first, second = (responder.respond(on, example, 1).receipts[0] for _ in range(2))
        assert first == second and first["tokens_reused"] < blocks - 32
        engine.reset()
        assert engine.run([Request("anew", ids, 1)])[0].cached_tokens == 0
        many = [Request("", backend.prompt(e.segments), n) for e, n in ((example, 3), (other, 1), (example, 2))]
        assert [len(r.token_times) for r in engine.run(many, clients=2)] == [3, 1, 2]
        whole, refused = engine.run([Request("whole", ids, 4), Request("long", ids * 9, 1)])
        assert whole.checked().tokens == 4
        with pytest.raises(PromptError, match="vLLM refuses the request"):
            refused.checked()
        assert not engine.llm.llm_engine.has_unfinished_requests()
