"""Reads the existing files of one run: records with their settings, and failures."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import DataError
from harness.results.records import RecordFile, read_file
from harness.systems import cope_systems, scalable, to_scale

MIXES = ("sparse", "deep", "ledger")
FILES = ("throughput", "cksim", "cksim_cope")
REFERENCE, NAIVE, OURS = "recompute", "naive_reuse", "cacheslide"


BySystem = dict[str, RecordFile]


@dataclass
class Run:
    """All measurements of one configuration; parts that were not measured are empty or None.

    `accuracy` and `equal_share` map data set, then system, to records; `latency` maps the nominal prompt length in
    tokens.
    """

    config: dict[str, Any]
    accuracy: dict[str, BySystem] = field(default_factory=dict)
    equal_share: dict[str, BySystem] = field(default_factory=dict)
    latency: dict[int, RecordFile] = field(default_factory=dict)
    throughput: RecordFile | None = None
    cksim: RecordFile | None = None
    cksim_cope: RecordFile | None = None
    agents: BySystem = field(default_factory=dict)  # by section of `agents:`
    prompts: dict[str, Any] | None = None
    prompts_cope: dict[str, Any] | None = None
    layer: dict[str, Any] | None = None

    @property
    def titles(self) -> dict[str, str]:
        """Display name of each system in figures and tables."""
        out = dict((self.prompts or {}).get("titles", {}))
        for timed in (*self.latency.values(), self.throughput):
            out |= timed.settings.get("titles", {}) if timed else {}
        for stage in (self.equal_share, self.accuracy):
            for files in stage.values():
                out |= {s: f.settings["title"] for s, f in files.items() if "title" in f.settings}
        return out

    def order(self, systems: Iterable[str]) -> list[str]:
        """`systems` in the configuration's order, then those on CoPE, then unknown ones by name."""
        named = {s: i for i, s in enumerate([*self.config.get("systems", []), *cope_systems(self.config)])}
        return sorted(set(systems), key=lambda s: (named.get(s, len(named)), s))

    def failures(self) -> list[dict[str, Any]]:
        """Every failed request with its place."""
        out = []
        for stage in ("accuracy", "equal_share"):
            for dataset, files in getattr(self, stage).items():
                for system, file in files.items():
                    where = {"stage": stage, "dataset": dataset, "system": system}
                    out += [where | f for f in file.failures]
        for tokens, file in self.latency.items():
            out += [{"stage": "latency", "tokens": tokens} | f for f in file.failures]
        for stage in FILES:
            file = getattr(self, stage)
            out += [{"stage": stage} | f for f in file.failures] if file else []
        for section, file in self.agents.items():
            out += [{"stage": f"agents/{section}"} | f for f in file.failures]
        return out


def mix_of(dataset: str) -> str:
    """The mix of a data set called STYLE-MIX, "ledger" for the ledger task's; other data sets are their own group."""
    tail = dataset.rpartition("-")[2]
    return tail if tail in MIXES else dataset


def load_run(config: dict[str, Any], **paths: Any) -> Run:
    """Read the existing files of a run.

    Parameters
    ----------
    config : dict
        The run's configuration.
    **paths
        `accuracy`, `equal_share`, `latency`, `agents`: lists of record files; `throughput`, `cksim`,
        `cksim_cope`: one record file; `prompts`, `prompts_cope`, `layer`: one JSON file. Missing files are skipped: the
        summary lists them.
    """
    run = Run(config)
    for stage in ("accuracy", "equal_share"):
        for path in _existing(paths.get(stage)):
            getattr(run, stage).setdefault(path.parent.name, {})[path.stem] = read_file(path)
    for dataset, files in run.equal_share.items():  # systems that recompute this share by themselves ran once
        own = run.accuracy.get(dataset, {})
        files |= {
            s: own[s]
            for s in scalable(own)
            if s not in files and s not in to_scale([s], config.get("recompute_ratio", 0))
        }
    for path in _existing(paths.get("latency")):
        if not path.stem.isdigit():
            raise DataError(f"{path}: a latency file is called by its prompt length, such as 4096.jsonl")
        run.latency[int(path.stem)] = read_file(path)
    run.agents = {path.stem: read_file(path) for path in _existing(paths.get("agents"))}
    run.latency = dict(sorted(run.latency.items()))
    for stage in FILES:
        for path in _existing(paths.get(stage)):
            setattr(run, stage, read_file(path))
    for stage in ("prompts", "prompts_cope", "layer"):
        for path in _existing(paths.get(stage)):
            setattr(run, stage, read_json(path))
    return run


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; DataError with its name if invalid."""
    try:
        return renamed.record(json.loads(Path(path).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, RecursionError) as broken:
        raise DataError(f"{path} is not JSON: {broken}") from None


def _existing(given: Any) -> list[Path]:
    listed = [] if given is None else [given] if isinstance(given, str | Path) else list(given)
    return [p for p in map(Path, listed) if p.is_file()]
