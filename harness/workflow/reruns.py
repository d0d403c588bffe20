"""The rules that Snakemake runs again after a finished run when one key of the configuration changes.

The finished run consists of empty files: `snakemake --touch` records the rules' parameters for them, as a run does.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cacheslide.errors import ConfigError
from harness.configuration import check
from harness.inventory import read_config
from harness.results.provenance import ROOT
from harness.workflow.apart import processes
from harness.workflow.paths import jobs_of

SCHEMA = ROOT / "workflows/schemas/config.schema.yaml"
STUDY = "config/cpu.yaml"  # has every section
TARGETS = ("reproduce-all", "total")
CHANGES: dict[str, Any] = {  # one key of each kind, with another valid value
    "seed": 1,
    "model": "models/tiny-agents-3m",
    "store_dtype": "float32",
    "chunk_size": 512,
    "recompute_ratio": 0.3,
    "systems": [
        *("recompute", "context_cache", "prompt_cache", "cacheblend", "cacheblend_stale", "epic"),
        *("naive_reuse", "cacheslide", "cacheslide_promote"),
    ],
    "datasets": ["hotpotqa-sparse", "hotpotqa-deep", "swebench-sparse"],
    "accuracy.prompts": 151,
    "accuracy.questions": 7,
    "latency.repeats": 4,
    "latency.tokens": [1024, 2048, 4096],
    "throughput.batches": [1, 2],
    "cksim.shifts": [0, 1000],
    "cope.prompts": 100,
    "agents.layer": 3,
    "agents.load.repeats": 2,
}


def changed(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `config` with another value of `key`; ConfigError if it has no such key, or that value already."""
    out: dict[str, Any] = deepcopy(dict(config))
    *sections, last = key.split(".")
    place = out
    for name in sections:
        place = place.get(name, {})
    if last not in place or place[last] == value:
        raise ConfigError(f"{key}: the configuration has no such key, or this value already")
    place[last] = value
    return out


def rules_rerun(changes: Mapping[str, Any] = CHANGES, jobs: int = 2) -> dict[str, list[str]]:
    """The rules that a dry run lists for each changed key, sorted; `jobs` dry runs at a time.

    Raises
    ------
    ConfigError
        If Snakemake fails, or runs a rule again although nothing has changed.
    """
    config = read_config(ROOT / STUDY)
    with TemporaryDirectory() as folder, processes(jobs) as pool:
        _finish(Path(folder), config)
        cases = {"": config} | {key: changed(config, key, value) for key, value in changes.items()}
        for number, case in enumerate(cases.values()):
            (Path(folder) / f"{number}.yaml").write_text(yaml.safe_dump(case, sort_keys=False))
        numbers = range(len(cases))
        pool.apply(_snakemake, (folder, "0.yaml", "--touch", "--forceall"))
        results = pool.map(partial(_dry_run, folder), [f"{n}.yaml" for n in numbers], chunksize=1)
    rules = dict(zip(cases, results, strict=True))
    if rules.pop(""):
        raise ConfigError("a finished run is not finished: Snakemake would run rules again with nothing changed")
    return rules


def _finish(folder: Path, config: Mapping[str, Any]) -> None:
    """Create empty files for every output, beside the models."""
    (folder / "models").symlink_to(ROOT / "models")
    checked = deepcopy(dict(config))
    check(checked, SCHEMA)
    with _inside(folder):
        for job in jobs_of(checked):
            for path in map(Path, job.outputs):
                (path if job.step.temporary else path.parent).mkdir(parents=True, exist_ok=True)
                if not job.step.temporary:
                    path.touch()


@contextmanager
def _inside(folder: str | Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _dry_run(folder: str, config: str) -> list[str]:
    output = _snakemake(folder, config, "--dry-run")
    return sorted({name for name, _ in re.findall(r"^(\S+) +(\d+)$", output, re.MULTILINE)} - set(TARGETS))


def _snakemake(folder: str, config: str, *options: str) -> str:
    """Snakemake's output; run inside this otherwise unused process, since importing it costs more than the run."""
    from snakemake.cli import main

    out = Path(folder) / f"{config}.out"
    command = ["reproduce-all", *options, "--snakefile", str(ROOT / "Snakefile"), "--cores", "2", "--nolock"]
    with _inside(folder), out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            main([*command, "--workflow-profile", "none", "--configfile", config])
        except SystemExit as end:
            if end.code:
                raise ConfigError(f"snakemake {' '.join(options)}: {_last(out.read_text().splitlines())}") from None
    return out.read_text()


def _last(lines: Sequence[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "it says nothing")
