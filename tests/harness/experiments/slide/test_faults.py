"""Faults: nothing wrong is served, nothing hangs, and the statistics say what happened."""

import errno
import os

import pytest

from harness.experiments.slide import faults as faults

pytestmark = pytest.mark.slow


def sound(verdict, limit_s=10.0):
    assert verdict.faults > 0, "the fault never happened: this test shows nothing"
    assert verdict.wrong_pages == 0
    assert verdict.seconds < limit_s
    return verdict


def test_the_look_notices_a_wrong_page(tmp_path):
    """Else the other tests would show nothing."""
    store = faults.small_store(tmp_path)
    store.put(faults.made_key(1), faults.made_chunk(2))
    store.put(faults.made_key(3), faults.made_chunk(3))
    seen = faults.Verdict("none").look(store, [1, 3, 5])
    assert (seen.served, seen.missed) == (2, 1) and seen.wrong_pages == faults.LAYOUT.pages
    store.close()


def test_kill_9(tmp_path):
    verdict = sound(faults.kill_9(tmp_path, 5, seed=7))
    assert verdict.served > 0


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CACHESLIDE_SLOW") != "1", reason="a minute: set CACHESLIDE_SLOW=1 to run it")
def test_kill_9_at_a_hundred_points(tmp_path):
    verdict = sound(faults.kill_9(tmp_path, 100, seed=1))
    assert verdict.faults == 100 and verdict.served > 500


def test_rot(tmp_path):
    verdict = sound(faults.rot(tmp_path, 15, seed=3))
    assert verdict.served > 300 and verdict.missed > 0


def test_a_full_disk(tmp_path):
    verdict = sound(faults.full_disk(tmp_path))
    assert verdict.says["write_errors"] > 0 and verdict.served > 0


@pytest.mark.parametrize("where", ["reads", "writes"])
def test_a_failing_disk(tmp_path, where):
    verdict = sound(faults.failing_disk(tmp_path, faults.Fails(errno.EIO, **{where: True}), "io"))
    assert verdict.says[f"{where[:-1]}_errors"] > 0 and verdict.served > 0


def test_a_slow_disk(tmp_path):
    sound(faults.failing_disk(tmp_path, faults.Fails(0, writes=True, reads=True, delay_s=0.003), "slow"))


def test_clock_jumps(tmp_path):
    verdict = sound(faults.clock_jump(tmp_path))
    assert verdict.served > verdict.missed
