"""The summary against numbers worked out by hand, its gates, and what it says when parts of a run are missing."""

import json
from pathlib import Path
from random import Random

import pytest

from cacheslide.errors import DataError
from harness.results import headline as headline_module
from harness.results import intervals
from harness.results.runs import load_run, mix_of
from harness.results.summary import SCHEMA, build_summary, summarize
from harness.results.timing import gate, round_seconds
from tests.helpers import made_run

pytestmark = pytest.mark.slow

SYSTEMS = ["recompute", "naive_reuse", "cacheslide", "cacheslide_promote"]
# F1 of four questions (two prompts of two) by mix
SCORES = {
    "sparse": {
        "recompute": [1, 1, 1, 1],
        "naive_reuse": [1, 0, 0, 0],
        "cacheslide": [1, 1, 1, 0],
        "cacheslide_promote": [1, 1, 1, 1],
    },
    "deep": {
        "recompute": [1, 1, 1, 0],
        "naive_reuse": [0, 0, 1, 0],
        "cacheslide": [1, 1, 1, 0],
        "cacheslide_promote": [1, 1, 1, 0],
    },
}
SHARES = {"recompute": 1.0, "naive_reuse": 0.1, "cacheslide": 0.5, "cacheslide_promote": 0.6}
TTFT = {"recompute": [2.0, 4.0, 1.0], "naive_reuse": [0.2, 0.4, 0.1], "cacheslide": [1.2, 2.0, 0.7]}


def accuracy(root, systems=SYSTEMS, reused=True, recomputed=0.26, failures=()):
    """Record files of both mixes with the scores above."""
    out = []
    for mix, scores in SCORES.items():
        for system in systems:
            records = {}
            for i in range(2):
                answers = [
                    made_run.question(j, scores[system][2 * i + j], depth=1 + j, volatile=j == 1) for j in (0, 1)
                ]
                share = recomputed if system.startswith("cacheslide") else 0.0
                record = made_run.accuracy_record("recompute", mix, Random(0), 1, 1)
                receipt = made_run.receipt(system, 1000, SHARES[system], share, reused)
                records[f"p{i}"] = record | {"system": system, "questions": answers, "receipt": receipt}
            settings = {"title": system.title(), "layer": 3, "data_hash": f"hash-{mix}"}
            path = root / "accuracy" / f"toy-{mix}" / f"{system}.jsonl"
            out.append(made_run.write(path, settings, records, failures))
    return out


def latency(root, tokens=4096, change=None):
    """Three timed prompts with the seconds above."""
    records = {}
    for i in range(3):
        systems = {
            s: {
                "ttft_seconds": [t[i], t[i], 9 * t[i]],  # the median of the repeats counts, not the mean
                "receipt": made_run.receipt(s, tokens - 6, SHARES[s], 0.26 if s == "cacheslide" else 0.0),
                "questions": [made_run.question(0, True)],
            }
            for s, t in TTFT.items()
        }
        records[f"p{i}"] = {"tokens": tokens - 6, "build": {}, "systems": systems}
    if change:
        change(records)
    return made_run.write(root / "latency" / f"{tokens}.jsonl", {"warmups": 2}, records)


def config(**changes):
    return made_run.config(systems=SYSTEMS, datasets=["toy-sparse", "toy-deep"], **changes)


@pytest.fixture
def summary(tmp_path):
    run = load_run(config(), accuracy=accuracy(tmp_path), latency=[latency(tmp_path)])
    return build_summary(run)


def row(rows, **wanted):
    [found] = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return found


def test_headline_is_what_the_tables_say(summary):
    assert summary["schema"] == SCHEMA
    assert summary["headline"] == {
        "recompute_f1": 0.75,  # deep, the worse mix
        "naive_reuse_loss_points": 50.0,  # deep; 75 on sparse
        "cacheslide_loss_points": 25.0,  # sparse; 0 on deep
        "best_policy_loss_points": 0.0,
        "best_policy_row_share": pytest.approx(0.6),
        "cpu_ttft_ratio_4k": 0.6,  # of 0.6, 0.5, 0.7
        "ideal_ratio_4k": 0.5,
    }
    assert summary["headline_missing"] == {}
    note = summary["headline_notes"]["cacheslide_loss_points"]
    assert (note["mix"], note["n"], note["values"]) == ("sparse", 2, 4)


