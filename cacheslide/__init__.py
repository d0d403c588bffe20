"""CacheSlide: reuse of the KV cache of fixed prompt segments whose position slides from turn to turn."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use: PyTorch takes seconds to load, and some submodules do not need it.
_EXPORTS = {
    "CacheSlideError": "cacheslide.errors",
    "Prefilled": "cacheslide.core.engine",
    "Prompt": "cacheslide.core.prompt",
    "Receipt": "cacheslide.core.receipt",
    "ReuseEngine": "cacheslide.core.engine",
    "ReusePolicy": "cacheslide.policies.base",
    "Role": "cacheslide.core.prompt",
    "Segment": "cacheslide.core.prompt",
    "load_policy": "cacheslide.policies.registry",
    "policy_names": "cacheslide.policies.registry",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cacheslide' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
