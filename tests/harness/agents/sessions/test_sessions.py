"""Recorded sessions: prompts rebuilt as sent, what a log lacks, and bad logs in one line (invented logs)."""

import json
import random

import pytest

from cacheslide.errors import DataError
from harness.agents.sessions.reflexion import DEMOS, REFLECTING
from harness.agents.sessions.registry import FORMATS, format_of, read_sessions
from harness.agents.sessions.swe_agent import BY_RULE, FULL, REPLAYED, TOOLS
from tests.helpers.made_sessions import processors, react, reflexion_log, trajectory, words, write_trajectory
from tests.helpers.real_data import real_file


def only(path):
    (session,) = read_sessions(path)
    return session


def texts(turn):
    return [message.content for message in turn.messages]


def left_out(turn):
    return [i for i, text in enumerate(texts(turn)) if text == "Old environment output: (3 lines omitted)"]


def test_without_a_configuration_observations_stand_in_full_and_that_is_said(tmp_path):
    run = trajectory(turns=7, demo=True)
    session = only(write_trajectory(tmp_path / "issue__a.traj", run))
    assert (session.id, session.agent, len(session.turns)) == ("issue__a", "swe-agent", 7)
    assert [len(t.messages) for t in session.turns] == [3, 5, 7, 9, 11, 13, 15]
    assert texts(session.turns[6]) == [m["content"] for m in run["history"][:15]]
    assert session.turns[0].messages[0].role == "system" and session.lacks == (FULL,)


@pytest.mark.parametrize("plural", [True, False])
def test_observations_are_left_out_by_the_rule_that_the_configuration_names(tmp_path, plural):
    run = trajectory(turns=9, demo=True, **processors(5, plural))
    session = only(write_trajectory(tmp_path / "a.traj", run))
    # system, demonstration, issue, then answer and observation; the issue is an observation too, which always stays
    assert [left_out(turn) for turn in session.turns] == [[], [], [], [], [], [], [4], [4, 6], [4, 6, 8]]
    assert session.lacks == (BY_RULE,)
    short = only(write_trajectory(tmp_path / "b.traj", trajectory(turns=3, **processors())))
    assert short.lacks == ()  # nothing was left out yet: the history is what was sent


def test_prompts_that_the_file_shows_are_taken_as_they_are(tmp_path):
    run = trajectory(turns=3, **processors(1))
    for t, step in enumerate(run["trajectory"]):
        step["query"] = [{"role": "system", "content": f"sent {t}"}, {"role": "user", "content": "x"}]
    session = only(write_trajectory(tmp_path / "a.traj", run))
    assert [texts(t)[0] for t in session.turns] == ["sent 0", "sent 1", "sent 2"] and session.lacks == ()
    run = trajectory(turns=3, **processors(1))
    run["trajectory"][1]["messages"] = [m | {"content": "after step 2"} for m in run["history"][:6]]
    session = only(write_trajectory(tmp_path / "b.traj", run))
    assert texts(session.turns[2]) == ["after step 2"] * 6 and texts(session.turns[1]) != texts(session.turns[2])[:4]


def test_tools_and_replayed_actions_are_named(tmp_path):
    run = trajectory(turns=2, calls=True, info={"model_stats": {"tokens_sent": 0}}, **processors())
    session = only(write_trajectory(tmp_path / "a.traj", run))
    assert session.lacks == (TOOLS, REPLAYED)
    assert json.loads(session.turns[1].messages[2].calls)[0]["function"]["name"] == "ls"
    other = {"replay_config": json.dumps({"agent": {"history_processors": [{"type": "closed_window"}]}})}
    assert "closed_window" in only(write_trajectory(tmp_path / "b.traj", trajectory(2, **other))).lacks[0]


STEPS = [
    ("look", "Search[mill]", words(40, 5) + "\nThought 9: is quoted"),
    ("so", "Finish[bone]", "Answer is INCORRECT"),
]


def test_react_asks_twice_a_step_and_goes_on_in_the_next_trial(tmp_path):
    log = reflexion_log(
        {"CORRECT": [react("Who ?", STEPS[:1])], "INCORRECT": [react("What mill?", STEPS)]},
        {"CORRECT": [react("Who ?", STEPS[:1]), react("What mill?", STEPS, ("look again",))]},
        {"CORRECT": [react("Who ?", STEPS[:1]), react("What mill?", STEPS, ("look again",))]},
    )
    (tmp_path / "run.txt").write_text(log)
    who, what = read_sessions(tmp_path / "run.txt")
    assert len(who.turns) == 2 and who.lacks == (DEMOS,) and who.agent == "reflexion-react"
    prompts = [texts(turn)[0] for turn in what.turns]
    assert len(prompts) == 8 and what.lacks == (DEMOS, REFLECTING)
    assert prompts[0] == "Question: What mill?\nThought 1:" and prompts[1].endswith("Thought 1: look\nAction 1:")
    assert prompts[2].endswith("Thought 9: is quoted\nThought 2:") and prompts[3].endswith("\nAction 2:")
    assert "\nReflections:\n- look again\nThought 1:" in prompts[4] and prompts[4].startswith("Question: What mill?You")
    assert all(turn.messages[0].role == "" for turn in what.turns) and who.id != what.id