def test_accuracy_rows(summary):
    mix = row(summary["accuracy"], scope="mix", name="sparse", system="cacheslide")
    assert (mix["prompts"], mix["questions"], mix["failures"], mix["title"]) == (2, 4, 0, "Cacheslide")
    assert mix["f1"]["value"] == mix["em"]["value"] == 0.75
    assert (mix["f1"]["low"], mix["f1"]["high"]) == (0.5, 1.0)  # two prompts: one right, one half right
    assert mix["loss_points"]["value"] == 25.0
    assert [(d["depth"], d["f1"]["value"]) for d in mix["by_depth"]] == [(1, 1.0), (2, 0.5)]
    assert [(d["volatile"], d["f1"]["value"]) for d in mix["by_volatility"]] == [(False, 1.0), (True, 0.5)]
    assert mix["tokens_recomputed"] == round(0.26 * 870)
    assert mix["recomputed_share"] == pytest.approx(0.26, abs=0.001)
    assert row(summary["accuracy"], scope="dataset", name="toy-deep", system="recompute")["f1"]["value"] == 0.75
    assert summary["provenance"]["data_hashes"] == {
        "accuracy/toy-sparse": "hash-sparse",
        "accuracy/toy-deep": "hash-deep",
    }


def test_latency_rows(summary):
    ours = row(summary["latency"], system="cacheslide", tokens=4096)
    assert (ours["prompts"], ours["repeats"], ours["warmups"], ours["prompt_tokens"]) == (3, 3, 2, 4090)
    assert ours["ttft_median"]["value"] == 1.2
    assert ours["ttft_ratio"]["value"] == pytest.approx(0.6)
    assert ours["efficiency"] == pytest.approx(0.5 / 0.6)
    reference = row(summary["latency"], system="recompute")
    assert reference["ttft_ratio"] is None and "reference" in reference["ratio_reason"]
    ratio = row(summary["latency_ratios"], system="naive_reuse")
    assert ratio["speedup"]["value"] == pytest.approx(1 / 6)  # of 0.2/1.2, 0.4/2.0, 0.1/0.7


def test_a_request_without_reuse_closes_the_gate(tmp_path):
    def idle(records):
        records["p1"]["systems"]["cacheslide"]["receipt"] = made_run.receipt("cacheslide", 4096, 1.0, 0.0, reused=False)

    run = load_run(config(), accuracy=accuracy(tmp_path), latency=[latency(tmp_path, change=idle)])
    summary = build_summary(run)
    ours = row(summary["latency"], system="cacheslide")
    assert ours["ttft_ratio"] is None and ours["efficiency"] is None
    assert ours["ratio_reason"] == "nothing was reused in 1 of 3 timed requests"
    assert ours["ttft_median"]["value"] == 1.2  # the time itself is still stated
    assert summary["headline"]["cpu_ttft_ratio_4k"] is None
    assert "nothing was reused" in summary["headline_missing"]["cpu_ttft_ratio_4k"]
    assert row(summary["latency_ratios"], system="recompute")["speedup"] is None


def test_unscored_requests_close_the_gate(tmp_path):
    def silent(records):
        records["p0"]["systems"]["cacheslide"]["questions"] = []

    summary = build_summary(load_run(config(), latency=[latency(tmp_path, change=silent)]))
    assert "no answers were scored" in row(summary["latency"], system="cacheslide")["ratio_reason"]
    assert gate([]) == "not timed"


