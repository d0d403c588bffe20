"""Every loader on a small local file in its official schema (invented content)."""

import json
from itertools import pairwise

import pytest
from datasets import Dataset

from cacheslide.errors import DataError
from harness.tasks import hotpotqa, layout, msc, samsum, swebench
from harness.tasks.example import fixed
from harness.tasks.registry import TASKS, load
from tests.helpers.places import DATA

FILES = {
    name: DATA / f"{name}.jsonl"
    for name in ("hotpotqa", "musique", "2wikimqa", "samsum", "msc", "msc_self_instruct", "swebench")
}
METRICS = {"samsum": "rouge_l", "msc": "rouge_l", "msc_self_instruct": "rouge_l", "swebench": "success"}


def raw(name):
    return [json.loads(line) for line in FILES[name].read_text().splitlines()]


def updated(segments):
    return [s for s in segments if s.role == "recompute"]


@pytest.mark.parametrize("name", FILES)
def test_every_example_has_the_papers_layout(name):
    examples = list(load(name, "validation", path=FILES[name]))
    assert len(examples) >= 2
    assert len({e.id for e in examples}) == len(examples)
    for example in examples:
        assert example.task == name
        assert example.metric == METRICS.get(name, "f1")
        assert [s.role for s in example.segments[:2]] == ["reuse", "recompute"]
        assert {s.role for s in example.segments[2:]} == {"reuse"}
        assert fixed(example.segments) == fixed(example.previous)
        assert len(updated(example.segments)) == len(updated(example.previous)) == 1
        assert updated(example.segments)[0].text != updated(example.previous)[0].text
        assert all(s.text.endswith("\n") and s.text.strip() for s in example.segments)
        assert all(isinstance(value, str) for value in example.meta.values())
        assert example.meta["file"] == FILES[name].name


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("samsum",)])
def test_updated_text_never_holds_the_answer(name):
    for seed in range(20):
        for example in load(name, "validation", path=FILES[name], seed=seed):
            for segment in (*updated(example.segments), *updated(example.previous)):
                assert not layout.mentions(segment.text, example.questions[0].answers), (seed, segment.text)


def test_scratchpad_depends_on_seed_and_row_only():
    first = list(load("hotpotqa", "validation", path=FILES["hotpotqa"], seed=1))
    assert first == list(load("hotpotqa", "validation", path=FILES["hotpotqa"], seed=1))
    texts = {tuple(e.segments[1].text for e in load("hotpotqa", "v", path=FILES["hotpotqa"], seed=s)) for s in range(5)}
    assert len(texts) == 5
    assert len({e.segments[1].text for e in first}) == len(first)


def test_scratchpad_of_a_comparison_names_neither_of_the_compared_titles():
    for seed in range(20):
        example = list(load("hotpotqa", "validation", path=FILES["hotpotqa"], seed=seed))[1]
        assert not layout.mentions(example.segments[1].text, ["Grell Bridge", "Sunder Tunnel"])


@pytest.mark.parametrize("answer", ["Veldhaven", "Pell Observatory", "Pell Observatory on the hill"])
def test_scratchpad_names_documents_although_a_title_holds_the_answer(tmp_path, answer):
    row = raw("hotpotqa")[0] | {"answer": answer}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for seed in range(20):
        (example,) = load("hotpotqa", "validation", path=tmp_path / "a.jsonl", seed=seed)
        assert "Attempt 1: I read " in example.segments[1].text


