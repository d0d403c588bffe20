"""Identifiers that have given way to the field's own words do not come back, nor do personifying words and locals."""

import ast
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

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

# A variable is named for what it holds, and a docstring or comment states facts about code, not about persons.
VAGUE = set("found said mine theirs told asked some everyone whoever".split())
PERSONS = re.compile(r"\b(whoever|somebody|anybody|nobody|everybody|none of its business)\b")
PLAIN = ("cacheslide", "harness/backends", "harness/results", "harness/workflow")
UNCHECKED = "cacheslide/policies"
# Public parameters and fields, whose type is `Found`.
VAGUE_ELSEWHERE = {("cacheslide/core/engine.py", "found"), ("cacheslide/core/request_builder.py", "found")}


def plain_files() -> list[Path]:
    files = [p for folder in PLAIN for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in files if ROOT / UNCHECKED not in p.parents]


def variables(code: str) -> Iterator[tuple[str, int]]:
    """Names that a module's code binds, parameters included, and their lines."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def prose(path: Path) -> Iterator[tuple[str, int]]:
    """Docstrings and comments of a file, and their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or "", getattr(node, "lineno", 1)
    with path.open("rb") as code:
        for token in tokenize.tokenize(code.readline):
            if token.type == tokenize.COMMENT:
                yield token.string, token.start[0]


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


def test_variables_are_named_for_what_they_hold():
    files = plain_files()
    assert len(files) > 200
    vague = {
        (str(path.relative_to(ROOT)), name): line
        for path in files
        for name, line in variables(path.read_text())
        if name in VAGUE
    }
    assert vague.keys() == VAGUE_ELSEWHERE, vague


def test_prose_has_no_persons():
    files = [p for package in ("cacheslide", "harness", "baselines") for p in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 400
    assert not [f"{p.relative_to(ROOT)}:{line}" for p in files for text, line in prose(p) if PERSONS.search(text)]


def test_vague_variables_are_seen():
    code = "def f(said, *, whole):\n    found = [mine for mine in said]\n    for k, told in found:\n        pass\n"
    assert {name for name, _ in variables(code)} & VAGUE == {"said", "found", "mine", "told"}
    assert PERSONS.search("kept for whoever reads it") and not PERSONS.search("`NOBODY` for padding")
