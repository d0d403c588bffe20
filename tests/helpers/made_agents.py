"""Made-up records of agents for tests of tables, figures and claims, in the real writer's format. Never a result."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from harness.agents.template import TextSegment
from tests.helpers.made_run import write

SYSTEMS = {  # right calls, share of row-layers
    "recompute": (0.97, 1.0),
    "context_cache": (0.97, 0.8),
    "prompt_cache": (0.3, 0.2),
    "cacheblend": (0.8, 0.5),
    "epic": (0.5, 0.4),
    "naive_reuse": (0.7, 0.2),
    "cacheslide": (0.95, 0.55),
}
STEPS, LAYERS, ROWS = 14, 8, 600


def step(
    rng: Random, right: float, share: float, turn: int, reuses: bool = True, generation: int = 0
) -> dict[str, Any]:
    """One step of one system."""
    hit = reuses and turn > 0
    layers = round(ROWS * LAYERS * (share if hit else 1.0))
    ttft = 0.1 * layers / (ROWS * LAYERS) * (1 + 0.05 * rng.random())
    good = float(rng.random() < right)
    return {
        "right": good,
        "f1": good or 0.5 * (rng.random() < 0.4),
        "text": "x",
        "ttft_s": ttft,
        "total_s": ttft + 0.02,
        "row_layers": layers,
        "layers": LAYERS,
        "tokens": ROWS,
        "tokens_reused": 400 * hit,
        "tokens_recomputed": 100 * hit,
        "chunks_hit": 3 * hit,
        "generation": generation,
        "build_row_layers": 300 * reuses,
        "build_s": 0.01,
    }


def replayed(
    path: Path, variants: dict[str, tuple[float, float]], agents: tuple[str, ...], own: bool, **settings
) -> str:
    """Episodes of 14 steps; `variants` gives right calls and cost."""
    records = {}
    for agent in agents:
        for i in range(6):
            rng = Random(f"{agent}-{i}")
            systems = {
                name: [step(rng, right, share, t, name != "recompute", min(t, 3) * ("@" in name)) for t in range(STEPS)]
                for name, (right, share) in variants.items()
            }
            record = {"agent": agent, "forced": ["x"] * STEPS, "systems": systems}
            if own:
                record["own"] = {
                    name: {
                        "score": (score := float(rng.random() < right)),
                        "success": score == 1.0,
                        "steps": 5,
                        "stop": "",
                    }
                    for name, (right, _) in variants.items()
                }
            records[f"{agent}/{i}"] = record
    return write(path, settings | _names(variants), records)


def _names(variants) -> dict[str, Any]:
    return {"order": list(variants), "titles": {name: f"The {name}" for name in variants}, "data_hash": "made-up"}


def requests(rng: Random, share: float, right: float, n: int, count: int, rate: float = 40.0) -> list[list[float]]:
    """`count` requests that end one after the other, `n` at once: [start, TTFT, end, correct]."""
    each = (0.2 + share) / rate
    ends = [each * (i + 1) * (1 + 0.02 * rng.random()) for i in range(count)]
    return [
        [max(0.0, e - n * each), n * each * (0.8 + 0.2 * rng.random()), e, float(rng.random() < right)] for e in ends
    ]


def loaded(path: Path) -> str:
    """Parallel agents, beams and copies, three repeats."""
    cells = [("parallel", n) for n in (2, 4, 6, 16)] + [(m, n) for m in ("beam", "beam_batch") for n in (2, 4, 6)]
    records = {}
    for mode, n in cells:
        for r in range(3):
            rng = Random(f"{mode}-{n}-{r}")
            systems = {s: requests(rng, share, right, n, 6 * n) for s, (right, share) in SYSTEMS.items()}
            records[f"{mode}-{n}-{r}"] = {"mode": mode, "n": n, "repeat": r, "systems": systems}
    return write(path, _names(SYSTEMS) | {"tasks": {"memgpt": {"count": 96}}}, records)


def over_time(path: Path) -> str:
    """Four slices of some seconds."""
    records = {}
    for k in range(4):
        rng = Random(f"slice-{k}")
        systems = {s: requests(rng, share, right, 8, 120) for s, (right, share) in SYSTEMS.items()}
        records[f"slice-{k}"] = {"slice": k, "n": 8, "systems": systems}
    return write(path, _names(SYSTEMS) | {"tasks": {"reflexion": {"count": 64}}}, records)


def make_agents(root: Path) -> dict[str, str]:
    """A record file for every section of `agents:`."""
    windows = {"recompute": (0.97, 1.0), "naive_reuse": (0.8, 0.2)}
    for w, right in ((64, 0.1), (128, 0.4), (192, 0.6)):
        windows |= {f"window@{w}": (right, 0.2), f"window_recompute@{w}": (right + 0.1, 1.2)}
    kept = {
        f"{s}@{k}": (0.9 - 0.1 * (k > 2), 0.3) for s in ("naive_reuse", "cacheslide_first_turn") for k in (0, 4, 1000)
    }
    ratios, taus = [0, 0.26, 1], [0, 0.12, 1]
    grid = {f"{s}@{t}": (0.9 if s else 0.4, 0.2 + 0.7 * s - 0.1 * (t == 0.12)) for s in ratios for t in taus}
    agents = ("reflexion", "memgpt", "swe_agent")
    return {
        "replay": replayed(root / "replay.jsonl", SYSTEMS, agents, own=True),
        "windows": replayed(root / "windows.jsonl", windows, ("reflexion",), own=False, windows=[64, 128, 192]),
        "turns": replayed(root / "turns.jsonl", SYSTEMS | kept, ("memgpt", "function_calling"), own=False),
        "load": loaded(root / "load.jsonl"),
        "series": over_time(root / "series.jsonl"),
        "grid": replayed(root / "grid.jsonl", grid, ("memgpt",), False, recompute_ratios=ratios, taus=taus, every=1),
    }


def keeps_order(before: Sequence[TextSegment], after: Sequence[TextSegment]) -> bool:
    """Whether `after` holds the fixed segments of `before` unchanged and in order, with others only added."""
    rest = iter([s for s in after if s.role == "reuse"])
    return all(s in rest for s in before if s.role == "reuse")
