"""Settings of a training run of the ledger model, read from YAML."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cacheslide.errors import ConfigError
from harness.inventory import read_config
from harness.tasks.ledger.world import Shape
from harness.training.ledger.bounds import check_rows, check_run, check_size
from harness.training.ledger.bounds import number as check_number
from harness.training.ledger.data import RowSpec
from harness.training.ledger.model import Size


@dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes
    ----------
    stages : list of {pass, by, rows}; a stage ends when the share of right answers reaches `pass`, at the latest when
        the share `by` (all where it is left out) of the time has passed. A row spec holds the fields of `RowSpec`, and
        those of its shape under `shape`
    model : fields of `Size`
    seconds : length of the run, of which the last share `decay` lowers the learning rate to its fiftieth
    warmup : steps
    pointers : weight of the attention loss
    again : number of uses of a row, with other words each time
    workers : processes that draw rows
    state : whether the state for `--resume` is written, 13 times the size of the model
    """

    stages: list[dict]
    model: dict
    seed: int = 0
    seconds: float = 220.0
    steps: int | None = None
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    decay: float = 0.35
    pointers: float = 0.5
    again: int = 4
    workers: int = 14
    log_every: int = 25
    save_seconds: float = 45.0
    state: bool = True
    eval_tokens: tuple[int, ...] = (1024, 4096)
    eval_prompts: int = 24

    def size(self) -> Size:
        """The model's size; ConfigError for an invalid count."""
        return _made(Size, self.model, "model")

    def specs(self, stage: int) -> list[RowSpec]:
        """The row specs of a stage."""
        return [_spec(raw, f"stages[{stage}].rows") for raw in self.stages[stage]["rows"]]


def read_settings(path: Path, changes: list[str] = ()) -> Settings:
    """Read a YAML file; `changes` are key=value strings that override it. Every stage is checked."""
    raw = read_config(path)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"{change!r} is not of the form key=value")
        try:
            raw[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{change!r}: the value is not valid YAML") from None
    settings = _made(Settings, raw, str(path))
    check_run(settings, str(path))
    check_size(settings.size())
    if not isinstance(settings.stages, list) or not settings.stages:
        raise ConfigError(f"{path}: stages must be a list of at least one stage")
    for number, stage in enumerate(settings.stages):
        if not isinstance(stage, dict) or not {"pass", "rows"} <= set(stage) <= {"pass", "by", "rows"}:
            raise ConfigError(f"{path}: stages[{number}] must hold pass and rows, may hold by, nothing else")
        if not isinstance(stage["rows"], list) or not stage["rows"]:
            raise ConfigError(f"{path}: stages[{number}].rows must be a list of at least one row spec")
        for name in {"pass", "by"} & set(stage):
            check_number(stage[name], f"{path}: stages[{number}].{name}", 0.0, 1.0)
        for spec in settings.specs(number):
            check_rows(spec, settings.size().positions, f"{path}: stages[{number}].rows")
    return settings


def _spec(raw: dict[str, Any], where: str) -> RowSpec:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: keys and values are expected, not {raw!r}")
    return _made(RowSpec, dict(raw) | {"shape": _made(Shape, raw.get("shape") or {}, f"{where}.shape")}, where)


def _made(kind: type, raw: dict[str, Any], where: str) -> Any:
    """A dataclass from plain values; lists become tuples."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: keys and values are expected, not {raw!r}")
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}")
    plain = {k: tuple(v) if isinstance(v, list) and k != "stages" else v for k, v in raw.items()}
    try:
        return kind(**plain)
    except TypeError as wrong:
        raise ConfigError(f"{where}: {wrong}") from None
