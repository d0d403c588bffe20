"""Whether two unified diffs are the same change: files, places, context and changed lines, character by character.

What does not change what `git apply` does is left out: the folder in front of names (a/ and b/, as a rule), index
lines, text around the diffs, the order of files. Everything else counts, indentation and signs above all.

The lines at which a hunk starts, before and after, count exactly. `git apply` looks for a hunk's context from the
second one outwards, so that other numbers are another change where the lines occur again; whether they do cannot be
known without the file. What the hunks before shift is in the second number of both patches alike. A name without a
folder in front is another one, since git takes the first folder off; so are names that differ from the line
`diff --git` above.
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
    """Whether `text` is meant as a unified diff: it has the lines that name a file and at least one hunk or mode."""
    found = {head.strip() for head in HEAD.findall(text)}
    return {"---", "+++"} <= found or "diff --git" in found


def changes(text: str) -> list[Change] | None:
    """What a patch changes, sorted by file; None where it is no patch, breaks off, changes nothing or is binary.

    Answers are stored without the blanks at their end: empty lines of context that are missing there are added.
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
        return None  # what a model wrote need not be a patch
    if len(found) < len(files) or not any(modes or hunks for _, _, modes, hunks in found):
        return None
    return sorted(found)


def _consistent(whole: str) -> bool:
    """The names above the hunks are those behind `diff --git` (git refuses others, unidiff takes the first)."""
    return all(
        (before == NO_FILE or both.startswith(f"{before} ")) and (after == NO_FILE or both.endswith(f" {after}"))
        for both, before, after in NAMED.findall(whole)
    )


def same_patch(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is the same change as one of the accepted patches, else 0.0.

    A patch that cannot be read (a binary one) is accepted character by character alone.
    """
    made = changes(prediction)
    same = (answer == prediction or (made is not None and made == changes(answer)) for answer in answers)
    return float(any(same))


def _plain(name: str | None) -> str:
    """The name without its first folder; in brackets where it has none, so that it equals no other's."""
    name = (name or "").strip()
    first, _, rest = name.partition("/")
    return rest if first and rest else f"<{name}>"


def _lines(hunk) -> Hunk:
    """The lines that the hunk's head counts (unidiff takes an empty line behind them too)."""
    left, out = [hunk.source_length, hunk.target_length], []
    for line in hunk:
        sign = line.line_type if line.line_type in ("+", "-", "\\") else " "  # git needs no blank on an empty line
        if sign != "\\" and left == [0, 0]:
            break
        left[0] -= sign in " -"
        left[1] -= sign in " +"
        out.append((sign, line.value.removesuffix("\n")))
    return tuple(out)
