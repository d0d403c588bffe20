"""`make figures`: every committed figure is drawn again from committed records, and equals the committed drawing."""

import re

import pytest

from harness.plots.__main__ import APART, RUN, STUDY, main
from tests.helpers.places import ROOT

NUMBER = re.compile(r"-?\d+\.?\d*")
COMMITTED = {str(path.relative_to(ROOT / "figures").with_suffix("")) for path in (ROOT / "figures").rglob("*.svg")}


def test_every_committed_figure_has_its_record_named():
    made_here = {name for name in COMMITTED if name.split("/")[0] in ("smoke", "smoke-vllm", "wca")}
    assert len(COMMITTED) >= 17 and COMMITTED - made_here <= {f"{RUN}/{name}" for name in STUDY} | APART.keys()


@pytest.mark.slow
def test_they_are_redrawn_without_a_job(tmp_path, capsys):
    """Up to the last digit of a coordinate, which depends on the machine."""
    assert main(["--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = {str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.svg")}
    assert len(lines) == len(STUDY) + len(APART) and sum(line.startswith(str(tmp_path)) for line in lines) == len(drawn)
    assert {f"{RUN}/{name}" for name in STUDY} < drawn and len(drawn) >= 17
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert {line.split()[2].rstrip(",") for line in left_out} == APART.keys() - drawn
    for name in drawn & COMMITTED:
        now, before = (path.read_text() for path in (tmp_path / f"{name}.svg", ROOT / f"figures/{name}.svg"))
        assert len(NUMBER.findall(now)) == len(NUMBER.findall(before)), name
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before), name
        pairs = zip(NUMBER.findall(now), NUMBER.findall(before), strict=True)
        assert all(abs(float(a) - float(b)) <= 0.02 for a, b in pairs), name


def test_records_that_are_not_there_or_damaged_are_one_line(tmp_path, capsys):
    packed = (ROOT / "results/cpu/records.tar.xz").read_bytes()
    for content in (None, b"no archive", packed[: len(packed) // 2]):
        if content:
            (tmp_path / "cpu").mkdir(exist_ok=True)
            (tmp_path / "cpu/records.tar.xz").write_bytes(content)
        assert main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("figures: ") and "records.tar.xz cannot be read" in err and err.count("\n") == 1
