"""What the repository weighs: a limit on what git tracks, and no copy of what the records make again."""

import shutil
import subprocess
from pathlib import Path

import pytest

from harness.report.__main__ import main
from harness.results.records import write_json
from harness.results.runs import load_run
from harness.results.summary import build_summary
from tests.helpers import made_run
from tests.helpers.places import ROOT

# Models are 39 MiB of it, all else 9.2. What could still be shrunk without loss is small: JSON written without any
# white space saves 0.08, the packed records at xz's highest setting 0.01.
LIMIT = 49 * 2**20


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files of the checkout that git tracks; skips where there is no checkout."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git does not answer: {listed.stderr.strip()}")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tree_is_below_its_limit(tracked):
    sizes = sorted(((path.stat().st_size, path.relative_to(ROOT).as_posix()) for path in tracked), reverse=True)
    total = sum(size for size, _ in sizes)
    assert total <= LIMIT, f"{total / 2**20:.2f} MiB; the largest files: {sizes[:12]}"


def test_nothing_is_tracked_that_the_records_make_again(tracked):
    made = [p.relative_to(ROOT) for p in tracked if p.suffix in (".png", ".pdf", ".html")]
    assert not [p.as_posix() for p in made if p.parts[0] in ("figures", "results")]


def test_every_committed_figure_is_the_form_that_is_drawn(tracked):
    """In an SVG drawn with text as outlines every letter is a path: ten times the size."""
    drawn = [path for path in tracked if path.suffix == ".svg"]
    assert drawn and not [path.name for path in drawn if "<text" not in path.read_text() or "\n <" in path.read_text()]


def test_report_is_rebuilt_from_summary_and_figures(tmp_path, capsys):
    cfg, paths = made_run.make_run(tmp_path / "made", {"systems": ["recompute", "cacheslide"]}, prompts_each=3)
    write_json(tmp_path / "results/r/summary.json", build_summary(load_run(cfg, **paths)))
    (tmp_path / "figures/r").mkdir(parents=True)
    (tmp_path / "figures/r/fig03.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert main(["r", "--root", str(tmp_path)]) == 0
    page = (tmp_path / "results/r/report.html").read_text()
    assert page.count("data:image/svg+xml") == 1 and "recompute" in page
    assert "Nothing recomputed" not in page  # the study on a real model is of this repository, not of that root
    assert main(["absent", "--root", str(tmp_path)]) == 2 and capsys.readouterr().err.startswith("report: ")
