"""The report's section on the real model: what leads, what is quoted from where, and what is missing."""

import copy

import pytest

from cacheslide.errors import DataError
from harness.report import real
from harness.report.builder import build_report, render
from harness.report.claims_real import BESIDE, beside
from harness.report.paper import CLAIMS
from harness.report.verdicts import Verdict, judge
from harness.report.words import significant
from harness.results.records import write_json
from harness.results.runs import Run
from harness.results.summary import build_summary
from tests.helpers import made_real

pytestmark = pytest.mark.slow

RPDC = next(c for c in CLAIMS if c.key == "rpdc-over-pic")


@pytest.fixture(scope="module")
def made():
    return made_real.summary()


@pytest.fixture(scope="module")
def empty():
    return build_summary(Run({"run": "empty"}))


def table(made):
    return {r["name"]: r for r in real.section(made)["rows"]}


def test_the_section_leads_the_page_and_brings_its_figures(made, empty, tmp_path):
    write_json(tmp_path / "summary.json", empty)
    write_json(tmp_path / "results/real/summary.json", made)
    (tmp_path / "figures/real").mkdir(parents=True)
    for name in (*real.FIGURES, "fig03"):
        (tmp_path / f"figures/real/{name}.svg").write_text(f"<svg><text>{name}</text></svg>")
    figures = [tmp_path / "figures/real/fig03.svg", tmp_path / "figures/real/fig03_real.svg"]
    args = (tmp_path / "summary.json", figures, tmp_path / "report.html")
    build_report(*args, real=tmp_path / "results/real/summary.json")
    page = (tmp_path / "report.html").read_text()
    assert page.index('id="real-model"') < page.index('id="claims"') < page.index('<figure id="fig03">')
    assert page.index("gemma3-270m on real questions") < page.index("The synthetic stress task")
    assert page.count("<figure") == 3 and page.count('<figure id="fig03_real">') == 1
    build_report(*args, real=tmp_path / "nothing.json")
    page = (tmp_path / "report.html").read_text()
    assert "real-model" not in page and "stress task" not in page and page.count("<figure") == 2


def test_another_schema_is_one_line(empty, tmp_path):
    write_json(tmp_path / "summary.json", empty)
    write_json(tmp_path / "real.json", {"schema": "other/1"})
    with pytest.raises(DataError, match="other/1"):
        build_report(tmp_path / "summary.json", [], tmp_path / "report.html", real=tmp_path / "real.json")


def test_rows_take_the_arms_that_they_name(made):
    rows = table(made)
    assert len(rows) == len(real.ROWS)
    cells = {name: r["cells"][1] for name, r in rows.items()}  # the setting matter
    assert (
        cells["recompute in pieces"]["kl"].startswith("0.00100 [") and cells["recompute in pieces"]["flips"] == "20 %"
    )
    assert cells["Nothing recomputed"]["kl"].startswith("0.0200 [") and cells["Nothing recomputed"]["compute"] == "5 %"
    assert cells["CacheSlide as printed"]["arm"] == "CacheSlide as printed 26 % at layer 3"
    assert cells["CacheBlend, best within 33 %"]["arm"] == "CacheBlend, by V 15 % at layer 1"
    assert cells["CacheBlend, by V 15 %, layer chosen for it"]["arm"] == "CacheBlend, by V 15 % at layer 6"
    assert cells["CacheSlide, by K 26 %"]["arm"] == "CacheSlide, by K 26 % at layer 5"
    assert cells["CacheBlend, stale positions"]["kl"].startswith("4.00 [")
    assert cells["First tokens 10 %"]["arm"] == ""
    swept = copy.deepcopy(made)
    for r in swept["frontier"]:
        if r["key"][2] == "First tokens 10 %":
            r["n"] -= 1
    fewer = table(swept)["First tokens 10 %"]["cells"][1]["arm"]
    assert fewer == f"(n = {max(r['n'] for r in made['frontier']) - 1})"


def test_comparisons_stand_by_data_set_too(made):
    more = copy.deepcopy(made)
    pooled = [c for c in made["comparisons"] if c["dataset"] == "both"]
    more["comparisons"] = pooled + [c | {"dataset": "hotpotqa", "value": 0.5} for c in pooled]
    found = real.section(more)["comparisons"]
    assert [c["about"] for c in found][:2] == [real.COMPARED["rpdc over pic"], "hotpotqa alone"]
    assert found[1]["cells"][1]["ratio"].startswith("0.500 [") and not found[0]["cells"][1]["ratio"].startswith("0.500")


