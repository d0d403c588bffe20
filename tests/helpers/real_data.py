"""Real data that the project does not hold: tests read it where CACHESLIDE_REAL_DATA names its folder."""

import os
from pathlib import Path

import pytest


def real_file(name: str) -> Path:
    """A file of the folder; skips the test where there is none."""
    folder = os.environ.get("CACHESLIDE_REAL_DATA")
    if not folder:
        pytest.skip("CACHESLIDE_REAL_DATA names no folder with real data sets (docs/real.md)")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"CACHESLIDE_REAL_DATA has no {name}")
    return path
