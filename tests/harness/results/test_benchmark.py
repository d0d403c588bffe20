"""The benchmark's headline: pooled over seeds, counted from the claims table, one line for a wrong input."""

import json
import sys

import pytest

from cacheslide.errors import DataError
from cacheslide.policies.registry import policy_names
from harness.experiments.rules import static_choices
from harness.results import benchmark
from harness.results.records import write_json
from harness.results.runs import read_json
from harness.step import command
from tests.helpers.failing_claims import FAILING
from tests.helpers.places import ROOT

CLAIMS = ROOT / "results/benchmark/claims.json"


def estimate(value, half=1.0):
    return {"value": value, "low": value - half, "high": value + half, "n": 30, "values": 90}


def audit(model, gains, stale=20.0, naive=40.0, mixes=("ledger",), **settings):
    """A made-up audit; `gains` of a static choice at each ratio, "a, 10%" for one."""

    def row(cell, factor, option, gain=None, loss=0.0):
        numbers = {"f1": estimate(0.5, 0.01), "gain_points": gain, "loss_points": estimate(loss)}
        return {"cell": cell, "factor": factor, "option": option, "prompts": 30, "compute_fraction": 0.3} | numbers

    rows = [
        row("recompute", "reference", "recompute"),
        row("naive", "no correction", "naive", loss=naive),
        row("stale positions", "no correction", "stale positions", gain=estimate(-stale), loss=naive + stale),
        *(row(cell, "static", cell.split(", ")[1], gain=estimate(gain)) for cell, gain in gains.items()),
    ]
    return {
        "schema": static_choices.SCHEMA,
        "settings": {"model": model, "datasets": ["hotpotqa-ledger"], "tokens": 2048} | settings,
        "families": ["ledger"],
        "headline": {mix: static_choices.headline(rows) for mix in mixes},
        "mixes": dict.fromkeys(mixes, rows),
    }


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "s0.json", audit("m0", {"a, 10%": 2.0, "b, 26%": 0.0, "a, 3%": 50.0}, stale=10.0))
    second = audit("m1", {"a, 10%": -1.0, "b, 26%": 1.2, "a, 3%": 50.0}, stale=30.0, naive=50.0)
    write_json(tmp_path / "s1.json", second)
    write_json(tmp_path / "frontier.json", {"schema": benchmark.FRONTIER, "rows": [{"line": x} for x in "abab"]})
    return tmp_path


def built(folder, *more, claims=CLAIMS, static=("s0.json", "s1.json")):
    out = folder / "made/summary.json"
    paths = [str(folder / name) for name in static]
    benchmark.main(["--static", *paths, "--claims", str(claims), "--out", str(out), *map(str, more)])
    return read_json(out)


def test_numbers_are_pooled_over_seeds_and_each_seed_stands_beside(folder, capsys):
    made = built(folder, "--frontier", folder / "frontier.json")
    head = made["headline"]
    # a: (2 - 1) / 2 = 0.5, b: (0 + 1.2) / 2 = 0.6; at 3 % nothing is judged
    assert head["static_choice_gain_points"] == pytest.approx(0.6)
    assert made["estimates"]["static_choice_gain_points"]["choice"] == "b, 26%"
    assert made["estimates"]["static_choice_gain_points"]["low"] == pytest.approx(-0.4)
    assert (head["stale_loss_points"], head["naive_loss_points"]) == (20.0, 45.0)
    by_seed = made["static"]["ledger"]["by_seed"]
    assert [by_seed[s]["static_choice_gain_points"]["choice"] for s in ("s0", "s1")] == ["a, 10%", "b, 26%"]
    [b] = [r for r in made["static"]["ledger"]["rows"] if r["cell"] == "b, 26%"]
    assert b["gain_points_by_seed"] == {"s0": 0.0, "s1": 1.2} and b["gain_points"]["highest"] == 1.2
    assert head["systems"] == 2 and made["systems"] == ["a", "b"] and "frontier" in made["notes"]["systems"]
    assert made["conditions"]["models"] == {"s0": "m0", "s1": "m1"}
    assert set(made["provenance"]["data_hashes"]) == {"s0.json", "s1.json", "claims.json", "frontier.json"}
    assert json.loads(capsys.readouterr().out) == head


