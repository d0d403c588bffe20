"""CacheSlide's own systems under the place they had before the product's wheel parted from the benchmark's.

The metadata of an environment that was installed before still names `baselines.cacheslide:canonical`; without these
names an updated checkout knows no system until it is installed anew. Nothing imports this file; it goes with 0.2.
"""

from baselines.naive_reuse import policy as naive
from cacheslide.policies.cacheslide import canonical, first_turn, promoting

__all__ = ["canonical", "first_turn", "naive", "promoting"]
