"""Grades patches for real SWE-bench instances with the benchmark's own docker harness; without docker it refuses.

The synthetic bug fixes need no docker: `harness.agents.grading`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cacheslide.errors import ConfigError, DataError

TIMEOUT_S = 1800
NO_DOCKER = (
    "SWE-bench instances run in the benchmark's docker images, and docker cannot be used here ({why}); "
    "synthetic bug fixes run without it: --agent swe_agent --dataset synthetic"
)


def check_docker() -> None:
    """ConfigError unless a docker daemon answers."""
    if shutil.which("docker") is None:
        raise ConfigError(NO_DOCKER.format(why="there is no docker command"))
    try:
        asked = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as broken:
        raise ConfigError(NO_DOCKER.format(why=str(broken))) from None
    if asked.returncode:
        raise ConfigError(NO_DOCKER.format(why=(asked.stderr.strip().splitlines() or ["docker info failed"])[-1]))


def grade_instances(dataset: str, split: str, patches: Mapping[str, str], run: str) -> dict[str, bool]:
    """Instance id -> resolved, from `swebench.harness.run_evaluation`.

    Parameters
    ----------
    dataset : str
        Hub name or file of the instances, as passed to the harness.
    patches : mapping
        Instance id -> patch text.
    run : str
        Names the harness's logs.
    """
    check_docker()
    with tempfile.TemporaryDirectory() as folder:
        predictions = Path(folder, "predictions.jsonl")
        rows = [{"instance_id": i, "model_name_or_path": run, "model_patch": p} for i, p in patches.items()]
        predictions.write_text("".join(json.dumps(r) + "\n" for r in rows))
        command = [sys.executable, "-m", "swebench.harness.run_evaluation", "-d", dataset, "-s", split]
        command += ["-p", str(predictions), "-id", run, "--report_dir", folder, "-i", *patches]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S * len(patches))
        reports = sorted(Path(folder).glob(f"*{run}*.json"))
        if done.returncode or not reports:
            tail = " ".join(done.stderr.strip().splitlines()[-3:])
            raise DataError(f"swebench's harness ended with status {done.returncode} and no report: {tail}")
        resolved = set(json.loads(reports[0].read_text())["resolved_ids"])
    return {i: i in resolved for i in patches}
