"""`results/house/second.json`: the store, the workflow and the tests in plain numbers.

    python -m harness.results.house --out results/house/second.json --recorded BEFORE --now AFTER

Reads results/slide and results/house/workflow.json, times `pytest --fast` on this machine, and compares two records of
`harness.frozen`. The readings of the machine (`harness.quiet`) beside the index and the tests are kept.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError
from harness.frozen.compare import add_records, changed_of
from harness.quiet import watched
from harness.results.provenance import ROOT, machine
from harness.results.records import write_json
from harness.results.runs import read_json
from harness.step import command

FAST = ("-n", "2", "--dist", "loadfile", "--fast")  # as `make test-fast` runs them


def fast_tests(root: Path) -> dict[str, Any]:
    """Run `pytest --fast` in a process of its own.

    Returns
    -------
    dict
        `seconds` of the whole process, `passed` tests, and the machine's reading `quiet`.

    Raises
    ------
    CacheSlideError
        If a test fails.
    """
    with watched() as quiet:
        begin = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *FAST, "-q", "-p", "no:cacheprovider"],
            cwd=root,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - begin
    passed = re.search(r"(\d+) passed", run.stdout)
    if run.returncode or passed is None:
        raise CacheSlideError(f"pytest --fast ended with {run.returncode}: {run.stdout.strip().splitlines()[-1:]}")
    return {"seconds": seconds, "passed": int(passed[1]), "quiet": quiet}


def summary(results: Path, tests: dict[str, Any], changed: list[str] | None) -> dict[str, Any]:
    """The headline and what stands behind it.

    Parameters
    ----------
    results : Path
        The folder that holds `slide/` and `house/`.
    tests : dict
        From `fast_tests`.
    changed : list of str, optional
        Differences of two frozen records; None where none were given.
    """
    slide, served = read_json(results / "slide/summary.json"), read_json(results / "slide/served.json")
    workflow = read_json(results / "house/workflow.json")
    lookup = slide["index"]["lookup_1e6"]
    undeclared = [name for names in workflow["undeclared_inputs"].values() for name in names]
    return {
        "headline": {
            "served_lru_over_clean_first_bytes": served["served_lru_over_clean_first_bytes"],
            "lookup_us_1e6": max(lookup.values()),
            "startup_s_1e5_pages": slide["headline"]["startup_s_1e5_pages"],
            "wrong_pages_served": slide["headline"]["wrong_pages_served"],
            "undeclared_inputs": len(undeclared),
            "rules_rerun_for_latency_repeats": len(workflow["rules_rerun_for_latency_repeats"]),
            "test_fast_s": round(tests["seconds"], 1),
            "records_changed": None if changed is None else len(changed),
        },
        "faults_injected": slide["headline"]["faults_injected"],
        "lookup_us": lookup,
        "index_quiet": slide["index"].get("quiet"),
        "served": {name: condition["lru_over_clean_first_bytes"] for name, condition in served["conditions"].items()},
        "rules_rerun": workflow["rules_rerun"],
        "tests_fast": tests,
        "changed": changed,
        "provenance": machine(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    add_records(parser)
    args = parser.parse_args(argv)
    changed = changed_of(args)  # before the tests take their time
    record = summary(ROOT / "results", fast_tests(ROOT), changed)
    write_json(args.out, record)
    print(json.dumps(record["headline"], indent=1))


if __name__ == "__main__":
    command(main)
