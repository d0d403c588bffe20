"""Retrieval results: ranks, hits, resuming, and reading back."""

import json

import pytest

from cacheslide.errors import ConfigError, DataError
from harness.rag import retrieval
from harness.rag.retrieval import read_retrieval, retrieval_path, retrieve, summary
from harness.rag.retrievers.registry import open_retriever
from harness.rag.run_retrieval import main
from harness.rag.samples import read_samples
from tests.helpers.made_passages import write_musique


@pytest.fixture
def data(tmp_path):
    return write_musique(tmp_path / "musique_made.jsonl", 4)


def result(data, tmp_path, k=2):
    out = retrieval_path(tmp_path / "results", "musique_made", k)
    return retrieve(read_samples(data), open_retriever("bm25"), k, out), out


def test_the_result_lies_where_the_next_step_looks_and_has_no_text(data, tmp_path):
    made, out = result(data, tmp_path)
    assert out == tmp_path / "results/retrieval/musique_made_rag_both_k2.json"
    assert json.loads(out.read_text())["samples"] == json.loads(json.dumps(made["samples"]))
    text = out.read_text() + out.with_suffix(".jsonl").read_text()
    rows = read_samples(data).rows
    assert not any(r.question in text or any(p[10:40] in text for p in r.passages) for r in rows)
    for record, row in zip(made["samples"], rows, strict=True):
        assert sorted(record["ranked"]) == list(range(len(row.passages))) and record["top_k"] == record["ranked"][:2]
        assert record["scores"] == sorted(record["scores"], reverse=True)


def test_hits_recall_and_all():
    records = [
        {"needed": [1, 3], "needed_by": "gold", "ranked": [1, 0, 3], "index_s": 1, "search_s": 0},
        {"needed": [2], "needed_by": "gold", "ranked": [0, 2, 1], "index_s": 0, "search_s": 1},
        {"needed": [], "needed_by": "", "ranked": [0, 1, 2], "index_s": 0, "search_s": 0},
    ]
    made = summary(records, 3)
    assert made["by_k"][0] == {"k": 1, "hits": 0.5, "recall": 0.25, "all": 0.0}
    assert made["by_k"][1] == {"k": 2, "hits": 1.0, "recall": 0.75, "all": 0.5}
    assert made["at_k"] == {"k": 3, "hits": 1.0, "recall": 1.0, "all": 1.0} and made["with_needed"] == 2
    assert summary(records[2:], 1)["at_k"]["hits"] is None


def test_a_second_run_computes_nothing_and_other_settings_do(data, tmp_path, monkeypatch):
    first, _ = result(data, tmp_path)
    searched = []
    monkeypatch.setattr(
        retrieval.Indices, "of", lambda self, row: searched.append(row) or self.retriever.index(row.passages)
    )
    again, _ = result(data, tmp_path)
    assert not searched and again["samples"] == first["samples"]
    data.write_text(data.read_text() + "\n")
    result(data, tmp_path)
    assert len(searched) == 4


def test_neighbours_over_the_same_passages_share_an_index(data):
    row, other = read_samples(data).rows[:2]
    indices = retrieval.Indices(open_retriever("bm25"))
    one = indices.of(row)
    assert indices.of(row) is one and indices.of(other) is not one


def test_reading_back_gives_the_rows_of_the_file(data, tmp_path):
    made, out = result(data, tmp_path)
    back = read_retrieval(out, count=3)
    assert (back.k, back.retriever, len(back.samples.rows)) == (2, "bm25", 3)
    assert back.ranked == {r["id"]: r["ranked"] for r in made["samples"][:3]}


def test_what_does_not_fit_is_refused_in_one_line(data, tmp_path):
    _, out = result(data, tmp_path)
    other = write_musique(tmp_path / "other.jsonl", 5)
    held = json.loads(out.read_text())
    swapped, short, odd = (tmp_path / f"{n}.json" for n in "abc")
    held["samples"][0]["ranked"][0] = 99
    swapped.write_text(json.dumps(held))
    short.write_text(json.dumps({"schema": held["schema"]}))
    odd.write_text("[]")
    cases = [((tmp_path / "no.json",), "run the retrieval step first"), ((out, other), "not the file that"),
             ((swapped,), "does not fit the row"), ((short,), "damaged"), ((odd,), "not a retrieval result"),
             ((out, None, 9), "9 samples are asked for")]  # fmt: skip
    for arguments, why in cases:
        with pytest.raises(DataError, match=why) as raised:
            read_retrieval(*arguments)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="k must be at least 1"):
        retrieve(read_samples(data), open_retriever("bm25"), 0, out)


def test_the_command_says_which_retrievers_there_are(data, tmp_path, capsys):
    main(["--data", str(data), "--k", "3", "--results", str(tmp_path / "r")])
    printed = capsys.readouterr()
    assert printed.err.startswith("retrievers installed: bm25")
    assert "4 samples; hits@3 " in printed.out and printed.out.endswith("musique_made_rag_both_k3.json\n")
