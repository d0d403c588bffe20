"""Campaign: damages a store's files at random, round after round, and verifies the chunks served afterwards."""

import time
from pathlib import Path

from harness.experiments.slide.faults import rot
from harness.robustness.silence import silent_store

_ROUNDS = 10  # consecutive rounds in one folder: later ones also damage repaired files


@silent_store()
def run(minutes: float, seed: int, work: Path) -> dict:
    """See `harness.robustness.__main__`. A round is one flipped bit, cut or blank, and a look-up of every chunk."""
    until, found = time.monotonic() + 60 * minutes, {"rounds": 0, "served": 0, "missed": 0, "wrong_pages": 0}
    longest, folder = 0.0, 0
    while time.monotonic() < until:
        verdict = rot(work / str(folder), _ROUNDS, seed=seed * 100_003 + folder)
        found["rounds"] += verdict.faults
        for what in ("served", "missed", "wrong_pages"):
            found[what] += getattr(verdict, what)
        longest, folder = max(longest, verdict.seconds), folder + 1
    return found | {"longest_call_s": round(longest, 3), "faults": found["wrong_pages"]}
