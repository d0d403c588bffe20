"""Timings taken beside other work: a neighbour is noticed, its blocks are marked and left out, and nothing is concluded
where too few are left."""

import copy
import math
import subprocess
import sys
from contextlib import contextmanager
from itertools import cycle

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import quiet
from harness.experiments.study.throughput import slices_of
from harness.plots import fig10, fig11, fig13, fig14, throughput
from harness.plots.style import RC
from harness.quiet import LOAD_OVER, OTHERS_SHARE, SLOWER, Calibration, Watch, judge, own_cpu_s, watched
from harness.report.builder import render
from harness.report.paper import CLAIMS
from harness.report.verdicts import Verdict
from harness.report.verdicts import judge as verdict_on
from harness.results.agent_load import load_table, series_table
from harness.results.agents import grid_table, quality_table
from harness.results.runs import RecordFile, load_run
from harness.results.summary import build_summary, timings
from harness.results.timing import latency_table
from harness.results.undisturbed import FEW, counted
from tests.helpers import made_run
from tests.helpers.made_agents import make_agents
from tests.helpers.readings import BUSY, CALM

pytestmark = [pytest.mark.fault("disturbed_timing"), pytest.mark.slow]


BURN = """
import os, select, sys, time
if sys.argv[1] == "neighbour" and os.fork():
    os._exit(0)  # whoever is left is nobody's child here
done = 0
while not select.select([0], [], [], 0)[0]:
    while time.process_time() < 0.1 * (done + 1):
        pass
    done += 1
    os.write(1, b".")
"""


@pytest.fixture(autouse=True)
def the_rule_itself(monkeypatch) -> None:
    monkeypatch.setattr(quiet, "judge", judge)


@contextmanager
def burning(kind: str):
    """A child or a "neighbour" that burns CPU; gives a function that waits for 0.1 s more of its CPU time."""
    command = [sys.executable, "-c", BURN, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield lambda: process.stdout.read(1)
        finally:
            process.stdin.close()  # it ends then, and if this process dies
            process.stdout.read()


def test_a_neighbour_marks_the_block_beside_it():
    with burning("neighbour") as wait:
        wait()
        with watched() as reading:
            for _ in range(8):
                assert wait() == b"."
    assert reading["disturbed"] and reading["why"]
    took = reading["others_cpu_share"] * reading["seconds"] * reading["cores"]
    assert took > 0.6  # of the 0.7 s or more that it has burnt meanwhile


def test_ones_own_processes_are_no_neighbours():
    """Servers and workers belong to what is timed, while they run and when they have ended."""
    before = own_cpu_s()
    with burning("child") as wait:
        for _ in range(6):
            wait()
        while_running = own_cpu_s()
    assert while_running - before > 0.5
    assert own_cpu_s() >= while_running


def test_blocks_that_follow_each_other_share_a_calibration():
    watch = Watch()
    first, second = watch.lap(), watch.lap()
    assert first["calibration_after_s"] == second["calibration_before_s"]
    assert first["calibration_best_s"] <= min(first["calibration_before_s"], first["calibration_after_s"])
    assert set(first) == set(CALM)


class Machine:
    """Two cores under a made-up clock: this process keeps one busy, others take a share of both; ticks of 10 ms."""

    def __init__(self, others: float, begun: float) -> None:
        self.others, self.now, self.best = others, begun, 0.010

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        self.now += 0.011
        return 0.010

    def own(self) -> float:
        return math.floor(self.now * 100) / 100

    def all(self) -> float:
        return math.floor(self.now * (1 + 2 * self.others) * 100) / 100


@pytest.mark.parametrize("seconds", [1e-4, 0.02, 0.05, 0.1, 0.25, 0.4, 3.0])
@pytest.mark.parametrize(("others", "marked"), [(0, False), (0.03, False), (0.2, True), (0.5, True), (0.7, True)])
def test_a_neighbour_beside_short_blocks_marks_each_of_them(monkeypatch, seconds, others, marked):
    for phase in (0.0, 0.0037, 0.0091):
        machine = Machine(others, 100 + phase)
        for name, fake in {
            "time": machine,
            "calibrate": machine,
            "machine_cpu_s": machine.all,
            "own_cpu_s": machine.own,
        }.items():
            monkeypatch.setattr(quiet, name, fake)
        watch, readings = Watch(), []
        for _ in range(20):
            machine.now += seconds
            readings.append(watch.lap())
        assert [r["disturbed"] for r in readings] == [marked] * 20
        assert all(r["seconds"] == round(seconds, 4) <= r["others_seconds"] for r in readings)
        assert all(0.3 <= r["others_seconds"] < 0.6 + seconds for r in readings)
        assert machine.now - 100 < 20 * (seconds + 0.011) + 0.4  # one wait at most


def test_a_block_that_fails_leaves_no_reading():
    readings = []
    with pytest.raises(KeyError), watched() as reading:
        readings.append(reading)
        raise KeyError
    assert counted(readings) == {"blocks": 1, "disturbed": 0, "not_checked": 1}


def test_another_number_of_threads_is_another_calibration(monkeypatch):
    one, threads = Calibration(), torch.get_num_threads()
    one()
    one.best = 1e-9
    assert one() > 1e-6 and one.best == 1e-9
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: threads + 1
    )  # an engine in this process may forbid setting it
    one()
    assert one.best > 1e-6


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"others_cpu_share": OTHERS_SHARE}, ""),
        ({"others_cpu_share": 0.5}, "others took 50%"),
        ({"others_cpu_share": 0.5, "others_seconds": 0.03}, ""),  # three ticks of the counter
        ({"others_cpu_share": 0.5, "seconds": 0.03, "others_seconds": 0.3}, "others took 50%"),
        ({"others_cpu_share": 1.0, "others_seconds": 0.1}, "others took"),
        ({"calibration_after_s": 0.010 * SLOWER + 0.001}, "calibration"),
        ({"calibration_before_s": 0.020}, "2.00 times as long"),
        ({"load_after": 9.0}, ""),  # others' time is known and small: the load is of a minute ago
        ({"load_after": 9.0, "others_cpu_share": None}, "load average 9.0"),
        ({"load_before": 2 * LOAD_OVER, "others_cpu_share": None}, ""),
    ],
)
def test_the_rule_on_recorded_readings(change, why):
    said = judge(CALM | change)
    assert why in said and bool(said) is bool(why)


@settings(max_examples=200, deadline=None)
@given(
    others=st.none() | st.floats(0, 1),
    more=st.floats(0, 1),
    calibrations=st.lists(st.floats(1e-4, 10), min_size=2, max_size=2),
    load=st.floats(0, 1e3),
    seconds=st.floats(0, 1e5),
    cores=st.integers(1, 1024),
)
def test_more_of_a_neighbour_never_unmarks_a_block(others, more, calibrations, load, seconds, cores):
    reading = {"others_cpu_share": others, "seconds": seconds, "cores": cores, "load_before": 0.0, "load_after": load}
    reading |= {"calibration_before_s": calibrations[0], "calibration_after_s": calibrations[1]}
    reading["calibration_best_s"] = min(calibrations)
    worse = {"load_after": load + 100 * more, "calibration_after_s": calibrations[1] * (1 + more)}
    if others is not None:
        worse["others_cpu_share"] = min(1.0, others + more)
    if judge(reading):
        assert judge(reading | worse)


def test_a_system_that_hides_its_counters_is_judged_by_its_load(monkeypatch):
    monkeypatch.setattr(quiet, "machine_cpu_s", lambda: None)
    with watched() as reading:
        pass
    assert reading["others_cpu_share"] is None and reading["disturbed"] is bool(reading["why"])


