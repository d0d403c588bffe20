"""Samples of every data set, and which passages count as needed."""

import json

import pytest

from cacheslide.errors import DataError
from harness.rag.samples import needed_passages, read_samples
from tests.helpers.made_passages import write_musique
from tests.helpers.places import DATA, ROOT
from tests.helpers.real_data import real_file


def write_longbench(path):
    row = {"input": "Where is the otter?", "answers": ["Rome"], "length": 9, "dataset": "2wikimqa", "language": "en"}
    context = "Passage 1:\nOne\nNothing.\nPassage 2:\nTwo\nThe otter is in Rome."
    row |= {"context": context, "all_classes": None, "_id": "x"}
    path.write_text(json.dumps(row))
    return path


def test_musique_as_published(tmp_path):
    samples = read_samples(write_musique(tmp_path / "musique_made.jsonl", 3))
    assert (samples.name, samples.metric, len(samples.rows)) == ("musique_made", "f1", 3)
    assert needed_passages(samples.rows[0]) == ((1, 3), "gold")


def test_2wikimqa_as_published_and_as_in_longbench(tmp_path):
    rows = read_samples(DATA / "2wikimqa.jsonl").rows
    assert {r.dataset for r in rows} == {"2wikimqa"} and needed_passages(rows[0])[1] == "gold"
    [row] = read_samples(write_longbench(tmp_path / "2wikimqa.jsonl")).rows
    assert row.dataset == "2wikimqa" and len(row.passages) == 2 and needed_passages(row) == ((1,), "answer")


def test_the_shipped_synthetic_set():
    samples = read_samples(ROOT / "datasets/synthetic/hotpotqa-deep-test.jsonl")
    assert len(samples.rows) > 10 and all(needed_passages(r)[1] == "gold" for r in samples.rows)


def test_samsum_asks_about_dialogues_that_are_no_passage():
    samples = read_samples(DATA / "samsum.jsonl")
    held = [json.loads(line) for line in (DATA / "samsum.jsonl").read_text().splitlines()]
    held = [row for row in held if row["dialogue"]]
    pool, asked = held[: len(held) // 2], held[len(held) // 2 :]
    assert samples.metric == "rouge_l" and [r.id for r in samples.rows] == [r["id"] for r in asked]
    for row, source in zip(samples.rows, asked, strict=True):
        assert row.answers == (source["summary"].strip(),) and row.question.endswith("\nSummary:")
        assert [p.endswith(f"\nSummary: {s['summary'].strip()}") for p, s in zip(row.passages, pool, strict=True)]
        assert len(row.passages) == len(pool) and needed_passages(row) == ((), "")


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "1", "dialogue": "A: b", "summary": "c"}))
    (tmp_path / "odd.json").write_text('[{"text": 1}]')
    for path, why in [(tmp_path / "no.json", "no such file"), (tmp_path / "one.jsonl", "two dialogues are needed"),
                      (tmp_path / "odd.json", "no schema that is known")]:  # fmt: skip
        with pytest.raises(DataError, match=why) as raised:
            read_samples(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="9 samples are asked for, the file holds 2"):
        read_samples(write_musique(tmp_path / "m.jsonl", 2), 9)


def test_cacheblends_own_inputs():
    samples = read_samples(real_file("musique/musique_s.json"))
    assert (samples.name, len(samples.rows)) == ("musique_s", 100)
    assert {needed_passages(r)[1] for r in samples.rows} == {"answer", ""}
