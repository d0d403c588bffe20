"""The project's pins."""

import re
import tomllib

from packaging.utils import canonicalize_name

from tests.helpers.places import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
BENCH = tomllib.loads((ROOT / "bench/pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    """The versions of a pinned list; any other line is an error."""
    versions = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"requirements/{name}.txt: not a plain pin: {line!r}"
        versions[canonicalize_name(match[1])] = match[2]
    return versions
