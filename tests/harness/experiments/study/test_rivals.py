"""Rivals with notes beside their chunks, and with a prefill a question, through the study's steps."""

import pytest

from cacheslide.policies.registry import load_policy
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.responders import ReferenceResponder
from harness.results.records import read_failures, read_records
from harness.results.tables import receipt_totals
from harness.tasks.data import read_examples
from tests.helpers.study_run import CONFIG, accuracy_of, deep_prompts

pytestmark = pytest.mark.slow

SYSTEMS = ["naive_reuse", "kvcomm", "prophetkv", "cache_craft", "cacheblend_gradual", "cacheblend_code"]
SETTINGS = CONFIG | {"systems": SYSTEMS, "store_dtype": "float32", "accuracy": {"questions": 4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return deep_prompts(tmp_path_factory.mktemp("data"), 2)


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    paths = accuracy_of(SETTINGS, data, tmp_path_factory.mktemp("accuracy"))
    assert not any(read_failures(path) for path in paths.values())
    return {name: list(read_records(path)) for name, path in paths.items()}


def f1(records) -> float:
    scores = [q["f1"] for r in records for q in r["questions"]]
    return sum(scores) / len(scores)


def test_a_rule_that_asks_has_a_prefill_and_a_receipt_a_question(records):
    for record in records["prophetkv"]:
        assert len(record["receipts"]) == len(record["questions"]) == 4 and record["prefill_seconds"] is None
        assert len({r["tokens"] for r in record["receipts"]} | {record["tokens"]}) > 1  # questions are part of prompts
        share = [r["tokens_recomputed"] / (r["tokens_recomputed"] + r["tokens_reused"]) for r in record["receipts"]]
        assert share == pytest.approx([0.2] * 4, abs=0.002) and min(record["cksim"]) > 0.5
    assert 0.2 < receipt_totals(records["prophetkv"][0]["receipts"])["compute_fraction"] < 0.5
    assert f1(records["prophetkv"]) >= 0.9 > f1(records["naive_reuse"])


def test_with_one_turn_before_kvcomm_serves_what_that_turn_left(records):
    """Base and offset of its only anchor are naive reuse's KV."""
    for ours, naive in zip(records["kvcomm"], records["naive_reuse"], strict=True):
        assert ours["receipt"]["tokens_reused"] == naive["receipt"]["tokens_reused"] > 500
        assert ours["cksim"] == pytest.approx(naive["cksim"], abs=1e-4)
        assert [q["f1"] for q in ours["questions"]] == [q["f1"] for q in naive["questions"]]


def test_cache_craft_mends_some_of_every_chunk_behind_an_update(records):
    receipts = [r["receipt"] for r in records["cache_craft"]]
    assert all(0 < r["tokens_recomputed"] < r["tokens_reused"] + r["tokens_recomputed"] for r in receipts)
    assert all(r["chunks_hit"] == r["chunks"] for r in receipts) and "receipts" not in records["cache_craft"][0]


def test_a_timed_first_token_and_answers_of_a_rule_that_asks(data):
    """The answers are those of a prefill a question, not of the first question's."""
    [example, *_] = read_examples(data, questions=4)
    responder = ReferenceResponder(ReferenceBackend(SETTINGS["model"]), EngineSettings())
    policy = load_policy("prophetkv").at_ratio(0.05)
    responder.fill([example], [policy])
    timed = responder.first_token(policy, example, 4, answer=True)
    assert timed.texts == responder.respond(policy, example, 4).texts and timed.seconds > 0
    assert len(timed.receipts) == 1


@pytest.mark.parametrize("name", ["cacheblend_gradual", "cacheblend_code"])
def test_a_narrowing_set_goes_through_the_study(records, name):
    for record in records[name]:
        receipt = record["receipt"]
        share = receipt["tokens_recomputed"] / (receipt["tokens_recomputed"] + receipt["tokens_reused"])
        assert 0.1 < share < 0.2 and "receipts" not in record  # 18 %, or what is left of it in the last layer