def test_what_was_not_measured_is_a_dash(made):
    less = copy.deepcopy(made)
    gone = ("EPIC 32 + 32", "CacheSlide as printed 26 % at layer 3")
    less["frontier"] = [r for r in less["frontier"] if r["key"][2] not in gone]
    less["comparisons"] = [c for c in less["comparisons"] if c["setting"] != "shift"]
    rows = table(less)
    assert (
        {c["kl"] for c in rows["EPIC 32 + 32"]["cells"]}
        == {"–"}
        == {c["compute"] for c in rows["CacheSlide as printed"]["cells"]}
    )
    assert {c["cells"][2]["ratio"] for c in real.section(less)["comparisons"]} == {"–"}
    assert "as printed" not in " ".join(real.opening(less)) and beside("fig10-cacheblend", less | {"real": less}) == ""
    render(build_summary(Run({"run": "empty"})) | {"real": less | {"histories": [], "replay": []}}, {})


def test_the_headline_has_the_intervals_of_its_rows(made):
    rows = {h["key"]: h for h in real.headline(made)}
    assert set(rows) == set(made["headline"])
    assert rows["kl_nothing_recomputed"]["value"] == "0.0200" and "Nothing" in rows["kl_nothing_recomputed"]["about"]
    assert rows["kl_cacheslide_at_20pct_compute"]["about"].startswith("First tokens 10 %")
    assert rows["kl_cacheblend_best_at_33pct"]["about"].startswith("CacheBlend, by V 15 % at layer 1")
    assert rows["rpdc_over_pic_kl_ratio"]["value"] == "0.0400"
    assert rows["rpdc_over_pic_kl_ratio"]["interval"] != "–"
    assert rows["real_sessions_replayed"] == {
        "key": "real_sessions_replayed", "value": "5", "interval": "–", "about": "recorded sessions of agents", "n": "",
    }  # fmt: skip
    for key in ("kl_isolated", "kl_noise_floor", "greedy_flip_share_cacheslide"):
        low, high = (float(x) for x in rows[key]["interval"].strip("[]").split(", "))
        assert low <= float(rows[key]["value"]) <= high and rows[key]["n"] == "n = 10"


def test_limits_follow_the_file(made):
    said = " ".join(real.limits(made))
    assert "270 million" in said and "bfloat16" in said and "failed" not in said
    assert "Prompts a setting: 10, of a.jsonl, b.json" in said
    other = made | {"failures": 3, "conditions": {"frontier": {"model": "other", "dtype": "float32", "data": ["a"]}}}
    said = " ".join(real.limits(other))
    assert "270 million" not in said and "3 measurements failed" in said and "of a; intervals" in said


def test_histories_count_turns_from_one(made):
    shown = real.section(made)["histories"]
    assert shown["turns"] == [4, 12] and shown["n"] == made_real.PROMPTS
    assert {r["name"] for r in shown["rows"]} >= {"Nothing recomputed"}
    assert all(r["n"] == made_real.PROMPTS and r["turns"] == made_real.PROMPTS for r in real.section(made)["replay"])


def test_the_claim_of_rpdc_over_pic_follows_the_intervals(made, empty):
    assert judge(RPDC, empty).verdict is Verdict.NOT_RUN
    finding = judge(RPDC, empty | {"real": made})
    assert finding.verdict is Verdict.REPRODUCED and "matter 0.0400 [" in finding.measured
    single = made | {"comparisons": [r | {"low": None, "high": None} for r in made["comparisons"]]}
    assert judge(RPDC, empty | {"real": single}).verdict is Verdict.NOT_JUDGED
    worse = made_real.summary({"shift": {"Nothing recomputed": 100.0}})
    assert judge(RPDC, empty | {"real": worse}).verdict is Verdict.PARTLY
    worst = made_real.summary(
        {s: {"Nothing recomputed": 100.0} for s in ("unrelated", "matter", "shift", "contradict")}
    )
    assert judge(RPDC, empty | {"real": worst}).verdict is Verdict.NOT_REPRODUCED


def test_numbers_stand_beside_verdicts_and_change_none(made, empty):
    keys = {c.key for c in CLAIMS}
    assert set(BESIDE) <= keys
    for claim in CLAIMS:
        if claim is not RPDC:
            assert judge(claim, empty | {"real": made}) == judge(claim, empty)
        assert bool(beside(claim.key, empty | {"real": made})) == (claim.key in BESIDE)
    said = beside("fig10-cacheblend", {"real": made})
    assert "CacheBlend, by V 15 % at layer 1 0.250 [" in said and "n = 10 prompts" in said
    assert beside("fig10-cacheblend", {}) == ""


def test_numbers_of_many_sizes():
    assert [significant(x) for x in (0.0010563, 0.0133, 4.3722, 123.4, 0.0, None)] == [
        "0.00106", "0.0133", "4.37", "123", "0", "–",
    ]  # fmt: skip
    assert significant(-0.0123) == "−0.0123"
