"""Cells of a reproduction against servers: a streaming client in a closed loop, beside NVML and the server's pages."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from harness.backends.http.pages import Pages
from harness.backends.http.server import Server
from harness.experiments.serving.client import Condition, Measured, open_server, run_condition
from harness.experiments.serving.plan import ServingPlan
from harness.experiments.serving.reproduction.cells import Cell
from harness.experiments.serving.reproduction.settings import Settings
from harness.experiments.serving.reproduction.stages import (
    REST_S,
    cell_seconds,
    memory_share,
    server_turns,
    store_room,
)
from harness.gpu import Monitor
from harness.limit import Limit


def measure_servers(
    settings: Settings,
    model: str,
    waiting: list[Cell],
    gpus: Monitor,
    limit: Limit,
    write: Callable[[Cell, Mapping[str, Any]], None],
) -> None:
    """Start the servers of the cells one after another, and measure while time is left."""
    logs = Path(mkdtemp(prefix="servers-"))
    for (device, system), group in groupby(waiting, key=lambda c: (c.device, None if c.device else c.arms[0])):
        own = list(group)
        if settings.start_s + cell_seconds(settings, own[0]) > limit.left:
            return
        plan = serving_plan(settings, model, own)
        with open_server(plan, device, own[0].arms[0], logs / f"{system or device}.log") as server:
            gpus.rest(REST_S)
            for cell in own:
                if cell_seconds(settings, cell) > limit.left:
                    return
                write(cell, measure_cell(settings, plan, cell, server, gpus))


def serving_plan(settings: Settings, model: str, own: list[Cell]) -> ServingPlan:
    """The plan of `serving.client` for cells on one server."""
    tokens = max(cell.tokens for cell in own)
    vllm: dict[str, Any] = {
        "gpu_memory_utilization": memory_share(settings, own),
        "load_format": "dummy" if settings.shape else "auto",
        "tensor_parallel_size": settings.tensor_parallel,
        "store_gib": store_room(settings, own),
        "max_model_len": tokens + settings.output_tokens + 256,  # window padding may lengthen a prompt
    }
    return ServingPlan(
        model=model,
        systems=tuple(dict.fromkeys(cell.arms[0] for cell in own)),
        tokens=(tokens,),
        batches=tuple(sorted({cell.batch for cell in own})),
        device=settings.device,
        dtype=settings.dtype,
        store_devices=(settings.store_device,),
        chunk_size=tokens,
        reused=own[0].reused,
        system_tokens=settings.system_tokens,
        warmups=max(1, settings.warmups),
        output_tokens=settings.output_tokens,
        vllm=vllm | {k: v for k, v in settings.engine.items() if k in _BOTH},
    )


_BOTH = ("block_size", "enforce_eager", "max_num_batched_tokens", "kv_cache_gib")  # options of engines and servers


def measure_cell(settings: Settings, plan: ServingPlan, cell: Cell, server: Server, gpus: Monitor) -> dict[str, Any]:
    """One system under one number of clients: a record of every request, and readings of machine, GPU and pages."""
    condition = Condition(cell.arms[0], cell.tokens, cell.batch, store_device=cell.device)
    measured, readings = Measured(), {}
    run_condition(
        replace(plan, turns=server_turns(settings, cell)), condition, server, measured, _beside(gpus, server, readings)
    )
    load = measured.loads[condition]
    return {
        "condition": asdict(condition),
        "seconds": load.seconds,
        "requests": [r.as_record(load.started) for r in load.results],
        "failed_warmups": measured.warmups[condition],
        "quiet": measured.quiet[condition],
        "server": {"arguments": _arguments(settings, plan, server), "vllm": server.version()},
    } | readings


def _arguments(settings: Settings, plan: ServingPlan, server: Server) -> list[str]:
    """The server's command line without interpreter, and with the shape's name for its folder."""
    return [settings.shape or word if word == plan.model else word for word in server.command[2:]]


@contextmanager
def _beside(gpus: Monitor, server: Server, readings: dict[str, Any]) -> Iterator[None]:
    pages = Pages.of(server.port)
    with gpus.block() as gpu, pages:
        yield
    readings |= {"gpu": gpu or None, "pages": pages.reading}
