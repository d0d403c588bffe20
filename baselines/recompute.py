"""Recompute under the place it had before the wheels parted; see baselines/cacheslide.py for why, and until when."""

from cacheslide.policies.recompute import policy

__all__ = ["policy"]
