"""What a run ends with: its headline and where its report is."""

import re

from harness.report.__main__ import main
from harness.report.builder import read_summary
from harness.report.prose import headline_lines, opening
from tests.helpers.places import ROOT


def test_a_run_ends_with_its_headline_and_the_reports_path(tmp_path, capsys):
    folder = tmp_path / "results/cpu"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text((ROOT / "results/cpu/summary.json").read_text())
    given = ["cpu", "--headline", "--root", str(tmp_path)]
    assert main(given) == 2
    assert capsys.readouterr().err == f"report: there is no report at {folder / 'report.html'}\n"
    (folder / "report.html").write_text("")
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = read_summary(folder / "summary.json", None, None, None)
    assert [line for line in lines[:-1] if line] == headline_lines(summary) == opening(summary)[: len(lines) - 3]
    assert len(lines) > 6 and lines[-1] == f"Report: {folder / 'report.html'}"
    assert not (folder / "report.html").read_text()


def test_make_ends_a_run_with_it():
    recipes = dict(re.findall(r"^([a-z-]+): install .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target, runs in (("smoke", ("smoke", "smoke-ledger")), ("smoke-vllm", ("smoke-vllm",)), ("full", ("cpu",))):
        wanted = [f"\t@$(BIN)/python -m harness.report {run} --headline" for run in runs]
        assert recipes[target].splitlines()[-len(runs) :] == wanted
