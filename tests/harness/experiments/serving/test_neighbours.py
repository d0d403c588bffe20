"""Decoding requests beside arriving ones: when these are sent, one command on a tiny model, and the tables."""

import json
import time

import pytest

from harness.backends.client import Result
from harness.experiments.serving import engine_ttft
from harness.experiments.serving.interleaved import in_turns
from harness.experiments.serving.neighbours import Arrivals, main, summary
from harness.results.neighbours import table
from harness.results.serving import build
from tests.helpers.checkpoints import save_random
from tests.helpers.readings import BUSY, CALM
from tests.helpers.serving_cells import START, cell, written

pytestmark = pytest.mark.slow


def run(gaps: list[list[float]], waits=(), quiet=None):
    """A run whose neighbours' tokens come at these distances in ms, behind one token of lead."""
    tokens = [[sum(g[:i]) / 1e3 for i in range(len(g) + 1)] for g in gaps]
    arrivals = [{"due": 1.0, "sent": 1.1, "first": 1.0 + w, "finished": 9.0} for w in waits]
    return {"tokens": tokens, "arrivals": arrivals, "seconds": 9.0, "quiet": quiet}


def arm(system: str, *runs, failed=None):
    about = {
        "store": "cpu",
        "tokens": 64,
        "neighbours": 2,
        "decode_tokens": 4,
        "lead": 1,
        "arrivals": 2,
        "every_s": 0.1,
    }
    return {"kind": "neighbours", "system": system, "runs": list(runs), "failed": failed} | about


def test_gaps_are_of_all_neighbours_and_an_arrival_waits_from_when_it_was_due():
    base = arm("nothing", run([[10, 10, 10], [10, 10, 10]]), run([[20, 20, 20], [20, 20, 20]]))
    ours = arm(
        "epic@0.05", run([[10, 40, 10], [10, 10, 20]], [0.2, 0.4]), run([[10, 60, 10], [10, 10, 20]], [0.2, 0.8])
    )
    [alone, row] = table([START, base, ours, arm("recompute", failed="found in the prefix cache")])
    assert alone["median_ms"]["value"] == alone["max_ms"]["value"] == 15 and "arrivals_mean_ttft_ms" not in alone
    assert row["median_ms"]["value"] == 10 and row["max_ms"]["value"] == 50
    assert row["p99_ms"]["value"] == pytest.approx((39 + 58) / 2) and row["mean_ms"]["value"] == pytest.approx(110 / 6)
    assert row["p99_over_nothing"]["value"] == pytest.approx((39 + 58) / 30) and not row["disturbed"]
    assert row["arrivals_mean_ttft_ms"]["value"] == pytest.approx(400)
    assert row["arrivals_max_ttft_ms"]["value"] == pytest.approx(600)
    assert "between tokens: median 10.0, p99 48.5, max 50.0; TTFT 400.0 ms" in summary(ours)


def test_tokens_before_all_neighbours_decode_do_not_count():
    late = arm("nothing", run([[900, 10, 10], [10, 10, 10]])) | {"lead": 2}
    assert table([late])[0]["max_ms"]["value"] == pytest.approx(10)


def test_disturbed_runs_are_left_out():
    base = arm("nothing", *(run([[10], [10]], quiet=CALM) for _ in range(2)))
    ours = arm("epic@0.05", run([[20], [20]], quiet=CALM), run([[90], [90]], quiet=BUSY))
    [_, row] = table([base, ours])
    assert row["max_ms"]["value"] == 20 and row["p99_over_nothing"]["value"] == 2
    [_, row] = table([base, arm("epic@0.05", *(run([[20], [20]], quiet=BUSY) for _ in range(2)))])
    assert row["disturbed"] and "p99_over_nothing" not in row


def test_a_batch_has_ratios_of_its_mean_and_of_its_requests_per_second(tmp_path):
    base, ours = cell("recompute", [[0.2, 0.6]] * 2), cell("epic@0.05", [[0.1, 0.3]] * 2, 0.4)
    for made, seconds in ((base, 0.8), (ours, 0.4)):
        made["batch"] = 2
        for timed in made["runs"]:
            timed["seconds"] = seconds
    run = build([written(tmp_path, [START, base, ours, arm("recompute", failed="why")])], None)["runs"][0]
    row = run["table"][1]
    assert row["recompute_over_mean_ttft"]["value"] == pytest.approx(2) and row["mean_ttft_ms"] == pytest.approx(200)
    assert row["requests_per_s"] == pytest.approx(5) and row["requests_per_s_over_recompute"]["value"] == pytest.approx(
        2
    )
    assert row["recompute_over_ttft"]["value"] == pytest.approx(2) and run["table"][0]["requests_per_s"] == 2.5
    assert run["neighbours"] == [] and [f["failed"] for f in run["failed"]] == ["why"]
    for made in (base, ours):
        for timed in made["runs"]:
            del timed["seconds"]  # as in older records
    row = build([written(tmp_path, [START, base, ours])], None)["runs"][0]["table"][1]
    assert row["requests_per_s"] == pytest.approx(2 / 0.3)
    assert row["requests_per_s_over_recompute"]["value"] == pytest.approx(2)
    single = build(
        [written(tmp_path, [START, cell("recompute", [[0.2]] * 2), cell("epic@0.05", [[0.1]] * 2, 0.4)])], None
    )
    assert "recompute_over_mean_ttft" not in single["runs"][0]["table"][1]


