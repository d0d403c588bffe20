"""Checks a configuration before a run: types and keys by the schema, then rules beyond the schema."""

from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from cacheslide import renamed
from cacheslide.errors import CacheSlideError, ConfigError
from cacheslide.plain_values import check_plain
from cacheslide.policies.registry import policy_names
from harness.systems import VANILLA
from harness.tasks.data import check_size

TIMED = ("latency", "throughput")
LONGEST = 600  # characters of an error message


def check(config: MutableMapping[str, Any], schema: str | Path) -> None:
    """Fill in the schema's defaults; ConfigError on an unknown key, a wrong value or a system that cannot be run.

    Parameters
    ----------
    config : dict
        The content of a config/*.yaml; config/README.md explains its keys. Changed in place; on vLLM, whose CoPE is
        not part of the study yet, its section `cope` is removed.
    schema : path
        The JSON schema, as YAML.
    """
    check_plain(config, ConfigError)
    try:
        _check(config, yaml.safe_load(Path(schema).read_text()))
    except ConfigError as wrong:  # the message quotes the value, of any length
        said = str(wrong)
        raise ConfigError(said if len(said) <= LONGEST else f"{said[:LONGEST]}…") from None


def _check(config: MutableMapping[str, Any], rules: Mapping[str, Any]) -> None:
    on_vllm = config.get("backend") == "vllm"
    if on_vllm:
        config.setdefault("vllm", {})
    elif "vllm" in config:
        raise ConfigError("vllm: these keys need backend: vllm; config/README.md lists every key")
    _rename(config, renamed.CONFIGURATION)
    if isinstance(agents := config.get("agents"), dict):
        for section, names in renamed.CONFIGURED_AGENTS.items():
            _rename(agents.get(section), names)
    if (error := best_match(Draft202012Validator(rules).iter_errors(config))) is not None:
        where = ".".join(str(step) for step in error.absolute_path) or "the file"
        reason = error.message if len(error.message) <= LONGEST // 2 else f"{error.message[: LONGEST // 2]}…"
        if error.validator == "additionalProperties":
            unknown = sorted(set(error.instance) - set(error.schema["properties"]))
            reason = f"unknown key {', '.join(name[:40] for name in unknown[:5])}"
        raise ConfigError(f"{where}: {reason}; config/README.md lists every key")
    _fill(config, rules)
    _check_systems(config, on_vllm)
    for part in (*TIMED, "cksim"):
        if part in config and config[part]["dataset"] not in config["datasets"]:
            raise ConfigError(f"{part}.dataset: {config[part]['dataset']!r} is not one of this run's datasets")
    _check_sizes(config)
    if on_vllm:
        _check_vllm(config)
    if on_vllm:
        config.pop("cope", None)
    elif "cope" in config and (unknown := sorted(set(config["cope"]["systems"]) - set(policy_names()))):
        raise ConfigError(f"cope.systems: unknown system {unknown[0]!r}; installed are {', '.join(policy_names())}")
    if "agents" in config:
        _check_agents(config["agents"])


def _rename(part: Any, names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if isinstance(part, dict) and old in part:  # from a file, or from Snakemake's --config over a file's new name
            part[new] = part.pop(old)


def _check_agents(agents: Mapping[str, Any]) -> None:
    for part in (agents, *(v for v in agents.values() if isinstance(v, dict) and "systems" in v)):
        for system in [*part["systems"], *part.get("retained", ())]:
            if system not in policy_names():
                raise ConfigError(f"agents: unknown system {system!r}; installed are {', '.join(policy_names())}")


def native(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without CoPE and agents, on which the native model's answers do not depend."""
    return {key: value for key, value in config.items() if key not in ("cope", "agents")}


def _fill(config: MutableMapping[str, Any], schema: Mapping[str, Any]) -> None:
    for key, rule in schema["properties"].items():
        if "default" in rule:
            config.setdefault(key, deepcopy(rule["default"]))
        if "properties" in rule and key in config:
            _fill(config[key], rule)


def _check_systems(config: Mapping[str, Any], on_vllm: bool) -> None:
    known = [*policy_names(), *(VANILLA if on_vllm else ())]
    for system in config["systems"]:
        if system in VANILLA and not on_vllm:
            raise ConfigError(f"systems: {system!r} is vLLM itself and needs backend: vllm")
        if system not in known:
            raise ConfigError(f"systems: unknown system {system!r}; installed are {', '.join(sorted(known))}")
    for part in TIMED:
        for system in config[part]["systems"]:
            if system not in config["systems"]:
                raise ConfigError(f"{part}.systems: {system!r} is not one of this run's systems")


def _check_sizes(config: Mapping[str, Any]) -> None:
    for part in ("accuracy", "validation", *TIMED, "cksim"):
        given = config.get(part, {})
        tokens = given.get("tokens", [])
        for name in [given["dataset"]] if "dataset" in given else config["datasets"]:
            for size in tokens if isinstance(tokens, list) else [tokens]:
                try:
                    check_size(name, size)
                except CacheSlideError as wrong:
                    raise ConfigError(f"{part}: {wrong}") from None


def _check_vllm(config: Mapping[str, Any]) -> None:
    if config["store_dtype"] != config["dtype"]:
        raise ConfigError(f"store_dtype: backend: vllm keeps chunks in the model's dtype; set it to {config['dtype']}")
    if config["device"] == "cpu" and config["vllm"]["block_size"] % 32:
        raise ConfigError(f"vllm.block_size: {config['vllm']['block_size']} must be a multiple of 32 on device: cpu")
