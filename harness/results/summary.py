"""summary.json: tables, headline, conditions and provenance of one run, for figures and report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import ModelError
from cacheslide.models.weights import fingerprint
from harness.configuration import native
from harness.results.agent_load import load_table, series_table
from harness.results.agents import grid_table, quality_table, turns_table, windows_table
from harness.results.curves import (
    agent_prompts_table,
    cksim_table,
    cope_table,
    layer_sweep,
    moves_table,
    prompts_table,
)
from harness.results.headline import headline
from harness.results.intervals import LEVEL
from harness.results.provenance import config_hash, provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.runs import FILES, Run, load_run
from harness.results.tables import accuracy_ratios, accuracy_table
from harness.results.timing import latency_ratios, latency_table, throughput_table
from harness.results.undisturbed import added, cells_of, counted, rounds_of, slices_of, steps_of
from harness.workflow.slices import slice_of
from harness.workflow.steps import STEPS

SCHEMA = "cacheslide.summary/1"
AGENTS = {  # section of `agents:`, and its table
    "replay": quality_table,
    "windows": windows_table,
    "turns": turns_table,
    "load": load_table,
    "series": series_table,
    "grid": grid_table,
}


def summarize(config: Mapping[str, Any], output: str | Path, **paths: Any) -> dict[str, Any]:
    """Read a run's results and write its summary to `output`; see `harness.results.runs.load_run` for `paths`."""
    summary = build_summary(load_run(dict(config), **paths), progress="summary")
    write_json(output, rounded(summary))
    return summary


def build_summary(run: Run, progress: str | None = None) -> dict[str, Any]:
    """The summary of a run. Parts that were not measured are empty; the headline gives the reason."""
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "run": run.config.get("run"),
        "level": LEVEL,
        "titles": run.titles,
        "conditions": conditions(run),
        "accuracy": accuracy_table(run, "accuracy", progress and f"{progress}, accuracy"),
        "accuracy_ratios": accuracy_ratios(run),
        "equal_share": accuracy_table(run, "equal_share", progress and f"{progress}, equal share"),
        "latency": latency_table(run),
        "latency_ratios": latency_ratios(run),
        "throughput": throughput_table(run),
        "cksim": cksim_table(run),
        "cksim_cope": cope_table(run),
        "agents": {section: AGENTS[section](file) for section, file in run.agents.items() if file.records},
        "prompts": prompts_table(run),
        "prompts_cope": moves_table(run),
        "agent_prompts": agent_prompts_table(run),
        "selection_layer": layer_sweep(run),
        "timings": timings(run),
        "failures": run.failures(),
        "provenance": provenance(run.config, data_hashes(run), model_hash(run.config)),
    }
    return headline(summary) | summary


def timings(run: Run) -> dict[str, dict[str, int]]:
    """For each part of the run: number of timed blocks, of disturbed ones and of unchecked ones."""
    counts = {}
    if run.latency:
        records = [r for file in run.latency.values() for r in file.records]
        counts["latency"] = added(counted(rounds_of(r, s)) for r in records for s in _one_a_session(r))
    if run.throughput:
        counts["throughput"] = added(counted(slices_of(r)[1]) for r in run.throughput.records)
    for section, file in run.agents.items():
        of = {"load": cells_of, "series": cells_of, "replay": steps_of, "grid": steps_of}.get(section)
        if of and file.records:
            counts[f"agents/{section}"] = added(counted(of(r)) for r in file.records)
    return counts


def _one_a_session(record: Mapping[str, Any]) -> list[str]:
    """One system of every session of a latency record: systems of a session share their rounds."""
    return [q["systems"][0] for q in record.get("quiet", ())] or list(record["systems"])[:1]


def conditions(run: Run) -> dict[str, Any]:
    """Conditions of the numbers: the configuration, and the configurations of the records."""
    files = [f for stage in (run.accuracy, run.equal_share) for d in stage.values() for f in d.values()]
    files += [*run.agents.values(), *run.latency.values()]
    files += [f for f in (run.throughput, run.cksim, run.cksim_cope) if f]
    own = own_hashes(run.config)
    made = sorted({f.settings["config_hash"] for f in files if "config_hash" in f.settings})
    machines = {json.dumps(f.settings["measured_on"], sort_keys=True) for f in files if "measured_on" in f.settings}
    return {
        "measured_on": [json.loads(m) for m in sorted(machines)],
        "device": run.config.get("device", "cpu"),
        "dtype": run.config.get("dtype"),
        "model": run.config.get("model"),
        "selection_layer": (run.layer or {}).get("layer"),
        "config": run.config,
        "record_config_hashes": made,
        "records_of_other_configs": [h for h in made if h not in own],
    }


def own_hashes(config: Mapping[str, Any]) -> set[str]:
    """The hashes that this configuration's records may have: those of the slices that their steps read.

    Records before 2026-11-30 have the hash of the whole configuration, or of all but the sections `cope` and `agents`;
    those before 2026-11-29 with older names of its keys.
    """
    configurations = (dict(config), _older_names(config))
    slices = (slice_of(config, step.reads) for step in STEPS if step.reads)
    return {config_hash(of) for of in (*configurations, *map(native, configurations), *slices)}


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    def older(part: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        back = {new: old for old, new in names.items()}
        return {back.get(key, key): value for key, value in part.items()}

    out = older(config, renamed.CONFIGURATION)
    if "agents" in out:
        sections = renamed.CONFIGURED_AGENTS
        out["agents"] = {k: older(v, sections[k]) if k in sections else v for k, v in out["agents"].items()}
    return out


def data_hashes(run: Run) -> dict[str, str]:
    """Hash of the prompts behind every result, from the records' headers."""
    out = {}
    for stage in ("accuracy", "equal_share"):
        for dataset, files in getattr(run, stage).items():
            out |= {f"{stage}/{dataset}": f.settings["data_hash"] for f in files.values() if "data_hash" in f.settings}
    named = {f"latency/{tokens}": f for tokens, f in run.latency.items()}
    named |= {f"agents/{section}": file for section, file in run.agents.items()}
    named |= {stage: getattr(run, stage) for stage in FILES}
    out |= {name: f.settings["data_hash"] for name, f in named.items() if f and "data_hash" in f.settings}
    out |= {f"validation/{d}": h for d, h in (run.layer or {}).get("data_hashes", {}).items()}
    return out


def model_hash(config: Mapping[str, Any]) -> str:
    """Hash of the checkpoint's configuration and weights, or the reason for not having one."""
    try:
        return fingerprint(Path(config["model"]))
    except (KeyError, OSError, ModelError) as missing:
        return f"not available: {type(missing).__name__}"
