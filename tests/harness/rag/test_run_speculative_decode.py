"""The third step: its trace, from folders of the second one or without, resumed."""

import json

import pytest

from cacheslide.errors import StoreError
from harness.rag import run_speculative_decode
from harness.rag.build_kv_cache import build, kv_path
from harness.rag.retrievers.registry import open_retriever
from harness.rag.run_speculative_decode import decode, main, trace_path
from harness.rag.speculative_decode import DecodeSettings, decode_sample
from tests.helpers.rag import SETTINGS, manager, retrieved

pytestmark = pytest.mark.slow

DECODING = DecodeSettings(k=2, max_new_tokens=6, stride=2, ahead=1)


@pytest.fixture
def ranked(tmp_path):
    return retrieved(tmp_path)


def run(ranked, out, folders=None, settings=DECODING):
    return decode(manager(), ranked, open_retriever("bm25"), settings, out, SETTINGS, folders=folders)


def test_the_trace_has_counts_latencies_and_answers_and_no_text_of_the_data(ranked, tmp_path):
    out = trace_path(tmp_path / "results")
    made = run(ranked, out)
    assert out == tmp_path / "results/decoding/speculative_trace.json"
    assert json.loads(out.read_text())["summary"] == json.loads(json.dumps(made["summary"]))
    for record in made["samples"]:
        assert {"promotions", "hits", "wasted_promotions", "tokens", "ttft_s", "total_s", "answer"} <= record.keys()
        assert 0 < record["ttft_s"] < record["total_s"] and record["tokens"] <= 6
        assert len([e for e in record["events"] if e["kind"] == "promotion"]) == record["promotions"]
    total = made["summary"]
    assert total["promotions"] == sum(r["promotions"] for r in made["samples"])
    assert not any(r.question in out.read_text() for r in ranked.samples.rows)


def test_folders_give_the_same_answers_without_encoding(ranked, tmp_path):
    folders = tmp_path / "kv_caches"
    build(manager(), ranked, 2, kv_path(tmp_path, "made", 2), SETTINGS, "cpu", folders)
    cold, warm = run(ranked, tmp_path / "a.json"), run(ranked, tmp_path / "b.json", folders)
    assert [r["answer"] for r in warm["samples"]] == [r["answer"] for r in cold["samples"]]
    assert warm["summary"]["loaded"] == 18 and warm["summary"]["encode_s"] == 0.0 < cold["summary"]["encode_s"]
    assert warm["summary"]["unusable"] == 0


def test_a_cut_run_goes_on_where_it_stopped(ranked, tmp_path, monkeypatch):
    rows = []

    def counted(*args):
        rows.append(args[2].id)
        if len(rows) == 2:
            raise KeyboardInterrupt
        return decode_sample(*args)

    monkeypatch.setattr(run_speculative_decode, "decode_sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run(ranked, tmp_path / "a.json")
    made = run(ranked, tmp_path / "a.json")
    assert rows == ["id-0", "id-1", "id-1", "id-2"] and made["summary"]["samples"] == 3


def test_the_command_and_a_folder_that_is_not_there(ranked, tmp_path, capsys):
    options = ["--retrieval-json", str(ranked.path), "--results", str(tmp_path / "r"), "--samples", "1"]
    with pytest.raises(StoreError, match=r"no folder \(build_kv_cache --save-cache-dir makes one\)$"):
        main([*options, "--load-cache-dir", str(tmp_path / "no")])
    main([*options, "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("1 samples; ") and trace_path(tmp_path / "r").is_file()
