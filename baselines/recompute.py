"""Recompute under its module path from before the wheel was split; see baselines/cacheslide.py."""

from cacheslide.policies.recompute import policy

__all__ = ["policy"]