def test_accuracy_without_reuse_is_no_headline(tmp_path):
    """A cache that never hits answers like recompute: its loss of 0 must not be reported."""
    summary = build_summary(load_run(config(), accuracy=accuracy(tmp_path, reused=False)))
    assert summary["headline"]["cacheslide_loss_points"] is None
    assert "reused nothing" in summary["headline_missing"]["cacheslide_loss_points"]
    assert summary["headline"]["best_policy_loss_points"] is None
    found = row(summary["accuracy"], scope="mix", name="deep", system="cacheslide")
    assert found["requests_without_reuse"] == 2
    assert found["fallbacks"] == {"no chunk of this prompt is in the store": 2}


def test_another_share_is_not_called_26_percent(tmp_path):
    summary = build_summary(load_run(config(), accuracy=accuracy(tmp_path, recomputed=0.10)))
    assert summary["headline"]["cacheslide_loss_points"] is None
    assert "10.0%" in summary["headline_missing"]["cacheslide_loss_points"]
    assert summary["headline"]["best_policy_loss_points"] == 0.0


def test_ties_go_to_the_smaller_share(tmp_path, monkeypatch):
    monkeypatch.setattr(headline_module, "TIE_POINTS", 30.0)
    summary = build_summary(load_run(config(), accuracy=accuracy(tmp_path)))
    assert summary["headline"]["best_policy_loss_points"] == 25.0
    assert summary["headline"]["best_policy_row_share"] == pytest.approx(0.5)


def test_missing_parts_give_reasons_not_errors(tmp_path):
    empty = build_summary(load_run(config()))
    assert set(empty["headline"].values()) == {None}
    assert empty["headline_missing"].keys() == empty["headline"].keys()
    assert empty["accuracy"] == empty["latency"] == empty["throughput"] == empty["cksim"] == []
    partial = build_summary(load_run(config(), accuracy=accuracy(tmp_path, systems=["recompute", "cacheslide"])))
    assert partial["headline"]["recompute_f1"] == 0.75
    assert partial["headline_missing"]["naive_reuse_loss_points"] == "naive_reuse has no accuracy records in this run"
    lonely = build_summary(load_run(config(), accuracy=accuracy(tmp_path / "b", systems=["cacheslide"])))
    assert "recompute has no accuracy records" in lonely["headline_missing"]["cacheslide_loss_points"]


def test_gpu_runs_have_no_cpu_ratio(tmp_path):
    summary = build_summary(load_run(config(device="cuda"), latency=[latency(tmp_path)]))
    assert summary["headline"]["cpu_ttft_ratio_4k"] is None
    assert "cuda" in summary["headline_missing"]["cpu_ttft_ratio_4k"]
    assert row(summary["latency"], system="cacheslide")["ttft_ratio"]["value"] == pytest.approx(0.6)


def test_failures_are_counted_apart(tmp_path):
    summary = build_summary(load_run(config(), accuracy=accuracy(tmp_path, failures=("p7",))))
    assert len(summary["failures"]) == 2 * len(SYSTEMS)
    first = summary["failures"][0]
    assert (first["stage"], first["dataset"], first["system"], first["id"]) == (
        "accuracy",
        "toy-sparse",
        "recompute",
        "p7",
    )
    found = row(summary["accuracy"], scope="mix", name="deep", system="cacheslide")
    assert (found["failures"], found["prompts"]) == (1, 2)


def test_prompts_of_two_data_sets_are_not_one_cluster(tmp_path):
    """Both styles of a mix number their prompts alike."""
    paths = accuracy(tmp_path)
    for path in [p for p in paths if "toy-deep" in p]:
        target = tmp_path / "accuracy" / "other-deep"
        target.mkdir(exist_ok=True)
        (target / path.rpartition("/")[2]).write_text(Path(path).read_text())
        paths.append(str(target / path.rpartition("/")[2]))
    summary = build_summary(load_run(config(), accuracy=paths))
    found = row(summary["accuracy"], scope="mix", name="deep", system="cacheslide")
    assert (found["f1"]["n"], found["f1"]["values"], found["loss_points"]["n"]) == (4, 8, 4)


