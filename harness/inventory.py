"""The prompt files and figures of a configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cacheslide.errors import ConfigError
from cacheslide.plain_values import check_plain

FIGURES = {  # figure, and the result it is drawn from
    "fig03": "prompts.json",
    "fig04a": "cksim.jsonl",
    "fig05": "prompts.json",
    "fig10": "summary.json",
    "throughput": "throughput.jsonl",
}
AGENT_FIGURES = {  # section of `agents:`, and the figure drawn from its records
    "windows": "fig04b",
    "turns": "turns",
    "load": "fig11",
    "series": "fig13",
    "grid": "fig14",
}
AGENT_NAMES = {
    "reflexion": "Reflexion",
    "memgpt": "MemGPT",
    "swe_agent": "SWE-Agent",
    "function_calling": "Function calling",
}
NO_AGENTS = "agents are measured with backend: reference; docs/agents.md says how a server is measured"
NO_CKSIM = "CKSim reads the KV of every layer, which only backend: reference shows"


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file; one-line ConfigError if it is unreadable or holds no mapping."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as broken:  # also not UTF-8, thousands of digits, deep nesting
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(broken).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a configuration: keys and values are expected; config/README.md lists them")
    try:
        check_plain(raw, ConfigError)
    except ConfigError as wrong:
        raise ConfigError(f"{path}: {wrong}") from None
    return raw


class _OnceLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag.endswith(":str")]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def has_cksim(config: Mapping[str, Any]) -> bool:
    """Whether this configuration measures CKSim; `NO_CKSIM` holds the reason why not."""
    return config.get("backend", "reference") == "reference"


def has_agents(config: Mapping[str, Any]) -> bool:
    """Whether this configuration measures agents; if it names some and does not, `NO_AGENTS` holds the reason."""
    return "agents" in config and config.get("backend", "reference") == "reference"


def has_chunk_files(config: Mapping[str, Any]) -> bool:
    """Whether chunk caches are files passed between steps; vLLM keeps them inside the engine."""
    return config.get("backend", "reference") == "reference"


def figures_of(config: Mapping[str, Any]) -> list[str]:
    """The figures that can be drawn of this configuration."""
    plain = [name for name, source in FIGURES.items() if has_cksim(config) or source != FIGURES["fig04a"]]
    return plain + [AGENT_FIGURES[section] for section in agent_sections(config) if section in AGENT_FIGURES]


def agent_sections(config: Mapping[str, Any]) -> list[str]:
    """The sections of `agents:` that this configuration measures; each makes one record file."""
    return [s for s in ("replay", *AGENT_FIGURES) if has_agents(config) and s in config["agents"]]


def data_spec(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Prompts to generate for one part of the study: split, number of prompts, tokens per prompt.

    `part` is accuracy, validation, throughput, cksim or latency-TOKENS.
    """
    section, _, tokens = part.partition("-")
    settings = config[section]
    return {
        "split": "validation" if section == "validation" else "test",
        "prompts": settings["requests"] if section == "throughput" else settings["prompts"],
        "tokens": int(tokens) if tokens else settings["tokens"],
    }
