"""Picks row attention's tiling by measuring a short list of candidates on a call's own inputs.

Without it `launch.choose_tiling` decides by rule. Call `tune` while a server warms up, before CUDA graphs are captured;
what it finds is kept for the process and serves every call of about that size.
"""

from collections.abc import Callable
from dataclasses import replace

import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from cacheslide.kernels import launch
from cacheslide.kernels.launch import SMALL, Device, Tiling, Work


def candidates(work: Work, device: Device) -> list[Tiling]:
    """The rule's choice and its neighbours, without those that cannot run or cannot pay."""
    rule = launch.choose_tiling(work, device)
    group = work.heads // work.kv_heads
    shapes = [Tiling(), Tiling(stages=3), Tiling(pack=False), SMALL] if work.dtype.itemsize == 2 else [rule]
    found = [rule]
    for shape in shapes:
        lanes = max(shape.lanes, triton.next_power_of_2(group) if shape.pack else 1)
        tiles = triton.cdiv(work.rows, lanes // (group if shape.pack else 1)) * work.kv_heads
        chunks = [0]
        if tiles < 4 * device.multiprocessors:  # otherwise the device is full without cutting the keys
            chunks += [c for c in (1024, 2048, 4096, 8192) if work.span / 16 <= c < work.span]
        found += [launch.fitting(replace(shape, lanes=lanes, chunk=c), work.dim, device) for c in chunks]
    return list(dict.fromkeys(found))


def fastest(options: list[Tiling], seconds: Callable[[Tiling], float]) -> Tiling:
    """The option that takes least; one that asks for more than the device has is passed over."""
    times = {}
    for option in options:
        try:
            times[option] = seconds(option)
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__)


def tune(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    scale: float | None = None,
    max_row: int | None = None,
) -> Tiling:
    """Measure on these inputs, remember the fastest tiling for calls of about this size, and return it."""
    span = block_table.shape[1] * kv.shape[2] if max_row is None else max_row + 1
    work = Work(len(q), len(block_table), span, q.shape[1], kv.shape[1], q.shape[2], kv.shape[2], q.dtype)

    def seconds(option: Tiling) -> float:
        def run() -> None:
            launch.row_attention(q, rows, cu_rows, block_table, kv, scale, max_row=max_row, tiling=option)

        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3

    key = launch.tuning_key(work)
    if key not in launch._TUNED:
        launch._TUNED[key] = fastest(candidates(work, launch.device_of(q)), seconds)
    return launch._TUNED[key]
