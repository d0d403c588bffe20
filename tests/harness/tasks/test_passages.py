"""Questions with passages, from every schema that is recognised (invented rows); real files where there are some."""

import json

import pytest

from cacheslide.errors import DataError
from harness.tasks.passages import answer_passages, others_than, read_passages
from harness.tasks.registry import load
from tests.helpers.real_data import real_file

HOTPOT = {
    "_id": "5a1",
    "question": "Which river does the mill of Arn stand on?",
    "answer": "the Lume",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Arn", 0], ["Mill of Arn", 1]],
    "context": [
        ["Ost", ["Ost is a hill.", " It is bare."]],
        ["Arn", ["Arn is a village."]],
        ["Mill of Arn", ["The mill is old.", " It stands on the lume."]],
    ],
}
MUSIQUE = {
    "id": "2hop__1",
    "paragraphs": [
        {"idx": 1, "title": "Arn", "paragraph_text": "Arn lies on the Lume.", "is_supporting": True},
        {"idx": 0, "title": "Ost", "paragraph_text": "Ost is a hill.", "is_supporting": False},
    ],
    "question": "Where is Arn?",
    "question_decomposition": [],
    "answer": "Lume",
    "answer_aliases": ["the Lume"],
    "answerable": True,
}
BLEND = {
    "question": "Where is Arn?",
    "answers": ["Lume", "the Lume"],
    "ctxs": [
        {"title": "", "text": "ost is a hill ."},
        {"title": "Arn", "text": "arn lies on the lume , in the south ."},
    ],
}
LONG = {
    "input": "Where is Arn?",
    "context": "Passage 1:\nOst\nOst is a hill.\n\nPassage 2:\nArn\nThe sign says\nPassage 7:\nLume.\n",
    "answers": ["Lume"],
    "length": 12,
    "dataset": "2wikimqa",
    "language": "en",
    "all_classes": None,
    "_id": "ab12",
}


def write(path, rows, lines):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_hotpotqa_as_one_list_or_as_lines_with_gold_passages(tmp_path, lines):
    columns = HOTPOT | {
        "id": "5a2",
        "supporting_facts": {"title": ["Ost"], "sent_id": [0]},
        "context": {"title": ["Ost", "Arn"], "sentences": [["Ost is a hill."], ["Arn."]]},
    }
    del columns["_id"]
    first, second = read_passages(write(tmp_path / "x.jsonl", [HOTPOT, columns], lines))
    assert (first.id, first.dataset, first.answers, first.gold) == ("5a1", "hotpotqa", ("the Lume",), (1, 2))
    assert first.passages[0] == "Ost\nOst is a hill. It is bare." and len(first.passages) == 3
    assert answer_passages(first) == (2,)
    assert (second.id, second.gold) == ("5a2", (0,))


def test_2wikimqas_official_rows_have_no_level(tmp_path):
    row = {k: v for k, v in HOTPOT.items() if k != "level"} | {"evidences": [["Arn", "river", "Lume"]]}
    assert read_passages(write(tmp_path / "dev.json", [row], False))[0].dataset == "2wikimqa"


def test_musique_in_its_own_order_and_in_cacheblends_format(tmp_path):
    (own,) = read_passages(write(tmp_path / "musique.jsonl", [MUSIQUE], True))
    assert own.passages == ("Ost\nOst is a hill.", "Arn\nArn lies on the Lume.") and own.gold == (1,)
    (blend,) = read_passages(write(tmp_path / "musique_s.json", [BLEND], False))
    assert blend.dataset == "musique" and blend.gold == () and answer_passages(blend) == (1,)
    assert blend.id == f"musique-{blend.sha256[:16]}" and blend.passages[0] == "ost is a hill ."


def test_longbench_passages_are_split_at_their_numbered_heads(tmp_path):
    (row,) = read_passages(write(tmp_path / "2wikimqa.jsonl", [LONG], True))
    assert (row.id, row.dataset, row.gold) == ("ab12", "2wikimqa", ())
    assert row.passages == ("Ost\nOst is a hill.", "Arn\nThe sign says\nPassage 7:\nLume.")


def test_a_rows_hash_depends_on_its_content_only(tmp_path):
    turned = dict(reversed(LONG.items()))
    other = LONG | {"answers": ["Ost"]}
    hashes = [read_passages(write(tmp_path / "a.jsonl", [row], True))[0].sha256 for row in (LONG, turned, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({k: v for k, v in HOTPOT.items() if k != "answer"}, "row 1: field 'answer' is missing"),
        (HOTPOT | {"context": [["Ost", "text"]]}, "row 1: field 'context.sentences[0]' must be a list of string"),
        ({k: v for k, v in HOTPOT.items() if k != "context"}, "row 1: field 'context' is missing"),
        (BLEND | {"ctxs": [{"text": "x"}]}, "row 1: field 'ctxs[0].title' is missing"),
        (BLEND | {"ctxs": []}, "row 1: no passage"),
        (BLEND | {"answers": []}, "row 1: no answer"),
        (LONG | {"context": "a story"}, "row 1: field 'context' has no line 'Passage 1:'"),
        ({"text": "x"}, "row 1: no schema that is known"),
        (3, "row 1: expected an object"),
    ],
)
def test_another_schema_is_one_line_that_names_file_row_and_field(tmp_path, row, says):
    path = write(tmp_path / "given.json", [row], False)
    with pytest.raises(DataError) as wrong:
        read_passages(path)
    assert f"{path}, {says}" in str(wrong.value) and "\n" not in str(wrong.value)


def test_missing_empty_and_broken_files_are_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(LONG) + "\n{")
    write(tmp_path / "twice.json", [LONG, LONG], False)
    for name, says in {
        "none.json": "no such file",
        "empty.jsonl": "holds no rows",
        "broken.jsonl": "row 2: not valid JSON",
        "twice.json": "row 2: id 'ab12' stands twice",
    }.items():
        with pytest.raises(DataError, match=says):
            read_passages(tmp_path / name)


def test_the_real_sample_of_hotpotqa():
    rows = read_passages(real_file("hotpotqa/distractor_sample.jsonl"))
    assert len(rows) == 70 and all(2 <= len(r.passages) <= 10 and len(r.gold) == 2 for r in rows)


def test_the_real_inputs_of_cacheblend():
    rows = read_passages(real_file("musique/musique_s.json"))
    assert len(rows) == 100 and {r.dataset for r in rows} == {"musique"}
    assert sum(bool(answer_passages(r)) for r in rows) > 50


def test_the_real_instances_of_swe_bench():
    for name in ("dev_easy_5.json", "lite_test.json"):
        examples = list(load("swebench", "test", path=real_file(f"swebench/{name}")))
        assert len(examples) == 5 and all(e.questions[0].answers[0].startswith("diff --git") for e in examples)


def test_others_share_neither_id_nor_hash_nor_question(tmp_path):
    rows = [MUSIQUE | {"id": f"2hop__{i}", "question": f"Where is the Arn of {i}?"} for i in range(6)]
    all_rows = read_passages(write(tmp_path / "all.json", rows, False))
    same_id = MUSIQUE | {"id": "2hop__1", "question": "Another one?"}
    known = read_passages(write(tmp_path / "known.json", [rows[0], same_id], True))
    asked = BLEND | {"question": "where is  arn of 4"}  # as another schema has it
    known += read_passages(write(tmp_path / "blend_s.json", [asked], False))
    assert [r.id for r in others_than(all_rows, known)] == ["2hop__2", "2hop__3", "2hop__5"]
    assert others_than(all_rows, []) == all_rows and others_than(all_rows, all_rows) == []
