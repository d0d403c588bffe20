"""Verdicts that can fail: for every claim with a rule a record that it must reject, and one that it must accept."""

import copy

import pytest

from harness.report import own_rules, tally
from harness.report.claims import predicted_stale
from harness.report.paper import CLAIMS
from harness.report.table import rows
from harness.report.verdicts import Basis, Grade, Verdict, at_most, grade, joined, judge, raced, slower
from tests.helpers.failing_claims import FAILING
from tests.helpers.made_claims import MIXES, condition, estimate, passing, row_of

BY_KEY = {c.key: c for c in CLAIMS}
RULED = [c.key for c in CLAIMS if c.has_rule]
CASES = [pytest.param(key, change, id=f"{key}-{i}") for key, each in FAILING.items() for i, change in enumerate(each)]


def changed(key, change):
    record = passing(key)
    change(record)
    return record


def verdict(key, record):
    return judge(BY_KEY[key], record).verdict


def test_every_rule_has_a_record_that_it_must_reject():
    assert set(FAILING) == set(RULED) and all(FAILING.values())


def test_claims_without_a_rule_never_get_a_verdict():
    silent = [c for c in CLAIMS if not c.has_rule]
    assert {c.key for c in silent} == {"fig03", "fig10-mistral", "fig10-llama", "fig10-mpt"}
    shipped = passing() | {"prompts": [{"dataset": "d", "reusable_share": {"mean": 0.8, "sd": 0.1}, "prompts": 3}]}
    for claim in silent:
        assert {judge(claim, r).verdict for r in (passing(), shipped)} <= {Verdict.NOT_RUN, Verdict.NOT_TESTABLE}


@pytest.mark.parametrize("key", RULED)
def test_the_rule_accepts_what_the_paper_says(key):
    found = judge(BY_KEY[key], passing(key))
    assert found.verdict is Verdict.REPRODUCED, found.measured


@pytest.mark.parametrize(("key", "change"), CASES)
def test_the_rule_rejects_a_record_that_speaks_against_it(key, change):
    found = judge(BY_KEY[key], changed(key, change))
    assert found.verdict is Verdict.NOT_REPRODUCED, found.measured
    assert "not reproduced:" in BY_KEY[key].rule or "not reproduced where" in BY_KEY[key].rule  # the page says when


@pytest.mark.parametrize("key", RULED)
def test_nothing_measured_is_no_verdict(key):
    nothing = passing() | {"agents": {}, "slide": None, "real": None, "sessions": None, "conditions": {"config": {}}}
    nothing |= {name: [] for name, value in nothing.items() if isinstance(value, list)}
    assert verdict(key, nothing) is Verdict.NOT_RUN


def test_every_claim_says_what_it_was_measured_on():
    assert {c.basis for c in CLAIMS} == set(Basis)
    assert all((c.basis is Basis.NOTHING) == (not c.target) for c in CLAIMS)


def test_our_own_rules_stand_beside_and_change_no_verdict():
    plain = passing()
    more = copy.deepcopy(plain)
    own, ours = "cacheslide_mixed", {"recomputed_share": 0.15, "prompts": 8, "compute_fraction": 0.1}
    more["latency"] += [{"system": own, "tokens": 4096, "ttft_median": estimate(0.001)} | ours]
    for mix in MIXES:
        row = {"scope": "mix", "name": mix, "system": own, "questions": 9, "f1": estimate(1.0), "loss_points": None}
        more["accuracy"].append(row | ours | {"loss_points": estimate(-50.0), "requests_without_reuse": 0})
    more["throughput"] += [passing()["throughput"][0] | {"system": own, "title": own, "qps_ratio": estimate(99.0)}]
    more["agents"]["replay"] += [
        r | {"system": own, "title": own, "ttft_median": estimate(0.001)} for r in more["agents"]["replay"][:1]
    ]
    assert [judge(c, more).verdict for c in CLAIMS] == [judge(c, plain).verdict for c in CLAIMS]
    said = {c.key: own_rules.beside(c.key, more) for c in CLAIMS}
    assert "1000.00× its own (medians), gains 50.0 points" in said["fig10-contextcache"]
    assert "99.00 [" in said["headline-throughput"] and own in said["fig10-reflexion"]
    assert not any(own_rules.beside(c.key, plain) for c in CLAIMS)
    slow = changed("headline-throughput", FAILING["headline-throughput"][0])
    slow["throughput"] += more["throughput"][-1:]
    assert verdict("headline-throughput", slow) is Verdict.NOT_REPRODUCED  # ours at 99 does not turn it


