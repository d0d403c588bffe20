"""Changes of a made-up record in which every claim is reproduced: each of `FAILING[key]` must make that claim fail."""

from collections.abc import Callable
from typing import Any

from tests.helpers.made_claims import AGENTS, Record, condition, estimate, row_of

Change = Callable[[Record], None]


def _set(find: Callable[[Record], Any], value: float, spread: float = 0.02) -> Change:
    """A change of one estimate, keeping what else it holds."""

    def change(record: Record) -> None:
        found = find(record)
        found |= estimate(value, spread, found.get("n", 20))

    return change


def _speed(system: str, value: float = 0.9) -> Change:
    return _set(lambda r: row_of(r["latency_ratios"], system=system)["speedup"], value)


def _mixes(system: str, key: str, value: float) -> Change:
    def change(record: Record) -> None:
        for row in record["accuracy"]:
            if row["system"] == system:
                row[key] |= estimate(value)

    return change


def _every(find: Callable[[Record], list[Record]], key: str, value: float, where: Callable = bool) -> Change:
    def change(record: Record) -> None:
        for row in find(record):
            if where(row):
                row[key] = estimate(value) if isinstance(row[key], dict) else value

    return change


def _unmoved(record: Record) -> None:
    for session in record["sessions"]["sessions"]:
        session["spans"] = [[turn, length, 0, in_order] for turn, length, _, in_order in session["spans"]]


def _nothing_in_order(record: Record) -> None:
    for session in record["sessions"]["sessions"]:
        session["spans"] = []


def _layer(record: Record) -> None:
    row_of(record["cksim"], shift=0)["position_delta"]["layers"] = [1.0, 0.99]


def _slower_agent(agent: str, rival: str) -> Change:
    return _set(lambda r: row_of(r["agents"]["replay"], agent=agent, system=rival)["speedup"], 0.9)


def _other_cell(record: Record) -> None:
    row_of(record["agents"]["grid"]["cells"], recompute_ratio=0.1, tau=0.0)["qps"] |= estimate(50.0)


def _control(record: Record) -> None:
    row_of(record["throughput"], system="context_cache")["qps_ratio"] |= estimate(4.0)


def _load(mode: str, n: int) -> Change:
    return _set(lambda r: row_of(r["agents"]["load"], mode=mode, n=n)["advantage"], 0.9)


def _stalls(record: Record) -> None:
    slow = record["slide"]["conditions"]["slow disk, selection layer 4"]
    slow["write_stall_reduction_pct_against_lru"] |= {"value": 80.0, "low": -5.0}


def _bytes(record: Record) -> None:
    record["slide"]["conditions"]["selection layer 4"] = condition(90.0, 0.98)


FAILING: dict[str, list[Change]] = {
    "fig04a-rope": [_set(lambda r: row_of(r["cksim"], shift=1000)["position_stale"], 0.8)],
    "fig04a-cope": [
        _set(lambda r: r["cksim_cope"][0]["context_cope"], 0.6),
        _set(lambda r: r["cksim_cope"][0]["chain_delta"], 0.97, 0.01),  # re-rotated RoPE keys keep more
    ],
    "fig04a-isotropic": [_set(lambda r: row_of(r["cksim"], shift=1000)["position_stale"], 0.6)],
    "fig04a-delta": [_layer],
    "fig04b": [_mixes("window_padding", "f1", 0.81)],
    "fig04b-agents": [_every(lambda r: r["agents"]["windows"]["rows"], "f1", 0.9)],
    "rpdc-over-pic": [_every(lambda r: r["real"]["comparisons"], "high", 1.2)],
    "fig05-rope": [_unmoved, _nothing_in_order],
    "fig05-cope": [
        _set(lambda r: r["prompts_cope"][0]["shift"]["cope"], 41.0),
        _set(lambda r: r["prompts_cope"][0]["unsaturated"]["cope"], 0.02),  # small only because most cannot move
    ],
    "fig10-contextcache": [_speed("context_cache")],  # no loss, but slower
    "fig10-cacheblend-stale": [_speed("cacheblend_stale")],
    "fig10-cacheblend": [_speed("cacheblend")],
    "fig10-promptcache": [_speed("prompt_cache")],  # more accurate, but slower
    **{f"fig10-{a}": [_slower_agent(a, rival) for rival in ("context_cache", "prompt_cache")] for a in AGENTS},
    "fig10-cope": [_mixes("cacheslide_cope", "loss_points", 4.0)],
    "fig11-parallel": [_load("parallel", 2), _load("parallel", 6)],
    "fig11-beam": [_load("beam_batch", 2), _load("beam_batch", 6)],
    "fig12a": [_every(lambda r: r["slide"]["orders"]["cuda"]["rows"], "reduction_pct", -1.0)],
    "fig12b": [_stalls],
    "fig12c": [_bytes],
    "fig12d": [_every(lambda r: r["slide"]["gpu_pages_computed"], "ratio", 0.9)],
    "fig13": [  # steadier, but slower than either rival
        _set(lambda r, s=s: row_of(r["agents"]["series"], system=s)["rate_ratio"], 0.95) for s in ("cacheblend", "epic")
    ],
    "fig14": [_other_cell],
    "turns": [_every(lambda r: r["agents"]["turns"], "loss_points", 9.0)],
    "headline-latency": [_speed("recompute")],
    "headline-throughput": [
        _set(lambda r: row_of(r["throughput"], system="cacheslide")["qps_ratio"], 0.95),
        _control,  # four times, but so is the control
    ],
    "headline-ssd": [_bytes],
}
