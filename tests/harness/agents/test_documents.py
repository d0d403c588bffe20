"""Real rows through the loops, from local data in the data sets' own format, and agents on an in-process engine."""

from itertools import pairwise

import pytest

from cacheslide.errors import ConfigError
from harness.agents import swebench_docker
from harness.agents.completer import Request, Scripted
from harness.agents.documents import ASK, DocumentReader, Library, TextReflexion
from harness.agents.loop import Stops, run_episode
from harness.agents.offline_engine import OfflineEngine, split
from harness.agents.oracle import oracle
from harness.agents.registry import entry
from harness.agents.trace import Recorded, prompt_digest, read_episodes, write_episodes
from harness.backends.client import Result
from harness.backends.tokens import Tokens
from harness.tasks import registry
from harness.tasks.example import TextSegment
from tests.helpers.made_agents import keeps_order
from tests.helpers.places import DATA, ROOT

MODEL = ROOT / "models/tiny-llama-12m"


@pytest.fixture(scope="module")
def rows():
    return list(registry.load("hotpotqa", "validation", path=DATA / "hotpotqa.jsonl"))


def test_a_row_becomes_an_episode_that_reflects_and_tries_again(rows, tmp_path):
    row = rows[0]
    said = iter([" answer Orlo", " reflect the founder is Mira Tandel", f" answer The {row.questions[0].answers[0]}."])
    episode = run_episode(TextReflexion(row), Scripted("model", lambda r: next(said)), Stops())
    assert (
        episode.success and episode.stop == "done" and [s.result for s in episode.steps] == ["wrong", "noted", "right"]
    )
    second, third = (Request("s", 0, s.segments, 1).text for s in episode.steps[1:])
    assert "Feedback: Orlo is wrong." in second and "Reflection: the founder is Mira Tandel" in third
    assert "Feedback" not in third and "Trial 1: Orlo" in third
    assert row.questions[0].answers[0] not in "".join(s.text for s in episode.steps[1].segments if "doc" not in s.name)
    prompts = [s.segments for s in episode.steps]
    assert all(keeps_order(a, b) for a, b in pairwise(prompts))
    write_episodes(tmp_path / "t.jsonl", [episode])
    again = run_episode(TextReflexion(row), Recorded(read_episodes(tmp_path / "t.jsonl")[0]), Stops())
    assert [prompt_digest(s.segments) for s in again.steps] == [prompt_digest(p) for p in prompts]


def test_three_wrong_answers_end_a_row_and_every_row_can_be_run(rows):
    for row in rows:
        episode = run_episode(TextReflexion(row), Scripted("model", lambda r: " answer nothing of the kind"), Stops())
        assert (episode.stop, episode.score, len(episode.steps)) == ("done", 0.0, 3)


def test_a_reader_retrieves_runs_commands_and_answers_last(rows):
    name = next(s.name for s in rows[0].segments if "Mira Tandel was born" in s.text)
    said = [f"open {name}", "I would search optics", "hm", " Veldhaven"]
    agent, replies = DocumentReader(rows[0], 4), iter(said)
    episode = run_episode(agent, Scripted("model", lambda r: next(replies)), Stops(turns=4, repeats=4))
    assert episode.success and [s.call.tool for s in episode.steps] == ["open", "search", "none", "answer"]
    assert "Mira Tandel was born" in episode.steps[1].segments[1].text  # what `open` printed is this turn's observation
    assert "no command understood" in episode.steps[3].segments[1].text
    assert sum(map(len, agent.retrieved)) == len({n for turn in agent.retrieved for n in turn}) == 4
    record = [s.text for s in episode.steps[3].segments if s.name.startswith("record")]
    assert [ASK + x for x in said[:3]] == [t for t in record if t.startswith(ASK)]


def test_the_library_ranks_by_shared_rare_words():
    library = Library({"a": "the cat sat", "b": "the dog sat on the rug", "c": "the end"})
    assert library.rank("dog rug")[0] == "b" and library.rank("cat", without=["a"])[0] != "a"
    assert library.search("cat") == "a: the cat sat" and "nothing found" in library.search("zebra")
    assert library.open("z") == "no file z"


