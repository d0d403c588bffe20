"""The setting that makes an engine serve a CoPE model: vLLM's `hf_overrides`, which reach all of its processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.training.load import CopeSetup, find_cope

ARCHITECTURE = "CacheSlideCopeForCausalLM"
KINDS = ("llama", "mistral")  # model types
ADAPTER, _LIVE, _CAP = "cope_adapter", "cope_live", "cope_cap"


def overrides(
    adapter: str | Path, live: bool = False, cap: bool = False, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`hf_overrides` that put the CoPE adapter in a folder on the base model, merged with the overrides `others`.

    A folder without an adapter, or with an altered one, raises ModelError before anything is loaded. `live` and `cap`
    as in `find_cope`.
    """
    others = dict(others or {})
    if "architectures" in others:
        raise ConfigError("with a CoPE adapter hf_overrides cannot name another architecture")
    find_cope(adapter, live=live)
    own = {"architectures": [ARCHITECTURE], ADAPTER: str(Path(adapter).resolve()), _LIVE: live, _CAP: cap}
    return others | own


def is_cope(hf_config: Any) -> bool:
    """Whether a model's configuration names a CoPE adapter."""
    return getattr(hf_config, ADAPTER, None) is not None


def setup_of(hf_config: Any) -> CopeSetup:
    """The adapter that a model's configuration names, read and checked, but not compared with the base model."""
    if not is_cope(hf_config):
        raise ConfigError(f"{ARCHITECTURE} needs an adapter: start it with --cope FOLDER")
    live, cap = getattr(hf_config, _LIVE, False), getattr(hf_config, _CAP, False)
    return find_cope(getattr(hf_config, ADAPTER), live=live, cap=cap)