def test_scratchpad_survives_an_answer_that_its_own_sentences_use(tmp_path):
    row = raw("hotpotqa")[0] | {"answer": "the question"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for seed in range(20):
        (example,) = load("hotpotqa", "validation", path=tmp_path / "a.jsonl", seed=seed)
        assert not layout.mentions(example.segments[1].text, ["the question"])


def test_hotpotqa_maps_paragraphs_in_order():
    example = next(load("hotpotqa", "validation", path=FILES["hotpotqa"]))
    assert [s.name for s in example.segments] == ["system", "scratchpad", *(f"document_{i}" for i in range(4))]
    expected = "Title: Mira Tandel\nMira Tandel was born in Veldhaven. She studied optics.\n"
    assert example.segments[4].text == expected
    (question,) = example.questions
    assert question.text == "Question: In which town was the founder of the Orlo Clockworks born?\nAnswer:"
    assert (question.id, question.answers, question.depth) == ("h0", ("Veldhaven",), None)
    assert example.meta["type"] == "bridge"


def test_hotpotqa_reads_the_original_release_too(tmp_path):
    rows = []
    for row in raw("hotpotqa"):
        context, facts = row["context"], row["supporting_facts"]
        row["_id"] = row.pop("id")
        row["context"] = [list(pair) for pair in zip(context["title"], context["sentences"], strict=True)]
        row["supporting_facts"] = [list(pair) for pair in zip(facts["title"], facts["sent_id"], strict=True)]
        rows.append(row)
    file = tmp_path / "hotpotqa.jsonl"
    file.write_text(json.dumps(rows))
    original = list(load("hotpotqa", "validation", path=file))
    assert original == list(load("hotpotqa", "validation", path=FILES["hotpotqa"]))


def test_musique_has_aliases_depth_and_no_unanswerable_rows():
    first, second = load("musique", "validation", path=FILES["musique"])
    assert first.questions[0].answers == ("Jon Aske", "Jonathan Aske", "J. Aske")
    assert (first.questions[0].depth, second.questions[0].depth) == (2, 3)
    titles = [s.text.splitlines()[0] for s in first.segments[2:]]
    assert titles == ["Title: Cobb Street", "Title: Tarn Ballads", "Title: Ilse Brandt"]


@pytest.mark.parametrize("layout_name", ["records", "json_text", "columns", "content"])
def test_2wikimqa_reads_all_published_layouts(tmp_path, layout_name):
    rows = raw("2wikimqa")
    names = {
        "context": ("title", "content" if layout_name == "content" else "sentences"),
        "supporting_facts": ("title", "sent_id"),
        "evidences": ("fact", "relation", "entity"),
    }
    for row in rows:
        for field, parts in names.items():
            if layout_name == "json_text":
                row[field] = json.dumps(row[field])
            elif layout_name != "records":
                row[field] = {part: [record[i] for record in row[field]] for i, part in enumerate(parts)}
    file = tmp_path / "2wikimqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load("2wikimqa", "validation", path=file)
    assert first.segments[3].text == "Title: Lew Farrow\nLew Farrow was a director. His mother was Edda Farrow.\n"
    assert (first.questions[0].depth, second.questions[0].depth) == (2, None)
    assert [e.questions[0].answers for e in (first, second)] == [("Edda Farrow",), ("Night Ledger",)]


def test_samsum_shares_its_shots_and_never_asks_about_them():
    examples = list(load("samsum", "train", path=FILES["samsum"], seed=3))
    shots = {tuple(s.text for s in e.segments[2:]) for e in examples}
    assert len(shots) == 1 and len(next(iter(shots))) == samsum.SHOTS
    # eight rows with a dialogue (the ninth has none), of which four are shots
    assert len(examples) == 4
    for example in examples:
        dialogue = example.segments[1].text.split("\n", 1)[1]
        assert not any(dialogue in shot for shot in next(iter(shots)))
    for earlier, later in pairwise(examples):
        assert later.previous[1].text == earlier.segments[1].text
    assert examples[0].previous[1].text == examples[1].segments[1].text


def test_samsum_draws_other_shots_for_another_seed():
    shots = {
        tuple(s.text for s in next(load("samsum", "train", FILES["samsum"], seed=n)).segments[2:]) for n in range(5)
    }
    assert len(shots) > 1


def test_samsum_leaves_out_a_repeated_dialogue(tmp_path):
    rows = [row for row in raw("samsum") if row["dialogue"]]
    rows = [copy for i, row in enumerate(rows) for copy in (row, row | {"id": f"copy-{i}"})]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(load("samsum", "train", tmp_path))
    assert len(examples) >= 2
    assert all(e.segments[1].text != e.previous[1].text for e in examples)


def test_samsum_needs_rows_beside_its_shots(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw("samsum")[:3]))
    with pytest.raises(DataError, match="found 3 rows"):
        list(load("samsum", "train", path=tmp_path))


def test_msc_groups_sessions_and_asks_for_the_last_utterance():
    first, second = load("msc", "test", path=FILES["msc"])
    assert first.id == "msc-test-0" and second.id == "msc-test-2"  # conversation 1 has one session only
    assert [s.name for s in first.segments] == ["system", "working_memory", "session_1", "session_2"]
    assert (
        first.segments[3].text == "Session 2:\nSpeaker 1: I moved to Pell.\nSpeaker 2: I bought a boat called Wren.\n"
    )
    assert first.questions[0].text == "Current session:\nSpeaker 1: How is the boat?\nSpeaker 2:"
    assert first.questions[0].answers == ("She is in the dock for the winter.",)
    assert second.questions[0].text.endswith("Speaker 2: Good to hear from you.\nSpeaker 1:")
    assert "- Speaker 1: I moved to Pell." in first.segments[1].text
    assert "I moved to Pell." not in first.previous[1].text


def test_msc_self_instruct_asks_memgpts_question_and_hides_its_answer_from_the_memory():
    first, second = load("msc_self_instruct", "train", path=FILES["msc_self_instruct"])
    assert first.questions[0].text.endswith("Question: What was my boat called?\nAnswer:")
    assert first.questions[0].answers == ("Wren!",)
    assert "Wren" not in first.segments[1].text and "bees" in first.segments[1].text
    assert "Speaker 1: I bought a boat called Wren." in first.segments[2].text
    assert second.questions[0].answers == ("Leek soup tonight.",)


def test_msc_memory_always_changes():
    for personas in ([], [[], []], [["a"], []], [["a", "b"], ["c"]]):
        now, before = msc.working_memory(personas, "unrelated")
        assert now != before


def test_swebench_with_files_shows_a_window_of_one_of_them():
    *_, example = load("swebench", "test", path=FILES["swebench"])
    assert [s.name for s in example.segments] == ["system", "observation", "issue", "README.md", "abacus/add.py"]
    assert example.segments[3].text == "[start of README.md]\n1 # abacus\n2 \n3 Counts.\n[end of README.md]\n"
    windows = {next(_third(seed)).segments[1].text for seed in range(12)}
    long = [w for w in windows if "abacus/add.py (150 lines total)" in w]
    assert long and any("[File: README.md (3 lines total)]" in w for w in windows)
    starts = {next(line for line in w.splitlines() if " line " in line) for w in long}
    assert len(starts) > 1
    for window in long:
        numbered = [line for line in window.splitlines() if line.split(" ", 1)[-1].startswith("line ")]
        assert swebench.WINDOW[0] <= len(numbered) <= swebench.WINDOW[1]
        above = [line for line in window.splitlines() if line.endswith("more lines above)")]
        assert numbered[0] == f"{int(above[0][1:].split()[0]) + 1 if above else 1} line " + numbered[0].split()[-1]


def _third(seed):
    examples = load("swebench", "test", path=FILES["swebench"], seed=seed)
    next(examples)
    next(examples)
    return examples


def test_swebench_without_files_uses_the_code_in_the_issue_or_a_clean_tree():
    snippet, plain, _ = load("swebench", "test", path=FILES["swebench"])
    assert "1:from abacus import add\n2:assert add(1, 1) == 2\n" in snippet.segments[1].text
    assert "nothing to commit" in plain.segments[1].text
    for example in (snippet, plain):
        assert [s.name for s in example.segments] == ["system", "observation", "issue"]
        assert example.meta["base_commit"] in example.previous[1].text


