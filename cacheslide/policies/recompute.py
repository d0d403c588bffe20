"""Recompute: every prompt is prefilled in full (vanilla serving without a prefix cache)."""

from cacheslide.policies.base import ReusePolicy


def policy() -> ReusePolicy:
    """Nothing is ever reused."""
    return ReusePolicy("recompute", "Recompute")
