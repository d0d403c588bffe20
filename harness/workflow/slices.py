"""The part of a configuration that a step reads."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from cacheslide.errors import ConfigError


def slice_of(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The values of `keys` as plain nested dicts; keys that the configuration lacks are left out.

    An empty `systems` of a section is replaced by the systems it stands for, so that a step reads one key, not two.

    Parameters
    ----------
    config : mapping
        A checked configuration.
    keys : sequence of str
        For example `seed`, `latency.repeats`, `agents.replay` (all of its keys); `*` is the whole configuration.
    """
    if "*" in keys:
        return deepcopy(dict(config))
    out: dict[str, Any] = {}
    for key in keys:
        *sections, last = key.split(".")
        source, target = config, out
        for name in sections:
            if name not in source:
                break
            source, target = source[name], target.setdefault(name, {})
        else:
            if last in source:
                target[last] = deepcopy(source[last])
                _fill_systems(config, key, target)
    return out


def _fill_systems(config: Mapping[str, Any], key: str, part: dict[str, Any]) -> None:
    """Replace an empty list of systems in `latency`, `throughput` or a section of `agents` by what it stands for."""
    section, _, last = key.rpartition(".")
    if section in ("latency", "throughput") and last == "systems":
        part["systems"] = part["systems"] or list(config["systems"])
    elif section == "agents" and isinstance(part[last], dict) and "systems" in part[last]:
        part[last]["systems"] = part[last]["systems"] or list(config["agents"]["systems"])


class Slice(dict):
    """A slice that raises ConfigError, naming the key, when an undeclared key is read."""

    def __init__(self, values: Mapping[str, Any], keys: Sequence[str], section: str = "") -> None:
        self._names = {key.split(".")[0] for key in keys}
        self._section = section
        super().__init__(
            {
                name: value if name in keys or not isinstance(value, dict) else Slice(value, _below(keys, name), name)
                for name, value in values.items()
            }
        )

    def _declared(self, key: str) -> None:
        if key not in self._names:
            name = f"{self._section}.{key}" if self._section else key
            raise ConfigError(f"a step reads the key {name} of the configuration and does not declare it")

    def __getitem__(self, key: str) -> Any:
        """The value of a declared key."""
        self._declared(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a declared key, or `default` if the configuration lacks it."""
        self._declared(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        """Whether the configuration has a declared key."""
        self._declared(str(key))
        return super().__contains__(key)


def _below(keys: Sequence[str], name: str) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]
