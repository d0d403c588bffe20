"""Record files: resume, torn lines, failures apart."""

import json

import pytest

from cacheslide.errors import DataError, PromptError
from harness.results.records import (
    RecordWriter,
    guarded,
    read_failures,
    read_records,
    read_settings,
    reopened,
    write_json,
)


def test_records_failures_and_settings_come_back(tmp_path):
    writer = RecordWriter(tmp_path / "a" / "r.jsonl", {"run": "x"})
    guarded(writer, "1", lambda: {"f1": 0.5})

    def bad():
        raise PromptError("too long")

    guarded(writer, "2", bad)
    assert not writer.output.exists()
    writer.finish()
    assert list(read_records(writer.output)) == [{"id": "1", "f1": 0.5}]
    assert read_failures(writer.output) == [{"id": "2", "failure": "PromptError: too long"}]
    assert read_settings(writer.output) == {"run": "x"}
    assert [p.name for p in writer.output.parent.iterdir()] == ["r.jsonl"]


def test_an_unexpected_error_stops_the_run(tmp_path):
    writer = RecordWriter(tmp_path / "r.jsonl", {})
    with pytest.raises(ZeroDivisionError):
        guarded(writer, "1", lambda: 1 / 0)


def test_an_interrupted_run_resumes_and_drops_a_torn_line(tmp_path):
    first = RecordWriter(tmp_path / "r.jsonl", {"run": "x"})
    first.add({"id": "1"})
    first.part.open("a").write('{"id": "2", "f1"')
    first.close()
    again = RecordWriter(tmp_path / "r.jsonl", {"run": "x"})
    assert again.done == {"1"}
    calls = []
    guarded(again, "1", lambda: calls.append(1) or {})
    guarded(again, "2", lambda: calls.append(2) or {"f1": 1.0})
    again.finish()
    assert calls == [2]
    assert [r["id"] for r in read_records(again.output)] == ["1", "2"]


def test_other_settings_start_over_and_keep_what_was_there(tmp_path, capsys):
    written = [RecordWriter(tmp_path / "r.jsonl", {"layer": n}) for n in (1,)]
    written[0].add({"id": "1"})
    before = written[0].part.read_bytes()
    written[0].close()
    for number, kept in ((2, ".r.jsonl.part.old"), (3, ".r.jsonl.part.old.2")):
        other = RecordWriter(tmp_path / "r.jsonl", {"layer": number})
        assert other.done == set()
        assert kept in capsys.readouterr().err and (tmp_path / kept).is_file()
        other.close()
    assert (tmp_path / ".r.jsonl.part.old").read_bytes() == before


def test_a_finished_file_of_other_settings_is_kept_aside(tmp_path):
    for layer in (1, 1, 2):
        writer = RecordWriter(tmp_path / "r.jsonl", {"layer": layer})
        writer.add({"id": str(layer)})
        writer.finish()
    assert read_settings(tmp_path / "r.jsonl") == {"layer": 2}
    assert list(read_records(tmp_path / ".r.jsonl.old")) == [{"id": "1"}]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_file_is_reopened_and_another_part_is_kept(tmp_path):
    one = RecordWriter(tmp_path / "r.jsonl", {"layer": 1})
    one.add({"id": "1"})
    one.finish()
    other = RecordWriter(tmp_path / "r.jsonl", {"layer": 2})
    other.add({"id": "2"})
    other.close()
    assert reopened(tmp_path / "r.jsonl", {"layer": 1}).done == {"1"}
    assert list(read_records(tmp_path / ".r.jsonl.part.old")) == [{"id": "2"}]


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"schema": "other/1", "settings": {}}) + "\n")
    with pytest.raises(DataError, match="other/1"):
        list(read_records(tmp_path / "r.jsonl"))


def test_a_full_disk_leaves_no_half_written_json(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match="No space left"):
        write_json(tmp_path / "s.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []
