"""The campaigns against the store: a few rounds each, and that they notice what they are there for."""

import logging
import multiprocessing
import random
from collections import Counter

import pytest

from cacheslide.store.persistent.record import Accept
from harness.robustness import damage, folders, writers
from harness.robustness.__main__ import CAMPAIGNS

pytestmark = pytest.mark.slow


@pytest.fixture
def trial(tmp_path):
    files = folders._template(tmp_path / "template")
    folders._beside(tmp_path / "outside")
    return lambda numbers, counts: [folders.trial(n, 1, tmp_path, files, counts) for n in numbers]


@pytest.mark.fault("hostile_store")
@pytest.mark.fault("forged_record")
def test_spoiled_folders_do_no_harm(trial):
    counts = Counter()
    assert not [said for said in trial(range(150), counts) if said]
    assert counts["hostile_folders_tried"] == 150 and counts["hits"] > 100 and counts["misses"] > 50


def test_the_campaign_notices_a_forged_record_that_is_served(trial, monkeypatch):
    """One whose checksums are right, to an asker that takes anything."""
    monkeypatch.setattr(folders, "WANTED", Accept())
    counts = Counter()
    trial(range(150), counts)
    assert counts["wrong_pages"] + counts["exceptions"] > 0


def test_the_campaign_notices_a_foreign_file_that_changed(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "use", lambda root, counts: (tmp_path / "outside/file").write_text("changed"))
    counts = Counter()
    assert all("foreign_changed" in said for said in trial(range(3), counts)) and counts["foreign_changed"] == 3


def test_two_writers_that_are_killed_lose_nothing_that_was_finished(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([writers.__name__])
    rng, kept, kills = random.Random(3), [], 0
    for number in range(3):
        died, told = writers.one_round(tmp_path / "store", number, rng, context)
        kept, kills = kept + told, kills + died
    assert kills == 6 and kept
    assert writers.look(tmp_path / "store", kept) == (0, 0)
    assert writers.look(tmp_path / "store", [10**9]) == (1, 0)  # what is not there is noticed


def test_the_campaigns_are_listed_and_damage_counts_its_rounds(tmp_path, monkeypatch):
    assert {"folders", "damage", "writers"} <= set(CAMPAIGNS)
    monkeypatch.setattr(damage, "_ROUNDS", 2)
    found = damage.run(0.0001, 1, tmp_path)
    assert logging.getLogger("cacheslide.store").level == logging.NOTSET  # its warnings are read on
    assert found["rounds"] == 2 and found["served"] > 0 and found["faults"] == 0