def test_another_share_than_the_papers_is_not_judged():
    record = passing()
    for row in (*record["accuracy"], *record["latency"]):
        row["recomputed_share"] = 0.10
    for key in ("fig10-contextcache", "fig10-cacheblend-stale", "fig10-promptcache", "fig10-cope", "headline-latency"):
        found = judge(BY_KEY[key], record)
        assert found.verdict is Verdict.NOT_JUDGED and "the paper's rule is 26 %" in found.measured


def test_stalls_are_judged_where_writes_are_the_bottleneck():
    record = passing()
    said = judge(BY_KEY["fig12b"], record).measured
    assert "at layer 1 95.0 %" in said and "at the disk's own speed 100.0 %" in said
    record["slide"]["conditions"]["slow disk, selection layer 4"] = condition(100.0, 3.5, stalled=0.04)
    found = judge(BY_KEY["fig12b"], record)
    assert found.verdict is Verdict.NOT_JUDGED and "less than 5 %" in found.measured
    del record["slide"]["conditions"]["slow disk, selection layer 4"]  # neither layer 1 nor full speed gives a verdict
    assert verdict("fig12b", record) is Verdict.NOT_RUN
    record = passing()
    record["conditions"]["selection_layer"] = 3  # of no measured condition
    assert verdict("fig12b", record) is Verdict.NOT_RUN


def test_bytes_are_judged_at_the_layer_that_keeps_the_answers():
    record = passing()
    record["slide"]["conditions"]["selection layer 4"] = condition(90.0, 2.5)
    assert verdict("fig12c", record) is Verdict.PARTLY and record["slide"]["main"]
    record["slide"]["conditions"]["selection layer 4"] = condition(90.0, 3.5, n=2)
    assert verdict("fig12c", record) is Verdict.PARTLY  # two runs have a range, not an interval
    record["conditions"]["selection_layer"] = 3
    assert verdict("fig12c", record) is Verdict.NOT_RUN


def test_throughput_takes_five_rounds_and_a_control():
    record = passing()
    few = [r | {"batch": 8, "rounds": 2} for r in record["throughput"]]
    record["throughput"] += few
    found = judge(BY_KEY["headline-throughput"], record)
    assert "at batch 4" in found.measured and "at batch 8 (2 rounds)" in found.measured
    assert "the control, context_cache, 1.02×" in found.measured
    assert judge(BY_KEY["headline-throughput"], record | {"throughput": few}).verdict is Verdict.NOT_JUDGED
    alone = record | {"throughput": [r for r in record["throughput"] if r["system"] == "cacheslide"]}
    assert verdict("headline-throughput", alone) is Verdict.NOT_JUDGED


def test_generated_prompts_do_not_show_that_positions_shift():
    record = passing() | {"sessions": None, "prompts": [{"displacement": {"mean": 40.0}}]}
    found = judge(BY_KEY["fig05-rope"], record)
    assert found.verdict is Verdict.NOT_TESTABLE and "by construction" in found.measured


def test_a_flat_map_has_no_peak():
    record = passing()
    for cell in record["agents"]["grid"]["cells"]:
        cell["qps"] = estimate(30.0) if cell["qps"]["value"] == 30.0 else estimate(29.5)
    assert verdict("fig14", record) is Verdict.PARTLY


def test_pages_that_would_be_fewer_if_shared_hold_partly():
    record = passing()
    record["slide"]["gpu_pages_computed"][0]["prompt_cache_shared"] = 100
    assert verdict("fig12d", record) is Verdict.PARTLY


def test_each_of_the_papers_figures_is_counted_once():
    figures = ["3", "4a", "4b", "5", "10", "11", "12a", "12b", "12c", "12d", "13", "14", "latency", "throughput"]
    table = rows(passing())
    found = tally.by_figure([r.claim for r in table], [r.finding for r in table])
    assert sorted(found) == sorted(figures)
    assert {c.counts_as for c in CLAIMS} - {""} == set(figures)
    assert BY_KEY["headline-ssd"].counts_as == BY_KEY["fig12c"].counts_as == "12c"
    assert sum(tally.counts(found.values()).values()) == len(figures)
    said = tally.sentence([r.claim for r in table], [r.finding for r in table])
    assert said.startswith("Of 14 figures") and "12 reproduced" in said and "1 partly (10)" in said


@pytest.mark.parametrize(
    ("each", "one"),
    [
        ("rr", Verdict.REPRODUCED),
        ("rx", Verdict.PARTLY),  # a row without a verdict holds the figure down
        ("rn", Verdict.PARTLY),
        ("nn", Verdict.NOT_REPRODUCED),
        ("nx", Verdict.NOT_REPRODUCED),
        ("p", Verdict.PARTLY),
        ("xj", Verdict.NOT_JUDGED),
        ("xt", Verdict.NOT_TESTABLE),
        ("xx", Verdict.NOT_RUN),
    ],
)
def test_a_figures_verdict_is_of_all_its_rows(each, one):
    letters = {"r": Verdict.REPRODUCED, "p": Verdict.PARTLY, "n": Verdict.NOT_REPRODUCED, "x": Verdict.NOT_RUN}
    letters |= {"j": Verdict.NOT_JUDGED, "t": Verdict.NOT_TESTABLE}
    assert tally.together([letters[x] for x in each]) is one


def test_grades_and_verdicts():
    def of(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 5, "values": 5}

    assert grade(of(2.5, 2.0, 3.0), 2.4) is Grade.FULL
    assert grade(of(1.6, 1.5, 1.7), 2.4) is Grade.SOME
    assert grade(of(2.5, 0.9, 3.0), 2.4) is Grade.NONE  # it may be no effect at all
    assert grade(of(2.5, None, None), 2.4) is Grade.NONE  # one prompt shows nothing
    assert at_most(of(1.0, 0.0, 2.0), 3.0) is Grade.FULL
    assert at_most(of(1.0, 0.0, 4.0), 3.0) is at_most(of(1.0, None, None), 3.0) is Grade.SOME
    assert at_most(of(3.1, 3.0, 4.0), 3.0) is Grade.NONE
    assert joined(Grade.FULL, Grade.FULL) is Verdict.REPRODUCED
    assert joined(Grade.FULL, Grade.NONE) is joined(Grade.SOME) is Verdict.PARTLY
    assert joined(Grade.NONE, Grade.NONE) is Verdict.NOT_REPRODUCED
    assert slower(of(2.0, 1.0, 3.0), of(0.99, 0.5, 1.5)) and not slower(of(1.0, 0.5, 1.5))
    assert raced([of(0.99, 0.9, 1.1)], [Grade.NONE, Grade.FULL]) is Verdict.NOT_REPRODUCED
    assert raced([of(1.1, 0.9, 1.2)], [Grade.NONE, Grade.FULL]) is Verdict.PARTLY


def test_a_rate_that_does_not_vary_is_steadier_than_any():
    """σ of 0 over a rival's: its inverse is infinite, not an error."""
    record = passing("fig13")
    for system in ("cacheblend", "epic"):
        row_of(record["agents"]["series"], system=system)["std_ratio"] = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 9}
    assert verdict("fig13", record) is Verdict.REPRODUCED


def test_an_interval_that_begins_at_nothing_is_an_interval():
    """Of stale keys 0.3 are left, between 0 and 0.5: our prediction, 0.16 to 0.28, lies within."""
    left = {"value": 0.3, "low": 0.0, "high": 0.5, "n": 9}
    assert predicted_stale({"cksim": [{"shift": 1000, "position_stale": left}]}).verdict is Verdict.PARTLY


def test_throughput_at_another_ratio_is_not_judged():
    record = passing()
    record["conditions"] = record["conditions"] | {"config": {"recompute_ratio": 0.1}}
    found = judge(BY_KEY["headline-throughput"], record)
    assert found.verdict is Verdict.NOT_JUDGED and "recomputed 10 %" in found.measured
