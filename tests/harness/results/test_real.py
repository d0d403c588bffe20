"""Tables of the study on a real model, from invented records whose means are known."""

import json
import os

import pytest

from cacheslide.errors import DataError
from harness.experiments.real.arms import NOISE
from harness.results import real
from harness.results.real import ISOLATED, NOTHING, POOLED, best_within, choose_layers, largest_within, summarise
from harness.results.rounding import rounded
from harness.step import command
from tests.helpers.real_records import FRACTION, record, write

KL = {NOISE: 0.001, NOTHING: 0.02, ISOLATED: 0.3, "First tokens 10 %": 0.01, "First tokens 26 %": 0.004,
      "CacheBlend, by V 15 % at layer 1": 0.12, "CacheBlend, by K 15 % at layer 1": 0.1,
      "CacheBlend, stale positions 15 % at layer 1": 0.05, "CacheBlend, by V 50 % at layer 5": 0.03}  # fmt: skip


def trials(setting="matter"):
    """Two prompts of one set and one of another, the third thrice as far off; the second one's tokens differ."""
    return [
        record(f"{setting} {dataset} {i}", arm, kl * scale, dataset, agreement)
        for arm, kl in KL.items()
        for dataset, i, scale, agreement in (("hotpotqa", 0, 1, 1.0), ("hotpotqa", 1, 2, 0.5), ("musique", 0, 6, 1.0))
    ]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "frontier-0of1", trials())
    return tmp_path


def rows_of(summary, setting, dataset):
    return {r["key"][2]: r for r in summary["frontier"] if r["key"][:2] == [setting, dataset]}


def test_means_are_by_setting_set_and_arm_and_over_both_sets(folder):
    summary = summarise(folder)
    own, other, both = (rows_of(summary, "matter", name) for name in ("hotpotqa", "musique", POOLED))
    assert own.keys() == other.keys() == both.keys() == KL.keys() and summary["schema"] == real.SCHEMA
    for arm, kl in KL.items():
        assert [r[arm]["answer"]["kl"]["value"] for r in (own, other, both)] == pytest.approx(
            [1.5 * kl, 6 * kl, 3 * kl]
        )
        assert [r[arm]["n"] for r in (own, other, both)] == [2, 1, 3]
        row = both[arm]
        assert row["greedy"]["kl"]["value"] == pytest.approx(1.5 * kl)
        assert row["answer"]["nll_change"]["value"] == pytest.approx(6 * kl)
        assert row["answer"]["agreement"]["value"] == pytest.approx(2.5 / 3, abs=1e-4)
        assert row["flips"]["value"] == pytest.approx(1 / 3, abs=1e-4)
        assert row["compute_fraction"] == FRACTION.get(arm, 0.25) and row["tokens_reused"] == 900
        interval = row["answer"]["kl"]
        assert interval["low"] == pytest.approx(kl) and interval["high"] == pytest.approx(6 * kl)
        assert other[arm]["answer"]["kl"]["low"] is None  # one prompt has no spread


def test_comparisons_are_paired_on_the_prompts_that_both_arms_have(folder, tmp_path):
    extra = record("matter hotpotqa 7", NOTHING, 99.0)
    write(folder, "frontier-1of2", [extra])
    found = {(r["comparison"], r["dataset"]): r for r in summarise(folder)["comparisons"] if "rule" not in r}
    assert len(found) == 9
    for dataset, n in (("hotpotqa", 2), ("musique", 1), (POOLED, 3)):
        pic = found["rpdc over pic", dataset]
        assert pic["value"] == pytest.approx(0.02 / 0.3) and pic["n"] == n
        assert found["ours over nothing recomputed", dataset]["value"] == pytest.approx(0.004 / 0.02)
        best = found["ours over the best CacheBlend", dataset]
        assert best["value"] == pytest.approx(0.04) and best["over"] == "CacheBlend, by K 15 % at layer 1"
    assert found["rpdc over pic", POOLED]["high"] == pytest.approx(0.02 / 0.3)
    assert real.paired(trials(), NOTHING, "none such", "matter") is None
    assert real.paired(trials(), NOTHING, ISOLATED, "shift") is None


