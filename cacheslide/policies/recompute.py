"""Recompute: every prompt is prefilled in full (vanilla serving without a prefix cache)."""

from cacheslide.policies.base import ReusePolicy


def policy() -> ReusePolicy:
    """No KV is reused."""
    return ReusePolicy("recompute", "Recompute")
