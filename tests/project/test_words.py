"""Identifiers that have given way to the field's own words do not come back."""

import subprocess
import tokenize

import pytest

from harness.results.provenance import ROOT

pytestmark = pytest.mark.slow

RETIRED = {
    "annotations": "marks Marks marked marks_of raw_marks mark_messages marked_as MarkedChat checks_marks unmarked",
    "on_worker_report, match, on_loaded": "heard _heard _unheard meet land _land landed Landed land_nothing",
    "slot offsets": "SlotMasses masses with_masses Crossing crossing _crossing cope_crossing crossing_positions",
    "storage tier, on disk": "Below BELOW lower_tiers FromBelow ColdChunks cold_ttft Backing backing open_backing"
    " backed",
    "vanilla": "Stock STOCK stock_command",
    "retain": "ChunkKeeper keeper Kept keep_history keeps _not_kept",
    "compute fraction, token": "row_layer_share rows_planned",
}
# Where a word means something else: CUDA events, chart markers, disturbed rounds, files, what was said in a chat.
ELSEWHERE = {
    "marks": {
        "cacheslide/store/slide/overlap.py",
        "harness/plots/fig04a.py",
        "harness/plots/labels.py",
        "harness/plots/wca.py",
    },
    "marked": {
        "harness/experiments/serving/ttft_ratio.py",
        "harness/results/undisturbed.py",
        "harness/robustness/folders.py",
    },
    "heard": {"harness/tasks/msc.py"},
}


def names() -> dict[str, set[str]]:
    """The files under version control of the product, the harness and the baselines, by each identifier in them."""
    tracked = ["git", "ls-files", "cacheslide/*.py", "harness/*.py", "baselines/*.py"]
    files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(files) > 200
    found: dict[str, set[str]] = {}
    for file in sorted(set(files) - {"cacheslide/renamed.py"}):
        with (ROOT / file).open("rb") as code:
            for token in tokenize.tokenize(code.readline):
                if token.type == tokenize.NAME:
                    found.setdefault(token.string, set()).add(file)
    return found


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    return names()


@pytest.mark.parametrize("word", RETIRED)
def test_retired_words_stay_away(used, word):
    back = {name: sorted(used.get(name, set()) - ELSEWHERE.get(name, set())) for name in RETIRED[word].split()}
    assert not {name: files for name, files in back.items() if files}, f"now: {word}"


def test_exceptions_are_needed(used):
    assert all(files <= used[name] for name, files in ELSEWHERE.items())
