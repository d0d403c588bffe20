"""Arrivals and measures by hand-made times, and the driver with threads that meet each other."""

import threading
from statistics import mean

import pytest

from cacheslide.errors import ConfigError, DataError
from harness.agents.completer import Completion, Request, Scripted
from harness.agents.function_calling import FunctionCalling
from harness.agents.loop import Stops
from harness.agents.oracle import oracle
from harness.agents.tasks import function_tasks
from harness.load import Closed, Done, Poisson, Replayed, Steady, drive, goodput, qps_correct, series, summary
from harness.load.driver import OneAtATime
from harness.load.measures import concurrency, spread

RUN = [
    Done(0.0, 0.0, 0.5, True, 0.1, 4),
    Done(0.0, 0.5, 1.5, False, 0.2, 4),
    Done(1.0, 1.5, 2.0, True, 0.9, 4),
    Done(1.0, 1.0, 2.5, True, None, 4),
]


def test_open_loop_times():
    assert Steady(4).times(3) == [0.0, 0.25, 0.5]
    times = Poisson(2.0, seed=1).times(4000)
    assert times == Poisson(2.0, seed=1).times(4000) != Poisson(2.0, seed=2).times(4000)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0 and abs(mean(gaps) - 0.5) < 0.03
    assert Replayed((0.0, 0.0, 3.0)).times(2) == [0.0, 0.0]


@pytest.mark.parametrize(
    "make", [lambda: Closed(0), lambda: Steady(0), lambda: Poisson(-1), lambda: Replayed((2.0, 1.0))]
)
def test_impossible_arrivals_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_too_few_recorded_times():
    with pytest.raises(ConfigError, match="only 1"):
        Replayed((0.0,)).times(2)


def test_rates():
    assert qps_correct(RUN) == 3 / 2.5
    assert goodput(RUN) == 3 / 2.5
    assert goodput(RUN, ttft_s=0.5) == 1 / 2.5
    assert goodput(RUN, latency_s=1.0) == 2 / 2.5
    assert concurrency(RUN) == 2
    made = summary(RUN)
    assert (made["n"], made["seconds"], made["qps"], made["tokens_per_s"]) == (4, 2.5, 1.6, 6.4)
    assert made["mean_wait_s"] == pytest.approx(0.25)


def test_series_sums_to_what_was_done_and_ends_with_a_partial_bin():
    assert series(RUN) == [1.0, 1.0, 4.0]  # two completions in the last half second
    assert series(RUN, correct_only=True) == [1.0, 0.0, 4.0]
    assert series(RUN, bin_s=10.0) == [1.6]
    assert spread([1.0, 3.0]) == 1.0 and spread([2.0]) == 0.0
    exact = [Done(0.0, 0.0, 1.0, True), Done(0.0, 0.0, 2.0, True)]
    assert series(exact) == [0.0, 2.0]


def test_no_run_has_no_rates():
    with pytest.raises(DataError, match="nothing"):
        qps_correct([])
    with pytest.raises(DataError, match="no time"):
        qps_correct([Done(1.0, 1.0, 1.0, True)])
    with pytest.raises(DataError, match="ascend"):
        Done(1.0, 0.5, 2.0, True)
    with pytest.raises(DataError, match="bins"):
        series(RUN, bin_s=0)


class Meeting:
    """An oracle whose first requests wait until `n` episodes are at work at once."""

    system = "meeting"

    def __init__(self, n: int) -> None:
        self.barrier, self.inner = threading.Barrier(n, timeout=60), oracle("function_calling")
        self.now = self.most = 0
        self.lock = threading.Lock()

    def complete(self, request: Request) -> Completion:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        if request.step == 0:
            self.barrier.wait()
        done = self.inner.complete(request)
        with self.lock:
            self.now -= 1
        return done


def test_a_closed_loop_keeps_exactly_its_number_at_work():
    tasks, meeting = list(function_tasks("test", 0, 8)), Meeting(4)
    run = drive(tasks, FunctionCalling, meeting, Closed(4), Stops(turns=60))
    assert meeting.most == 4 and [e.task_id for e in run.episodes] == [t.id for t in tasks]
    assert all(d.correct and d.due == d.start and d.tokens > 0 for d in run.done)
    assert concurrency(run.done) == 4


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_an_open_loop_starts_when_due_and_counts_waiting():
    tasks, clock = list(function_tasks("test", 0, 4)), Clock()
    run = drive(tasks, FunctionCalling, Meeting(2), Steady(0.5), Stops(turns=60), 2, clock, clock.sleep)
    assert clock.now == 106.0 and [d.due for d in run.done] == pytest.approx([0.0, 2.0, 4.0, 6.0])
    assert all(d.correct and d.start >= d.due for d in run.done)


def test_one_at_a_time_lets_one_in_and_counts_the_wait():
    inside, most, lock = [], [], threading.Lock()

    def serve(request):
        with lock:
            inside.append(1)
            most.append(len(inside))
        said = oracle("function_calling").function(request)
        with lock:
            inside.pop()
        return said

    guarded = OneAtATime(Scripted("slow", serve))
    run = drive(list(function_tasks("test", 0, 6)), FunctionCalling, guarded, Closed(6), Stops(turns=60))
    assert max(most) == 1 and all(d.correct for d in run.done)
    steps = [s for e in run.episodes for s in e.steps]
    assert all(s.completion.total_s >= s.completion.ttft_s > 0 for s in steps)


def test_a_driver_without_work_is_refused():
    with pytest.raises(ConfigError, match="no tasks"):
        drive([], FunctionCalling, oracle("function_calling"), Closed(1))
