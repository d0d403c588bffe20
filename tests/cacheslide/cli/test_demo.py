"""`cacheslide demo`: both turns answered as the notes say, with most of the second turn reused, and a missing model."""

import json

import pytest

from cacheslide.cli.demo import SHIPPED, shipped_model
from cacheslide.cli.demo_turns import ANSWERS, ASKED, NOTES, SOURCE, turn
from cacheslide.core.prompt import Role
from cacheslide.core.prompt_file import load_tokenizer, read_segments
from cacheslide.errors import ModelError
from tests.helpers.commands import MODEL, run
from tests.helpers.places import ROOT


def test_the_turns_share_their_fixed_text_and_the_answer_stands_in_the_notes_alone():
    tokenizer = load_tokenizer(MODEL)
    first, second = (turn(i, tokenizer) for i in (0, 1))
    fixed = [[s for s in segments if s.role is Role.REUSE] for segments in (first, second)]
    assert fixed[0] == fixed[1] and len(fixed[0]) == 7
    assert len(second[1].token_ids) > len(first[1].token_ids)  # so the reports move
    for number, segments in enumerate((first, second)):
        holding = [s.name for s in segments if ANSWERS[number] in tokenizer.decode(s.token_ids)]
        assert holding == ["notes"] and dict(NOTES[number])[SOURCE] == ANSWERS[number]
        [link] = [s.name for s in segments if f"{ASKED} follows {SOURCE}" in tokenizer.decode(s.token_ids)]
        assert link.startswith("report")


def test_both_turns_are_answered_and_the_second_reuses_the_first(capsys):
    code, out, _ = run(capsys, "demo", "--repeats", "1", "--json")
    first, second = json.loads(out)["turns"]
    assert code == 0
    for shown, expected in zip((first, second), ANSWERS, strict=True):
        assert [shown[key]["text"].strip() for key in ("recompute", "reuse")] == [expected, expected]
        assert shown["recompute"]["receipt"]["tokens_reused"] == 0 and shown["reuse"]["ttft_ms"] > 0
    assert first["reuse"]["receipt"]["chunks_hit"] == 0 and first["retained"]["copied"] == 7
    receipt = second["reuse"]["receipt"]
    assert receipt["chunks_hit"] == 7 and receipt["compute_fraction"] < 0.25
    assert 2 * receipt["tokens_reused"] > receipt["tokens"] > 1500


@pytest.mark.slow
def test_it_shows_both_answers_and_what_they_cost_and_a_wrong_one(capsys):
    """Reuse without recomputation answers what the first turn's notes said."""
    code, out, _ = run(capsys, "demo", "--repeats", "1", "--system", "naive_reuse")
    second = out.partition("turn 2:")[2].splitlines()
    assert code == 0 and "compute 100.0 %  answers: copper seven" in second[1]
    assert second[2].startswith("  naive_reuse") and second[2].endswith("answers: agate ten")
    assert second[3].startswith("  reused 1519 of 1601 tokens (7 of 7 chunks, ") and second[4] == "  wrong: naive_reuse"
    assert second[-1].startswith("Second turn: 5 % of the compute and ")
    code, _, err = run(capsys, "demo", "--system", "recompute")
    assert code == 2 and "reuses nothing" in err and err.count("\n") == 1


def test_the_model_is_found_from_any_folder_and_its_absence_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shipped_model(None) == ROOT / SHIPPED
    monkeypatch.setattr("cacheslide.cli.demo.__file__", str(tmp_path / "site-packages/cacheslide/cli/demo.py"))
    for arguments, said in (((), "give its models/tiny-llama-12m with --model"), (("--model", "x"), "no model at x")):
        code, out, err = run(capsys, "demo", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    with pytest.raises(ModelError, match="not here"):
        shipped_model(None)


def test_the_turns_are_prompt_files_of_the_run_command(capsys, tmp_path):
    assert run(capsys, "demo", "--prompts", str(tmp_path)) == (0, "", "")
    tokenizer = load_tokenizer(MODEL)
    for number, name in enumerate(("before.json", "now.json")):
        assert read_segments(tmp_path / name, tokenizer) == turn(number, tokenizer)
    code, _, err = run(capsys, "demo", "--prompts", str(tmp_path / "nowhere"))
    assert code == 2 and "cannot write" in err and err.count("\n") == 1
