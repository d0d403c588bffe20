"""Runs of the study on a real model: stages, shards, and what goes on where a run was cut."""

import json
import os

import pytest
import yaml

from cacheslide.errors import ConfigError, DataError
from harness.experiments.real import histories, measure, study
from harness.experiments.real.arms import NOISE, confirm_arms, core, frontier, history_arms, replay_arms, slice_arms
from harness.results import real_confirm
from harness.results.real import read_stage
from harness.results.real_records import rule_and_layer
from harness.results.records import read_file
from tests.helpers.made_passages import LAYERS, save_gemma, write_musique
from tests.helpers.made_sessions import WORDS, trajectory, write_trajectory

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(histories, "TURNS", 4)
    monkeypatch.setattr(histories, "PASSAGE", 60)
    monkeypatch.setattr(measure, "GREEDY", 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    model, data = save_gemma(folder / "model"), write_musique(folder / "made.json", 6)
    write_trajectory(folder / "logs" / "issue__a.traj", trajectory(turns=3))
    plan = {"model": str(model), "data": [str(data)], "dtype": "float32", "lengths": [200], "longest": 4000}
    plan |= {"validation": 1, "prompts": 3, "sessions": 1, "settings": ["unrelated", "matter"]}
    plan |= {"recordings": str(folder / "logs")}
    (folder / "real.yaml").write_text(yaml.safe_dump(plan))
    return folder / "real.yaml"


def start(config, out, stage="slice", *more):
    study.main([stage, "--config", str(config), "--out", str(out), "--device", "cpu", *more])


def by_id(file):
    return {r["id"]: r for r in read_file(file).records}


def test_a_slice_has_each_arm_on_each_prompt_and_no_text(config, tmp_path):
    start(config, tmp_path)
    assert os.listdir(tmp_path) == ["slice-0of1.jsonl"]
    file = read_file(tmp_path / "slice-0of1.jsonl")
    assert len(file.records) == 2 * 3 * len(slice_arms()) and not file.failures
    order = [r["trial"].split()[0] for r in file.records[:: len(slice_arms())]]
    assert order == ["unrelated", "matter"] * 3  # settings take turns
    assert file.settings["model"] == "model" and file.settings["data"] == ["made.json"]
    assert file.settings["stage"] == "slice" and len(file.settings["provenance"]["data_hashes"]["musique"]) == 64
    text = (tmp_path / "slice-0of1.jsonl").read_text()
    assert str(config.parent) not in text and not [word for word in WORDS if word in text]
    numbers = [v for r in file.records for part in ("answer", "greedy") for v in r[part].values()]
    assert all(v == float(f"{v:.6g}") for v in numbers)


def test_validation_rows_choose_layers_and_give_no_results(config, tmp_path):
    start(config, tmp_path, "layers")
    start(config, tmp_path, "slice", "--prompts", "99")
    chosen = {r["about"]["row"] for r in read_file(tmp_path / "layers-0of1.jsonl").records}
    results = {r["about"]["row"] for r in read_file(tmp_path / "slice-0of1.jsonl").records}
    assert chosen == {"id-5"} and results == {f"id-{i}" for i in range(5)}
    arms = {r["arm"] for r in by_id(tmp_path / "layers-0of1.jsonl").values()}
    assert {a.rpartition(" ")[2] for a in arms} == {str(n) for n in range(1, LAYERS // 2 + 1)}


def test_histories_and_recorded_sessions_give_every_arm_at_their_turns(config, tmp_path):
    start(config, tmp_path, "histories")
    start(config, tmp_path, "replay")
    stages = ("histories", {3}, history_arms()), ("replay", {1, 2}, replay_arms())
    for stage, turns, expected in stages:
        arms = {a.name for a in expected}
        file = read_file(tmp_path / f"{stage}-0of1.jsonl")
        assert not file.failures and {(r["arm"], r["turn"]) for r in file.records} == {
            (a, t) for a in arms for t in turns
        }
        assert len({r["trial"] for r in file.records}) == 1
        floor = [r["greedy"]["kl_max"] for r in file.records if r["arm"] == NOISE]
        assert max(floor) < 1e-5
    assert file.records[0]["dataset"] == "swe-agent-full" and len(file.records[0]["about"]["sha256"]) == 64


def test_the_layers_that_were_chosen_are_swept(config, tmp_path):
    (tmp_path / "best.json").write_text(json.dumps({"layers": {"CacheBlend, by V": 2}, "prompts": 1}))
    start(config, tmp_path, "frontier", "--best", str(tmp_path / "best.json"), "--prompts", "1", "--settings", "matter")
    file = read_file(tmp_path / "frontier-0of1.jsonl")
    assert "CacheBlend, by V 15 % at layer 2" in {r["arm"] for r in file.records}
    assert file.failures and all(f["arm"].endswith("at layer 8") for f in file.failures)
    assert file.settings["best"] == {"CacheBlend, by V": 2}


def test_prompts_behind_the_swept_ones_have_the_core_arms(config, tmp_path):
    swept = config.with_name("swept.yaml")
    swept.write_text(config.read_text() + "swept: 1\n")
    start(swept, tmp_path, "frontier", "--prompts", "2", "--settings", "matter")
    arms = {}
    file = read_file(tmp_path / "frontier-0of1.jsonl")
    for r in [*file.records, *file.failures]:
        arms.setdefault(r["about"]["number"], set()).add(r["arm"])
    assert arms == {0: {a.name for a in frontier()}, 1: {a.name for a in core()}} and len(arms[0]) > 2 * len(arms[1])


def test_some_lines_may_be_measured_alone_and_join_the_others(config, tmp_path):
    given = ("frontier", "--prompts", "1", "--settings", "matter")
    start(config, tmp_path, *given, "--only", "First tokens", "--only", "Nothing recomputed")
    start(config, tmp_path, *given, "--only", "Isolated, nothing recomputed", "--shard", "0/2")
    start(config, tmp_path, *given, "--only", "Isolated, nothing recomputed", "--shard", "1/2")
    records, _, settings = read_stage(tmp_path, "frontier")
    lines = {rule_and_layer(r["arm"])[0] for r in records}
    assert lines == {"First tokens", "Nothing recomputed", "Isolated, nothing recomputed"}
    assert sorted(map(len, (s["only"] for s in settings))) == [1, 1, 2]


@pytest.mark.parametrize("stage", ["slice", "frontier", "histories", "replay", "layers"])
def test_a_line_that_the_stage_has_not_is_named_before_anything_is_measured(config, tmp_path, stage):
    with pytest.raises(ConfigError, match=f"{stage} has neither .*'First token'"):
        start(config, tmp_path, stage, "--only", NOISE if stage in ("frontier", "histories") else "CacheBlend, by V",
              "--only", "First token")  # fmt: skip
    assert not os.listdir(tmp_path)


def test_other_prompts_are_of_rows_that_the_first_study_has_not(config, tmp_path):
    """Disjoint by ids, and the files that were left out stand in the records by name and hash, not by place."""
    first = write_musique(tmp_path / "first.json", 4)
    start(config, tmp_path / "one", "slice", "--data", str(first), "--prompts", "99")
    start(config, tmp_path / "two", "slice", "--without", str(first), "--seed", "1", "--prompts", "99")
    used, other = (read_file(tmp_path / n / "slice-0of1.jsonl") for n in ("one", "two"))
    ids = [{r["about"]["row"] for r in file.records} for file in (used, other)]
    assert ids == [{"id-0", "id-1", "id-2"}, {"id-4"}]  # one row of each choice is for validation
    assert other.settings["without"] == ["first.json"] and other.settings["seed"] == 1
    assert len(other.settings["provenance"]["data_hashes"]["without first.json"]) == 64
    assert "without" not in used.settings and str(tmp_path) not in json.dumps(other.settings)
    with pytest.raises(DataError, match=r"first.json: every question stands in .*made.json as well"):
        start(config, tmp_path / "none", "slice", "--data", str(first), "--without", str(config.parent / "made.json"))


def test_confirm_measures_its_arms_and_has_tables(config, tmp_path, capsys):
    (tmp_path / "best.json").write_text(json.dumps({"layers": {"CacheBlend, by V": 3}, "prompts": 1}))
    start(config, tmp_path, "confirm", "--best", str(tmp_path / "best.json"), "--prompts", "2")
    file = read_file(tmp_path / "confirm-0of1.jsonl")
    arms = {a.name for a in confirm_arms({"CacheBlend, by V": 3})}
    assert not file.failures and {r["arm"] for r in file.records} == arms and len(file.records) == 2 * 2 * len(arms)
    real_confirm.main([str(tmp_path), "--out", str(tmp_path / "confirm.json")])
    made = json.loads((tmp_path / "confirm.json").read_text())
    assert made["confirmed"].keys() == arms - {NOISE, "Nothing recomputed", "CacheBlend, by V 15 % at layer 3"}
    assert made["rival"] == "CacheBlend, by V 15 % at layer 3"
    assert len(made["rows"]) == 2 * len(arms) and len(made["ratios"]) == 2 * 2 * (len(arms) - 3)
    assert capsys.readouterr().out.count("confirmed: ") == len(arms) - 3


def test_shards_are_parts_of_the_whole(config, tmp_path):
    start(config, tmp_path)
    whole, parts = by_id(tmp_path / "slice-0of1.jsonl"), []
    for i in range(4):
        start(config, tmp_path, "slice", "--shard", f"{i}/4")
        parts.append(by_id(tmp_path / f"slice-{i}of4.jsonl"))
    assert sum(map(len, parts)) == len(whole) and {k: v for part in parts for k, v in part.items()} == whole
    assert all(parts)


def test_a_run_that_was_cut_goes_on(config, tmp_path, monkeypatch):
    start(config, tmp_path / "whole")
    ran, wanted, run_arm = [], by_id(tmp_path / "whole" / "slice-0of1.jsonl"), measure.run_arm

    def cut(*args):
        if len(ran) == 6:
            raise KeyboardInterrupt
        ran.append(args[3].name)
        return run_arm(*args)

    monkeypatch.setattr(measure, "run_arm", cut)
    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".slice-0of1.jsonl.part", "whole"]
    assert len(by_id(tmp_path / ".slice-0of1.jsonl.part")) == 6
    monkeypatch.setattr(measure, "run_arm", lambda *args: ran.append(args[3].name) or run_arm(*args))
    start(config, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["slice-0of1.jsonl", "whole"]
    assert by_id(tmp_path / "slice-0of1.jsonl") == wanted and len(ran) == len(wanted)


def test_what_is_finished_is_never_measured_again(config, tmp_path, monkeypatch):
    start(config, tmp_path)
    before = (tmp_path / "slice-0of1.jsonl").read_bytes()
    monkeypatch.setattr(measure, "Reference", None)
    start(config, tmp_path)
    assert os.listdir(tmp_path) == ["slice-0of1.jsonl"] and (tmp_path / "slice-0of1.jsonl").read_bytes() == before


def test_out_of_time_keeps_what_is_finished(config, tmp_path, monkeypatch):
    ran, run_arm = [], measure.run_arm
    clock = iter([0.0, 1.0, 59.0, 61.0])  # at the start, and before each prompt
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(study, "tqdm", lambda work, **about: work)
    with pytest.raises(ConfigError, match="slice: out of time; start again to go on"):
        start(config, tmp_path, "slice", "--minutes", "1")
    assert len(by_id(tmp_path / ".slice-0of1.jsonl.part")) == 2 * len(slice_arms())
    monkeypatch.undo()
    monkeypatch.setattr(measure, "GREEDY", 4)
    monkeypatch.setattr(measure, "run_arm", lambda *args: ran.append(args) or run_arm(*args))
    start(config, tmp_path)  # nobody holds the part
    assert len(ran) == 4 * len(slice_arms())


def test_records_of_other_settings_are_kept_apart(config, tmp_path, capsys):
    start(config, tmp_path, "slice", "--prompts", "1")
    start(config, tmp_path, "slice", "--prompts", "1", "--settings", "matter")
    assert len(by_id(tmp_path / "slice-0of1.jsonl")) == len(slice_arms())
    assert sorted(os.listdir(tmp_path)) == [".slice-0of1.jsonl.old", "slice-0of1.jsonl"]
