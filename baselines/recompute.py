"""Recompute: every prompt is prefilled in full (vanilla serving without a prefix cache)."""

from cacheslide.policy import ReusePolicy


def policy() -> ReusePolicy:
    """Nothing is ever reused."""
    return ReusePolicy("recompute", "Recompute")
