"""Prompts of the study on a real model: what each setting promises, made anew from row, setting and seed alone."""

from dataclasses import replace

import pytest

from cacheslide.core.prompt import Role
from cacheslide.errors import DataError
from harness.experiments.real.trials import ANSWER, CORRECTION, NOTES, SETTINGS, SHIFTS, Builder
from tests.helpers.made_passages import gemma, passage_row, passage_rows

LENGTHS = (200, 350, 600)


def builder(rows=None, seed=0, lengths=LENGTHS):
    return Builder(gemma(), passage_rows(8) if rows is None else rows, seed, lengths)


def part(prompt, name):
    [segment] = [s for s in prompt.segments if s.name == name]
    return segment.token_ids


def fixed(prompt):
    return [s.token_ids for s in prompt.segments if s.role is Role.REUSE]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_trial_follows_from_row_setting_and_seed(setting):
    one, other = builder(), builder()
    for index in (5, 1, 3):  # whatever was made before
        other.trial("shift", index)
    assert [one.trial(setting, i) for i in range(4)] == [other.trial(setting, i) for i in range(4)]
    assert builder(seed=1).trial(setting, 0).prompt != one.trial(setting, 0).prompt
    trial = one.trial(setting, 2)
    assert trial.id == f"{setting} made id-2" and trial.dataset == "made"


@pytest.mark.parametrize("setting", SETTINGS)
def test_both_turns_have_the_same_fixed_text_and_other_notes(setting):
    for index in range(8):
        trial, row = builder().trial(setting, index), passage_row(index)
        before, now = trial.previous, trial.prompt
        assert fixed(before) == fixed(now) and part(before, "question") == part(now, "question")
        assert [s.role for s in now.segments[:2]] == [Role.REUSE, Role.RECOMPUTE]
        assert part(before, "notes") != part(now, "notes") and now.segments[-1].name == "question"
        assert now.token_ids[0] == gemma().tokenizer.bos_token_id
        about, text = trial.about, gemma().decode(part(before, "notes"))
        passages = fixed(now)[1:]
        assert LENGTHS[index % 3] <= sum(map(len, passages)) == about["fixed_tokens"] < LENGTHS[index % 3] + 40
        assert (about["notes_before"], about["notes_tokens"]) == (len(part(before, "notes")), len(part(now, "notes")))
        assert NOTES[0] <= about["notes_before"] <= NOTES[1] and about["passages"] == len(passages)
        assert about["shift"] == len(now) - len(before) and row.answers[0] not in text


@pytest.mark.parametrize("setting", ["unrelated", "shift", "contradict"])
def test_needed_passages_are_fixed_text(setting):
    made = builder()
    for index in range(4):
        row = passage_row(index)
        passages = fixed(made.trial(setting, index).prompt)[1:]
        assert all(made.passage(row.passages[i]) in passages for i in row.gold)


def test_matter_has_a_needed_passage_in_the_notes_and_nowhere_else():
    made, moved = builder(), set()
    for index in range(8):
        row = passage_row(index)
        prompt = made.trial("matter", index).prompt
        inside = [i for i in row.gold if part(prompt, "notes") == made.passage(row.passages[i])]
        assert len(inside) == 1 and part(prompt, "notes") not in fixed(prompt)
        [other] = set(row.gold) - set(inside)
        assert made.passage(row.passages[other]) in fixed(prompt)
        moved.add(inside[0])
    assert moved == {1, 3}


def test_a_copy_of_the_needed_passage_in_another_row_stays_out():
    """Questions of one set share passages, and not every needed one holds the answer."""
    row = passage_row(0, gold=(0,))
    rows = [row, replace(passage_row(1), passages=(row.passages[0],) * 9 + passage_row(1).passages)]
    made = builder(rows)
    for seed in range(3):
        made.seed = seed
        trial = made.trial("matter", 0)
        assert part(trial.prompt, "notes") == made.passage(row.passages[0])
        start = part(trial.prompt, "notes")[:30]  # filler may be cut
        assert not [f for f in fixed(trial.prompt) if f[:30] == start]
        assert part(trial.previous, "notes")[:30] != start


def test_shift_grows_the_notes_by_exactly_its_tokens():
    for index in range(5):
        trial = builder().trial("shift", index)
        before, now = part(trial.previous, "notes"), part(trial.prompt, "notes")
        assert now[: len(before)] == before and len(now) - len(before) == SHIFTS[index % 4] == trial.about["grown"]


def test_contradict_says_another_answer_and_asks_for_it():
    made = builder()
    answers = {made.encode(" " + row.answers[0]): row.answers[0] for row in made.rows}
    for index in range(6):
        row, trial = made.rows[index], made.trial("contradict", index)
        said = answers[trial.answer]
        assert said != row.answers[0] and made.trial("unrelated", index).answer == made.encode(" " + row.answers[0])
        correction = made.encode(CORRECTION.format(old=row.answers[0], new=said))
        assert part(trial.prompt, "notes")[-len(correction) :] == correction


def test_contradict_needs_an_answer_that_is_none_of_the_rows_own():
    row, same = passage_row(0), passage_row(1)
    row = replace(row, answers=(*row.answers, "another name"))
    rows = [row, replace(same, answers=(row.answers[0].upper(),)), replace(passage_row(2), answers=("Another name",))]
    assert builder(rows).trial("contradict", 0) is None
    assert builder([*rows, passage_row(3)]).trial("contradict", 0).answer == gemma().encode(
        " " + passage_row(3).answers[0]
    )


def test_rows_that_do_not_suit_give_none_and_an_answer_in_the_text_is_enough():
    lost = replace(passage_row(0, gold=()), answers=("nowhere",))
    made = builder([lost, passage_row(1, gold=())])
    assert [made.trial(setting, 0) for setting in SETTINGS] == [None] * len(SETTINGS)
    prompt = made.trial("matter", 1).prompt
    assert part(prompt, "notes") in [made.passage(made.rows[1].passages[i]) for i in (1, 3)]


def test_a_long_answer_is_cut_and_one_row_is_too_few():
    long = replace(passage_row(0), answers=(" ".join(["lantern"] * 40),))
    assert len(builder([long, passage_row(1)]).trial("unrelated", 0).answer) == ANSWER
    with pytest.raises(DataError, match="at least two rows"):
        builder(passage_rows(1))
    with pytest.raises(DataError, match=r"unknown setting 'harder' \(known: unrelated, ") as wrong:
        builder().trial("harder", 0)
    assert "\n" not in str(wrong.value)


def test_a_set_whose_every_passage_holds_the_answer_is_named():
    row = passage_row(0)
    full = replace(passage_row(1), passages=(f"the {row.answers[0]} .",))
    with pytest.raises(DataError, match="row id-0: no other row has a passage without its answer"):
        builder([row, full]).trial("unrelated", 0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_record_says_holds_no_text(setting):
    row, about = passage_row(1), builder().trial(setting, 1).about
    assert (about.pop("row"), about.pop("row_sha256")) == (row.id, row.sha256)
    assert all(value is None or type(value) is int for value in about.values()) and len(about) == 6
