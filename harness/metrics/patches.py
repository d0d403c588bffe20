"""Compares patches as patches: which lines of which file go and come, in which context, whatever the line numbers say.

An answer's normalisation (articles, punctuation, case, blanks) is none for code: it takes a sign for nothing.
"""

from collections import Counter
from collections.abc import Iterable

from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

Hunk = tuple[str, tuple[str, ...]]  # a file, and lines with their sign


def hunks_of(text: str) -> Counter[Hunk]:
    """The hunks of a unified diff, as a multiset; empty where the text is none.

    Paths lose `a/` and `b/`; line numbers, the order of files and what `git` says about modes and hashes do not count.
    """
    if not text.endswith("\n"):
        text += "\n"  # models and benchmarks strip the last line's end
    try:
        files = PatchSet(text)
    except (UnidiffParseError, ValueError, IndexError):
        return Counter()
    return Counter(
        (file.path, tuple(f"{line.line_type}{line.value}" for line in hunk if line.line_type != "\\"))
        for file in files
        for hunk in file
    )


def is_patch(text: str) -> bool:
    """Whether the text is a unified diff that changes something."""
    return any(line[0] in "+-" for _, lines in hunks_of(text) for line in lines)


def same_patch(prediction: str, patch: str) -> bool:
    """Whether both change the same lines of the same files in the same context."""
    found = hunks_of(prediction)
    return bool(found) and found == hunks_of(patch)


def changed_line_f1(prediction: str, patch: str) -> float:
    """F1 in [0, 1] of the lines that two patches add and remove, each with its file, sign and blanks."""
    got, want = Counter(_changes(hunks_of(prediction))), Counter(_changes(hunks_of(patch)))
    shared = sum((got & want).values())
    return 2 * shared / (got.total() + want.total()) if shared else 0.0


def _changes(hunks: Counter[Hunk]) -> Iterable[tuple[str, str]]:
    for (path, lines), count in hunks.items():
        for line in lines:
            if line[0] in "+-":
                yield from [(path, line)] * count