def test_arrivals_begin_when_all_neighbours_decode_and_keep_their_distance():
    arrivals, results = Arrivals(2, 2, every=0.03, lead=2), [None] * 4
    assert list(arrivals.due(results)) == [0, 1]
    results[:2] = [Result("a", 0.0, token_times=[1, 2]), Result("b", 0.0, token_times=[1])]
    assert list(arrivals.due(results)) == [] and arrivals.begun is None
    results[1].token_times.append(2)
    assert list(arrivals.due(results)) == [2]
    sent, until = [], time.perf_counter() + 10
    while not sent and time.perf_counter() < until:
        sent = list(arrivals.due(results))
    assert sent == [3] and time.perf_counter() >= arrivals.at(3) == arrivals.begun + 0.03


def test_an_arm_that_fails_ends_and_the_others_go_on():
    asked = []

    def once(system):
        asked.append(system)
        if system == "broken":
            raise RuntimeError("reuse did not happen")
        return {"n": len(asked)}

    found = in_turns(["a", "broken", "b"], once, repeats=2, warmups=1)
    assert found["broken"] == ([], "reuse did not happen") and asked == ["a", "broken", "b", "a", "b", "a", "b"]
    assert [r["n"] for r in found["a"][0]] == [4, 6] and all(set(CALM) == set(r["quiet"]) for r in found["b"][0])


ENGINE = {"dtype": "float32", "block_size": 32, "max_num_seqs": 8}
GIVEN = [
    "--vocabulary", "90", "--eager", "--engine", json.dumps(ENGINE), "--systems", "cacheslide_first",
    "--recompute-ratios", "0.05", "--answer-tokens", "2", "--batched-tokens", "512",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    shape = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 1024}
    return save_random(tmp_path_factory.mktemp("neighbours"), **shape)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
def test_one_command_measures_neighbours(path, tmp_path):
    pytest.importorskip("vllm")
    out = tmp_path / "r" / "neighbours.jsonl"
    main([
        "--out", str(out), "--model", str(path), *GIVEN, "--tokens", "256", "--store", "cpu", "--arrivals", "3",
        "--every", "0.02", "--neighbours", "2", "--neighbour-tokens", "16", "--decode-tokens", "30", "--lead", "3",
        "--repeats", "2", "--warmups", "0",
    ])  # fmt: skip
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["kind"] for r in records] == ["start", "engine", *["neighbours"] * 3, "end"], records
    for made in records[2:5]:
        assert not made["failed"] and len(made["runs"]) == 2
        for timed in made["runs"]:
            assert [len(t) for t in timed["tokens"]] == [30, 30] and set(timed["quiet"]) == set(CALM)
            began = max(t[2] for t in timed["tokens"])
            for number, arrival in enumerate(timed["arrivals"]):
                assert began <= arrival["due"] <= arrival["sent"] < arrival["first"] <= arrival["finished"]
                assert arrival["due"] == pytest.approx(timed["arrivals"][0]["due"] + 0.02 * number, abs=1e-5)
            assert max(t[-1] for t in timed["tokens"]) <= timed["seconds"] + 1e-5
    nothing, recompute, ours = (r["runs"] for r in records[2:5])
    assert not any(r["arrivals"] for r in nothing) and all(len(r["arrivals"]) == 3 for r in (*recompute, *ours))
    assert all(n > 200 for r in ours for n in r["tokens_reused"]) and "tokens_reused" not in recompute[0]
    rows = build([out], None)["runs"][0]["neighbours"]
    assert [r["system"] for r in rows] == ["nothing", "recompute", "cacheslide_first@0.05"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
def test_one_command_measures_batches(path, tmp_path):
    pytest.importorskip("vllm")
    out = tmp_path / "ttft.jsonl"
    engine_ttft.main([
        "--out", str(out), "--model", str(path), *GIVEN, "--lengths", "256", "--batches", "1,3", "--stores", "cpu",
        "--repeats", "4", "--connector", '{"computed_tokens_per_step": 1}',
    ])  # fmt: skip
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cells = {(r["batch"], r["system"]): r for r in records if r["kind"] == "cell"}
    assert records[-1]["kind"] == "end" and len(cells) == 6 and not any(c["failed"] for c in cells.values()), records
    for timed in cells[3, "cacheslide_first@0.05"]["runs"]:
        assert timed["ttft"][0] < timed["ttft"][-1] <= timed["seconds"]  # a step each
    rows = {(r["batch"], r["system"]): r for r in build([out], None)["runs"][0]["table"]}
    assert rows[3, "cacheslide_first@0.05"]["requests_per_s_over_recompute"]["value"] > 0
