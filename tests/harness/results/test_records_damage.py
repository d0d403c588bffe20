"""What kills, full disks, other writers and damaged bytes do to record files: finished records stay, bad lines show."""

import errno
import json
import os
import random
import select
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheslide.errors import DataError
from harness.results.lines import LineFile, read_lines, seal, unseal
from harness.results.records import RecordWriter, read_file, read_records, write_json

pytestmark = [pytest.mark.fault("records_kill"), pytest.mark.slow]
SETTINGS = {"run": "x", "layer": 3}


def written(folder: Path, count: int = 10, pad: int = 20) -> Path:
    """An unfinished part of `count` records."""
    writer = RecordWriter(folder / "r.jsonl", SETTINGS)
    for i in range(count):
        writer.add(record(i, pad))
    writer.close()
    return writer.part


def record(i: int, pad: int = 20) -> dict:
    return {"id": str(i), "x": i, "pad": "y" * pad}


def resumed(folder: Path) -> set[str]:
    writer = RecordWriter(folder / "r.jsonl", SETTINGS)
    writer.close()
    return writer.done


def ids(*numbers: int) -> set[str]:
    return {str(i) for i in numbers}


DAMAGE = {  # name: what is done to a part of ten records, and the records that are lost by it
    "torn last line": (lambda b: b[:-30], {9}),
    "last newline missing": (lambda b: b[:-1], set()),
    "garbage in between": (lambda b: b[:400].rpartition(b"\n")[0] + b"\n\x00garbage\n" + _after(b, 400), set()),
    "a line that is 5": (lambda b: b + b"5\n", set()),
    "a line that is a list": (lambda b: b + b"[]\n", set()),
    "an object without id": (lambda b: b + b"{}\n", set()),
    "a sealed object without id": (lambda b: b + seal({"x": 1}), set()),
    "an empty line": (lambda b: b + b"\n", set()),
    "not UTF-8": (lambda b: b[:-40] + b"\xff" + b[-39:], {9}),
    "a flipped number": (lambda b: b.replace(b'"x": 3', b'"x": 7'), {3}),
    "a flipped checksum": (lambda b: b.replace(b'"crc"', b'"crb"', 6).replace(b'"crb"', b'"crc"', 5), {3}),
    "a checksum taken out": (lambda b: b[:-29] + b"}\n", {9}),
    "nested beyond all bounds": (lambda b: b + b'{"id": ' + b"[" * 10**5 + b"\n", set()),
    "nested as deep as JSON may": (lambda b: b + b'{"id": "x", "y": ' + b"[" * 700 + b"]" * 700 + b"}\n", set()),
    "a number beyond all bounds": (lambda b: b + b'{"id": "n", "x": ' + b"9" * 10**4 + b"}\n", set()),
    "zeros behind a lost page": (lambda b: b + b"\0" * 4096, set()),
    "the same record again": (lambda b: b + b.splitlines(True)[3], set()),
}


def _after(raw: bytes, at: int) -> bytes:
    return raw[raw[:at].rindex(b"\n") + 1 :]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_goes_on_with_every_other_record(tmp_path, capsys, name):
    part = written(tmp_path)
    damage, lost = DAMAGE[name]
    before = part.read_bytes()
    part.write_bytes(damage(before))
    assert part.read_bytes() != before
    writer = RecordWriter(tmp_path / "r.jsonl", SETTINGS)
    assert writer.done == ids(*range(10)) - ids(*lost)
    said = capsys.readouterr().err
    assert said.count("\n") <= 1
    torn = name in ("torn last line", "last newline missing", NUL)
    assert ("bad lines are left out (line " in said) is not torn
    if not torn:
        assert (tmp_path / ".r.jsonl.part.old").read_bytes() == damage(before)
    for i in lost:
        writer.add(record(i))
    writer.finish()
    whole = read_file(writer.output)
    assert sorted(whole.records, key=lambda r: r["x"]) == [record(i) for i in range(10)] and not whole.bad


NUL = "zeros behind a lost page"


@pytest.mark.parametrize("name", [n for n in DAMAGE if n != "last newline missing"])
def test_a_damaged_finished_file_names_its_lines(tmp_path, capsys, name):
    damage, lost = DAMAGE[name]
    path = tmp_path / "done.jsonl"
    path.write_bytes(damage(written(tmp_path).read_bytes()))
    found = read_file(path)
    assert [r["x"] for r in found.records] == [i for i in range(10) if i not in lost]
    assert len(found.bad) == 1 and found.unchecked == 0
    line, why = found.bad[0]
    assert capsys.readouterr().err == f"{path}: 1 bad lines are left out (line {line}: {why})\n"


def of_before(raw: bytes) -> bytes:
    """A file as versions before the header's copy wrote it."""
    lines = raw.splitlines(True)
    return b"".join(lines[:2] + lines[3:])