def test_each_rule_is_compared_with_nothing_and_with_cacheblend_at_its_best_layer(folder):
    more = {
        "Remembered 10 %": 0.005,
        "Remembered + boundary 32 10 %": 0.002,
        "Remembered 20 %": 0.0,
        "Shrinking 10 %": 0.0,
        "Question-aware 10 % at layer 4": 0.008,
        "Question-aware 10 % at layer 5": 0.016,
        "Boundary 10 %": 0.0,
        "CacheBlend, by V 15 % at layer 9": 0.08,
    }
    few = {"Boundary 10 %"}  # swept on one prompt alone: nothing to compare
    made = [
        record(r["trial"], arm, more[arm] * r["answer"]["kl"] / 0.02, r["dataset"])
        for r in trials()
        if r["arm"] == NOTHING
        for arm in more
        if arm not in few or "musique" in r["trial"]
    ]
    write(folder, "frontier-1of2", made)
    for best, asked in ((None, (5, 0.8)), ({"Question-aware": 4}, (4, 0.4))):
        rows = real.tabulate([*trials(), *made], real.by_setting)
        out = [r for r in real.comparisons([*trials(), *made], rows, best) if r["dataset"] == POOLED and "rule" in r]
        found = {(r["comparison"], r["rule"]): r for r in out}
        over = [
            found["rule over nothing recomputed", rule]
            for rule in ("First tokens 10 %", "Remembered 10 %", "Remembered + boundary 32 10 %", "Question-aware 10 %")
        ]
        assert [r["value"] for r in over] == pytest.approx([0.5, 0.25, 0.1, asked[1]])
        assert over[3]["of"] == f"Question-aware 10 % at layer {asked[0]}" and over[0]["over"] == NOTHING
        rival = found["rule over CacheBlend 15 %", "Remembered 10 %"]
        assert rival["value"] == pytest.approx(0.005 / 0.08) and rival["over"] == "CacheBlend, by V 15 % at layer 9"
        assert len(found) == 2 * 4 and all(r["n"] == 3 for r in out)
    assert [r for r in summarise(folder)["comparisons"] if "rule" in r and r["dataset"] == POOLED]


def test_a_ratio_is_that_of_sums_not_the_mean_of_ratios():
    made = [record("matter h 0", "a", 1.0), record("matter h 0", "b", 1.0), record("matter h 1", "a", 1.0)]
    assert real.paired([*made, record("matter h 1", "b", 9.0)], "a", "b", "matter")["value"] == pytest.approx(0.2)


def test_the_headline_is_of_matter_and_both_sets(folder):
    write(folder, "frontier-1of2", trials("shift"))
    turns = [record(f"replay a {s}", NOTHING, 0.1, "a", turn=t) for s in "xyz" for t in (1, 2)]
    write(folder, "replay-0of1", turns)
    summary = summarise(folder)
    assert summary["headline"] == {
        "kl_nothing_recomputed": 0.06,
        "kl_isolated": 0.9,
        "kl_cacheblend_best_at_33pct": 0.3,
        "kl_cacheslide_at_20pct_compute": 0.03,
        "kl_noise_floor": 0.003,
        "greedy_flip_share_cacheslide": 0.3333,
        "rpdc_over_pic_kl_ratio": pytest.approx(0.02 / 0.3),
        "real_sessions_replayed": 3,
    }
    [row] = summary["replay"]
    assert row["key"] == ["a", NOTHING] and row["n"] == 3
    assert summary["conditions"]["frontier"]["lengths"] == [200] and "histories" not in summary["conditions"]


def test_without_arms_or_the_setting_the_headline_has_no_numbers(tmp_path):
    write(tmp_path, "frontier-0of1", trials("shift"))
    headline = summarise(tmp_path)["headline"]
    assert headline.pop("real_sessions_replayed") == 0 and set(headline.values()) == {None}


def row(arm, fraction, kl, n=9, key=("matter", POOLED)):
    return {"key": [*key, arm], "compute_fraction": fraction, "n": n, "answer": {"kl": {"value": kl}}}


def test_the_best_is_chosen_by_kl_and_the_largest_by_compute():
    rows = [row("X 1 %", 0.1, 3.0), row("X 2 %", 0.2, 1.0), row("X 3 %", 0.3, 2.0), row("X 4 %", 0.31, 0.1),
            row("X, stale", 0.3, 0.0), row("Y", 0.3, 0.0), row("X 3 %", 0.3, 0.0, key=("shift", POOLED)),
            row("X 3 %", 0.3, 0.0, key=("matter", "hotpotqa"))]  # fmt: skip
    assert best_within(rows, "X", 0.3, "matter", POOLED)["key"][2] == "X 2 %"
    assert largest_within(rows, "X ", 0.3, "matter", POOLED)["key"][2] == "X 3 %"
    assert best_within(rows, "X", 0.05, "matter", POOLED) is largest_within(rows, "Z", 1, "matter", POOLED) is None


def test_an_arm_on_a_few_prompts_is_not_compared_with_one_on_all():
    rows = [row("X 1 %", 0.1, 3.0, n=20), row("X 2 %", 0.2, 1.0, n=9), row("X 3 %", 0.2, 2.0, n=10)]
    assert best_within(rows, "X", 0.3, "matter", POOLED)["key"][2] == "X 3 %"
    assert largest_within(rows[:2], "X", 0.3, "matter", POOLED)["key"][2] == "X 1 %"


def test_turns_stand_in_their_order(folder):
    turns = [record("histories h 0", arm, t / 100, turn=t) for t in (11, 2, 10, 1) for arm in (NOTHING, NOISE)]
    write(folder, "histories-0of1", turns)
    rows = summarise(folder)["histories"]
    assert [r["key"] for r in rows] == [[t, arm] for t in (1, 2, 10, 11) for arm in (NOTHING, NOISE)]
    assert [r["answer"]["kl"]["value"] for r in rows[::2]] == [0.01, 0.02, 0.1, 0.11]


def test_layers_are_chosen_by_rule_over_all_its_ratios():
    made = [
        record(f"matter h {i}", f"{line} at layer {layer}", kl)
        for i in (0, 1)
        for line, scores in {
            "CacheSlide, by K 10 %": {1: 3, 2: 1, 12: 2},
            "CacheSlide, by K 26 %": {1: 3, 2: 4, 12: 2},
            "CacheBlend, by V 15 %": {1: 5, 2: 5, 12: 6},  # equal: the earlier one
        }.items()
        for layer, kl in scores.items()
    ]
    made += [record("matter h 0", "EPIC 8", 0.0)]
    assert choose_layers(made) == {"CacheSlide, by K": 12, "CacheBlend, by V": 1}


def test_shards_parts_and_repeated_ids_count_once(tmp_path):
    made = trials()
    write(tmp_path, "frontier-0of2", made[:10])
    write(tmp_path, "frontier-1of2", made[8:20], part=True)
    write(tmp_path, "frontier-0of4", made[15:])
    assert sorted(os.listdir(tmp_path))[0] == ".frontier-1of2.jsonl.part"
    records, failures, settings = real.read_stage(tmp_path, "frontier")
    assert sorted(r["id"] for r in records) == sorted(r["id"] for r in made) and not failures and len(settings) == 3


