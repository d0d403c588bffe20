"""The fixed request set gives the receipts and tokens that were recorded, whatever has moved since."""

import json

import pytest

from cacheslide.errors import DataError
from harness.frozen import kernels
from harness.frozen.__main__ import main
from harness.frozen.compare import compared, differences
from tests.helpers.places import DATA, ROOT

pytestmark = pytest.mark.slow

RECORDED = DATA / "frozen.json"


def recorded(part: str) -> dict:
    """The committed outcomes: receipts and tokens; their bits are those of another processor."""
    return json.loads(RECORDED.read_text())["outcomes"][part]


def test_a_difference_is_named_by_its_place():
    before = {"a/0": {"receipt": {"rows": 3, "share": 0.5}, "tokens": [1, 2], "bits": "x"}}
    same = {"a/0": {"receipt": {"rows": 3, "share": 0.5 + 1e-9}, "tokens": [1, 2], "bits": "y"}}
    assert differences(before, same, bits=False) == []
    assert [line.split(":")[0] for line in differences(before, same)] == ["/a/0/bits", "/a/0/receipt/share"]
    other = {"a/0": {"receipt": {"rows": 4}, "tokens": [1, 7], "bits": "x"}, "b": {}}
    assert [line.split(":")[0] for line in differences(before, other, bits=False)] == [
        "/a/0/receipt/rows",
        "/a/0/receipt/share",
        "/a/0/tokens/1",
        "/b",
    ]


def test_a_renamed_key_is_no_difference():
    assert differences({"a": {"rows": 3, "rows_reused": 2}}, {"a": {"tokens": 3, "tokens_reused": 2}}) == []


def test_kernels_write_the_same_bits_twice_and_cover_every_recorded_call():
    first = kernels.run()
    assert not differences(first, kernels.run())
    assert first.keys() == recorded("kernels").keys()


@pytest.mark.slow
def test_the_reference_host_answers_as_recorded(monkeypatch):
    from harness.frozen import reference

    monkeypatch.chdir(ROOT)
    assert differences(recorded("reference"), reference.run("models/tiny-llama-12m"), bits=False) == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("vllm_environment")
def test_vllm_answers_as_recorded(monkeypatch):
    pytest.importorskip("vllm")
    from harness.frozen import served

    monkeypatch.chdir(ROOT)
    assert differences(recorded("served"), served.run("models/tiny-llama-12m"), bits=False) == []


@pytest.mark.parametrize(
    "content, reason", [(None, "cannot be read"), ("{}", "holds no outcomes"), ("{", "is not JSON")]
)
def test_a_file_without_outcomes_is_one_line(tmp_path, capsys, content, reason):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", str(path), str(RECORDED)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in error and str(path) in error


def record_of(path, outcomes: dict, threads: int = 1):
    path.write_text(json.dumps({"outcomes": outcomes, "machine": {"torch_threads": threads}}))
    return path


def test_new_outcomes_are_no_change_and_lost_ones_are(tmp_path, capsys):
    one, two = ({"receipt": {"tokens": n}, "bits": "x"} for n in (1, 2))
    before = record_of(tmp_path / "before.json", {"served": {"a": one}})
    more = record_of(tmp_path / "more.json", {"served": {"a": one, "b/0": two}, "kernels": {"c": two}})
    assert compared(before, more) == ([], ["served/b/0", "kernels/c"])
    assert main(["compare", str(before), str(more)]) == 0 and "2 outcomes are new" in capsys.readouterr().out
    assert [line.split(":")[0] for line in compared(more, before)[0]] == ["/kernels", "/served/b/0"]
    other = record_of(tmp_path / "other.json", {"served": {"a": one | {"tokens": []}}})
    assert compared(before, other) == (["/served/a/tokens: only after"], [])


def test_bits_of_other_threads_are_not_compared(tmp_path):
    before, after = (record_of(tmp_path / f"{n}.json", {"served": {"a": {"bits": str(n)}}}, n) for n in (1, 2))
    with pytest.raises(DataError, match="OMP_NUM_THREADS"):
        compared(before, after)
    assert compared(before, after, bits=False) == ([], [])
