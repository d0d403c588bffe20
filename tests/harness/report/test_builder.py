"""The report: every claim with a verdict by its rule, sentences that follow the numbers, and nothing fetched."""

import base64
import re
from html.parser import HTMLParser

import pytest

from cacheslide.errors import DataError
from harness.inventory import NO_CKSIM
from harness.plots.render import FIGURES
from harness.report import prose
from harness.report.builder import build_report, command, render
from harness.report.paper import CLAIMS
from harness.report.verdicts import Finding, Verdict, judge
from harness.report.words import cell, number, points, size
from harness.results.records import write_json
from harness.results.runs import Run, load_run, read_json
from harness.results.summary import build_summary
from tests.helpers import made_run
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

SYSTEMS = ["recompute", "context_cache", "prompt_cache", "cacheblend", "cacheblend_stale", "window_padding"]
SYSTEMS += ["naive_reuse", "cacheslide", "cacheslide_promote"]


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    cfg, paths = made_run.make_run(tmp_path_factory.mktemp("made"), {"systems": SYSTEMS}, prompts_each=6)
    return build_summary(load_run(cfg, **paths))


@pytest.fixture(scope="module")
def page(summary, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_json(root / "summary.json", summary)
    for name in FIGURES:
        (root / f"{name}.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{name}</text></svg>")
        (root / f"{name}.png").write_bytes(b"not used")
    figures = [root / f"{name}.{kind}" for name in FIGURES for kind in ("svg", "pdf", "png")]
    build_report(root / "summary.json", figures, root / "report.html", real=root / "no-real.json")
    return (root / "report.html").read_text()


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [given[k] for k in ("src", "href", "srcset", "data", "poster", "action") if k in given]
        self.ids |= {given["id"]} if "id" in given else set()
        if tag not in ("meta", "img", "br", "link", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_every_claim_stands_in_the_page_with_a_verdict(page, summary):
    ids = parsed(page).ids
    assert {f"claim-{c.key}" for c in CLAIMS} <= ids
    assert len({c.key for c in CLAIMS}) == len(CLAIMS)
    for figure in ("3", "4a", "4b", "5", "11", "12a", "12b", "12c", "12d", "13", "14"):
        assert any(c.figure.split(",")[0] == figure for c in CLAIMS), figure
    mpt = next(c for c in CLAIMS if "MPT-30B" in c.text)
    assert judge(mpt, summary).verdict is Verdict.NOT_RUN
    for claim in CLAIMS:
        finding = judge(claim, summary)
        assert finding.measured
        assert bool(claim.target) == (claim.rule != "none yet")
        assert f"<td>{claim.basis.value}</td>" in page


def test_a_report_of_ledger_prompts_names_their_task(summary):
    """In front of the opening sentences where the study on a real model leads, and in the claims table."""
    of_ledger = [row | {"name": re.sub("deep|sparse", "ledger", row["name"])} for row in summary["accuracy"]]
    real = read_json(ROOT / "results/real/summary.json")
    page = render(summary | {"accuracy": of_ledger, "real": real}, {})
    assert "The synthetic ledger task, whose answers" in page and "<td>ledger</td>" in page
    assert "The synthetic stress task, whose answers" in render(summary | {"real": real}, {})


def test_a_run_inside_vllm_says_so_and_why_it_has_no_cksim(summary):
    config = summary["conditions"]["config"] | {"backend": "vllm"}
    served = summary | {"cksim": [], "conditions": summary["conditions"] | {"config": config}}
    findings = [judge(claim, served) for claim in CLAIMS if claim.figure == "4a"]
    assert findings and any(NO_CKSIM in f.measured for f in findings)
    assert "inside vLLM" in " ".join(prose.opening(served))
    assert "without a serving engine" in " ".join(prose.opening(summary, "counts"))


def test_claims_about_cope_are_judged_where_an_adapter_was_measured(summary, tmp_path):
    chosen = {c.key: c for c in CLAIMS if c.key in ("fig04a-cope", "fig05-cope", "fig10-cope")}
    assert len(chosen) == 3
    for claim in chosen.values():
        finding = judge(claim, summary)
        assert finding.verdict is Verdict.NOT_RUN and "no CoPE adapter" in finding.measured
    cfg, paths = made_run.add_cope(tmp_path, *made_run.make_run(tmp_path, prompts_each=5))
    measured = build_summary(load_run(cfg, **paths))
    found = {key: judge(claim, measured) for key, claim in chosen.items()}
    drift = found["fig05-cope"]
    assert drift.verdict is Verdict.REPRODUCED and "0.50 positions (ccpe)" in drift.measured
    fell = found["fig04a-cope"]
    assert fell.verdict is Verdict.NOT_REPRODUCED  # made-up: re-rotated RoPE keys are as good
    row = measured["cksim_cope"][-1]
    row["chain_delta"] = row["chain_delta"] | {"value": 0.8, "low": 0.79, "high": 0.81}
    fell = judge(chosen["fig04a-cope"], measured)
    assert fell.verdict is Verdict.REPRODUCED and "behind a real prefix" in fell.measured
    assert "mix" in found["fig10-cope"].measured
    row["context_cope"] = row["context_cope"] | {"value": 0.5, "low": 0.4, "high": 0.6}
    measured["prompts_cope"][0]["shift"]["cope"] |= {"value": 900.0, "low": 800.0, "high": 1000.0}
    assert judge(chosen["fig04a-cope"], measured).verdict is Verdict.NOT_REPRODUCED
    assert judge(chosen["fig05-cope"], measured).verdict is Verdict.PARTLY
    for mix in (r for r in measured["accuracy"] if r["system"] == "cacheslide_cope" and r["scope"] == "mix"):
        mix["loss_points"] |= {"value": 1.0, "low": 0.5, "high": 1.5}
    assert judge(chosen["fig10-cope"], measured).verdict is Verdict.REPRODUCED
    mix["loss_points"] |= {"value": 2.0, "low": 0.5, "high": 3.5}
    assert judge(chosen["fig10-cope"], measured).verdict is Verdict.PARTLY
    mix["loss_points"] |= {"value": 4.0, "low": 0.5, "high": 5.5}
    assert judge(chosen["fig10-cope"], measured).verdict is Verdict.NOT_REPRODUCED


def test_the_page_fetches_nothing(page):
    tags = parsed(page)
    for link in tags.links:
        assert link.startswith(("#", "data:image/svg+xml;base64,")), link[:80]
    assert all(link[1:] in tags.ids for link in tags.links if link.startswith("#"))
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.search(r"url\(", page)
    images = [link for link in tags.links if link.startswith("data:")]
    assert len(images) == len(FIGURES)
    assert "fig03" in base64.b64decode(images[0].partition(",")[2]).decode()


def test_an_empty_run_still_makes_a_report():
    empty = build_summary(Run({"run": "empty"}))
    page = render(empty, {})
    parsed(page)
    assert "Not given" in page and "no accuracy records" in page
    verdicts = {judge(c, empty).verdict for c in CLAIMS}
    assert verdicts == {Verdict.NOT_RUN}


def by_key(key):
    return next(c for c in CLAIMS if c.key == key)


def test_verdicts_follow_the_numbers(summary):
    assert judge(by_key("fig04a-rope"), summary).verdict is Verdict.PARTLY  # made-up: 0.23 is left
    assert judge(by_key("fig04a-isotropic"), summary).verdict is Verdict.REPRODUCED
    assert judge(by_key("fig04a-delta"), summary).verdict is Verdict.REPRODUCED
    assert judge(by_key("fig03"), summary).verdict is Verdict.NOT_TESTABLE
    assert judge(by_key("headline-latency"), summary).verdict is Verdict.PARTLY  # made-up: about 1.6
    worse = judge(by_key("fig10-promptcache"), summary)  # more accurate, but slower
    assert worse.verdict is Verdict.NOT_REPRODUCED
    drifted = {**summary, "cksim": [r | {"position_delta": {"layers": [0.99]}} for r in summary["cksim"]]}
    assert judge(by_key("fig04a-delta"), drifted).verdict is Verdict.NOT_REPRODUCED


def test_no_speed_up_without_the_gate(summary):
    closed = [r | {"speedup": None, "speedup_reason": "nothing was reused"} for r in summary["latency_ratios"]]
    for key in ("fig10-contextcache", "fig10-cacheblend", "headline-latency"):
        finding = judge(by_key(key), {**summary, "latency_ratios": closed})
        assert finding == Finding(Verdict.NOT_RUN, "no speed-up may be reported: nothing was reused")


def test_a_twin_is_timed_where_the_stale_form_was_not(summary):
    rows = [r for r in summary["latency_ratios"] if r["system"] != "cacheblend_stale"]
    claim = by_key("fig10-cacheblend-stale")
    assert "TTFT of CacheBlend over" in judge(claim, {**summary, "latency_ratios": rows}).measured
    assert "TTFT of CacheBlend, stale positions over" in judge(claim, summary).measured


def test_the_opening_does_not_flatter(summary):
    head, note = summary["headline"], summary["headline_notes"]
    bad = {
        **summary,
        "headline": head | {"cacheslide_loss_points": 12.34, "cpu_ttft_ratio_4k": None},
        "headline_missing": {"cpu_ttft_ratio_4k": "made-up reason"},
        "headline_notes": note,
        "latency": [],
    }
    text = " ".join(prose.opening(bad))
    assert "loses 12.3 points" in text and "outside the 3 points" in text
    assert "time to first token" not in text and "made-up reason" in text
    assert "not comparable with the paper's" in text and "those" not in text
    config = bad["conditions"].get("config", {}) | {"agents": {"model": "models/other"}}
    more = {"agents": {"replay": []}, "slide": {}, "conditions": bad["conditions"] | {"config": config}}
    text = " ".join(prose.opening(bad | more))
    assert "those about agents are of models/other, those of figure 12" in text
    good = " ".join(prose.opening({**summary, "headline": head | {"cacheslide_loss_points": -0.5}}))
    assert "gains 0.5 points" in good and "within the 3 points" in good


def test_requirements_are_met_or_not(summary):
    head = {"recompute_f1": 0.95, "naive_reuse_loss_points": 12.0, "cacheslide_loss_points": None}
    given = {**summary, "headline": head, "headline_missing": {"cacheslide_loss_points": "why"}}
    rows = prose.requirements(given)
    assert [r["verdict"] for r in rows] == ["met", "not met", "not run"]
    assert rows[2]["reason"] == "why"


def test_commands_put_the_target_first():
    assert command("fig10", "smoke") == ".venv/bin/snakemake fig10 --configfile config/smoke.yaml"
    assert command("results/{run}/summary.json", "cpu").split()[1] == "results/cpu/summary.json"
    assert command("", "smoke") == ""


def test_bad_input_is_one_line(tmp_path):
    write_json(tmp_path / "summary.json", {"schema": "other/1"})
    with pytest.raises(DataError, match="other/1"):
        build_report(tmp_path / "summary.json", [], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_words():
    assert number(-0.04, 1) == "0.0" and number(-1.26, 1) == "−1.3" and number(None) == "–"
    assert points(-1.0) == "gains 1.0 points"
    assert size(1536) == "1.5 KiB" and size(3 * 2**30) == "3.0 GiB"
    assert cell({"value": 0.5, "low": None, "high": None}, 1) == "0.5 [no interval]" and cell(None) == "–"