def test_what_a_run_set_aside_is_not_read(folder):
    """Records of other settings, and other stages whose name ends alike."""
    other = [record("matter hotpotqa 0", NOTHING, 77.0), record("matter hotpotqa 99", NOTHING, 77.0)]
    write(folder, "frontier-0of3", other, part=True)
    os.rename(folder / ".frontier-0of3.jsonl.part", folder / ".frontier-0of3.jsonl.part.old")
    write(folder, "frontier-0of3", other)
    os.rename(folder / "frontier-0of3.jsonl", folder / ".frontier-0of3.jsonl.old.2")
    write(folder, "old-frontier-0of1", other)
    assert {r["id"] for r in real.read_stage(folder, "frontier")[0]} == {r["id"] for r in trials()}


def test_failures_are_counted_once_and_only_where_nothing_was_measured(folder):
    failed = [{"id": name, "failure": "layer 8"} for name in ("a", "b", trials()[0]["id"])]
    write(folder, "frontier-1of3", failed)
    write(folder, "frontier-2of3", failed[:2])
    assert summarise(folder)["failures"] == 2 and len(rows_of(summarise(folder), "matter", POOLED)) == len(KL)


@pytest.mark.parametrize("change", [{"model": "other"}, {"dtype": "float32"}, {"seed": 1}, {"lengths": [300]}])
def test_shards_of_two_studies_are_not_summed_up(folder, change):
    write(folder, "frontier-1of2", [record("matter h 5", NOTHING, 1.0)], **change)
    with pytest.raises(DataError, match=rf"{next(iter(change))} is .* a folder holds one study") as wrong:
        summarise(folder)
    assert "\n" not in str(wrong.value)


def test_the_commands_write_json(folder):
    write(folder, "layers-0of1", [record("matter h 0", f"CacheBlend, by V 15 % at layer {n}", 9 - n) for n in (1, 2)])
    real.main(["layers", str(folder), "--out", str(folder / "layers.json")])
    assert json.loads((folder / "layers.json").read_text()) == {"layers": {"CacheBlend, by V": 2}, "prompts": 1}
    real.main(["summary", str(folder), "--out", str(folder / "summary.json")])
    written = json.loads((folder / "summary.json").read_text())
    assert written["headline"] == rounded(summarise(folder)["headline"]) and str(folder) not in json.dumps(written)


def test_a_record_that_lacks_what_the_tables_read_is_named(tmp_path):
    """A line may be whole and still be of another version, or hold what another program wrote."""
    good = record("matter hotpotqa 0", NOTHING, 0.1, turn=1)
    scores = good["answer"]
    cases = [
        ("frontier", {"trial": None}, "trial must be a text, not None"),
        ("frontier", {"dataset": [1]}, "dataset must be a text"),
        ("frontier", {"compute_fraction": "0.5"}, "compute_fraction must be a number, not '0.5'"),
        ("frontier", {"tokens": float("nan")}, "tokens must be a number, not nan"),
        ("frontier", {"answer": scores | {"kl": 1e300}}, "answer.kl must be a number"),
        ("frontier", {"greedy": {}}, "greedy.kl must be a number, not None"),
        ("replay", {"greedy": 3}, "greedy must be an object, not 3"),
        ("histories", {"turn": "1"}, "turn must be a count, not '1'"),
        ("layers", {"arm": "CacheBlend at layer x"}, "the arm's layer must be a count, not 'x'"),
        ("layers", {"answer": None}, "answer must be an object, not None"),
    ]
    for number, (stage, change, why) in enumerate(cases):
        folder = tmp_path / str(number)
        write(folder, f"{stage}-0of1", [good | change])
        with pytest.raises(DataError, match=f"{stage}-0of1.jsonl: record 'matter hotpotqa 0 .*{why}"):
            real.read_stage(folder, stage)


@pytest.mark.parametrize("what", ["layers", "summary"])
@pytest.mark.parametrize("where", ["", "none"])
def test_a_folder_without_records_is_one_line_and_status_2(tmp_path, capsys, what, where):
    with pytest.raises(SystemExit) as ended:
        command(lambda: real.main([what, str(tmp_path / where), "--out", str(tmp_path / "out.json")]))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "holds no records of the stage" in said and said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
