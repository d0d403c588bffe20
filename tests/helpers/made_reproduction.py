"""A small reproduction: its settings on a tiny model, and made records of every stage of a plan."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from harness.backends.client import Result
from harness.experiments.serving.arms import Arm
from harness.experiments.serving.client import Condition
from harness.experiments.serving.reproduction.cells import Cell
from harness.experiments.serving.reproduction.run import stage_settings
from harness.experiments.serving.reproduction.settings import Settings, read_settings
from harness.experiments.serving.reproduction.stages import plan
from harness.results.records import RecordWriter
from tests.helpers.places import ROOT
from tests.helpers.readings import CALM

SYSTEMS = ["cacheblend", "context_cache", "epic", "kvcomm", "naive_reuse", "cacheslide", "cacheslide_mixed"]
TINY = {
    "run": "tiny", "device": "cpu", "dtype": "float32", "base": {"tokens": 512, "batch": 1, "reused": 0.9},
    "tokens": [512], "batches": [1, 2], "reused": [0.9], "system_tokens": 64, "vocabulary": 90, "store_device": "cpu",
    "repeats": 2, "warmups": 1, "answer_tokens": 2, "energy_s": 0.05, "clients": [2], "turns": 2, "output_tokens": 4,
    "ratios": [0.1], "taus": [0.12], "systems": SYSTEMS, "recompute_8k_s": 0.5,
    "engine": {"block_size": 32, "enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 28},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    """A configuration file; without a `model` of the 7B shape."""
    keys = TINY | {"shape": "mistral-7b"} | changes
    if "model" in changes:
        del keys["shape"]
    path = folder / "reproduction.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def settings(folder: Path, **changes: Any) -> Settings:
    return read_settings(written(folder, **changes))


def reading(power: float, seconds: float, idle: float = 80.0) -> dict[str, Any]:
    """A block's reading of a GPU at a power, as `harness.gpu` makes it."""
    return {
        "seconds": seconds, "samples": 20, "power_mean_w": power, "power_max_w": power + 10, "idle_w": idle,
        "energy_j": power * seconds, "energy_counter_j": power * seconds, "memory_bytes": 40 << 30,
        "sm_mhz": [1900, 1950.0, 1980], "memory_mhz": [3201] * 3,
    }  # fmt: skip


def speed(arm: str, reused: float) -> float:
    """Part of recompute's time that an arm needs in the made records."""
    named = Arm.parse(arm)
    if named.system in ("recompute", "prefix_cache", "vllm", "vllm_prefix_cache", "context_cache"):
        return 1.0
    parts = {"cacheslide_mixed": 0.1, "cacheblend": 0.3, "epic": 0.4, "cacheslide": 0.3, "prefix_cache_ideal": 0.05}
    return 1 - reused + parts.get(named.system, 0.2) + (named.ratio or 0.0)


def arm_of(cell: Cell, name: str, quiet: dict[str, Any] | None = CALM) -> dict[str, Any]:
    """The runs of an arm: the requests of a batch one behind another."""
    each = cell.tokens / 40_000 * speed(name, cell.reused)
    runs = []
    for turn in range(cell.repeats):
        ttft = [each * (i + 1) * (1 + 0.01 * turn) for i in range(cell.batch)]
        run = {"ttft": ttft, "seconds": ttft[-1], "gpu": reading(500, ttft[-1]), "quiet": quiet}
        if cell.kind == "energy":
            run |= {"ttft": ttft * 10, "requests": 10 * cell.batch, "seconds": 10 * each}
            run["gpu"] = reading(500, 10 * each * (1 + 0.01 * turn))
        if name not in ("recompute", "prefix_cache", "prefix_cache_ideal"):
            share, tokens = speed(name, cell.reused), [100] * cell.batch
            run |= {"compute_fraction": [min(1.0, share)] * cell.batch, "tokens_reused": tokens, "bytes_loaded": tokens}
        runs.append(run)
    return {"runs": runs, "failed": None}


def server_of(cell: Cell) -> dict[str, Any]:
    """A closed loop of two turns."""
    system, results = cell.arms[0], []
    for number in range(2 * cell.batch):
        sent = number // cell.batch * 1.5
        first = sent + cell.tokens / 40_000 * speed(system, cell.reused)
        result = Result(
            f"{number % cell.batch}-{number // cell.batch}", sent, first + 0.5, [first, first + 0.4, first + 0.5], 3
        )
        result.prompt_tokens, result.finish_reason = cell.tokens, "length"
        if cell.device:
            result.receipt = {"tokens_reused": 100, "tokens_recomputed": 10, "compute_fraction": 0.3, "fallback": "",
                              "bytes_loaded": 1 << 30}  # fmt: skip
        results.append(result.as_record(0.0))
    return {
        "condition": asdict(Condition(system, cell.tokens, cell.batch, store_device=cell.device)),
        "seconds": max(r["finished"] for r in results),
        "requests": results,
        "failed_warmups": [],
        "quiet": CALM,
        "gpu": reading(400, 3.0),
        "pages": {"used": 0.1, "blocks": 1000, "block_tokens": 16},
    }


def short_plan(name: str) -> Settings:
    """The study config/NAME.yaml with few systems and points."""
    own = read_settings(ROOT / f"config/{name}.yaml")
    tokens, batches = (8192, 16384), (1, 4) if name == "h200-x2" else (1, 8)
    systems = ("cacheblend", "context_cache", "epic", "kvcomm", "naive_reuse", "cacheslide", "cacheslide_mixed")
    return replace(own, systems=systems, tokens=tokens, batches=batches, reused=(0.9,), ratios=(0.1, 0.26))


def make_records(folder: Path, own: Settings, quiet: dict[str, Any] | None = CALM) -> Path:
    """Records of every stage of a plan under `folder`."""
    made = {"git_commit": "abc", "gpus": [{"name": "NVIDIA H200"}], "config_hash": "0"}
    for stage in plan(own).stages:
        writer = RecordWriter(folder / stage.file, stage_settings(own, stage))
        for cell in stage.cells:
            record = {"id": cell.id, "cell": asdict(cell), "provenance": made}
            if cell.kind == "server":
                writer.add(record | server_of(cell))
            else:
                arms = {name: arm_of(cell, name, quiet) for name in cell.arms}
                writer.add(record | {"engine": {"dtype": "torch.bfloat16"}, "arms": arms})
        writer.finish()
    return folder
