"""Measures one stage of a reproduction; every finished cell is a record, and the next call goes on behind it."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

from cacheslide.errors import CacheSlideError
from cacheslide.policies.registry import register
from harness.experiments.serving.engine_ttft import fill, once
from harness.experiments.serving.engines import described, shaped
from harness.experiments.serving.interleaved import Run, in_turns
from harness.experiments.serving.prompts import Prompts
from harness.experiments.serving.reproduction.cells import Cell, grid_systems
from harness.experiments.serving.reproduction.serve import measure_servers
from harness.experiments.serving.reproduction.settings import Settings
from harness.experiments.serving.reproduction.stages import (
    REST_S,
    Stage,
    cell_seconds,
    memory_share,
    policies_of,
    store_room,
)
from harness.gpu import Monitor, open_source
from harness.limit import Limit
from harness.results.provenance import provenance
from harness.results.records import RecordWriter

SCHEMA = "cacheslide.reproduction/1"
BATCHED_TOKENS = 16384
Write = Callable[[Cell, Mapping[str, Any]], None]


def run_stage(settings: Settings, stage: Stage, out: Path, limit: Limit) -> int:
    """Measure the stage's cells that `out` does not hold yet; returns the number of those left over.

    ConfigError where the configuration's device is not there.
    """
    path = out / stage.file
    wanted = stage_settings(settings, stage)
    if path.is_file():
        print(f"{path} is complete: nothing to measure", file=sys.stderr)
        return 0
    source = open_source(settings.device, settings.tensor_parallel)
    writer = RecordWriter(path, wanted)
    try:
        waiting = [cell for cell in stage.cells if cell.id not in writer.done]
        if waiting:
            with Monitor(source) as gpus, _model(settings) as model:
                made = provenance(wanted, {}, settings.model or f"{settings.shape}, random weights")

                def write(cell: Cell, measured: Mapping[str, Any]) -> None:
                    writer.add({"id": cell.id, "cell": asdict(cell), "provenance": made} | dict(measured))
                    print(f"{cell.id}: measured, {limit.left:.0f} s left", file=sys.stderr, flush=True)

                measure = measure_servers if stage.cells[0].kind == "server" else measure_engine
                measure(settings, model, waiting, gpus, limit, write)
        left = len(stage.cells) - len(writer.done)
        if not left:
            writer.finish()
        return left
    finally:
        writer.close()


def stage_settings(settings: Settings, stage: Stage) -> dict[str, Any]:
    """What a stage's records depend on, the header of its file."""
    return json.loads(json.dumps({"reproduction": SCHEMA, "stage": stage.file, "settings": asdict(settings)}))


@contextmanager
def _model(settings: Settings) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield settings.model or str(shaped(settings.shape, Path(folder) / settings.shape))


def measure_engine(
    settings: Settings, model: str, waiting: list[Cell], gpus: Monitor, limit: Limit, write: Write
) -> None:
    """Open one engine for the cells and measure them in order while time is left."""
    if waiting[0].kind == "grid":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine shares this process's registered systems
        for name, policy in grid_systems(settings).items():
            register(name, lambda policy=policy: policy)
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `replays`, between this run's processes
    from cacheslide.vllm.offline import close_engine, open_engine

    connector, options = engine_options(settings, waiting)
    engine = open_engine(model, connector, **options)
    try:
        gpus.rest(REST_S)
        about = described(engine)
        for cell in waiting:
            if cell_seconds(settings, cell) > limit.left:
                return
            arms = measure_cell(engine, settings, cell, gpus)
            write(cell, {"engine": about, "arms": arms})
    finally:
        close_engine(engine)


def engine_options(settings: Settings, own: list[Cell]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The connector's and `vllm.LLM`'s options for cells that share an engine."""
    longest = max(cell.tokens for cell in own)
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel,
        "max_model_len": longest + 256,  # window padding may lengthen a prompt
        "gpu_memory_utilization": memory_share(settings, own),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": own[0].prefix_caching,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "load_format": "dummy" if settings.shape else "auto",
    }
    store = {"store_device": settings.store_device, "store_gib": store_room(settings, own)}
    return store | {"chunk_size": longest}, options | settings.engine


def measure_cell(engine, settings: Settings, cell: Cell, gpus: Monitor) -> dict[str, dict[str, Any]]:
    """Fill the store for a cell, and measure its arms in turns: runs, and the reason of a failure, by arm."""
    seed = crc32(cell.id.encode())  # another cell's prompts, met again, would lie in the prefix cache
    prompts = Prompts(cell.tokens, settings.vocabulary, seed, cell.reused, settings.system_tokens)
    fill(engine, prompts, list(dict.fromkeys(p.name for p in policies_of(settings, cell))))

    def single(arm: str) -> Run:
        return once(engine, prompts, arm, cell.batch, settings.answer_tokens)

    def measured(arm: str) -> Run:
        with _reasons(), gpus.block() as gpu:
            run = single(arm) if cell.kind != "energy" else _block(single, arm, settings.energy_s)
        return run | {"gpu": gpu or None}

    arms = in_turns(cell.arms, measured, cell.repeats, settings.warmups)
    return {arm: {"runs": runs, "failed": failed} for arm, (runs, failed) in arms.items()}


def _block(single: Callable[[str], Run], arm: str, seconds: float) -> Run:
    """Requests one behind another for `seconds`: their TTFT, their number, and the time of all."""
    begun, runs = time.perf_counter(), []
    while not runs or time.perf_counter() - begun < seconds:
        runs.append(single(arm))
    last = {k: v for k, v in runs[-1].items() if k not in ("ttft", "seconds")}
    ttft = [x for run in runs for x in run["ttft"]]
    return last | {"ttft": ttft, "requests": len(ttft), "seconds": time.perf_counter() - begun}


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns a refused request into the RuntimeError that ends its arm only."""
    try:
        yield
    except (CacheSlideError, ValueError) as refused:
        raise RuntimeError(" ".join(str(refused).split())[:600]) from None
