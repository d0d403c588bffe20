"""The agents' loops: templates, parsing, stop conditions, oracles, and what a hostile model can do."""

import json
from contextlib import closing
from itertools import pairwise

import pytest

from cacheslide.errors import DataError, PromptError
from harness.agents.calls import Call, MalformedCall, Tool, parse, render
from harness.agents.completer import Scripted
from harness.agents.function_calling import FunctionCalling
from harness.agents.loop import Stops, run_episode
from harness.agents.oracle import NoContext, oracle
from harness.agents.reflexion import Reflexion
from harness.agents.registry import AGENTS, run_tasks
from harness.agents.sandbox import Limits, missing
from harness.agents.swe_agent import SWEAgent
from harness.agents.tasks import fix_tasks, function_tasks, qa_tasks
from harness.agents.template import Slot, Template
from harness.tasks.example import fixed
from tests.helpers.made_agents import keeps_order

pytestmark = pytest.mark.slow

LONG = Stops(turns=60)
TEXT_ONLY = ("reflexion", "memgpt", "function_calling")
sandboxed = pytest.mark.skipif(bool(missing()), reason=missing())
TOOLS = {t.name: t for t in (Tool("add", ("x", "y"), max), Tool("edit", ("line", "text"), max, rest=True))}


def says(*outputs: str) -> Scripted:
    """A model that says these in turn and then repeats the last."""
    return Scripted("scripted", lambda request: outputs[min(request.step, len(outputs) - 1)])


def test_templates_render_in_order_and_keep_fixed_text():
    template = Template((Slot("a", "reuse"), Slot("b", "recompute"), Slot("h", "reuse", grows=True)))
    one = template.render({"a": "A", "b": "1", "h": ["x"]})
    two = template.render({"a": "A", "b": "", "h": ["x", "y"]})
    assert [s.text for s in two] == ["A", "x", "y"] and keeps_order(one, two)
    assert not keeps_order(two, one) and not keeps_order(one, template.render({"a": "A", "b": "", "h": ["z"]}))
    with pytest.raises(PromptError, match="b, q"):
        template.render({"a": "A", "q": "", "h": []})
    with pytest.raises(PromptError, match="list"):
        template.render({"a": "A", "b": "", "h": "x"})


@pytest.mark.parametrize("grammar", ["line", "json"])
def test_calls_are_read_back(grammar):
    call = Call("edit", ("3", "a = b + c"))
    assert parse(render(call, TOOLS, grammar), TOOLS, grammar) == call


@pytest.mark.parametrize(
    ("grammar", "output"),
    [
        ("line", ""),
        ("line", "   \n add 1 2"),
        ("line", "rm -rf /"),
        ("line", "add 1"),
        ("line", "add 1 2 3"),
        ("line", "add \x00 1"),
        ("line", "add \ud800 1"),
        ("line", "add 1 " + "2" * 5000),
        ("json", "add 1 2"),
        ("json", "[" * 3000),
        ("json", "[]"),
        ("json", '{"name": "add"}'),
        ("json", '{"name": ["add"], "arguments": {}}'),
        ("json", '{"name": "add", "arguments": {"x": 1}}'),
        ("json", '{"name": "add", "arguments": {"x": 1, "y": {}}}'),
        ("json", '{"name": "add", "arguments": {"x": 1, "y": true}}'),
    ],
)
def test_malformed_calls_are_named(grammar, output):
    if output.strip().startswith("add 1 2") and grammar == "line" and "\n" in output:
        assert parse(output, TOOLS).args == ("1", "2")  # leading blank space is no call
        return
    with pytest.raises(MalformedCall):
        parse(output, TOOLS, grammar)


