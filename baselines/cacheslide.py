"""CacheSlide's own systems under their module path from before the wheel was split into product and benchmark.

Metadata of environments installed before the split names `baselines.cacheslide:canonical`; without these names an
updated checkout has no systems until it is reinstalled. Nothing imports this file; 0.2 removes it.
"""

from baselines.naive_reuse import policy as naive
from cacheslide.policies.cacheslide import canonical, first_turn, promoting

__all__ = ["canonical", "first_turn", "naive", "promoting"]
