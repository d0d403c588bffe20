"""Whether two unified diffs are the same change: files, context and changed lines, character by character.

What does not change what `git apply` does is left out: the a/ and b/ in front of names, line numbers of hunks, index
lines, text around the diffs, the order of files. Everything else counts, indentation and signs above all.
"""

import re
from collections.abc import Sequence

from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

HEAD = re.compile(r"^(diff --git |--- |\+\+\+ |@@ -\d)", re.MULTILINE)
MODE = re.compile(r"^(?:(?:old|new|new file|deleted file) mode \d+|(?:rename|copy) (?:from|to) .*)$", re.MULTILINE)
CONTEXT = 3  # lines around a change
Hunk = tuple[tuple[str, str], ...]  # sign and text of every line
Change = tuple[str, str, tuple[str, ...], tuple[Hunk, ...]]  # name before and after, modes, hunks in order


def is_patch(text: str) -> bool:
    """Whether `text` is meant as a unified diff: it has the lines that name a file and at least one hunk or mode."""
    found = {head.strip() for head in HEAD.findall(text)}
    return {"---", "+++"} <= found or "diff --git" in found


def changes(text: str) -> list[Change] | None:
    """What a patch changes, sorted by file; None where it is no patch, breaks off, changes nothing or is binary.

    Answers are stored without the blanks at their end: empty lines of context that are missing there are added.
    """
    whole = text.rstrip("\n") + "\n"
    if "\nGIT binary patch\n" in whole:
        return None
    return next(filter(None, (_parse(whole + " \n" * missing) for missing in range(CONTEXT + 1))), None)


def _parse(whole: str) -> list[Change] | None:
    try:
        files = PatchSet(whole)
        found = [
            (
                _plain(file.source_file, "a/"),
                _plain(file.target_file, "b/"),
                tuple(MODE.findall(str(file.patch_info or ""))),
                tuple(map(_lines, file)),
            )
            for file in files
            if not file.is_binary_file
        ]
    except (UnidiffParseError, ValueError, AttributeError, TypeError, IndexError):
        return None  # what a model wrote need not be a patch
    if len(found) < len(files) or not any(modes or hunks for _, _, modes, hunks in found):
        return None
    return sorted(found)


def same_patch(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is the same change as one of the accepted patches, else 0.0.

    A patch that cannot be read (a binary one) is accepted character by character alone.
    """
    made = changes(prediction)
    same = (answer == prediction or (made is not None and made == changes(answer)) for answer in answers)
    return float(any(same))


def _plain(name: str | None, prefix: str) -> str:
    return (name or "").strip().removeprefix(prefix)


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
