"""The study's measurements, end to end on the shipped model and a few short prompts."""

import json
from types import SimpleNamespace

import pytest
import torch

from cacheslide import ReuseEngine, load_policy
from cacheslide.errors import DataError, ModelError, PolicyError, PromptError
from cacheslide.store import MemoryChunkStore
from harness.backends.answering import answer_branches, branch_room
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.experiments.study import steps as study
from harness.experiments.study.accuracy import evaluate
from harness.experiments.study.select_layer import choose
from harness.experiments.study.throughput import measure_throughput
from harness.results.records import RecordWriter, read_failures, read_records, read_settings
from harness.systems import recipes, resolve, scalable, to_scale
from harness.tasks.data import read_examples, write_dataset
from tests.helpers import study_run
from tests.helpers.prompts import prompt
from tests.helpers.token_ids import random_ids

pytestmark = pytest.mark.slow

SYSTEMS = ["recompute", "context_cache", "naive_reuse", "epic", "cacheslide", "cacheslide_promote"]
CONFIG = study_run.CONFIG | {
    "systems": SYSTEMS,
    "accuracy": {"questions": 8},
    "validation": {"questions": 2},
    "latency": {"systems": ["recompute", "cacheslide"], "warmups": 1, "repeats": 2},
    "throughput": {"systems": ["recompute", "cacheslide"], "batches": [1, 2]},
    "cksim": {"shifts": [0, 40]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return study_run.deep_prompts(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def accuracy(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    study_run.accuracy_of(CONFIG, data, folder)
    return folder


def questions(path):
    return [q for r in read_records(path) for q in r["questions"]]


def test_the_model_answers_and_naive_reuse_serves_stale_facts(accuracy):
    scores = {name: questions(accuracy / f"{name}.jsonl") for name in SYSTEMS}
    f1 = {name: sum(q["f1"] for q in qs) / len(qs) for name, qs in scores.items()}
    assert len(scores["recompute"]) == 24
    assert f1["recompute"] == f1["context_cache"] >= 0.9
    assert f1["naive_reuse"] < f1["recompute"] - 0.1
    wrong = [q for q in scores["naive_reuse"] if not q["f1"]]
    assert wrong and all(q["volatile"] for q in wrong)
    assert f1["cacheslide"] >= f1["naive_reuse"]


def test_records_say_what_happened(accuracy):
    [*records] = read_records(accuracy / "cacheslide.jsonl")
    receipt = records[0]["receipt"]
    assert receipt["chunks_hit"] == receipt["chunks"] == 3
    assert receipt["tokens_recomputed"] == pytest.approx(
        0.26 * (receipt["tokens_reused"] + receipt["tokens_recomputed"]), abs=1
    )
    assert receipt["bytes_loaded"] > 0 and 0 < receipt["compute_fraction"] < 1
    assert len(records[0]["cksim"]) == 8 and min(records[0]["cksim"]) > 0.5
    assert read_settings(accuracy / "cacheslide.jsonl")["layer"] == 3
    assert not read_failures(accuracy / "cacheslide.jsonl")
    index = json.loads((accuracy / "chunks" / "index.json").read_text())
    assert index["recipes"]["fixedchain_fixed_chain"]["layer_inputs"] == [1]


def test_recompute_is_exact_in_cksim(accuracy):
    [record, *_] = read_records(accuracy / "recompute.jsonl")
    assert min(record["cksim"]) > 1 - 1e-5


def test_equal_share_holds_only_systems_that_scale(data, accuracy, tmp_path):
    assert scalable(SYSTEMS) == ["epic", "cacheslide", "cacheslide_promote"]
    assert to_scale(SYSTEMS, 0.26) == ["epic"] and to_scale(SYSTEMS, 0.3) == [
        "epic",
        "cacheslide",
        "cacheslide_promote",
    ]
    outputs = [str(tmp_path / f"{name}.jsonl") for name in to_scale(SYSTEMS, 0.26)]
    study.step_accuracy(CONFIG, data, str(accuracy / "chunks"), 3, outputs, 2, recompute_ratio=0.26)
    for path in outputs[:1]:
        receipt = next(read_records(path))["receipt"]
        share = receipt["tokens_recomputed"] / (receipt["tokens_reused"] + receipt["tokens_recomputed"])
        assert share == pytest.approx(0.26, abs=0.01)


def test_latency_takes_turns_and_keeps_answers(data, tmp_path):
    study.step_latency(CONFIG, data, 2, str(tmp_path / "700.jsonl"), 2)
    [record, *_] = read_records(tmp_path / "700.jsonl")
    assert set(record["systems"]) == {"recompute", "cacheslide"}
    for system in record["systems"].values():
        assert len(system["ttft_seconds"]) == 2 and min(system["ttft_seconds"]) > 0
        assert len(system["questions"]) == 8
    assert record["systems"]["cacheslide"]["receipt"]["tokens_reused"] > 0
    assert sum(q["f1"] for q in record["systems"]["recompute"]["questions"]) >= 7
    [session] = record["quiet"]
    assert set(session["systems"]) == set(record["systems"])
    assert len(session["rounds"]) == 2 and all(r["seconds"] > 0 for r in session["rounds"])


def test_throughput_counts_correct_answers(data, tmp_path):
    study.step_throughput(CONFIG, data, 2, str(tmp_path / "t.jsonl"), 2)
    records = {r["id"]: r for r in read_records(tmp_path / "t.jsonl")}
    assert set(records) == {"recompute-1", "recompute-2", "cacheslide-1", "cacheslide-2"}
    for r in records.values():
        assert len(r["requests"]) == 3
        assert 0 <= r["qps_correct"] <= r["qps"] == pytest.approx(3 / r["elapsed_seconds"])
        finished = [q["finished_seconds"] for q in r["requests"]]
        assert finished == sorted(finished)
        assert sum(r["slices"]) == 3 and len(r["quiet"]) == len(r["slices"]) == {1: 3, 2: 2}[r["batch"]]


class Loop:
    """A responder that notes whose requests it gets, and fails those of one system."""

    def __init__(self, fails=""):
        self.asked, self.fails = [], fails

    def fill(self, examples, systems):
        pass

    def closed_loop(self, system, examples, clients, max_new_tokens):
        if system.name == self.fails:
            raise PolicyError("made to fail")
        self.asked.append((system.name, len(examples)))
        one = {"question": {"success": 1.0}, "receipt": {"compute_fraction": 0.5}}
        return [one | {"finished_seconds": 0.5 * (i + 1)} for i in range(len(examples))], 0.5 * len(examples)


def test_systems_take_turns_within_a_loop_and_fail_alone(tmp_path):
    systems = [SimpleNamespace(name=n) for n in ("a", "b", "c")]
    responder, writer = Loop(fails="b"), RecordWriter(tmp_path / "t.jsonl", {})
    measure_throughput([(responder, systems)], list(range(8)), writer, [2], progress=None)
    writer.finish()
    assert [n for _, n in responder.asked] == [2] * 8
    assert all({responder.asked[i][0], responder.asked[i + 1][0]} == {"a", "c"} for i in range(0, 8, 2))
    records = {r["id"]: r for r in read_records(tmp_path / "t.jsonl")}
    assert set(records) == {"a-2", "c-2"} and [f["id"] for f in read_failures(tmp_path / "t.jsonl")] == ["b-2"]
    assert [r["finished_seconds"] for r in records["a-2"]["requests"]] == [0.5 * (i + 1) for i in range(8)]
    assert records["a-2"]["elapsed_seconds"] == 4.0 and records["a-2"]["qps"] == 2.0


def test_similarity_keeps_position_and_context_apart(data, tmp_path):
    study.step_similarity(CONFIG, data, str(tmp_path / "c.jsonl"), 2)
    records = {(r["shift"]): r["cksim"] for r in read_records(tmp_path / "c.jsonl")}
    assert min(records[0]["position_stale"]) > 1 - 1e-5
    assert min(records[40]["position_delta"]) > 1 - 1e-4
    assert max(records[40]["position_stale"]) < 0.99
    assert records[40]["context_delta"][0] > 1 - 1e-4  # the first layer's keys see no context
    assert min(records[40]["context_delta"]) < 1 - 1e-3


def test_prompts_are_measured(data, tmp_path):
    study.step_prompts(CONFIG, [data], str(tmp_path / "p.json"))
    held = json.loads((tmp_path / "p.json").read_text())["datasets"]["hotpotqa-deep"]
    assert len(held["reusable_share"]) == 3 and 0.5 < min(held["reusable_share"]) < 1
    move = held["moves"][0]
    assert move["displacement"] != 0
    assert move["shift"]["cacheslide"] == 0 and "context_cache" not in move["shift"]


def test_selection_layer_is_chosen_on_validation_data(data, tmp_path):
    study.step_select_layer(CONFIG, [data], str(tmp_path / "layer.json"), 2)
    chosen = json.loads((tmp_path / "layer.json").read_text())
    assert 1 <= chosen["layer"] <= 4
    assert study.selected_layer(tmp_path / "layer.json") == chosen["layer"]


@pytest.mark.parametrize(("losses", "layer"), [((0.5, 0.01, 0.0), 2), ((0.5, 0.3, 0.2), 3), ((0.0, 0.2, 0.0), 1)])
def test_the_smallest_sufficient_layer_wins(losses, layer):
    row = {"recompute": 0.9} | {f"s@{i + 1}": 0.9 - loss for i, loss in enumerate(losses)}
    assert choose({"a": row, "b": dict.fromkeys(row, 0.9)}, "s", range(1, 4)) == layer


def test_branches_equal_one_question_at_a_time(model):
    engine = ReuseEngine(model, load_policy("cacheslide"), MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    asked = [random_ids(n, 70 + n) for n in (3, 1, 6)]
    state = engine.prefill(prompt(13, 5), room=branch_room(asked, 5))
    want = []
    for ids in asked:
        length, position = state.length, state.next_position
        want.append(engine.generate(state, engine.extend(state, ids), 5, frozenset({9})))
        state.length, state.next_position = length, position
    with torch.inference_mode():
        state.kv.k[:, state.length :] = float("nan")
    assert answer_branches(model, state, asked, 5, frozenset({9})) == want
    stops = frozenset(t for ids in want for t in ids[1:2])
    cut = answer_branches(model, state, asked, 5, stops)
    assert all(not set(ids) & stops for ids in cut) and cut != want


def test_recipes_share_caches_and_unite_probe_layers():
    held = recipes(resolve(["cacheslide", "cacheslide_promote", "epic", "cacheblend", "recompute"], layer=2))
    assert {name: sorted(layers) for name, (_, layers) in held.items()} == {
        "fixedchain_fixed_chain": [1],
        "content_isolated": [],
    }


def test_caches_are_built_with_scores_where_a_system_reads_them():
    names = ["naive_reuse", "cacheslide_first", "cacheslide_overlap", "cacheslide_first_turn"]
    for reads in ("cacheslide_remember", "cacheslide_mixed"):
        [(builder, _)] = recipes(resolve([*names, reads])).values()
        assert builder.needs_scores
    [(builder, _)] = recipes(resolve(names)).values()
    assert not builder.needs_scores


def test_clear_errors(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        read_examples(tmp_path / "hotpotqa-deep.jsonl")
    with pytest.raises(DataError, match="unknown synthetic data set"):
        write_dataset(tmp_path / "x.jsonl", "hotpotqa-wide", "test", 0, 1, 700)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ReferenceBackend(tmp_path)


def test_a_prompt_whose_caches_cannot_be_filled_is_a_failure_of_every_system(data, tmp_path):
    class Refuses:
        def fill(self, examples, systems):
            raise PromptError("the prompt is too long")

    systems = resolve(["recompute", "cacheslide"])
    writers = {s.name: RecordWriter(tmp_path / f"{s.name}.jsonl", {}) for s in systems}
    evaluate([(Refuses(), systems)], read_examples(data), writers, progress=None)
    for name, writer in writers.items():
        writer.finish()
        assert [f["failure"] for f in read_failures(tmp_path / f"{name}.jsonl")] == [
            "PromptError: the prompt is too long"
        ] * 3


def test_segments_are_tokenised_apart_with_bos_first(data):
    backend = ReferenceBackend(CONFIG["model"])
    example = read_examples(data)[0]
    got = backend.prompt(example.segments, example.questions[0].text)
    assert got.token_ids[0] == backend.tokenizer.bos_token_id
    assert backend.tokenizer.bos_token_id not in got.token_ids[1:]
    text = "".join(s.text for s in example.segments) + example.questions[0].text
    assert list(got.token_ids[1:]) == backend.tokenizer.encode(text, add_special_tokens=False)
    engine = backend.engine(load_policy("recompute"), MemoryChunkStore(), EngineSettings())
    assert isinstance(engine.prefill(got).logits, torch.Tensor)
