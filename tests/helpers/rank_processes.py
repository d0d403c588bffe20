"""Runs a module whose vLLM engine has tensor-parallel ranks as processes, and leaves none of them behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tests.helpers.vllm_variables import VLLM_ENVIRONMENT

LIMIT_S = 600


def last_line(module: str, *args: str, variables: Mapping[str, str] = {}, ranks: int = 2) -> Any:
    """The JSON of the last line that `python -m module args` prints, with one core bound to each rank.

    The whole process group is killed at the end: ranks that hang would take the cores of every later test.
    """
    environment = {**os.environ, **VLLM_ENVIRONMENT, "OMP_NUM_THREADS": "1", **variables}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the ranks are processes
    command = [sys.executable, "-m", module, *args]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams)
    try:
        out, error = process.communicate(timeout=LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])
