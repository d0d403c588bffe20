"""The workflow's targets `real` and `real-slice`: they plan, say what is missing, and the slice has its tables."""

import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from cacheslide.errors import DataError
from harness.experiments.real.arms import slice_arms
from harness.experiments.real.plan import RealPlan, read_plan
from harness.real_model.inputs import required
from harness.results import real_slice
from harness.results.records import RecordWriter
from harness.results.runs import read_json
from tests.helpers import made_real
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow


def plan_file(folder: Path, **changes) -> Path:
    """A configuration whose model, data and recordings are there."""
    (folder / "model").mkdir(parents=True)
    (folder / "sessions").mkdir()
    for name in ("a.jsonl", "b.json"):
        (folder / name).write_text("")
    plan = {"model": "model", "data": ["a.jsonl", "b.json"], "recordings": "sessions"}
    named = {k: [str(folder / x) for x in v] if isinstance(v, list) else str(folder / v) for k, v in plan.items()}
    (folder / "plan.yaml").write_text(yaml.safe_dump(named | changes))
    return folder / "plan.yaml"


def planned(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A dry run in a folder without results."""
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config/smoke.yaml").write_text((ROOT / "config/smoke.yaml").read_text())
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", "--workflow-profile", "none", "--nolock", "--dry-run", "-p", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def jobs(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert done.returncode == 0, done.stderr
    return {name: int(n) for name, n in re.findall(r"^(\S+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE)}


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 2, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("config: ")]


def test_the_study_plans_in_shards_from_either_form(tmp_path):
    plan = plan_file(tmp_path / "in")
    stages = dict.fromkeys(("real_layers", "real_frontier", "real_histories", "real_replay"), 3)
    for given in (
        ["--config", f"real={plan}", "real_shards=3"],
        ["--config", "real_shards=3", "--configfile", str(plan)],
    ):
        done = planned(tmp_path, "real", *given)
        count = jobs(done)
        assert {k: count[k] for k in stages} == stages
        assert count["real_summary"] == count["real_best"] == count["draw_real"] == count["fig03_real"] == 1
        text = done.stdout + done.stderr
        assert f"study frontier --config={plan} --shard=2/3 --best=results/real/best.json --threads 1" in text
        assert f"study layers --config={plan} --shard=0/3 --threads 1" in text


def test_other_prompts_are_measured_at_the_layers_that_were_chosen(tmp_path):
    plan = plan_file(tmp_path / "in", without=[str(tmp_path / "in/a.jsonl")])
    (tmp_path / "results/real").mkdir(parents=True)
    (tmp_path / "results/real/best.json").write_text("{}")
    done = planned(tmp_path, "real-confirm", "--config", f"real={plan}", "real_shards=3")
    assert jobs(done) == {"real_confirm": 3, "real-confirm": 1, "total": 4}
    text = done.stdout + done.stderr
    assert f"study confirm --config={plan} --shard=2/3 --best=results/real/best.json --threads 1" in text
    missing = plan_file(tmp_path / "other", without=[str(tmp_path / "nowhere.json")])
    [line] = said(planned(tmp_path, "real-confirm", "--config", f"real={missing}"))
    assert "nowhere.json is not there" in line


def test_a_summary_that_is_there_is_drawn_without_model_or_data(tmp_path):
    for name in ("summary.json", "sessions.json"):
        (tmp_path / "results/real").mkdir(parents=True, exist_ok=True)
        (tmp_path / "results/real" / name).write_text("{}")
    plan = plan_file(tmp_path / "in", model=str(tmp_path / "nowhere"))
    count = jobs(planned(tmp_path, "real", "--config", f"real={plan}"))
    assert set(count) == {"draw_real", "fig03_real", "real", "total"}


@pytest.mark.parametrize(
    ("change", "arguments", "line"),
    [
        ({"model": "./nowhere"}, ["real"], "model: nowhere is not there: `make real-model` brings the model"),
        ({"data": ["./nowhere.json"]}, ["real-slice"], "data: nowhere.json is not there: docs/real.md says where"),
        ({}, ["real", "real_shards=0"], "real_shards: 0 is no count of at least 1"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, change, arguments, line):
    plan = plan_file(tmp_path / "in", **change)
    lines = said(planned(tmp_path, arguments[0], "--config", f"real={plan}", *arguments[1:]))
    assert len(lines) == 1 and lines[0].replace("./", "").startswith(f"config: {line}")


def test_no_key_of_a_plan_is_changed_behind_its_file(tmp_path):
    plan = plan_file(tmp_path / "in")
    lines = said(planned(tmp_path, "real", "--config", "prompts=3", "--configfile", str(plan)))
    assert lines == ["config: --config changes no key of a study on a real model: write a file"]


def test_required_names_what_it_needs(tmp_path):
    plan = read_plan(plan_file(tmp_path / "in"))
    assert len(required(plan.model, plan.data, plan.recordings)) == 4
    assert required("owner/name", plan.data) == [Path(p) for p in plan.data]  # the hub may have it
    with pytest.raises(DataError, match="make real-model"):
        required(str(tmp_path / "x"), plan.data)
    with pytest.raises(DataError, match="is no folder"):
        required(plan.model, plan.data, str(tmp_path / "x"))


def test_every_key_of_a_plan_is_documented_and_no_other():
    part = (ROOT / "config/README.md").read_text().split("\n## The study on a real model")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", part, re.MULTILINE))
    assert set(rows) == {f.name for f in fields(RealPlan)}
    for one in fields(RealPlan):
        shown = rows[one.name].strip("`")
        if isinstance(one.default, int):
            assert shown == str(one.default)
        assert (shown == "required") == (one.default is MISSING)


def test_the_model_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_plan(ROOT / "config/real.yaml").model.startswith(f"{tmp_path}/.cache/cacheslide/real-model/")


def test_tables_of_the_slice(tmp_path, capsys):
    with pytest.raises(DataError, match="no records of the stage slice"):
        real_slice.summarise(tmp_path)
    writer = RecordWriter(tmp_path / "slice-0of1.jsonl", {"provenance": {"git_commit": "0"}})
    for name in ("hotpotqa", "musique"):
        for at in range(made_real.PROMPTS):
            for one in slice_arms():
                writer.add(made_real.record(f"matter {name} {at}", name, one.name, at))
    writer.finish()
    real_slice.main([str(tmp_path), "--out", str(tmp_path / "slice.json")])
    made = read_json(tmp_path / "slice.json")
    assert made["schema"] == real_slice.SCHEMA and len(made["rows"]) == 3 * 4 and made["failures"] == 0
    values = {(r["of"], r["over"]): r["value"] for r in made["comparisons"]}
    assert values["Nothing recomputed", "Isolated, nothing recomputed"] == pytest.approx(0.04)
    assert values["First tokens 10 %", "CacheBlend, by V 15 % at layer 1"] == pytest.approx(0.012 / 0.25)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 3 and lines[0].startswith("matter, ") and "n = 10" in lines[0]
    assert "KL of First tokens 10 % over Nothing recomputed: 0.6 [0.6, 0.6], n = 10" in lines[-2]