@pytest.mark.parametrize("name", TEXT_ONLY)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_oracle_solves_every_task_and_the_fixed_text_never_moves(name, split):
    tasks = list(AGENTS[name].tasks(split, 0, 25))
    episodes = run_tasks(name, tasks, oracle(name), LONG)
    assert [e.score for e in episodes] == [1.0] * 25 and not any(e.failures for e in episodes)
    for episode in episodes:
        prompts = [s.segments for s in episode.steps]
        assert all(keeps_order(a, b) for a, b in pairwise(prompts))
        assert any(fixed(a) != fixed(b) for a, b in pairwise(prompts)), "the history never grew"
    assert list(AGENTS[name].tasks(split, 0, 25)) == tasks != list(AGENTS[name].tasks(split, 1, 25))


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_without_context_nothing_is_solved(name):
    episodes = run_tasks(name, AGENTS[name].tasks("test", 0, 25), NoContext(oracle(name)), LONG)
    assert sum(e.success for e in episodes) / 25 <= 0.1
    assert {s.name for e in episodes for step in e.steps for s in step.segments} > {"cue", "system"}


@sandboxed
def test_a_bug_is_not_fixed_without_context():
    episodes = run_tasks("swe_agent", fix_tasks("test", 0, 3), NoContext(oracle("swe_agent")))
    assert [(e.stop, e.score) for e in episodes] == [("done", 0.0)] * 3


def test_reflection_is_what_makes_the_second_trial_right():
    task = next(t for t in qa_tasks("test", 0, 20) if all(q.changed for q in t.questions))
    agent = Reflexion(task)
    episode = run_episode(agent, oracle("reflexion"), LONG)
    assert episode.success and agent.trials == [2] * len(task.questions)
    solve = oracle("reflexion").function

    def forgetful(request):
        said = solve(request)
        return " lookup amber ash" if said.startswith(" reflect") else said

    stubborn = Reflexion(task)
    assert run_episode(stubborn, Scripted("forgetful", forgetful), LONG).score == 0.0
    assert stubborn.trials[0] == 3


def test_malformed_output_is_recorded_told_and_bounded():
    task = next(iter(function_tasks("test", 0, 1)))
    episode = run_episode(FunctionCalling(task), says("nonsense"), Stops(retries=2))
    assert episode.stop == "malformed" and len(episode.steps) == 3 and episode.score == 0.0
    assert all(s.call is None and "unknown tool 'nonsense'" in s.error for s in episode.steps)
    assert episode.steps[1].segments[-1].text.startswith("\nError: unknown tool 'nonsense'")
    solve = oracle("function_calling").function
    once = Scripted("once", lambda r: "nonsense" if r.step == 0 else solve(r))
    recovered = run_episode(FunctionCalling(task), once, LONG)
    assert recovered.success and len(recovered.failures) == 1
    assert "Error" not in recovered.steps[2].segments[-1].text


def test_endless_repetition_and_endless_variation_end():
    task = next(iter(function_tasks("test", 0, 1)))
    name = next(iter(task.registers))
    same = run_episode(FunctionCalling(task), says(f"get {name}"), Stops(repeats=3))
    assert same.stop == "repeated" and len(same.steps) == 4
    count = Scripted("counting", lambda r: f"add {r.step} 1")
    assert run_episode(FunctionCalling(task), count, Stops(turns=7)).stop == "turns"
    now = iter(range(1000))
    assert run_episode(FunctionCalling(task), count, Stops(seconds=5), clock=lambda: next(now)).stop == "time"


def test_tool_errors_are_shown_and_do_not_end_the_episode():
    task = next(iter(function_tasks("test", 0, 1)))
    episode = run_episode(FunctionCalling(task), says("get no body", f"add {'9' * 50} 1", "add x 1"), Stops(turns=3))
    assert [bool(s.error) for s in episode.steps] == [True, True, True]
    assert "no name no body" in episode.steps[1].segments[1].text


def test_a_failing_server_is_a_recorded_failure():
    def refuse(request):
        raise PromptError("the prompt is too long")

    episode = run_episode(FunctionCalling(next(iter(function_tasks("test", 0, 1)))), Scripted("full", refuse))
    assert (episode.stop, episode.failure, episode.score) == ("completer", "the prompt is too long", 0.0)


def test_a_json_agent_reads_its_own_history():
    task = next(iter(function_tasks("test", 0, 1)))
    name = next(iter(task.registers))
    call = json.dumps({"name": "get", "arguments": dict(zip(("first", "second"), name.split(), strict=True))})
    episode = run_episode(FunctionCalling(task, grammar="json"), says(call), Stops(turns=2))
    assert episode.steps[0].result == str(task.registers[name])
    assert call in episode.steps[1].segments[2].text


