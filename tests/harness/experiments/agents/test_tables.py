"""Tables and claims of agents against numbers worked out by hand, and one small run of every section for real."""

import json
from random import Random

import pytest
import yaml

from cacheslide.errors import ConfigError
from harness.configuration import check
from harness.experiments.agents import steps as study_agents
from harness.experiments.agents.replay import call_f1
from harness.report.claims_agents import inverse
from harness.report.paper import CLAIMS
from harness.report.verdicts import NotMeasured, Verdict, judge
from harness.results.agent_load import bins_of, load_table, series_table
from harness.results.agents import grid_table, quality_table, turns_table, windows_table
from harness.results.runs import RecordFile, read_file
from harness.results.summary import AGENTS
from tests.helpers.made_agents import LAYERS, ROWS, STEPS, make_agents, step
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

CLAIM = {c.key: c for c in CLAIMS}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, RecordFile]:
    return {s: read_file(p) for s, p in make_agents(tmp_path_factory.mktemp("agents")).items()}


@pytest.fixture(scope="module")
def summary(files):
    return {"agents": {section: AGENTS[section](file) for section, file in files.items()}}


def test_the_quality_table_counts_warm_steps_and_pairs_them(files):
    rows = {(r["agent"], r["system"]): r for r in quality_table(files["replay"])}
    ours, exact = rows["memgpt", "cacheslide"], rows["memgpt", "recompute"]
    assert ours["compute_fraction"] == pytest.approx(0.55) and exact["compute_fraction"] == 1.0
    assert 0.5 < ours["ttft_ratio"]["value"] < 0.6 and exact["ttft_ratio"] is None
    assert rows["memgpt", "context_cache"]["speedup"]["value"] == pytest.approx(0.8 / 0.55, rel=0.06)
    assert ours["steps"] == 6 * STEPS and ours["loss_points"]["n"] == 6 and ours["speedup"] is None


def test_no_speed_up_where_a_turn_reused_nothing(files):
    file = files["replay"]
    records = json.loads(json.dumps(file.records))
    records[0]["systems"]["epic"][5]["chunks_hit"] = 0
    rows = {(r["agent"], r["system"]): r for r in quality_table(RecordFile(file.settings, records, []))}
    spoiled = rows[records[0]["agent"], "epic"]
    assert spoiled["ttft_ratio"] is spoiled["speedup"] is None and "1 of" in spoiled["ratio_reason"]
    assert rows[records[-1]["agent"], "epic"]["ttft_ratio"]


def test_an_episode_of_one_step_has_no_warm_ttft_and_spoils_no_others(files):
    file = files["replay"]
    records = json.loads(json.dumps(file.records))
    for system, steps in records[0]["systems"].items():
        records[0]["systems"][system] = steps[:1]
    agent = records[0]["agent"]
    rows = {(r["agent"], r["system"]): r for r in quality_table(RecordFile(file.settings, records, []))}
    whole = {(r["agent"], r["system"]): r for r in quality_table(file)}
    cut = rows[agent, "cacheslide"]["ttft_median"]
    assert cut["n"] == whole[agent, "cacheslide"]["ttft_median"]["n"] - 1 and cut["value"] > 0


def test_turns_count_what_encoding_costs_and_from_the_twelfth_turn_on():
    rng = Random(0)
    systems = {s: [step(rng, right, 0.5, t, s != "recompute") for t in range(STEPS)] for s, right in
               (("recompute", 1.0), ("cacheslide", 1.0))}  # fmt: skip
    for wrong in (0, 12):  # turn 1 does not count, turn 13 does
        systems["cacheslide"][wrong]["right"] = 0.0
    settings = {"order": list(systems), "titles": dict.fromkeys(systems, "")}
    record = {"id": "a/1", "agent": "memgpt", "systems": systems}
    rows = {r["system"]: r for r in turns_table(RecordFile(settings, [record, record | {"id": "a/2"}], []))}
    assert rows["cacheslide"]["late"]["value"] == pytest.approx(2 / 3)
    assert rows["cacheslide"]["loss_points"]["value"] == pytest.approx(100 / 3)
    assert rows["cacheslide"]["encode"] == pytest.approx(300 / (ROWS * LAYERS))
    assert rows["cacheslide"]["prefill"] == pytest.approx((1 + 13 * 0.5) / 14)
    assert [t["right"]["value"] for t in rows["cacheslide"]["turns"]][:2] == [0.0, 1.0]


def test_loads_name_the_fastest_rival_and_series_leave_out_the_last_second(files):
    rows = {(r["mode"], r["n"]): r for r in load_table(files["load"])}
    assert {r["best"] for r in rows.values()} == {"prompt_cache"}  # not naive reuse, which is no rival
    assert rows["parallel", 6]["advantage"]["high"] < 1 and rows["parallel", 6]["repeats"] == 3
    assert bins_of([[0.0, 0.1, e, 1.0] for e in (0.2, 0.9, 1.5, 2.1, 2.2)]) == [2.0, 1.0]
    over = {r["system"]: r for r in series_table(files["series"])}
    assert over["recompute"]["rate_ratio"]["value"] == pytest.approx(1.2 / 0.75, rel=0.05)
    assert over["cacheslide"]["rate_ratio"] is None and over["epic"]["std_ratio"]["n"] == 4


