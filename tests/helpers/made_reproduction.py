"""A small reproduction: its settings on a tiny model, as a dictionary of keys."""

from pathlib import Path
from typing import Any

import yaml

from harness.experiments.serving.reproduction.settings import Settings, read_settings

SYSTEMS = ["cacheblend", "context_cache", "epic", "kvcomm", "naive_reuse", "cacheslide", "cacheslide_mixed"]
TINY = {
    "run": "tiny", "device": "cpu", "dtype": "float32", "base": {"tokens": 512, "batch": 1, "reused": 0.9},
    "tokens": [512], "batches": [1, 2], "reused": [0.9], "system_tokens": 64, "vocabulary": 90, "store_device": "cpu",
    "repeats": 2, "warmups": 1, "answer_tokens": 2, "energy_s": 0.05, "clients": [2], "turns": 2, "output_tokens": 4,
    "ratios": [0.1], "taus": [0.12], "systems": SYSTEMS, "recompute_8k_s": 0.5,
    "engine": {"block_size": 32, "enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 28},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    """A configuration file; without a `model` of the 7B shape."""
    keys = TINY | {"shape": "mistral-7b"} | changes
    if "model" in changes:
        del keys["shape"]
    path = folder / "reproduction.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def settings(folder: Path, **changes: Any) -> Settings:
    return read_settings(written(folder, **changes))
