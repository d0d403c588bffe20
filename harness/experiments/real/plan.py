"""What the study on a real model measures: the keys of config/real.yaml."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from harness.backends.reference import dtype_of
from harness.experiments.real.trials import LENGTHS, SETTINGS
from harness.inventory import read_config

COUNTS = ("prompts", "validation", "sessions", "every_turn", "turns", "longest")


@dataclass(frozen=True)
class RealPlan:
    """One study.

    Attributes
    ----------
    model : str
        A checkpoint folder, a GGUF file, or a name on the hub.
    data : tuple of str
        Files of questions with passages, one a data set.
    dtype : str
        What the model computes in and chunks are kept in.
    lengths : tuple of int
        Tokens of fixed text; prompts take turns at them.
    settings : tuple of str
        Of `trials.SETTINGS`.
    prompts : int
        Prompts a data set and setting at most.
    validation : int
        Rows at the end of each data set that choose layers and give no results.
    sessions, every_turn : int
        Histories a data set at most, and which of their turns are compared.
    layers_on : tuple of str
        Settings of the validation part.
    recordings : str
        Folder of recorded agent sessions.
    turns, longest : int
        Turns of a recorded session at most, and tokens of its prompts.
    """

    model: str
    data: tuple[str, ...]
    dtype: str = "bfloat16"
    seed: int = 0
    lengths: tuple[int, ...] = LENGTHS
    settings: tuple[str, ...] = SETTINGS
    prompts: int = 60
    validation: int = 10
    sessions: int = 30
    every_turn: int = 3
    layers_on: tuple[str, ...] = ("unrelated", "matter")
    recordings: str = ""
    turns: int = 16
    longest: int = 8192

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        for name in COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not self.data or not self.lengths or min(self.lengths) < 200:
            raise ConfigError("data names at least one file, and lengths are 200 tokens or more")
        if unknown := {*self.settings, *self.layers_on} - set(SETTINGS):
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r} (known: {', '.join(SETTINGS)})")


def read_plan(path: str | Path, **changes: Any) -> RealPlan:
    """The plan in a YAML file, with `changes` that are not None; ConfigError names a key that is unknown or missing."""
    raw = read_config(path) | {k: v for k, v in changes.items() if v is not None}
    if unknown := sorted(set(raw) - {f.name for f in fields(RealPlan)}):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; config/README.md lists every key")
    if missing := [name for name in ("model", "data") if name not in raw]:
        raise ConfigError(f"{path}: {', '.join(missing)} is missing")
    if isinstance(raw["model"], str):
        raw["model"] = str(Path(raw["model"]).expanduser())
    return RealPlan(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
