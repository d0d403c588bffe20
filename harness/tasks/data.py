"""Data files of a run: written from a synthetic family or taken from a real data set, read back as examples.

A data set's name is `style-mix` for the ledger task (hotpotqa-ledger, swebench-ledger) and for the stress task
(hotpotqa-sparse, hotpotqa-deep, swebench-sparse, swebench-deep), or a name of `harness.tasks.registry`.
"""

from dataclasses import replace
from pathlib import Path

from cacheslide.errors import DataError
from harness.tasks import ledger
from harness.tasks.example import TaskExample, take
from harness.tasks.synthetic import MIXES, STYLES, examples, read_rows, write_rows

STRESS = "stress"  # the first family's label: an adversarial test with a known shortcut, unlike real text
LEDGER = ledger.MIX


def synthetic_names() -> list[str]:
    """The synthetic data sets."""
    return [f"{style}-{mix}" for style in STYLES for mix in (*MIXES, LEDGER)]


def family_of(name: str) -> str:
    """Label of the family of the synthetic data set `name` in figures and reports."""
    _check(name)
    return LEDGER if name.endswith(f"-{LEDGER}") else STRESS


def check_size(name: str, tokens: int) -> None:
    """DataError unless prompts of about `tokens` tokens of the synthetic data set `name` can be drawn."""
    if family_of(name) == LEDGER:
        ledger.documents_for(tokens)


def draw_examples(name: str, split: str, seed: int, count: int, tokens: int) -> list[TaskExample]:
    """`count` prompts of about `tokens` tokens of the synthetic data set `name`, without a file."""
    _check(name)
    style, mix = name.split("-")
    if mix == LEDGER:
        return list(ledger.examples(style, split, seed, count, tokens))
    return list(examples(style, mix, split, seed, count, tokens))


def _check(name: str) -> None:
    if name not in synthetic_names():
        raise DataError(f"unknown synthetic data set {name!r} (known: {', '.join(synthetic_names())})")


def write_dataset(path: str | Path, name: str, split: str, seed: int, count: int, tokens: int) -> str:
    """Write `count` prompts of about `tokens` tokens of the synthetic data set `name`; returns the file's SHA-256."""
    _check(name)
    style, mix = name.split("-")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if mix == LEDGER:
        return ledger.write_rows(Path(path), style, split, seed, count, tokens)
    return write_rows(Path(path), style, mix, split, seed, count, tokens)


def read_examples(path: str | Path, count: int | None = None, questions: int | None = None) -> list[TaskExample]:
    """Examples of a data file; at most `count` of them, each with its first `questions` questions.

    The file's stem is the data set's name, as `write_dataset` sets it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no data at {path}")
    name = path.stem
    if name in synthetic_names():
        found = ledger.read_rows(path) if family_of(name) == LEDGER else read_rows(path)
    else:
        from harness.tasks import registry  # imports Hugging Face's `datasets`, which takes seconds

        found = registry.load(name, "test", path=path)
    return [replace(e, questions=e.questions[:questions]) for e in take(found, count)]
