"""Compares two unified diffs for equality: files, places, context and changed lines, character by character.

Parts without effect on `git apply` are ignored: the first folder of names (usually a/ and b/), index lines, text around
the diffs, the order of files. Everything else counts, such as indentation and signs.

The start lines of a hunk, before and after, must be equal. `git apply` searches for a hunk's context from the second
one outwards, so that other numbers are another change if the lines occur again, which cannot be decided without the
file. The second number includes the shift by earlier hunks in both patches. A name without a leading folder is
different, since git strips the first folder; so are names that differ from the line `diff --git` above.
"""

import re
from collections.abc import Sequence

from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

HEAD = re.compile(r"^(diff --git |--- |\+\+\+ |@@ -\d)", re.MULTILINE)
MODE = re.compile(r"^(?:(?:old|new|new file|deleted file) mode \d+|(?:rename|copy) (?:from|to) .*)$", re.MULTILINE)
NAMED = re.compile(
    r"^diff --git (.*)\n(?:(?!diff --git |--- |@@ ).*\n)*--- ([^\t\n]*).*\n\+\+\+ ([^\t\n]*)", re.MULTILINE
)
NO_FILE = "/dev/null"
CONTEXT = 3  # lines around a change
Hunk = tuple[tuple[str, str], ...]  # sign and text of every line
Placed = tuple[int, int, Hunk]  # line before and after at which it starts
Change = tuple[str, str, tuple[str, ...], tuple[Placed, ...]]  # name before and after, modes, hunks in order


def is_patch(text: str) -> bool:
    """Whether `text` looks like a unified diff: it has lines that name a file, and at least one hunk or mode."""
    found = {head.strip() for head in HEAD.findall(text)}
    return {"---", "+++"} <= found or "diff --git" in found


def changes(text: str) -> list[Change] | None:
    """The changes of a patch, sorted by file; None if it is no patch, is cut off, changes nothing or is binary.

    Answers are stored without trailing blanks: empty context lines missing at the end are added.
    """
    whole = text.rstrip("\n") + "\n"
    if "\nGIT binary patch\n" in whole or not _consistent(whole):
        return None
    return next(filter(None, (_parse(whole + " \n" * missing) for missing in range(CONTEXT + 1))), None)


def _parse(whole: str) -> list[Change] | None:
    try:
        files = PatchSet(whole)
        found = [
            (
                _plain(file.source_file),
                _plain(file.target_file),
                tuple(MODE.findall(str(file.patch_info or ""))),
                tuple((hunk.source_start, hunk.target_start, _lines(hunk)) for hunk in file),
            )
            for file in files
            if not file.is_binary_file
        ]
    except (UnidiffParseError, ValueError, AttributeError, TypeError, IndexError):
        return None  # a model's output may not be a patch
    if len(found) < len(files) or not any(modes or hunks for _, _, modes, hunks in found):
        return None
    return sorted(found)


def _consistent(whole: str) -> bool:
    """Whether the names above the hunks equal those of `diff --git` (git rejects others, unidiff uses the first)."""
    return all(
        (before == NO_FILE or both.startswith(f"{before} ")) and (after == NO_FILE or both.endswith(f" {after}"))
        for both, before, after in NAMED.findall(whole)
    )


def same_patch(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is the same change as one of the accepted patches, else 0.0.

    Patches that cannot be parsed (binary ones) are compared as text.
    """
    made = changes(prediction)
    same = (answer == prediction or (made is not None and made == changes(answer)) for answer in answers)
    return float(any(same))


def _plain(name: str | None) -> str:
    """The name without its first folder; in brackets if it has none, so that it equals no other name."""
    name = (name or "").strip()
    first, _, rest = name.partition("/")
    return rest if first and rest else f"<{name}>"


def _lines(hunk) -> Hunk:
    """The lines counted by the hunk's header (unidiff also includes an empty line after them)."""
    left, out = [hunk.source_length, hunk.target_length], []
    for line in hunk:
        sign = line.line_type if line.line_type in ("+", "-", "\\") else " "  # git needs no blank on an empty line
        if sign != "\\" and left == [0, 0]:
            break
        left[0] -= sign in " -"
        left[1] -= sign in " +"
        out.append((sign, line.value.removesuffix("\n")))
    return tuple(out)
