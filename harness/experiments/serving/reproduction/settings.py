"""The keys of a reproduction's configuration (config/h200.yaml); config/README.md explains them."""

import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, ModelError
from cacheslide.plain_values import shown
from cacheslide.units import GIB
from harness.experiments.serving.engines import COMMON, SHAPES
from harness.inventory import read_config
from harness.systems import resolve

_TUPLES = {"tokens": int, "batches": int, "reused": float, "ratios": float, "taus": float, "clients": int,
           "systems": str}  # fmt: skip
_COUNTS = ("tensor_parallel", "repeats", "answer_tokens", "turns", "output_tokens", "vocabulary")
_POSITIVE = ("energy_s", "gpu_gib", "start_first_s", "start_s", "recompute_8k_s", "stage_minutes")
_BASE = {"tokens": int, "batch": int, "reused": float}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Settings:
    """One model on one kind of machine. Times are estimates, by which cells are put into stages."""

    run: str
    shape: str = ""
    model: str = ""
    device: str = "cuda"
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    base: dict[str, Any] = field(default_factory=lambda: {"tokens": 8192, "batch": 1, "reused": 0.9})
    tokens: tuple[int, ...] = (4096, 8192, 16384, 32768)
    batches: tuple[int, ...] = (1, 2, 4, 6, 8, 16)
    reused: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    longest: int | None = None
    most_requests: int | None = None
    systems: tuple[str, ...] = ()
    ours: str = "cacheslide_mixed"
    ratios: tuple[float, ...] = (0.05, 0.1, 0.15, 0.26, 0.5)
    taus: tuple[float, ...] = (0.06, 0.12, 0.25, 0.5)
    system_tokens: int = 256
    vocabulary: int = 31000
    store_device: str = "model"
    repeats: int = 8
    warmups: int = 2
    answer_tokens: int = 1
    energy_s: float = 2.0
    clients: tuple[int, ...] = (1, 8)
    turns: int = 8
    output_tokens: int = 64
    gpu_gib: float = 139.0
    start_first_s: float = 100.0
    start_s: float = 65.0
    recompute_8k_s: float = 0.21
    stage_minutes: float = 9.0
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not self.run:
            raise ConfigError(f"run must be a name, not {shown(self.run)}")
        if bool(self.shape) is bool(self.model):
            raise ConfigError("give a shape (random weights) or a model (a checkpoint's folder), one of them")
        if self.shape and self.shape not in SHAPES:
            raise ConfigError(f"shape: {shown(self.shape)} is not one of {', '.join(SHAPES)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, not {shown(self.device)}")
        if self.dtype not in BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(BYTES)}, not {shown(self.dtype)}")
        if self.store_device not in ("cpu", "model"):
            raise ConfigError(f"store_device must be cpu or model, not {shown(self.store_device)}")
        for name, kind in _TUPLES.items():
            self._check_tuple(name, kind)
        for name in (*_COUNTS, "system_tokens", "warmups"):
            value, least = getattr(self, name), int(name in _COUNTS)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
        for name in ("longest", "most_requests"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {shown(value)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if type(value) not in (int, float) or not value > 0:
                raise ConfigError(f"{name} must be a number above 0, not {shown(value)}")
        if not isinstance(self.base, dict) or self.base.keys() != _BASE.keys():
            raise ConfigError(f"base holds {', '.join(_BASE)}, not {shown(self.base)}")
        if not isinstance(self.engine, dict):
            raise ConfigError(f"engine holds options of vllm.LLM, not {shown(self.engine)}")
        for axis, name in (("tokens", "tokens"), ("batches", "batch"), ("reused", "reused")):
            if self.base[name] not in getattr(self, axis):
                raise ConfigError(f"base: {name} {shown(self.base[name])} is not one of {axis}")
        resolve([*self.systems, self.ours])  # an unknown system ends the run before a model is loaded

    def _check_tuple(self, name: str, kind: type) -> None:
        values, numbers = getattr(self, name), (int, float) if kind is float else (kind,)
        if not isinstance(values, tuple) or any(type(v) not in numbers for v in values):
            raise ConfigError(f"{name} must be a list of {kind.__name__}s, not {shown(values)}")
        if not values and name not in ("systems", "taus", "clients"):
            raise ConfigError(f"{name} is empty")
        if kind is int and any(v < 1 for v in values):
            raise ConfigError(f"{name}: every value must be at least 1, not {shown(values)}")
        if kind is float and any(not 0 < v < 1 for v in values):
            raise ConfigError(f"{name}: every value must lie between 0 and 1, not {shown(values)}")

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The model's config.json."""
        if self.shape:
            return SHAPES[self.shape] | COMMON
        path = Path(self.model) / "config.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as missing:
            raise ModelError(f"model: {path} cannot be read ({missing}): put the checkpoint there") from None

    @property
    def layers(self) -> int:
        """The model's layers."""
        return self.model_config["num_hidden_layers"]

    @property
    def weight_gib(self) -> float:
        """Weights on each GPU, of a Llama: projections, MLP, embeddings and head."""
        c = self.model_config
        hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        attention = 2 * hidden * (heads + kv) * self._head_dim
        layer = attention + 3 * hidden * c["intermediate_size"]
        return (self.layers * layer + 2 * c["vocab_size"] * hidden) * BYTES[self.dtype] / self.tensor_parallel / GIB

    @property
    def token_gib(self) -> float:
        """KV of a token on each GPU."""
        kv_heads = self.model_config["num_key_value_heads"] / self.tensor_parallel
        return 2 * self.layers * kv_heads * self._head_dim * BYTES[self.dtype] / GIB

    @property
    def _head_dim(self) -> int:
        c = self.model_config
        return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def is_reproduction(raw: dict[str, Any]) -> bool:
    """Whether a configuration is one of these: no other has a shape, or a model without systems of a study."""
    return "shape" in raw or ("model" in raw and "run" in raw and "accuracy" not in raw)


def read_settings(path: str | Path) -> Settings:
    """The settings in a YAML file; ConfigError naming an unknown or missing key."""
    raw = read_config(path)
    if unknown := sorted(set(raw) - {f.name for f in fields(Settings)}):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; config/README.md lists every key")
    if "run" not in raw:
        raise ConfigError(f"{path}: run is missing")
    for name in _TUPLES:
        if isinstance(raw.get(name), list):
            raw[name] = tuple(raw[name])
    return Settings(**raw)
