"""Compacts matplotlib's SVG without changing the drawing; committed figures have this form only.

Labels stay text (`svg.fonttype: none`). The bulk is markers, each with its style written out and coordinates
to a millionth of a point.
"""

import re
from itertools import groupby

_COORDINATES = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')
_LONG = re.compile(r"-?\d+\.\d{3,}(?![\de])")
_NO_TURN = re.compile(r' transform="rotate\(-?0 [^"]*\)"')
_MARKER = re.compile(r'(<use [^>]*?) style="([^"]*)"/>')
_OWN = re.compile(r"(?:^|[ ;])opacity:")  # group opacity is not inherited: hoisting it would change overlapping markers


def compact(svg: str) -> str:
    """Return `svg` without indentation, with coordinates in 1/100 pt and one style for a run of like markers."""
    lines = _NO_TURN.sub("", svg).splitlines()
    flat = "\n".join(line.strip() for line in lines)
    return _one_style_a_run(_COORDINATES.sub(lambda found: _LONG.sub(_rounded, found[0]), flat))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _one_style_a_run(svg: str) -> str:
    out: list[str] = []
    for style, run in groupby(svg.split("\n"), _style):
        lines = list(run)
        if style and len(lines) > 2:
            bare = [_MARKER.sub(r"\1/>", line) for line in lines]
            out += [f'<g style="{style}">', *bare, "</g>"]
        else:
            out += lines
    return "\n".join(out) + "\n"


def _style(line: str) -> str:
    """The style of a line that is a single marker with a shareable style; empty otherwise."""
    found = _MARKER.fullmatch(line)
    return found[2] if found and not _OWN.search(found[2]) else ""