def test_a_trial_that_a_question_is_missing_from_is_named(tmp_path):
    missing = reflexion_log({"HALTED": [react("Who ?", STEPS)]}, {"HALTED": [react("Why ?", STEPS)]})
    (tmp_path / "run.txt").write_text(missing)
    who, _ = read_sessions(tmp_path / "run.txt")
    assert who.lacks == (DEMOS, "trial 2")


def test_given_context_there_is_one_step_a_trial(tmp_path):
    asked = "Context: The mill is old.\n\nIt is bare. Question: What is old?"
    block = asked + "\nThought: the mill\nAction: Finish[x]\nObservation: no"
    (tmp_path / "cot.txt").write_text(reflexion_log({"INCORRECT": [block]}, {"INCORRECT": [block]}))
    session = only(tmp_path / "cot.txt")
    prompts = [texts(turn)[0] for turn in session.turns]
    assert session.agent == "reflexion-cot" and len(prompts) == 4 and prompts[0] == prompts[2]
    assert prompts[0].endswith("What is old?\nThought:") and prompts[1].endswith("the mill\nAction:")


def test_requests_are_a_format_too_and_a_data_set_is_none(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"body": {"messages": [{"role": "user", "content": "x"}], "model": "m"}}\n')
    assert only(tmp_path / "r.jsonl").agent == "m"
    assert list(FORMATS) == ["swe-agent", "reflexion", "openai"]
    for text in ("", "{", "[]", '{"question": "x", "answer": "y"}', "BEGIN TRIAL 1", '"text"', "[" * 100_000):
        assert format_of(text) is None


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (trajectory(history=3), "history and trajectory must be lists"),
        (trajectory(trajectory=[3]), "history and trajectory must be lists"),
        (trajectory(history=[{"content": "x"}]), "history message 1 has no role"),
        (trajectory(history=[{"role": "user", "content": 3}]), "history message 1: content is neither"),
        (trajectory(turns=0), "holds no turns"),
        (trajectory(replay_config="{"), "replay_config is not valid JSON"),
    ],
)
def test_a_damaged_trajectory_is_one_line(tmp_path, run, says):
    path = write_trajectory(tmp_path / "a.traj", run)
    with pytest.raises(DataError, match=says) as wrong:
        read_sessions(path)
    assert str(path) in str(wrong.value) and "\n" not in str(wrong.value)


def test_a_damaged_log_is_one_line(tmp_path):
    (tmp_path / "none.txt").write_text("nothing of interest")
    (tmp_path / "twice.txt").write_text(reflexion_log({"HALTED": [react("Who ?", STEPS)] * 2}))
    (tmp_path / "other.txt").write_text(reflexion_log({"HALTED": ["Task: mend\nThought 1: x"]}))
    (tmp_path / "silent.txt").write_text(reflexion_log({"HALTED": ["Question: Who ?"]}))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, says in {
        "none.txt": "no log format that is known",
        "twice.txt": "trial 1 holds a question twice",
        "other.txt": "neither Question: nor Context:",
        "silent.txt": "a question without a thought",
        "bytes.txt": "is not UTF-8",
        "missing.txt": "cannot read",
    }.items():
        with pytest.raises(DataError, match=says):
            read_sessions(tmp_path / name)


def test_no_mutation_of_a_trajectory_is_a_stack_trace(tmp_path):
    """Any value of a run is replaced by one of another kind: a session or a DataError."""
    rng, outcomes = random.Random(2), set()
    for _ in range(300):
        run = trajectory(turns=2, info={"model_stats": {"tokens_sent": 0}}, **processors())
        run["trajectory"][0] |= {"query": run["history"][:2], "messages": run["history"][:4]}
        node = run
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if rng.random() < 0.3 or not isinstance(node[key], dict | list) or not node[key]:
                node[key] = rng.choice([None, 3, -1.5, "x", [], {}, [3], {"x": []}, [{}], True])
                break
            node = node[key]
        try:
            outcomes.add(len(read_sessions(write_trajectory(tmp_path / "a.traj", run))))
        except DataError as wrong:
            outcomes.add("refused" if "\n" not in str(wrong) else "lines")
    assert outcomes == {1, "refused"}


def test_the_rule_is_what_a_real_run_shows():
    """A run whose prompts are recorded, and the same without them, rebuilt by the rule."""
    path = real_file("swe_agent/marshmallow-1867__function_calling_replace_from_source.traj")
    shown = only(path)
    run = json.loads(path.read_text())
    for step in run["trajectory"]:
        del step["messages"]
    from harness.agents.sessions import swe_agent

    (built,) = swe_agent.read(path, json.dumps(run), "")
    assert BY_RULE in built.lacks and BY_RULE not in shown.lacks
    assert built.turns == shown.turns and len(shown.turns) == 13


def test_the_real_logs_hold_a_hundred_questions():
    for name, turns in (("react_5_trials.txt", 2686), ("cot_context_5_trials.txt", 462)):
        sessions = read_sessions(real_file(f"reflexion/{name}"))
        assert len(sessions) == 100 and sum(len(s.turns) for s in sessions) == turns
