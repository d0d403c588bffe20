"""Paths from the patterns of `harness.workflow.steps`, and the jobs of a configuration."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from harness.inventory import agent_sections, figures_of
from harness.results.provenance import ROOT
from harness.systems import cope_systems, to_scale
from harness.workflow.steps import STEPS, Config, Step, steps_of

NAME = re.compile(r"\{([a-z_.]+)\}")
# Files that loaders of checkpoints and adapters open; notes and training records beside them are no inputs.
LOADED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "cope.json", "ccpe.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
)
Inputs = dict[str, str | list[str]]


@dataclass(frozen=True)
class Job:
    """One run of a step: inputs by name, a list where the step reads several files, and its outputs."""

    step: Step
    inputs: Inputs
    outputs: list[str]


def lists(config: Config) -> dict[str, list[str]]:
    """The values of names that stand for a list of the configuration."""
    return {
        "dataset": config["datasets"],
        "system": config["systems"],
        "scaled": to_scale(config["systems"], config["recompute_ratio"]),  # those that run again at an equal share
        "cope_system": cope_systems(config),
        "tokens": [str(n) for n in config["latency"]["tokens"]],
        "section": agent_sections(config),
        "figure": figures_of(config),
    }


def expanded(pattern: str, config: Config, each: Mapping[str, str]) -> list[str]:
    """The paths of a pattern; `each` gives the values of the step's `each` names."""
    values = lists(config) | {name: [value] for name, value in each.items()} | {"root": [str(ROOT)]}
    names = list(dict.fromkeys(NAME.findall(pattern)))
    choices = [values[name] if name in values else [_looked_up(config, name)] for name in names]
    paths = []
    for chosen in product(*choices):
        choice = dict(zip(names, chosen, strict=True))
        paths.append(NAME.sub(lambda match, choice=choice: choice[match[1]], pattern))
    return paths


def _looked_up(config: Config, key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return str(value)


def outputs_of(step: Step, config: Config, each: Mapping[str, str] | None = None) -> list[str]:
    """A step's outputs; without `each`, its names stay in braces, as Snakemake's wildcards."""
    each = {name: f"{{{name}}}" for name in step.each} if each is None else each
    return [path for pattern in step.outputs for path in expanded(pattern, config, each)]


def only_tables(config: Config) -> list[Step]:
    """The steps that make tables and figures from existing records; figures without their source are left out."""
    kept: list[Step] = []
    for step in steps_of(config):
        source = inputs_of(step, config, {}).get("source") if step.of_records else None
        if step.of_records and (source is None or what_is_there({"source": source}, kept, config)):
            kept.append(step)
    return kept


def what_is_there(inputs: Inputs, steps: Sequence[Step], config: Config) -> Inputs:
    """The inputs that exist or that one of `steps` makes."""
    made = {path for step in steps for path in outputs_of(step, config)}
    out: Inputs = {}
    for name, given in inputs.items():
        paths = [p for p in ([given] if isinstance(given, str) else given) if p in made or Path(p).exists()]
        if paths:
            out[name] = paths[0] if isinstance(given, str) else paths
    return out


def records_of(config: Config) -> list[str]:
    """The record files of a run, which cannot be remade from other files."""
    paths = [path for step in steps_of(config) for pattern in step.outputs for path in expanded(pattern, config, {})]
    return [path for path in paths if path.endswith(".jsonl") and "/data/" not in path]


def inputs_of(step: Step, config: Config, each: Mapping[str, str]) -> Inputs:
    """A step's inputs by name: a path, or a list for patterns of several; those that nothing makes are left out.

    Raises
    ------
    ConfigError
        A folder of the configuration lacks files of a checkpoint or an adapter.
    """
    out: Inputs = {}
    for name, given in step.inputs.items():
        patterns = (given,) if isinstance(given, str) else given
        paths, several = [], len(patterns) > 1
        for pattern in patterns:
            if pattern in _left_out(tuple(s.name for s in steps_of(config))) or not _known(pattern, config):
                continue
            several |= "*" in pattern or any(n in lists(config) and n not in each for n in NAME.findall(pattern))
            for path in expanded(pattern, config, each):
                paths += _files(path, pattern) if "*" in pattern or pattern.startswith("{root}/") else [path]
        if paths:
            out[name] = paths if several else paths[0]
    return out


@cache
def _left_out(names: tuple[str, ...]) -> frozenset[str]:
    """Patterns that are made only by steps which the configuration leaves out."""
    return frozenset(pattern for step in STEPS if step.name not in names for pattern in step.outputs)


def _known(pattern: str, config: Config) -> bool:
    """Whether the configuration has the section of a pattern's folder."""
    return not (pattern.startswith("{agents.") and not agent_sections(config))


def _files(path: str, pattern: str) -> list[str]:
    """Existing files of a pattern: a committed record, or files of a checkpoint, an adapter or a tokenizer."""
    folder, _, names = path.rpartition("/")
    if pattern.startswith("{root}/"):
        return sorted(map(str, Path(folder).glob(names)))
    if names != "*":
        return sorted(map(str, Path(folder).glob(names)))
    return loaded(folder, NAME.findall(pattern)[0])


def loaded(folder: str, key: str) -> list[str]:
    """The files of a checkpoint's folder or, depending on the configuration's `key`, of an adapter's.

    Raises
    ------
    ConfigError
        The folder lacks required files.
    """
    files = sorted({str(p) for kind in LOADED for p in Path(folder).glob(kind)})
    if key.endswith("adapter"):
        if not (Path(folder) / "cope.json").is_file():
            raise ConfigError(f"{key}: there is no adapter in {folder}")
    elif not (Path(folder) / "config.json").is_file() or not any(p.endswith(".safetensors") for p in files):
        raise ConfigError(f"{key}: {folder} needs a config.json and *.safetensors weights")
    return files


def jobs_of(config: Config, steps: Sequence[Step] | None = None) -> Iterator[Job]:
    """Every job of a configuration, each after the jobs whose outputs it reads."""
    for step in steps_of(config) if steps is None else steps:
        for chosen in product(*(lists(config)[name] for name in step.each)):
            each = dict(zip(step.each, chosen, strict=True))
            yield Job(step, inputs_of(step, config, each), outputs_of(step, config, each))