@pytest.mark.parametrize("head", [b"", b"[]\n", b"5\n", b"\xff\n", b'{"schema": "cacheslide.records/1"}\n'])
def test_a_part_that_begins_with_something_else(tmp_path, capsys, head):
    """A line in front of the header is damage, since the header says whose records these are."""
    part = written(tmp_path)
    content = head + part.read_bytes() if head else b""
    part.write_bytes(content)
    assert resumed(tmp_path) == (ids(*range(10)) if head else set())
    old = tmp_path / ".r.jsonl.part.old"
    assert old.read_bytes() == content if head else not old.exists()
    assert ("line 1: the header: " in capsys.readouterr().err) is bool(head)
    assert read_file(part).settings == SETTINGS and read_file(part).bad == ()


def flips(raw: bytes, count: int, seed: int):
    """The file with one flipped bit in its first `count` bytes: all bits of the last two bytes, and some others."""
    rng = random.Random(seed)
    places = [(at, bit) for at in (count - 2, count - 1) for bit in range(8)]
    for at, bit in places + [(rng.randrange(count), rng.randrange(8)) for _ in range(60)]:
        yield raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :], {0} if at == count - 1 else set()


def test_any_flipped_bit_of_the_header_costs_no_record(tmp_path, capsys):
    """But the first one, where the newline between them is what was hit: it is measured again."""
    part = written(tmp_path)
    raw = part.read_bytes()
    for number, (damaged, lost) in enumerate(flips(raw, raw.index(b"\n") + 1, 7), 1):
        (tmp_path / "done.jsonl").write_bytes(damaged)
        found = read_file(tmp_path / "done.jsonl")
        assert found.settings == SETTINGS and found.unchecked == 0
        assert {r["id"] for r in found.records} == ids(*range(10)) - ids(*lost)
        assert "bad lines are left out (line 1: the header: " in capsys.readouterr().err
        part.write_bytes(damaged)
        assert resumed(tmp_path) == ids(*range(10)) - ids(*lost)
        assert "line 1: the header: " in capsys.readouterr().err
        assert len(list(tmp_path.glob(".r.jsonl.part.old*"))) == number
        mended = read_file(part)
        assert mended.settings == SETTINGS and not mended.bad and part.read_bytes().count(b'"settings"') == 2


def test_a_damaged_header_does_not_make_another_run_of_it(tmp_path, capsys):
    part = written(tmp_path)
    part.write_bytes(part.read_bytes().replace(b'"layer": 3', b'"layer": 4', 1))
    other = RecordWriter(tmp_path / "r.jsonl", SETTINGS | {"layer": 4})
    assert other.done == set() and "records of other settings" in capsys.readouterr().err


def test_a_header_without_a_copy_is_named_where_it_is_damaged(tmp_path, capsys):
    """As earlier versions wrote it: nothing else says whose the records are."""
    part = written(tmp_path)
    before = of_before(part.read_bytes())
    damaged = before.replace(b'"layer": 3', b'"layer": 4')
    part.write_bytes(damaged)
    with pytest.raises(DataError, match="line 1: its checksum does not fit"):
        read_file(part)
    assert resumed(tmp_path) == set()
    said = capsys.readouterr().err
    assert "the header is damaged (line 1: its checksum does not fit) and has no copy" in said and said.count("\n") == 1
    assert (tmp_path / ".r.jsonl.part.old").read_bytes() == damaged
    part.write_bytes(before)
    assert read_file(part).settings == SETTINGS and len(read_file(part).records) == 10
    assert resumed(tmp_path) == ids(*range(10)) and part.read_bytes().startswith(before)
    part.write_bytes(part.read_bytes().replace(b'"layer": 3', b'"layer": 4', 1))  # it has a copy now
    assert resumed(tmp_path) == ids(*range(10))


def test_a_lost_copy_is_written_again(tmp_path, capsys):
    part = written(tmp_path)
    first, _, raw = part.read_bytes().partition(b"\n")
    part.write_bytes(first + b"\n" + raw.replace(b'"layer": 3', b'"layer": 4', 1))
    assert resumed(tmp_path) == ids(*range(10)) and "line 3: its checksum" in capsys.readouterr().err
    assert part.read_bytes().count(first) == 2


@pytest.mark.parametrize("content", [b"", b"[]\n", b"5\n", b'{"id": "1"}\n', b"\xff\xfe\n", b'{"schema": 1}\n'])
def test_a_file_without_a_header_is_one_line(tmp_path, content):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.jsonl") as wrong:
        read_file(tmp_path / "r.jsonl")
    assert "\n" not in str(wrong.value)


def test_records_without_checksums_are_read_and_counted(tmp_path):
    part = tmp_path / ".r.jsonl.part"
    lines = [{"schema": "cacheslide.records/1", "settings": SETTINGS}, record(0), record(1)]
    part.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    writer = RecordWriter(tmp_path / "r.jsonl", SETTINGS)
    assert writer.done == ids(0, 1)
    writer.add(record(2))
    writer.finish()
    found = read_file(tmp_path / "r.jsonl")
    assert (found.records, found.unchecked, found.bad) == ([record(i) for i in range(3)], 2, ())