def test_swebench_never_shows_patch_tests_or_hints():
    for example in load("swebench", "test", path=FILES["swebench"]):
        shown = "".join(s.text for s in (*example.segments, *example.previous)) + example.questions[0].text
        for secret in ("return a + b", "sign in add.py", "test_add"):
            assert secret not in shown
        assert "return a + b" in example.questions[0].answers[0]


def test_swebench_meta_is_enough_to_grade():
    plain = list(load("swebench", "test", path=FILES["swebench"]))[1]
    assert set(swebench.REQUIRED) - {"patch", "problem_statement", "hints_text"} <= set(plain.meta)
    assert not {"patch", "problem_statement", "hints_text", "text"} & set(plain.meta)
    assert json.loads(plain.meta["FAIL_TO_PASS"]) == ["tests/test_add.py::test_add"]
    assert plain.meta["created_at"] == "2021-03-04T05:06:07Z"
    assert plain.meta["difficulty"] == "<15 min fix"


def test_swebench_accepts_lists_of_tests(tmp_path):
    row = raw("swebench")[1] | {"FAIL_TO_PASS": ["a", "b"]}
    (tmp_path / "dev.json").write_text(json.dumps([row]))
    (example,) = load("swebench_lite", "dev", path=tmp_path)
    assert json.loads(example.meta["FAIL_TO_PASS"]) == ["a", "b"]
    assert example.task == "swebench_lite"


@pytest.mark.parametrize("name", FILES)
def test_parquet_gives_the_same_examples_as_json_lines(tmp_path, name):
    rows = raw(name)
    if name == "2wikimqa":  # pairs of text and list do not fit a table: the hub's parquet holds JSON text
        rows = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in r.items()} for r in rows]
    columns = dict.fromkeys(key for row in rows for key in row)
    Dataset.from_list([{**columns, **row} for row in rows]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    expected = list(load(name, "test", path=FILES[name], seed=5))
    found = list(load(name, "test", path=tmp_path, seed=5))
    for example in (*expected, *found):
        del example.meta["file"]
    assert found == expected


def test_parquet_of_the_hubs_hotpotqa_schema_round_trips(tmp_path):
    file = tmp_path / "validation.parquet"
    Dataset.from_list(raw("hotpotqa"), features=hotpotqa.FEATURES).to_parquet(file)
    found = [e.segments for e in load("hotpotqa", "validation", path=file)]
    assert found == [e.segments for e in load("hotpotqa", "validation", path=FILES["hotpotqa"])]


def test_csv_keeps_numeric_ids_as_text(tmp_path):
    rows = [row for row in raw("samsum") if row["dialogue"]]
    Dataset.from_list(rows).to_csv(tmp_path / "validation.csv")
    found = list(load("samsum", "validation", path=tmp_path))
    kept = tmp_path / "validation.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(load("samsum", "validation", path=kept))
    assert [e.id for e in found] == [e.id for e in expected]
    assert [e.segments for e in found] == [e.segments for e in expected]


def test_limit_takes_the_first_examples():
    every = list(load("hotpotqa", "validation", path=FILES["hotpotqa"]))
    assert list(load("hotpotqa", "validation", path=FILES["hotpotqa"], limit=2)) == every[:2]
    assert list(load("hotpotqa", "validation", path=FILES["hotpotqa"], limit=0)) == []
    with pytest.raises(DataError, match="limit"):
        load("hotpotqa", "validation", path=FILES["hotpotqa"], limit=-1)


def test_limit_does_not_read_further_than_it_needs(tmp_path):
    lines = FILES["hotpotqa"].read_text().splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join([lines[0], "not json"]))
    assert len(list(load("hotpotqa", "validation", path=tmp_path, limit=1))) == 1


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError) as error:
        load("hotpot", "validation")
    for name in TASKS:
        assert name in str(error.value)
