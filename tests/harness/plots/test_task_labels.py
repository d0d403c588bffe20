"""Figures say which synthetic task they show."""

import pytest

from harness.plots.task_labels import of_task, task_of
from harness.tasks.data import LEDGER, STRESS, family_of, synthetic_names


def test_every_synthetic_data_set_is_named_by_its_family():
    assert {family_of(n) for n in synthetic_names()} == {STRESS, LEDGER}
    assert all(task_of(n) == f"{family_of(n)} task" for n in synthetic_names())
    assert task_of("deep") == "stress task" and task_of("musique") == task_of("hotpotqa") == ""


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["hotpotqa-deep", "swebench-sparse"], "F1 (stress task)\nat 8k"),
        (["hotpotqa-deep", "hotpotqa-ledger"], "F1 (ledger task, stress task)\nat 8k"),
        (["musique", None], "F1\nat 8k"),
        ([], "F1\nat 8k"),
    ],
)
def test_titles_say_the_task(names, title):
    assert of_task("F1\nat 8k", names) == title
