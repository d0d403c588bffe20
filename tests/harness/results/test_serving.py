"""Tables of the engine's TTFT: ratios, efficiency, what failed stays out, torn files."""

import argparse
import lzma

import pytest

from cacheslide.errors import DataError
from harness.experiments.serving.arms import Arm, add_arguments, arms
from harness.results.serving import build, read
from tests.helpers.serving_cells import RECORDS, START, cell, written


def test_efficiency_is_the_share_computed_times_recomputes_time_over_the_measured(tmp_path):
    made = build([written(tmp_path, RECORDS)], None)
    rows = {(r["system"], r["store"]): r for r in made["runs"][0]["table"]}
    ours = rows["cacheslide@0.26", "model"]
    assert ours["ttft_ms"]["value"] == pytest.approx(100)
    assert ours["recompute_over_ttft"]["value"] == pytest.approx(2)
    assert ours["efficiency"]["value"] == pytest.approx(0.8) and ours["efficiency"]["n"] == 3
    assert rows["cacheslide@0.26", "cpu"]["efficiency"]["value"] == pytest.approx(0.5)
    headline = {"executor_efficiency_8k": 0.8, "ttft_ratio_8k_topk26": 2.0, "plugin_overhead_pct": 1.0}
    assert made["headline"] == pytest.approx(headline)


def test_arms_of_any_system_have_their_compute_fraction_and_launched_ones_a_name(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser, [0.05])
    args = parser.parse_args(["--systems", "epic,naive_reuse", "--graphs", "on,off"])
    names = ["epic@0.05", "epic@0.05+launched", "naive_reuse@0.05", "naive_reuse@0.05+launched"]
    assert arms(args) == names and [Arm.parse(n).name for n in names] == names
    assert Arm.parse(names[1]) == Arm("epic", 0.05, graphs=False)
    assert arms(parser.parse_args([])) == ["cacheslide@0.05"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--graphs", "on,maybe"])
    records = [START, cell("recompute", [[0.2], [0.2]]), *(cell(n, [[0.1], [0.1]], 0.4) for n in names)]
    rows = {r["system"]: r for r in build([written(tmp_path, records)], None)["runs"][0]["table"]}
    assert all(rows[n]["efficiency"]["value"] == pytest.approx(0.8) for n in names)


def test_what_failed_is_named_and_kept_out_of_the_table(tmp_path):
    run = build([written(tmp_path, RECORDS)], None)["runs"][0]
    assert [f["failed"] for f in run["failed"]] == ["reuse did not happen"]
    assert all(r["system"] != "cacheslide@0.05" for r in run["table"])
    assert run["complete"] and not build([written(tmp_path, RECORDS[:-1])], None)["runs"][0]["complete"]


def test_packed_records_read_as_they_were(tmp_path):
    plain = written(tmp_path, RECORDS)
    packed = tmp_path / "records.jsonl.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read(packed) == read(plain)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match="records"):
        read(packed)


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    assert len(read(written(tmp_path, RECORDS[:3], '{"kind": "ce'))) == 3
    with pytest.raises(DataError, match=":2:"):
        read(written(tmp_path, [START], '{"kind"\n{"kind": "end"}\n'))
    with pytest.raises(DataError, match="not a record file"):
        read(written(tmp_path, RECORDS[1:]))
