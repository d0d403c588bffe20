"""The project's folders and Python files."""

from pathlib import Path

from tests.helpers.places import ROOT


def python_files(*tops: str) -> list[Path]:
    return sorted(
        path
        for top in tops
        for path in (ROOT / top).rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )
