"""The engine's figures in one file: which row each number of the headline comes from, and what is null."""

import json
import lzma

import pytest

from harness.results.engine import headline, host_over_device, main
from harness.results.real_confirm import OVER_NOTHING, OVER_RIVAL

START = {"kind": "start", "settings": {"shape": "mistral-7b"}, "provenance": {"git_commit": "abc"}}
RULE = "Mixed, two thirds remembered"


def cell(system, seconds, tokens=8192, batch=1, store="model", fraction=None):
    run = {"ttft": [seconds * (i + 1) / batch for i in range(batch)], "seconds": seconds}
    if fraction is not None:
        run |= {"compute_fraction": [fraction] * batch, "bytes_loaded": [1] * batch}
    about = {"kind": "cell", "store": store, "tokens": tokens, "batch": batch, "system": system}
    return about | {"runs": [run] * 4, "failed": None}


@pytest.fixture
def files(tmp_path):
    """Records, packed, and the two files about answers."""
    cells = [
        cell("recompute", 0.2), cell("ours@0.05", 0.04, fraction=0.145), cell("ours@0.1", 0.05, fraction=0.19),
        cell("ours@0.05", 0.042, store="cpu", fraction=0.145), cell("other@0.05", 0.01, fraction=0.1),
        cell("recompute", 1.6, batch=8), cell("ours@0.05", 0.32, batch=8, fraction=0.145),
        cell("recompute", 0.1, 4096), cell("ours@0.05", 0.025, 4096, fraction=0.145),
    ]  # fmt: skip
    records = tmp_path / "records.jsonl.xz"
    records.write_bytes(lzma.compress("\n".join(map(json.dumps, [START, *cells, {"kind": "end"}])).encode()))
    ratio = {"n": 120, "value": 0.5, "low": 0.4, "high": 0.6}
    places = [("matter", "both", 1), ("matter", "hotpotqa", 9), ("shift", "both", 2)]
    ratios = [
        {"key": [setting, data, f"{RULE} 10 %"], OVER_NOTHING: ratio | {"value": 0.1 * n}, OVER_RIVAL: ratio}
        for setting, data, n in places
    ]
    (tmp_path / "confirm.json").write_text(json.dumps({"ratios": ratios}))
    row = {"cell": "mixed, 15%", "loss_points": {"value": 0.625}, "compute_fraction": 0.28}
    (tmp_path / "stress.json").write_text(json.dumps({"models": {"rope": {"mixes": {"deep": [row]}}}}))
    return tmp_path


def made(files, *more: str) -> dict:
    names = [f"--{n}={files / n}.json" for n in ("confirm", "stress")]
    out = files / "deep" / "engine.json"
    main(["--records", str(files / "records.jsonl.xz"), "--system", "ours", "--cell", "mixed, 15%", *names, *more,
          "--out", str(out)])  # fmt: skip
    return json.loads(out.read_text())


def test_each_number_comes_from_its_own_row(files):
    assert made(files)["headline"] == pytest.approx(
        {
            "ttft_ratio_4k": 4.0,
            "ttft_ratio_8k": 5.0,
            "ttft_ratio_16k": None,  # not measured
            "ttft_ratio_8k_10pct": 4.0,
            "ttft_ratio_16k_10pct": None,
            "mean_ttft_ratio_8x8k": 5.0,
            "requests_per_s_ratio_8x8k": 5.0,
            "efficiency_8k": 0.725,
            "efficiency_16k": None,
            "kl_over_nothing_matter_10pct": 0.1,
            "kl_over_nothing_shift_10pct": 0.2,
            "stress_f1_loss_points": 0.625,
            "stress_compute_fraction": 0.28,
        }
    )


def test_chunks_on_the_host_are_compared_with_the_same_cell(files):
    [row] = made(files)["host_over_device"]
    assert row == {"tokens": 8192, "batch": 1, "system": "ours@0.05", "ratio": pytest.approx(1.05)}
    assert host_over_device([]) == []


def test_what_was_not_measured_is_null(files):
    (files / "confirm.json").write_text('{"ratios": []}')
    (files / "stress.json").write_text('{"models": {}}')
    found = made(files)
    assert found["headline"]["kl_over_nothing_matter_10pct"] is found["headline"]["stress_f1_loss_points"] is None
    assert set(headline([], "ours", {}).values()) == {None}


def test_of_other_files_the_tables_are_taken_in(files):
    (files / "retaining.json").write_text(json.dumps({"provenance": {}, "table": {"later": 1}, "runs": [1, 2]}))
    parts = {"ttft_ms": [1.0], "timeline": [], "device_us": 2.0, "kernels": [["name", 1, 2.0]]}
    (files / "profile.json").write_text(json.dumps({"provenance": {}, "lengths": {"8192": {"ours@0.05": parts}}}))
    found = made(files, f"--retaining={files / 'retaining.json'}", f"--profile={files / 'profile.json'}")
    assert found["retaining"] == {"provenance": {}, "table": {"later": 1}}
    assert found["profile"]["lengths"]["8192"]["ours@0.05"] == {"ttft_ms": [1.0], "timeline": [], "device_us": 2.0}
    assert "retaining" not in made(files)
