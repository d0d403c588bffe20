"""Plan of the study on a real model: the keys of config/real.yaml."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.plain_values import shown
from harness.backends.reference import dtype_of
from harness.experiments.real.trials import LENGTHS, SETTINGS
from harness.inventory import read_config

COUNTS = ("prompts", "swept", "validation", "sessions", "every_turn", "turns", "longest")
TEXTS = ("model", "dtype", "recordings")
LISTS = {"data": str, "settings": str, "layers_on": str, "lengths": int, "without": str}
MAY_BE_EMPTY = ("without",)
SHORTEST = 200  # minimum tokens of fixed text


@dataclass(frozen=True)
class RealPlan:
    """One study.

    Attributes
    ----------
    model : str
        A checkpoint folder, a GGUF file, or a name on the hub.
    data : tuple of str
        Files of questions with passages, one per data set.
    without : tuple of str
        Files of the same kinds whose questions are excluded, so that the study uses other prompts.
    dtype : str
        Dtype of the model and of stored chunks.
    lengths : tuple of int
        Tokens of fixed text; prompts cycle through them.
    settings : tuple of str
        Names from `trials.SETTINGS`.
    prompts : int
        Maximum prompts per data set and setting.
    swept : int
        Number of prompts measured under every arm; the others under `arms.core`.
    validation : int
        Rows at the end of each data set, used only to choose layers.
    sessions, every_turn : int
        Maximum histories per data set, and the step between compared turns.
    layers_on : tuple of str
        Settings of the validation part.
    recordings : str
        Folder of recorded agent sessions.
    turns, longest : int
        Maximum turns of a recorded session, and maximum tokens of its prompts.
    """

    model: str
    data: tuple[str, ...]
    dtype: str = "bfloat16"
    seed: int = 0
    lengths: tuple[int, ...] = LENGTHS
    settings: tuple[str, ...] = SETTINGS
    prompts: int = 60
    swept: int = 10
    validation: int = 10
    sessions: int = 30
    every_turn: int = 3
    layers_on: tuple[str, ...] = ("unrelated", "matter")
    recordings: str = ""
    turns: int = 16
    longest: int = 8192
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, not {shown(getattr(self, name))}")
        for name, kind in LISTS.items():
            value = getattr(self, name)
            empty = not value and name not in MAY_BE_EMPTY
            if not isinstance(value, tuple) or empty or any(type(x) is not kind or not x for x in value):
                what = "texts" if kind is str else "whole numbers"
                raise ConfigError(f"{name} must be a list of {what}, not {shown(value)}")
        for name, least in dict.fromkeys(COUNTS, 1).items() | {("seed", 0)}:
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
        if not self.model:
            raise ConfigError("model names a checkpoint")
        if min(self.lengths) < SHORTEST:
            raise ConfigError(f"lengths are {SHORTEST} tokens or more")
        dtype_of(self.dtype)
        if unknown := {*self.settings, *self.layers_on} - set(SETTINGS):
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r} (known: {', '.join(SETTINGS)})")


def read_plan(path: str | Path, **changes: Any) -> RealPlan:
    """The plan in a YAML file, with `changes` that are not None; ConfigError names an unknown or missing key."""
    raw = read_config(path) | {k: v for k, v in changes.items() if v is not None}
    if unknown := sorted(set(raw) - {f.name for f in fields(RealPlan)}):
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; config/README.md lists every key")
    if missing := [name for name in ("model", "data") if name not in raw]:
        raise ConfigError(f"{path}: {', '.join(missing)} is missing")
    if isinstance(raw["model"], str) and raw["model"]:  # an empty path would mean the current folder
        try:
            raw["model"] = str(Path(raw["model"]).expanduser())
        except RuntimeError:
            raise ConfigError(f"{path}: model: {shown(raw['model'])} names the home of no user here") from None
    return RealPlan(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
