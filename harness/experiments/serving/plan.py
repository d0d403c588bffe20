"""Plan of a serving experiment: its configuration, and the conditions and servers derived from it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import ConfigError, ModelError
from harness.backends.in_process import EngineOptions
from harness.inventory import read_config
from harness.systems import VANILLA, resolve, scalable

_LISTS = {
    "systems": str,
    "tokens": int,
    "batches": int,
    "recompute_ratios": float,
    "store_devices": str,
    "rates": float,
}


@dataclass(frozen=True)
class ServingPlan:
    """The keys of a serving configuration; config/README.md explains them."""

    model: str
    systems: tuple[str, ...]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    recompute_ratios: tuple[float, ...] = ()
    store_devices: tuple[str, ...] = ("cpu",)
    rates: tuple[float, ...] = ()
    chunk_size: int = 4096
    suffix_len: int = 1
    layer: int | None = None
    reused: float = 0.9
    chunks: int = 8
    system_tokens: int = 0
    turns: int = 4
    warmups: int = 1
    output_tokens: int = 8
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("turns", "output_tokens", "chunk_size", "suffix_len", "chunks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, not {getattr(self, name)!r}")
        for name in ("systems", "tokens", "batches", "store_devices"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty")
        if not isinstance(self.warmups, int) or self.warmups < 0:
            raise ConfigError(f"warmups must be an integer of at least 0, not {self.warmups!r}")
        if type(self.system_tokens) is not int or self.system_tokens < 0:
            raise ConfigError(f"system_tokens must be an integer of at least 0, not {self.system_tokens!r}")
        if not 0 < self.reused < 1:
            raise ConfigError(f"reused must lie between 0 and 1, not {self.reused}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, not {self.device!r}")
        if wrong := sorted(set(self.store_devices) - {"cpu", "model"}):
            raise ConfigError(f"store_devices: {', '.join(wrong)} is not one of cpu, model")
        if "store_device" in self.vllm:
            raise ConfigError("vllm.store_device: name the devices under store_devices")
        if unknown := sorted(set(self.vllm) - {f.name for f in fields(EngineOptions)}):
            raise ConfigError(f"vllm: unknown key {', '.join(unknown)}")
        resolve(self.systems, self.layer)  # fails on an unknown system before a model is loaded

    @property
    def options(self) -> EngineOptions:
        """The engine's options; without a configured length, the longest prompt's."""
        options = EngineOptions(**self.vllm)
        return options if options.max_model_len else replace(options, max_model_len=self.longest)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(self.tokens) + self.output_tokens

    @property
    def vocab(self) -> int:
        """The model's vocabulary."""
        try:
            return int(json.loads((Path(self.model) / "config.json").read_text())["vocab_size"])
        except (OSError, KeyError, ValueError) as missing:
            raise ModelError(f"{self.model}: config.json does not say vocab_size: {missing}") from None

    def servers(self) -> Iterator[tuple[str | None, list[str]]]:
        """Every server to start: the device of its chunk store (None: plain vLLM), and its systems."""
        for name in self.systems:
            if name in VANILLA:
                yield None, [name]
        annotated = [name for name in self.systems if name not in VANILLA]
        for device in self.store_devices if annotated else ():
            yield device, annotated

    def settings(self, systems: list[str]) -> Iterator[tuple[str, float | None]]:
        """System and recompute ratio; systems that do not scale have none."""
        for name in systems:
            for recompute_ratio in self.recompute_ratios if self.recompute_ratios and scalable([name]) else (None,):
                yield name, recompute_ratio

    def loads(self) -> Iterator[tuple[int, float | None]]:
        """Clients, and for an open loop its arrivals a second."""
        yield from ((batch, None) for batch in self.batches)
        yield from ((max(self.batches), rate) for rate in self.rates)


def read_plan(path: str | Path) -> ServingPlan:
    """The plan in a YAML file; ConfigError naming an unknown or missing key."""
    try:
        raw = renamed.options(read_config(path), renamed.SERVING)
    except ValueError as wrong:
        raise ConfigError(f"{path}: {wrong}") from None
    known = {f.name for f in fields(ServingPlan)}
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; config/README.md lists every key")
    if missing := [n for n in ("model", "systems", "tokens", "batches") if n not in raw]:
        raise ConfigError(f"{path}: {', '.join(missing)} is missing")
    for name, kind in _LISTS.items():
        if name in raw:
            raw[name] = _tuple(name, raw[name], kind)
    return ServingPlan(**raw)


def _tuple(name: str, values: Any, kind: type) -> tuple:
    numbers = (int, float) if kind is float else kind
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, numbers) for v in values):
        raise ConfigError(f"{name} must be a list of {kind.__name__}s, not {values!r}")
    if kind is not str and any(v < 0 or (kind is int and v < 1) for v in values):
        raise ConfigError(f"{name}: {values!r} holds a value that is too small")
    return tuple(values)