@sandboxed
@pytest.mark.parametrize("kind", ["constant", "reference", "operator"])
def test_the_oracle_fixes_every_kind_of_bug(kind):
    task = next(t for t in fix_tasks("test", 0, 30) if t.kind == kind)
    assert task.files[task.path].split("\n")[task.line - 1] != task.fixed
    [episode] = run_tasks("swe_agent", [task], oracle("swe_agent"))
    assert episode.success and episode.stop == "done", episode.failure
    assert [s.call.tool for s in episode.steps] == ["search", "open", "edit", "test", "submit"]
    assert episode.steps[3].result == "passed"


@sandboxed
def test_wrong_and_cheating_patches_do_not_pass():
    task = next(t for t in fix_tasks("test", 1, 30) if t.kind == "constant")
    site, test = f"open {task.path}", f"open {task.fail_to_pass[0].split('::')[0]}"
    wrong = task.fixed.replace('"', '"not ', 1)
    cheat = ("edit 5     assert True", "submit")
    for outputs in (["submit"], [site, f"edit {task.line} {wrong}", "submit"], [test, *cheat]):
        [episode] = run_tasks("swe_agent", [task], says(*outputs))
        assert episode.stop == "done" and episode.score == 0.0, outputs


@sandboxed
def test_no_path_leaves_the_worktree(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    with closing(SWEAgent(next(iter(fix_tasks("test", 0, 1))))) as agent:
        (agent.workspace.root / "link").symlink_to(secret)
        (agent.workspace.root / "loop").symlink_to("loop")
        paths = ("../x", str(secret), "/etc/passwd", "link", "loop", "conf/../../x", ".git", "conf", "a" * 600)
        model = Scripted("hostile", lambda r: f"open {paths[r.step]}")
        episode = run_episode(agent, model, Stops(turns=len(paths), repeats=99))
        assert [bool(s.error) for s in episode.steps] == [True] * len(paths)
        assert "hidden" not in "".join(s.text for step in episode.steps for s in step.segments)


# pytest captures fd 1 and keeps the real one under another number: a flood goes to all of them.
BOMBS = {
    "time": "while True: pass",
    "output": "exec('import os, contextlib\\nwhile 1:\\n for n in range(3, 30):\\n  with contextlib.suppress(OSError): "
    "os.write(n, bytes(9999))')",
    "processes": "exec('import os\\nwhile 1:\\n try: os.fork()\\n except OSError: pass')",
}


@sandboxed
@pytest.mark.parametrize("stopped", BOMBS)
def test_hostile_code_ends_in_a_recorded_failure(stopped):
    task = next(iter(fix_tasks("test", 0, 1)))
    seconds = 1.5 if stopped == "time" else 60.0  # the others end by their own bound, however slowly pytest starts
    with closing(SWEAgent(task, Limits(seconds, processes=24, output_bytes=50_000))) as agent:
        episode = run_episode(agent, says(f"open {task.path}", f"edit 1 {BOMBS[stopped]}", "test", "submit"))
        assert episode.stop == "done" and episode.score == 0.0
        assert episode.steps[2].error == f"the tests were ended: {stopped}"


@sandboxed
def test_git_does_not_believe_a_worktree_that_hostile_code_changed(tmp_path):
    task, mark = next(iter(fix_tasks("test", 0, 1))), tmp_path / "ran"
    with closing(SWEAgent(task)) as agent:
        root = agent.workspace.root
        (root / "evil").mkdir()
        (root / "evil/config").write_text(
            f'[core]\n\tfsmonitor = "touch {mark}"\n[diff "x"]\n\tcommand = touch {mark}\n'
        )
        (root / ".gitattributes").write_text("*.py diff=x filter=x\n")
        (root / ".git").write_text(f"gitdir: {root}/evil\n")
        model = says(f"open {task.path}", f"edit {task.line} {task.fixed}", "submit")
        episode = run_episode(agent, model)
        assert episode.success and not mark.exists()


def test_a_replay_that_does_not_fit_is_loud():
    def other(request):
        raise DataError("segment 'notes' differs from the trace")

    with pytest.raises(DataError):
        run_episode(FunctionCalling(next(iter(function_tasks("test", 0, 1)))), Scripted("replay", other))