def test_equal_share_table_is_filled_from_accuracy(tmp_path):
    """CacheSlide recomputes 26 % anyway and is not run twice; naive reuse recomputes nothing and has no place there."""
    settings = {"title": "CacheBlend", "recompute_ratio": 0.26}
    record = made_run.accuracy_record("cacheslide", "deep", Random(0), 1, 2)
    path = made_run.write(tmp_path / "equal_share" / "toy-deep" / "cacheblend.jsonl", settings, {"p0": record})
    summary = build_summary(load_run(config(), accuracy=accuracy(tmp_path), equal_share=[path]))
    systems = [r["system"] for r in summary["equal_share"] if r["scope"] == "mix"]
    assert systems == ["recompute", "cacheslide", "cacheslide_promote", "cacheblend"]
    assert row(summary["equal_share"], scope="mix", system="cacheslide")["f1"]["value"] == 0.75


def test_throughput_counts_rounds_and_gates(tmp_path):
    rng = Random(0)
    records = {f"{s}-{b}": made_run.throughput_record(s, b, rng, 6) for s in SYSTEMS[:3] for b in (1, 4)}
    records["naive_reuse-4"]["compute_fraction"] = 1.0
    path = made_run.write(tmp_path / "throughput.jsonl", {}, records)
    rows = build_summary(load_run(config(), throughput=path))["throughput"]
    ours = row(rows, system="cacheslide", batch=4)
    record, reference = records["cacheslide-4"], records["recompute-4"]
    assert (ours["requests"], ours["rounds"]) == (6, 2)
    assert ours["qps"]["value"] == pytest.approx(record["qps"])
    assert ours["qps_correct"]["value"] == pytest.approx(record["qps_correct"])
    assert ours["qps_ratio"]["value"] == pytest.approx(record["qps"] / reference["qps"])
    assert sum(round_seconds(record)) == pytest.approx(record["elapsed_seconds"])
    assert "nothing was reused" in row(rows, system="naive_reuse", batch=4)["ratio_reason"]


def test_ratio_of_sums():
    found = intervals.ratio_of_sums([1, 2, 3], [2, 2, 2], ["a", "a", "b"])
    assert found["value"] == 1.0 and found["n"] == 2
    assert (found["low"], found["high"]) == (0.75, 1.5)
    nothing = intervals.ratio_of_sums([1, 1], [0, 0], ["a", "b"])
    assert nothing["value"] is None and nothing["low"] is None
    assert intervals.ratio_of_sums([1], [2], ["a"])["low"] is None


def test_mixes_by_name():
    assert [mix_of(d) for d in ("hotpotqa-sparse", "swebench-deep", "swebench-ledger", "musique", "2wikimqa-dev")] == [
        "sparse",
        "deep",
        "ledger",
        "musique",
        "2wikimqa-dev",
    ]


def test_summary_file_is_whole_and_repeatable(tmp_path):
    cfg, paths = made_run.make_run(tmp_path, {"systems": SYSTEMS, "datasets": ["hotpotqa-sparse", "swebench-deep"]}, 4)
    summarize(cfg, tmp_path / "summary.json", **paths)
    first = (tmp_path / "summary.json").read_bytes()
    summarize(cfg, tmp_path / "summary.json", **paths)
    assert (tmp_path / "summary.json").read_bytes() == first
    content = json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["selection_layer"]["layer"] == 3
    assert content["cksim"][-1]["shift"] == 1000
    assert content["prompts"][0]["reusable_share"]["mean"] == pytest.approx(0.875, abs=0.02)
    assert [r["system"] for r in content["equal_share"] if r["name"] == "sparse"] == SYSTEMS


def test_a_broken_record_file_is_named(tmp_path):
    path = tmp_path / "accuracy" / "toy-deep" / "recompute.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("not json\n")
    with pytest.raises(DataError, match=r"recompute\.jsonl"):
        load_run(config(), accuracy=[str(path)])
