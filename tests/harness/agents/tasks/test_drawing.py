"""Tasks of agents: what cannot be drawn, and splits that share nothing."""

import pytest

from cacheslide.errors import DataError
from harness.agents.tasks import chat_tasks, fix_tasks, function_tasks, qa_tasks
from harness.agents.tasks.functions import constants


def test_tasks_that_cannot_be_drawn_are_refused():
    with pytest.raises(DataError, match="3 lines"):
        list(fix_tasks("test", 0, 1, lines=2))
    with pytest.raises(DataError, match="different words"):
        list(function_tasks("test", 0, 1, jobs=500))
    with pytest.raises(DataError, match="unknown split"):
        list(function_tasks("tests", 0, 1))
    with pytest.raises(DataError, match="unknown mix"):
        list(qa_tasks("test", 0, 1, mix="shallow"))


def test_splits_share_no_names_values_constants_or_bug_sites():
    seen = {}
    for split in ("train", "validation", "test"):
        words = set(constants(split))
        words |= {q.name for t in qa_tasks(split, 0, 20) for q in t.questions}
        words |= {q.answer for t in qa_tasks(split, 0, 20) for q in t.questions}
        words |= {x for t in chat_tasks(split, 0, 20) for turn in t.turns for x in (turn.name, turn.value)}
        words |= {n for t in function_tasks(split, 0, 20) for n in t.registers}
        words |= {t.fixed.split(" = ")[0] for t in fix_tasks(split, 0, 20)}
        seen[split] = words
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]
