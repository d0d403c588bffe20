"""The same for CoPE models: kinds of runs, and what is compared."""

import torch

KINDS = {"live": (0, False), "calibrated": (3, False), "capped": (1, True)}  # slots, and whether they are capped
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def assert_same(got, want) -> None:
    assert got[1] == want[1]
    for mine, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
