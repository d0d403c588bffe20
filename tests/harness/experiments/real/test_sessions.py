"""The record of recorded sessions: numbers that add up, no text, and its figure (invented logs)."""

import json
import subprocess
import sys

import pytest

from cacheslide.analysis.kinds import KINDS
from cacheslide.errors import DataError
from harness.experiments.real.sessions import find_sessions, main
from harness.plots.render import render
from tests.helpers.made_sessions import WORDS, processors, react, reflexion_log, trajectory, words, write_trajectory

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    write_trajectory(data / "swe" / "issue__a.traj", trajectory(turns=9, **processors(4)))
    write_trajectory(data / "swe" / "issue__b.traj", trajectory(turns=6))
    steps = [("look", "Search[mill]", words(60, 5)), ("so", "Finish[bone]", "Answer is INCORRECT")]
    log = reflexion_log(
        {"INCORRECT": [react("What mill?", steps)]}, {"CORRECT": [react("What mill?", steps, ("again",))]}
    )
    (data / "log.txt").write_text(log)
    (data / "notes.txt").write_text("no log")
    (data / "rows.jsonl").write_text('{"question": "x"}\n')
    return data


def measured(folder, tmp_path, *more):
    main(["--data", str(folder), "--out", str(tmp_path / "out.json"), *more])
    return json.loads((tmp_path / "out.json").read_text())


def test_every_session_is_numbers_that_add_up_and_no_text(folder, tmp_path):
    record = measured(folder, tmp_path)
    assert record["groups"].keys() == {"swe-agent", "swe-agent-full", "reflexion-react"}
    for session in record["sessions"]:
        turns = session["turns"]
        for i, tokens in enumerate(turns["tokens"]):
            assert sum(turns[kind][i] for kind in KINDS) == tokens and turns["cached"][i] >= turns["prefix"][i]
        assert len(session["sha256"]) == 64 and session["lacks"]
        in_order = [sum(s[1] for s in session["spans"] if s[0] == t and s[3]) for t in range(len(turns["tokens"]))]
        assert in_order == turns["order_preserving"]
    text = (tmp_path / "out.json").read_text()
    assert not any(word + "5x" in text or word + "2x" in text for word in WORDS)
    assert record["notes"][0] == "2 of 2 sessions of swe-agent are of one task, issue"
    assert set(record["provenance"]["data_hashes"]) == {"issue__a.traj", "issue__b.traj", "log.txt"}


def test_what_a_history_processor_leaves_out_is_what_moves(folder, tmp_path):
    groups = measured(folder, tmp_path)["groups"]
    assert groups["swe-agent"]["tokens"]["order_preserving"] > 500 and groups["swe-agent"]["moved"] == 1
    assert groups["swe-agent"]["shift"]["max"] < 0
    assert groups["swe-agent-full"]["tokens"]["order_preserving"] == 0 and groups["swe-agent-full"]["shift"] is None
    assert groups["swe-agent-full"]["share"]["prefix"]["min"] > 0.5
    assert groups["reflexion-react"]["shift"]["median"] > 0


def test_a_models_tokens_are_counted_where_it_is_given(folder, tmp_path):
    record = measured(folder, tmp_path, "--model", "models/tiny-llama-12m")
    assert record["counted_with"] == "the model's tokenizer" and len(record["tokenizer_sha256"]) == 64
    assert "models/" not in (tmp_path / "out.json").read_text()


def test_the_figure_is_drawn_of_whatever_groups_there_are(folder, tmp_path):
    measured(folder, tmp_path)
    render("fig03_real", tmp_path / "out.json", [tmp_path / "all.svg"])
    svg = (tmp_path / "all.svg").read_text()
    assert "old output left out" in svg and "history in full" in svg and "none" in svg
    write_trajectory(tmp_path / "one" / "issue__a.traj", trajectory(turns=1))
    measured(tmp_path / "one", tmp_path)
    render("fig03_real", tmp_path / "out.json", [tmp_path / "none.svg"])
    assert "no session has a second turn" in (tmp_path / "none.svg").read_text()


def test_a_folder_without_logs_is_one_line_and_status_2(tmp_path):
    (tmp_path / "notes.txt").write_text("no log")
    with pytest.raises(DataError, match="holds no recorded sessions"):
        find_sessions(tmp_path)
    command = [
        sys.executable,
        "-m",
        "harness.experiments.real.sessions",
        "--data",
        str(tmp_path / "x"),
        "--out",
        "o.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no folder" in done.stderr
