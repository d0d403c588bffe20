"""A wrong file, row or field, and an absent network, each give one line that names it."""

import json
import re

import pandas as pd
import pytest
from datasets import Features, List, Value

from cacheslide.errors import DataError
from harness.tasks import hub
from harness.tasks.registry import TASKS, load
from harness.tasks.schema import Schema
from tests.helpers.places import DATA


def write(tmp_path, name, change, row=1):
    """The test file of `name` with `change` applied to one row (counted from 1)."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    change(rows[row - 1])
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def message(name, file):
    with pytest.raises(DataError) as error:
        list(load(name, "validation", path=file))
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hotpotqa", "answer"),
        ("hotpotqa", "context"),
        ("musique", "question_decomposition"),
        ("musique", "answer_aliases"),
        ("2wikimqa", "evidences"),
        ("samsum", "summary"),
        ("msc", "persona2"),
        ("msc_self_instruct", "previous_dialogs"),
        ("swebench", "problem_statement"),
        ("swebench", "hints_text"),
    ],
)
def test_a_missing_field_is_named_with_file_and_row(tmp_path, name, field):
    file = write(tmp_path, name, lambda row: row.pop(field), row=2)
    assert message(name, file) == f"{file}, row 2: field {field!r} is missing"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("hotpotqa", lambda r: r.update(id=7), "field 'id' must be string, found int"),
        ("hotpotqa", lambda r: r.update(answer=None), "field 'answer' must be string, found null"),
        ("hotpotqa", lambda r: r["context"].pop("sentences"), "field 'context.sentences' is missing"),
        (
            "hotpotqa",
            lambda r: r["context"]["sentences"].__setitem__(1, "one text"),
            "field 'context.sentences[1]' must be a list of string, found string",
        ),
        (
            "hotpotqa",
            lambda r: r.update(context="text"),
            "field 'context' must be an object with title, sentences, found string",
        ),
        ("hotpotqa", lambda r: r["context"]["title"].pop(), "field 'context' has 3 titles but 4 paragraphs"),
        ("hotpotqa", lambda r: r.update(answer=" "), "field 'answer' is empty; this split has no gold answers"),
        ("musique", lambda r: r.update(answerable="yes"), "field 'answerable' must be bool, found str"),
        ("musique", lambda r: r["paragraphs"][2].pop("idx"), "field 'paragraphs[2].idx' is missing"),
        (
            "musique",
            lambda r: r["paragraphs"][0].update(idx=True),
            "field 'paragraphs[0].idx' must be int32, found bool",
        ),
        ("2wikimqa", lambda r: r.update(context="[["), "field 'context' holds text that is not valid JSON"),
        (
            "2wikimqa",
            lambda r: r.update(context="[" * 10**5),
            "field 'context' holds text that is not valid JSON (nested",
        ),
        (
            "2wikimqa",
            lambda r: r["evidences"][0].pop(),
            "field 'evidences' must be an object with fact, relation, entity",
        ),
        ("samsum", lambda r: r.update(dialogue=["a"]), "field 'dialogue' must be string, found list"),
        ("msc", lambda r: r.update(session_id="0"), "field 'session_id' must be int64, found string"),
        ("msc", lambda r: r["speaker"].pop(), "field 'speaker' has 1 entries, 'dialogue' has 2"),
        ("msc_self_instruct", lambda r: r.update(previous_dialogs=[]), "field 'previous_dialogs' is empty"),
        ("msc_self_instruct", lambda r: r["dialog"][1].pop("id"), "field 'dialog[1].id' is missing"),
        ("swebench", lambda r: r.update(text=3), "field 'text' must be string, found int"),
    ],
)
def test_a_wrong_value_is_named_with_file_row_and_field(tmp_path, name, change, said):
    file = write(tmp_path, name, change)
    assert message(name, file).startswith(f"{file}, row 1: {said}")


def test_a_row_that_is_no_object(tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_text("[1, 2]\n")
    assert message("hotpotqa", file) == f"{file}, row 1: expected an object with fields, found int"


def test_a_wrong_column_type_in_parquet_is_named(tmp_path):
    rows = [json.loads(line) for line in (DATA / "samsum.jsonl").read_text().splitlines()]
    file = tmp_path / "validation.parquet"
    pd.DataFrame(rows).assign(summary=range(len(rows))).to_parquet(file)
    assert message("samsum", file) == f"{file}, row 1: field 'summary' must be string, found int"
    pd.DataFrame(rows).drop(columns="summary").to_parquet(file)
    assert message("samsum", file) == f"{file}, row 1: field 'summary' is missing"


@pytest.mark.parametrize(
    ("file_name", "content", "said"),
    [
        ("a.jsonl", '{"id": "1"}\n{"id":\n', "row 1: field 'question' is missing"),
        ("a.jsonl", '\n{"id":\n', "row 2: not valid JSON"),
        ("a.json", "[{]", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON (nested too deeply)"),
        ("a.jsonl", '\n{"id": ' + "[" * 100_000, "row 2: not valid JSON (nested too deeply)"),
        ("a.jsonl", '{"id": ' + "9" * 5000 + "}", "row 1: not valid JSON (Exceeds the limit"),
        ("a.json", "[" + "9" * 5000 + "]", "not valid JSON (Exceeds the limit"),
        ("a.jsonl", '{"id": "\\ud800"}', "row 1: not valid JSON (half of a surrogate pair)"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.xml", "<a/>", "unknown file type '.xml'; expected one of .parquet, .csv, .json"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file_name, content, said):
    file = tmp_path / file_name
    file.write_text(content)
    text = message("hotpotqa", file)
    assert text.startswith(str(file)) and said in text


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none.jsonl'} does not exist")):
        load("hotpotqa", "validation", path=tmp_path / "none.jsonl")


def test_a_folder_without_the_split_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError) as error:
        load("hotpotqa", "validation", path=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "distractor/validation-*.parquet" in str(error.value) and "validation.jsonl" in str(error.value)


def test_a_folder_is_searched_for_official_names_first(tmp_path):
    (tmp_path / "validation.jsonl").write_text("")
    (tmp_path / "musique_ans_v1.0_dev.jsonl").write_text("")
    assert hub.locate(_source("musique"), "validation", tmp_path) == [tmp_path / "musique_ans_v1.0_dev.jsonl"]
    for shard in (1, 0):
        (tmp_path / f"train-0000{shard}-of-00002.parquet").write_text("")
    found = [file.name for file in hub.locate(_source("hotpotqa"), "train", tmp_path)]
    assert found == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def _source(name):
    from harness.tasks import hotpotqa, musique

    return {"musique": musique.SOURCE, "hotpotqa": hotpotqa.SOURCE}[name]


OFFLINE = {
    "hotpotqa": ("validation", "hotpotqa/hotpot_qa", "distractor/validation-00000-of-00001.parquet"),
    "musique": ("validation", "dgslibisey/MuSiQue", "musique_ans_v1.0_dev.jsonl"),
    "2wikimqa": ("validation", "xanhho/2WikiMultihopQA", "dev.parquet"),
    "samsum": ("test", "knkarthick/samsum", "test.csv"),
    "msc": ("test", "nayohan/multi_session_chat", "data/test-00000-of-00001.parquet"),
    "msc_self_instruct": ("train", "MemGPT/MSC-Self-Instruct", "msc_self_instruct.jsonl"),
    "swebench": ("test", "SWE-bench/SWE-bench", "data/test-00000-of-00001.parquet"),
    "swebench_lite": ("test", "SWE-bench/SWE-bench_Lite", "data/test-00000-of-00001.parquet"),
    "swebench_verified": ("test", "SWE-bench/SWE-bench_Verified", "data/test-00000-of-00001.parquet"),
    "swebench_oracle": ("test", "princeton-nlp/SWE-bench_oracle", "data/test-00000-of-00001.parquet"),
    "swebench_lite_oracle": ("test", "princeton-nlp/SWE-bench_Lite_oracle", "data/test-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("name", OFFLINE)
def test_without_network_the_file_to_place_is_named(tmp_path, monkeypatch, name):
    split, repo, file = OFFLINE[name]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "LOCAL_DIR", tmp_path)
    with pytest.raises(DataError) as error:
        load(name, split)
    text = str(error.value)
    assert "\n" not in text and repr(repo) in text and file in text and str(tmp_path / name) in text


def test_every_hub_task_has_an_offline_test():
    assert set(OFFLINE) == {name for name in TASKS if not name.startswith("synthetic")}


def test_the_place_that_the_offline_message_names_is_where_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LOCAL_DIR", tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    folder = tmp_path / "musique"
    folder.mkdir()
    (folder / "musique_ans_v1.0_dev.jsonl").write_bytes((DATA / "musique.jsonl").read_bytes())
    assert len(list(load("musique", "validation"))) == 2


def test_the_default_place_is_shown_relative_to_the_repository(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(DataError, match=r"into datasets/local/swebench_verified/, or give its path"):
        load("swebench_verified", "test")


def test_a_download_asks_for_the_split_only_and_is_read(tmp_path, monkeypatch):
    asked = {}

    def download(repo, **kwargs):
        asked.update(repo=repo, **kwargs)
        (tmp_path / "musique_ans_v1.0_dev.jsonl").write_bytes((DATA / "musique.jsonl").read_bytes())
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "LOCAL_DIR", tmp_path / "none")
    assert len(list(load("musique", "validation"))) == 2
    assert asked == {
        "repo": "dgslibisey/MuSiQue",
        "repo_type": "dataset",
        "allow_patterns": ["musique_ans_v1.0_dev.jsonl"],
    }


def test_an_unknown_split_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LOCAL_DIR", tmp_path)
    with pytest.raises(DataError, match="no split 'test'; known splits: train, validation"):
        load("hotpotqa", "test")


def test_schema_drops_what_it_does_not_declare_and_keeps_optional_fields_out():
    schema = Schema(
        Features({"a": Value("string"), "b": Value("string"), "c": List(Value("int32"))}),
        optional=frozenset({"b"}),
        nullable=frozenset({"c"}),
    )
    assert schema.check({"a": "x", "c": None, "d": 1}, "f") == {"a": "x", "c": None}
    assert schema.check({"a": "x", "b": None, "c": [1]}, "f") == {"a": "x", "c": [1]}
    assert schema.check({"a": "x", "b": "y", "c": []}, "f") == {"a": "x", "b": "y", "c": []}
    with pytest.raises(DataError, match=r"f: field 'c' is missing"):
        schema.check({"a": "x"}, "f")