def test_the_heat_map_divides_right_calls_by_all_seconds(files):
    table = grid_table(files["grid"])
    [cell] = [c for c in table["cells"] if (c["recompute_ratio"], c["tau"]) == (0.26, 0.12)]
    steps = [s for r in files["grid"].records for s in r["systems"]["0.26@0.12"]]
    assert cell["qps"]["value"] == pytest.approx(sum(s["right"] for s in steps) / sum(s["total_s"] for s in steps))
    assert {r["system"] for r in windows_table(files["windows"])["rows"]} >= {"window@64", "window_recompute@192"}


def test_verdicts_follow_the_numbers(summary):
    found = {key: judge(CLAIM[key], summary) for key in ("fig10-memgpt", "fig11-parallel", "fig11-beam", "fig13")}
    assert (
        found["fig11-parallel"].verdict is Verdict.NOT_REPRODUCED
        and "(The prompt_cache) at 6" in found["fig11-beam"].measured
    )
    assert found["fig13"].verdict is Verdict.NOT_REPRODUCED  # made-up: slower than both
    assert "PromptCache" not in found["fig10-memgpt"].measured and "prompt_cache" in found["fig10-memgpt"].measured
    assert judge(CLAIM["fig14"], summary).verdict is Verdict.REPRODUCED
    padded = judge(CLAIM["fig04b-agents"], summary)
    assert padded.verdict is Verdict.PARTLY and "192 tokens" in padded.measured  # all apart, none loses 78 %
    late = judge(CLAIM["turns"], summary)
    assert "KV retained for k generations" in late.measured and late.verdict in (Verdict.REPRODUCED, Verdict.PARTLY)


def test_a_model_that_solves_nothing_gets_no_verdict(files):
    nothing = {}
    for section, file in files.items():
        records = json.loads(json.dumps(file.records))
        for r in records:
            for steps in r["systems"].values():
                for s in steps if isinstance(steps[0], dict) else ():
                    s["right"] = s["f1"] = 0.0
            for own in r.get("own", {}).values():
                own["score"], own["success"] = 0.0, False
        nothing[section] = AGENTS[section](RecordFile(file.settings, records, []))
    for key in ("fig10-memgpt", "fig14", "fig04b-agents", "turns"):
        finding = judge(CLAIM[key], {"agents": nothing})
        assert finding.verdict is Verdict.NOT_RUN and "the run's model" in finding.measured, key
    with pytest.raises(NotMeasured, match="'load'"):
        CLAIM["fig11-beam"].judge({"agents": {}})


def test_words_and_arithmetic_of_the_rules():
    e = inverse({"value": 0.5, "low": 0.25, "high": 0.8, "n": 4, "values": 4})
    assert (e["value"], e["low"], e["high"]) == (2.0, 1.25, 4.0)
    assert call_f1(" answer glass zero", " answer glass zero") == 1.0 == call_f1(" test", "test")
    assert call_f1(" answer glass one", " answer glass zero") == 0.5
    assert call_f1(" reply glass zero", " answer glass zero") == 0.0 == call_f1("", " test")


def small(**sections) -> dict:
    found = yaml.safe_load((ROOT / "config/smoke.yaml").read_text())
    same = {k: found["agents"][k] for k in ("model", "layer")}
    found["agents"] = same | {"systems": ["recompute", "cacheslide"], **sections}
    found["agents"].setdefault("traces", {"function_calling": {"count": 1, "jobs": 1, "steps": 1}})
    found["agents"].setdefault("replay", {"episodes": 1})
    check(found, ROOT / "workflows/schemas/config.schema.yaml")
    return found


def test_every_section_is_measured_for_real(tmp_path):
    tasks = {"function_calling": {"count": 2, "jobs": 1, "steps": 1}}
    config = small(
        windows={"tasks": tasks, "windows": [8]},
        turns={"tasks": tasks, "retained": ["naive_reuse"], "limits": [2]},
        load={"tasks": tasks, "parallel": [2], "widths": [2], "repeats": 1},
        series={"tasks": tasks, "concurrent": 2, "slices": 1},
        grid={"tasks": tasks, "recompute_ratios": [0, 0.5], "taus": [0.12], "every": 1},
    )
    traces = str(tmp_path / "traces.jsonl")
    study_agents.step_traces(config, traces)
    for section in study_agents.SECTIONS:
        out = tmp_path / f"{section}.jsonl"
        study_agents.step_agents(config, section, str(out), 1, traces)
        file = read_file(out)
        assert not file.failures and file.records and AGENTS[section](file)
        assert file.settings["order"] and len(file.settings["data_hash"]) == 64
    rows = {r["system"]: r for r in quality_table(read_file(tmp_path / "replay.jsonl"))}
    assert rows["cacheslide"]["compute_fraction"] < 1 and rows["cacheslide"]["score"] is not None
    generations = {r["system"]: r["generation"] for r in turns_table(read_file(tmp_path / "turns.jsonl"))}
    assert generations["naive_reuse@2"] > 0 == generations["cacheslide"]
    with pytest.raises(ConfigError, match="unknown section"):
        study_agents.step_agents(config, "dreams", str(tmp_path / "x"), 1)


def test_configurations_of_agents_are_checked():
    with pytest.raises(ConfigError, match="agents: unknown system 'magic'"):
        small(turns={"tasks": {"memgpt": {"count": 1}}, "retained": ["magic"]})
    with pytest.raises(ConfigError, match=r"agents\.traces"):
        small(traces={"autogen": {"count": 1}})