def test_two_processes_do_not_write_the_same_records(tmp_path):
    first = RecordWriter(tmp_path / "r.jsonl", SETTINGS)
    first.add(record(0))
    with pytest.raises(DataError, match="another process is writing it"):
        RecordWriter(tmp_path / "r.jsonl", SETTINGS)
    with pytest.raises(DataError, match="another process is writing it"):
        RecordWriter(tmp_path / "r.jsonl", {"other": 1})
    first.finish()
    assert list(read_records(first.output)) == [record(0)]


def test_an_id_is_written_once(tmp_path):
    writer = RecordWriter(tmp_path / "r.jsonl", SETTINGS)
    writer.add(record(0))
    with pytest.raises(DataError, match="there is a record '0' already"):
        writer.add(record(0))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_one_line_and_loses_nothing(tmp_path, monkeypatch, code):
    """The device takes a part of the line, then no more; once there is room again, the same writer goes on."""
    writer, write = RecordWriter(tmp_path / "r.jsonl", SETTINGS), os.pwrite
    writer.add(record(0))
    left = [10]

    def full(fd, data, at):
        if not left[0]:
            raise OSError(code, os.strerror(code))
        done = write(fd, bytes(data)[: left[0]], at)
        left[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(DataError, match=os.strerror(code)) as wrong:
            writer.add(record(1))
        assert "\n" not in str(wrong.value)
    assert read_lines(writer.part).torn is False
    writer.add(record(1))
    writer.finish()
    assert list(read_records(writer.output)) == [record(0), record(1)]


@pytest.mark.parametrize("place", ["a file in the way", "no permission"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, place):
    if place == "no permission" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    target = tmp_path / "folder"
    if place == "a file in the way":
        target.write_text("")
    else:
        target.mkdir(mode=0o500)
    for write in (lambda: RecordWriter(target / "r.jsonl", {}), lambda: write_json(target / "s.json", {})):
        with pytest.raises(DataError, match="cannot write") as wrong:
            write()
        assert "\n" not in str(wrong.value)


def killed_after(seconds: float, work, told: int | None) -> None:
    """Run `work` in a child and kill -9 it after a while, wherever it is then; with `told`, once that can be read."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    if told is not None:
        select.select([told], [], [], 60)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("fresh", [False, True], ids=["resumed", "fresh"])
def test_a_kill_at_any_moment_loses_no_finished_record(tmp_path, fresh):
    """A pipe says what was finished: `add` had returned before the child wrote it there."""
    rng, known, start = random.Random(5), ids(*range(2000)), 2000
    if not fresh:
        written(tmp_path, start, pad=400)
    for turn in range(24):
        if fresh:
            known, start = set(), 0
            (tmp_path / ".r.jsonl.part").unlink(missing_ok=True)
        told, tell = os.pipe()

        def work(tell=tell):
            writer = RecordWriter(tmp_path / "r.jsonl", SETTINGS)
            for i in range(100_000, 200_000):
                if str(i) not in writer.done:
                    writer.add(record(i))
                    os.write(tell, b"%d\n" % i)

        killed_after(rng.uniform(0, 0.04), work, told if turn % 2 else None)
        os.close(tell)
        with os.fdopen(told, "rb") as pipe:
            known |= {line.strip().decode() for line in pipe.read().splitlines(True) if line.endswith(b"\n")}
        assert known <= resumed(tmp_path)
    assert len(known) > start


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.text(max_size=8).filter(lambda k: k != "crc"), VALUES, max_size=4)


@settings(max_examples=150, deadline=None)
@given(RECORDS)
def test_any_record_comes_back_from_its_line(content):
    line = seal(content)
    assert line.count(b"\n") == 1 and unseal(line[:-1]) == (content, True)


@settings(max_examples=150, deadline=None)
@given(RECORDS, st.data())
def test_any_changed_byte_of_a_line_is_noticed(content, data):
    line = bytearray(seal(content)[:-1])
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))
    try:
        found, checked = unseal(bytes(line))
    except ValueError:
        return
    assert not checked, found  # behind a sealed header, a line without a checksum is bad


@settings(max_examples=100, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=8), st.data())
def test_every_line_beside_a_damage_is_read_back(tmp_path_factory, contents, data):
    path = tmp_path_factory.mktemp("lines") / "l.jsonl"
    with LineFile(path) as file:
        for content in contents:
            file.add(content)
    raw = bytearray(path.read_bytes())
    at, ends = data.draw(st.integers(0, len(raw) - 1)), [i for i, b in enumerate(raw) if b == 10]
    raw[at] ^= data.draw(st.integers(1, 255))
    hit = sum(end < at for end in ends)
    touched = {hit, hit + 1} if at in ends else {hit}
    path.write_bytes(raw)
    kept = [c for i, c in enumerate(contents) if i not in touched]
    found = read_lines(path)
    assert [r for _, r in found.good if r in kept] == kept
    assert found.bad or 0 in touched  # the first line says that all lines have checksums
    with LineFile(path) as again:
        again.add({"more": 1})
    assert [r for _, r in read_lines(path).good][-1] == {"more": 1}