SYSTEMS = ["recompute", "context_cache", "cacheblend", "naive_reuse", "cacheslide"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of before: no readings anywhere."""
    cfg, paths = made_run.make_run(tmp_path_factory.mktemp("quiet"), {"systems": SYSTEMS}, prompts_each=4)
    files = make_agents(tmp_path_factory.mktemp("agents"))
    return load_run(cfg, **paths, agents=list(files.values()))


def disturb(run, readings, slow=1.0):
    """The same run with a reading a timed block, in turn from `readings`; marked rounds took `slow` times as long."""
    out, turn = copy.deepcopy(run), cycle(readings)
    for file in out.latency.values():
        for record in file.records:
            rounds = [next(turn) for _ in record["systems"][SYSTEMS[0]]["ttft_seconds"]]
            record["quiet"] = [{"systems": list(record["systems"]), "rounds": rounds}]
            for system in record["systems"].values():
                times = zip(system["ttft_seconds"], rounds, strict=True)
                system["ttft_seconds"] = [t * (slow if r["disturbed"] else 1.0) for t, r in times]
    for record in out.throughput.records:
        parts = slices_of(len(record["requests"]), record["batch"])
        record["slices"], record["quiet"] = [len(p) for p in parts], [next(turn) for _ in parts]
    for section in ("load", "series"):
        for record, reading in zip(out.agents[section].records, turn, strict=False):
            record["quiet"] = dict.fromkeys(record["systems"], CALM) | {"cacheslide": reading}
    for section in ("replay", "grid"):
        for record in out.agents[section].records:
            steps = max(map(len, record["systems"].values()))
            record["quiet"] = [next(turn) for _ in range(steps)]
    return out


@pytest.fixture(scope="module")
def before(run):
    return build_summary(run)


@pytest.fixture(scope="module")
def calm(run):
    return build_summary(disturb(run, [CALM]))


@pytest.fixture(scope="module")
def busy(run):
    return build_summary(disturb(run, [BUSY, BUSY, BUSY, CALM]))


def ours(rows, system="cacheslide"):
    return next(r for r in rows if r["system"] == system and r.get("tokens", 4096) == 4096)


def test_records_of_before_keep_their_numbers_and_count_as_not_checked(before, calm):
    for part in ("latency", "latency_ratios", "throughput", "agents"):
        assert before[part] == calm[part]
    assert before["headline"] == calm["headline"] and before["headline"]["cpu_ttft_ratio_4k"]
    assert all(n["not_checked"] == n["blocks"] > 0 == n["disturbed"] for n in before["timings"].values())
    assert all(n["not_checked"] == 0 == n["disturbed"] for n in calm["timings"].values())
    agents = {f"agents/{section}" for section in ("replay", "load", "series", "grid")}
    assert set(calm["timings"]) == {"latency", "throughput"} | agents


def test_disturbed_rounds_are_left_out_on_both_sides(run, calm):
    half = disturb(run, [CALM, BUSY], slow=50)
    row, want = ours(latency_table(half)), ours(calm["latency"])
    assert not row["disturbed"] and row["ttft_ratio"]["value"] == pytest.approx(want["ttft_ratio"]["value"], rel=0.05)
    assert row["ttft_median"]["value"] < 2 * want["ttft_median"]["value"]
    assert timings(half)["latency"] == {"blocks": 20, "disturbed": 10, "not_checked": 0}


def test_where_too_few_are_left_nothing_is_concluded(before, busy):
    for row in (ours(busy["latency"]), ours(busy["throughput"]), busy["latency_ratios"][0]):
        assert row["disturbed"].startswith(FEW)
    assert ours(busy["latency"])["ttft_ratio"] is None and ours(busy["latency"])["ttft_median"]
    assert ours(busy["throughput"])["qps_ratio"] is None
    assert busy["headline"]["cpu_ttft_ratio_4k"] is None
    assert busy["headline_missing"]["cpu_ttft_ratio_4k"].startswith(FEW)
    judged = {claim.key: (verdict_on(claim, before), verdict_on(claim, busy)) for claim in CLAIMS}
    changed = {key: now for key, (then, now) in judged.items() if then.verdict is not now.verdict}
    speed = {"headline-latency", "headline-throughput", "fig10-contextcache", "fig10-cacheblend", "fig10-reflexion"}
    assert changed.keys() >= speed | {"fig13", "fig14"}
    assert all(now.verdict is Verdict.NOT_JUDGED and now.measured.startswith(FEW) for now in changed.values())
    page = render(busy, {})
    assert "blocks disturbed" in page and "other work ran beside" in page


def test_loads_beside_other_work_are_not_judged(run, before):
    table = load_table(disturb(run, [BUSY]).agents["load"])
    for claim in (c for c in CLAIMS if c.key in ("fig11-parallel", "fig11-beam")):
        summary = before | {"agents": before["agents"] | {"load": table}}
        assert verdict_on(claim, summary).verdict is Verdict.NOT_JUDGED is not verdict_on(claim, before).verdict


def titles(summary, load):
    with mpl.rc_context(RC):
        drawn = [fig10.draw(summary), throughput.draw(summary["throughput"]), fig11.draw(load)]
        drawn += [fig13.draw(summary["agents"]["series"]), fig14.draw(summary["agents"]["grid"])]
        return [" ".join(axes.get_title(loc="left") for axes in figure.axes) for figure in drawn]


def test_figures_of_disturbed_timings_say_so(run, busy, calm):
    load = load_table(disturb(run, [BUSY]).agents["load"])
    assert all("DISTURBED" in title for title in titles(busy, load))
    assert not any("DISTURBED" in title for title in titles(calm, calm["agents"]["load"]))


def test_tables_of_agents_leave_out_what_was_disturbed(run):
    half, none = disturb(run, [CALM, BUSY]), disturb(run, [BUSY])
    assert sum(r["repeats"] for r in load_table(half.agents["load"])) < len(run.agents["load"].records)
    assert all(r["advantage"] for r in load_table(half.agents["load"]) if not r["disturbed"])
    assert ours(series_table(half.agents["series"]), "epic")["rate_ratio"]["n"] == 2
    for table in (load_table(none.agents["load"]), series_table(none.agents["series"])):
        assert all(r["disturbed"].startswith(FEW) for r in table)
    assert all(r["speedup"] is None for r in quality_table(none.agents["replay"]))
    grid, plain = grid_table(half.agents["grid"]), grid_table(run.agents["grid"])
    assert not grid["disturbed"] and grid_table(none.agents["grid"])["disturbed"].startswith(FEW)
    assert grid["cells"] != plain["cells"] and len(grid["cells"]) == len(plain["cells"])


def test_a_prompt_without_an_undisturbed_round_is_left_out(run):
    file = run.latency[4096]
    records = copy.deepcopy(file.records)
    for i, record in enumerate(records):
        rounds = [BUSY if i == 0 else CALM] * 2
        record["quiet"] = [{"systems": list(record["systems"]), "rounds": rounds}]
    changed = copy.copy(run)
    changed.latency = {4096: RecordFile(file.settings, records, [])}
    row = ours(latency_table(changed))
    assert row["ttft_ratio"]["n"] == len(records) - 1 and row["prompts"] == len(records)


@given(st.integers(1, 200), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_slices_are_whole_rounds_and_cover_all_requests(count, batch):
    parts = slices_of(count, batch)
    assert [i for p in parts for i in p] == list(range(count)) and 1 <= len(parts) <= 4
    assert all(p.start % batch == 0 for p in parts)