def test_every_number_of_the_headline_is_plain(folder):
    head = built(folder)["headline"]
    assert all(isinstance(v, int | float) for v in head.values())
    claims = {"claims_reproduced", "claims_partly", "claims_not", "verdict_rules_tested_to_fail"}
    assert set(head) == {*benchmark.POOLED, *claims, "systems"}


def test_without_a_frontier_the_registered_systems_are_counted_and_it_says_so(folder):
    made = built(folder)
    assert made["headline"]["systems"] == len(policy_names()) and "registered" in made["notes"]["systems"]


def test_the_mix_that_speaks_most_against_the_task_is_taken(folder):
    for name, model in (("s0.json", "m0"), ("s1.json", "m1")):
        made = audit(model, {"a, 10%": 1.0})
        other = audit(model, {"a, 10%": 4.0}, stale=5.0, naive=60.0)
        made["mixes"]["other"], made["headline"]["other"] = other["mixes"]["ledger"], other["headline"]["ledger"]
        write_json(folder / name, made)
    made = built(folder)
    assert [made["headline"][k] for k in benchmark.POOLED] == [4.0, 5.0, 40.0]
    assert [made["estimates"][k]["mix"] for k in benchmark.POOLED] == ["other", "other", "ledger"]


def test_claims_are_counted_from_the_table_and_rules_with_a_record_that_they_reject(folder):
    head, claims = built(folder)["headline"], read_json(CLAIMS)
    counts = claims["counts"]
    assert [head[f"claims_{n}"] for n in ("reproduced", "partly", "not")] == [
        counts[n] for n in ("reproduced", "partly", "not reproduced")
    ]
    assert head["verdict_rules_tested_to_fail"] == len(FAILING)  # test_verdicts.py runs each of these records
    claims["claims"][0]["has_rule"] = True  # a further rule
    write_json(folder / "more.json", claims)
    assert built(folder, claims=folder / "more.json")["headline"]["verdict_rules_tested_to_fail"] == len(FAILING) + 1


def test_committed_headline_is_made_from_the_committed_files():
    """Once it is committed: its sources are the files beside it, and it says of them what the builder says."""
    path = ROOT / "results/benchmark/summary.json"
    if not path.is_file():
        pytest.skip("no headline is committed yet")
    made = read_json(path)
    sources = made["provenance"]["data_hashes"]
    assert sources == {name: benchmark.file_hash(path.with_name(name)) for name in sources}
    assert made["headline"]["verdict_rules_tested_to_fail"] == len(FAILING)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": "other/1"}, "s1.json: expected a file of schema 'cacheslide.static_choices/1'"),
        ({"settings": {"model": "m0"}}, "s1 and s0 audit one model"),
        ({"settings": {"model": "m1", "tokens": 9}}, "s1 and s0 were measured on different prompts"),
    ],
)
def test_audits_that_do_not_belong_together_are_one_line(folder, change, why):
    write_json(folder / "s1.json", read_json(folder / "s1.json") | change)
    with pytest.raises(DataError, match=why):
        built(folder)


def test_an_audit_that_ended_early_is_one_line(folder):
    short = read_json(folder / "s1.json")
    short["mixes"]["ledger"] = short["mixes"]["ledger"][:-1]
    write_json(folder / "s1.json", short)
    with pytest.raises(DataError, match="different prompts"):
        built(folder)


def test_a_frontier_without_systems_is_one_line(folder):
    write_json(folder / "frontier.json", {"schema": benchmark.FRONTIER, "rows": []})
    with pytest.raises(DataError, match="no rows that name a system"):
        built(folder, "--frontier", folder / "frontier.json")


@pytest.mark.parametrize("absent", ["--static", "--claims", "--frontier"])
def test_an_absent_input_ends_the_command_with_one_line(folder, monkeypatch, capsys, absent):
    given = {"--static": folder / "s0.json", "--claims": CLAIMS, "--frontier": folder / "frontier.json"}
    given |= {absent: folder / "absent.json", "--out": folder / "out.json"}
    monkeypatch.setattr(sys, "argv", ["benchmark", *(str(x) for pair in given.items() for x in pair)])
    with pytest.raises(SystemExit) as end:
        command(benchmark.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("benchmark: ") and said.endswith("absent.json does not exist\n")
    assert said.count("\n") == 1 and not (folder / "out.json").exists()