def test_swe_bench_instances_refuse_without_docker(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="docker images, and docker cannot be used here"):
        swebench_docker.grade_instances("SWE-bench/SWE-bench", "test", {"tern__abacus-1": "--- a"}, "run")


class FakeEngine:
    """An engine whose tokens are characters; it answers from a list and notes what it was asked."""

    def __init__(self, answers) -> None:
        self.answers, self.asked = iter(answers), []

    def begin(self):
        return [1]

    def encode(self, text):
        return [1000 + ord(c) for c in text]

    def ask(self, ids, annotations, max_new_tokens, stop_ids=()):
        self.asked.append((list(ids), annotations))
        text, ids = next(self.answers)
        return Result("", 0.0, 0.2, [0.1], len(ids), text, token_ids=ids)


def test_generated_text_keeps_its_ids_and_is_annotated_as_history(rows):
    """The generated ids (7, 8, 9) are not what encoding the text would give; the next turn must send them again."""
    engine = FakeEngine([("open Mira Tandel", [7, 8, 9]), ("x", [5, 6]), (" Veldhaven", [4])])
    served = OfflineEngine(engine, "cacheslide")
    episode = run_episode(DocumentReader(rows[0], 3), served, Stops(turns=3, repeats=3))
    assert episode.success
    (first, one), (second, two), (third, three) = engine.asked
    assert second[two["segments"][2][0] : two["segments"][2][1]] == [*first[one["history"] :], 7, 8]
    assert second[two["segments"][3][0] : two["segments"][3][1]] == [9]  # the last one had no KV yet
    for (before, _), (after, annotations) in pairwise(engine.asked):
        assert (
            annotations["segments"][0] == [0, one["segments"][0][1]] and len(after) > 0 and before[0] == after[0] == 1
        )
    assert three["segments"][: len(two["segments"])] != two["segments"]  # the observation moved them
    kept = [third[a:b] for a, b in three["segments"]]
    assert [second[a:b] for a, b in two["segments"]] == kept[: len(two["segments"])]


@pytest.mark.parametrize("name", ["reflexion", "memgpt", "function_calling"])
def test_every_agent_is_sent_what_the_in_process_backend_is_sent(name):
    """Token ids and fixed spans of a whole episode, whatever the engine keeps between turns."""
    tokens, answers = Tokens(MODEL), oracle(name)
    task = next(iter(entry(name).tasks("test", 3, 1)))
    episode = run_episode(entry(name).agent(task), answers, Stops(turns=60))
    engine = FakeEngine((s.completion.text, list(tokens.encode(s.completion.text))) for s in episode.steps)
    engine.begin, engine.encode = (lambda: [tokens.tokenizer.bos_token_id]), (lambda text: list(tokens.encode(text)))
    again = run_episode(entry(name).agent(task), OfflineEngine(engine, "cacheslide"), Stops(turns=60))
    assert again.success and len(engine.asked) == len(episode.steps)
    for (ids, annotations), step in zip(engine.asked, episode.steps, strict=True):
        prompt = tokens.prompt(step.segments)
        assert ids == list(prompt.token_ids)
        fixed = [[c.start, c.end] for c in prompt.chunks(10**6)]
        assert annotations["segments"] == fixed


def test_other_templates_are_annotated_only():
    def segments(shape):
        return tuple(TextSegment(f"{i}", f"t{i}", "reuse" if c == "F" else "recompute") for i, c in enumerate(shape))

    assert split(segments("FUUFFU")) == ("t0", "t1t2", ["t3", "t4"], "t5")
    assert split(segments("FFFU")) == ("t0", "", ["t1", "t2"], "t3") and split(segments("FU")) == ("t0", "", [], "t1")
    assert split(segments("FUFUFU")) is split(segments("UFU")) is split(segments("FUF")) is None
    engine = FakeEngine([("a", [7])] * 3)
    served = OfflineEngine(engine, "epic")
    for step in range(2):
        served.complete(Request("s", step, segments("FUFUFU"), 4))
    assert engine.asked[0] == engine.asked[1] and engine.asked[0][1] == {"segments": [[0, 3], [5, 7], [9, 11]]}
    served.complete(Request("s", 2, segments("FUFU"), 4))  # a shape that fits, but its session began otherwise
    assert "history" not in engine.asked[2][1]
