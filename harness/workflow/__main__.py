"""Checks the workflow itself: `python -m harness.workflow --out FILE`, a minute or two on two cores.

The file holds the rules that Snakemake runs again for each changed key of a configuration (`rules_rerun`), and the
files that each step of a small study opens without declaring them (`undeclared_inputs`).
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.configuration import check
from harness.inventory import read_config
from harness.results.provenance import ROOT, machine
from harness.results.records import write_json
from harness.step import command
from harness.workflow.reads import undeclared
from harness.workflow.reruns import SCHEMA, rules_rerun

SMALL: dict[str, Any] = {  # of config/smoke.yaml: every step, with minimal work
    "run": "small",
    "systems": ["recompute", "prompt_cache", "cacheblend", "naive_reuse", "cacheslide"],
    "datasets": ["hotpotqa-deep"],
    "accuracy": {"prompts": 1, "tokens": 400, "questions": 1},
    "validation": {"prompts": 1, "tokens": 400, "questions": 1},
    "latency": {"dataset": "hotpotqa-deep", "systems": [], "tokens": [400], "prompts": 1, "warmups": 0, "repeats": 1},
    "throughput": {"dataset": "hotpotqa-deep", "systems": ["recompute"], "batches": [1], "tokens": 400, "requests": 1},
    "cksim": {"dataset": "hotpotqa-deep", "prompts": 2, "tokens": 400, "shifts": [0, 100]},
    "cope": {"adapter": "models/tiny-llama-12m-cope", "prompts": 1, "cksim_prompts": 1},
}
TASK = {"function_calling": {"count": 1, "jobs": 2}}
SMALL_AGENTS: dict[str, Any] = {
    "model": "models/tiny-agents-3m",
    "layer": 3,
    "systems": ["recompute", "cacheslide"],
    "traces": TASK,
    "replay": {"episodes": 1, "own": False},
    "turns": {"tasks": TASK, "retained": ["naive_reuse"], "limits": [0]},
    "load": {"tasks": TASK, "parallel": [1], "widths": [1], "repeats": 1},
}


def small_study(folder: Path) -> dict[str, Any]:
    """The configuration of the small study; copies its models into `folder`."""
    config = read_config(ROOT / "config/smoke.yaml") | SMALL | {"agents": SMALL_AGENTS}
    check(config, SCHEMA)
    for model in (config["model"], config["cope"]["adapter"], config["agents"]["model"]):
        shutil.copytree(ROOT / model, folder / model)
    return config


def undeclared_inputs() -> Mapping[str, list[str]]:
    """The files that the steps of the small study open without declaring them, by step."""
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return undeclared(small_study(Path(folder)), Path(folder).resolve())
        finally:
            os.chdir(before)


def main(argv: list[str] | None = None) -> None:
    """Entry point: writes both lists."""
    parser = argparse.ArgumentParser(prog="python -m harness.workflow", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    rules, undeclared = rules_rerun(), undeclared_inputs()
    write_json(
        args.out,
        {
            "undeclared_inputs": undeclared,
            "rules_rerun_for_latency_repeats": rules["latency.repeats"],
            "rules_rerun": rules,
            "provenance": machine(),
        },
    )
    print(f"undeclared inputs: {sum(map(len, undeclared.values()))}")
    print(f"rules that run again for latency.repeats: {', '.join(rules['latency.repeats'])}")


if __name__ == "__main__":
    command(main)
