"""A made-up run for tests of summary, figures and report: invented numbers, written by the real RecordWriter.

Never a result: only tests call it, under their temporary folders.
"""

import math
from pathlib import Path
from random import Random
from typing import Any

from harness.results.records import RecordWriter, write_json

# system: F1 on sparse, F1 on deep, share of the reused rows recomputed, share of row-layers, title
SYSTEMS: dict[str, tuple[float, float, float, float, str]] = {
    "recompute": (0.97, 0.94, 0.0, 1.0, "Recompute"),
    "context_cache": (0.97, 0.94, 0.0, 0.985, "ContextCache"),
    "prompt_cache": (0.27, 0.22, 0.0, 0.10, "PromptCache"),
    "cacheblend": (0.84, 0.72, 0.18, 0.52, "CacheBlend"),
    "cacheblend_stale": (0.55, 0.41, 0.18, 0.52, "CacheBlend, stale positions"),
    "epic": (0.42, 0.35, 0.22, 0.30, "EPIC"),
    "epic_stale": (0.31, 0.24, 0.22, 0.30, "EPIC, stale positions"),
    "window_padding": (0.56, 0.50, 0.0, 0.16, "Window padding"),
    "naive_reuse": (0.60, 0.56, 0.0, 0.10, "Naive reuse"),
    "cacheslide": (0.96, 0.91, 0.26, 0.56, "CacheSlide"),
    "cacheslide_first_turn": (0.90, 0.80, 0.26, 0.56, "CacheSlide, first-turn encoding"),
    "cacheslide_promote": (0.97, 0.93, 0.24, 0.60, "CacheSlide, promotion"),
}
DATASETS = ("hotpotqa-sparse", "hotpotqa-deep", "swebench-sparse", "swebench-deep")
SHIFTS = tuple(range(0, 1001, 100))


def config(**changes: Any) -> dict[str, Any]:
    """A configuration with what summary and report read of it."""
    return {
        "run": "made-up",
        "seed": 0,
        "model": "models/none",
        "backend": "reference",
        "device": "cpu",
        "dtype": "float32",
        "systems": list(SYSTEMS),
        "datasets": list(DATASETS),
        "recompute_ratio": 0.26,
        "accuracy": {"prompts": 19, "tokens": 1024, "questions": 4},
        "latency": {"dataset": DATASETS[0], "tokens": [2048, 4096], "prompts": 5, "warmups": 1, "repeats": 2},
    } | changes


def question(i: int, right: bool, depth: int = 1, volatile: bool = False) -> dict[str, Any]:
    """One answer, fully right or fully wrong."""
    scores = dict.fromkeys(("f1", "em", "rouge_l", "success"), float(right))
    return {"id": f"q{i}", "depth": depth, "volatile": volatile, "prediction": "x", "answers": ["y"], **scores}


def receipt(system: str, rows: int, share: float, recomputed: float, reused: bool = True) -> dict[str, Any]:
    """What the engine reports of a request."""
    candidates = 0 if system == "recompute" or not reused else int(0.87 * rows)
    chosen = round(recomputed * candidates)
    return {
        "system": system,
        "tokens": rows,
        "tokens_reused": candidates - chosen,
        "tokens_recomputed": chosen,
        "compute_fraction": share if candidates else 1.0,
        "tokens_per_layer": [rows] * 8,
        "chunks": 4 if system != "recompute" else 0,
        "chunks_hit": 4 if candidates else 0,
        "bytes_loaded": 12288 * candidates,
        "fallback": "" if candidates or system == "recompute" else "no chunk of this prompt is in the store",
        "alpha": {},
    }


def accuracy_record(system: str, mix: str, rng: Random, prompts: int, questions: int) -> dict[str, Any]:
    """One prompt's record; deeper and volatile questions fail more often."""
    sparse, deep, recomputed, share, _ = SYSTEMS[system]
    level = sparse if mix == "sparse" else deep
    asked = []
    for i in range(questions):
        depth, volatile = 1 + i % 4, rng.random() < 0.4
        asked.append(question(i, rng.random() < level - 0.02 * (depth - 2) * (level < 0.95), depth, volatile))
    rows = 900 + rng.randrange(150)
    return {
        "system": system,
        "task": "synthetic-hotpotqa",
        "metric": "f1",
        "tokens": rows,
        "reusable_share": 0.87,
        "prefill_seconds": 0.2 * share + 0.01 * rng.random(),
        "receipt": receipt(system, rows, share + 0.01 * rng.random(), recomputed),
        "cksim": None if system in ("prompt_cache", "window_padding") else [1 - 0.02 * i for i in range(8)],
        "questions": asked,
    }


def latency_record(systems: list[str], tokens: int, rng: Random, repeats: int) -> dict[str, Any]:
    """One timed prompt of every system."""
    base, out = 1.7 * (tokens / 4096) ** 1.3 * (1 + 0.05 * rng.random()), {}
    for system in systems:
        sparse, _, recomputed, share, _ = SYSTEMS[system]
        seconds = base * (0.9 * share + 0.1)
        out[system] = {
            "ttft_seconds": [seconds * (1 + 0.04 * rng.random()) for _ in range(repeats)],
            "receipt": receipt(system, tokens, share, recomputed),
            "questions": [question(i, rng.random() < sparse) for i in range(8)],
        }
    return {"task": "synthetic-hotpotqa", "tokens": tokens - 20, "build": {}, "systems": out}


def throughput_record(system: str, batch: int, rng: Random, requests: int) -> dict[str, Any]:
    """A closed loop in rounds."""
    sparse, _, _, share, _ = SYSTEMS[system]
    now, out = 0.0, []
    for start in range(0, requests, batch):
        size = min(batch, requests - start)
        length = size * (0.05 + 0.22 * share) * (0.75 + 0.25 / batch) * (1 + 0.1 * rng.random())
        now += length
        for i in range(size):
            out.append(
                {
                    "example": f"e{start + i}",
                    "ttft_seconds": 0.8 * length,
                    "finished_seconds": now,
                    "decode_tokens": 2,
                    "question": question(0, rng.random() < sparse),
                }
            )
    right = sum(r["question"]["success"] for r in out)
    totals = {"elapsed_seconds": now, "qps": len(out) / now, "qps_correct": right / now, "compute_fraction": share}
    return {"system": system, "batch": batch, **totals, "requests": out}


def similarity_record(shift: int, rng: Random, layers: int = 8) -> dict[str, Any]:
    """CKSim at one shift: stale keys fall to about 0.25, re-rotated ones lose to context only."""
    fall = 1.0 if not shift else 0.25 + 0.75 * math.exp(-shift / 60) + 0.04 * math.sin(shift / 40)
    seen = 1.0 if not shift else 0.93
    cksim = {
        "position_stale": [
            fall * (1 - 0.03 * i * bool(shift)) + 0.02 * rng.random() * bool(shift) for i in range(layers)
        ],
        "position_delta": [1.0] * layers,
        "context_stale": [fall * seen * (1 - 0.04 * i * bool(shift)) for i in range(layers)],
        "context_delta": [1.0 if not shift else 1 - 0.02 * i - 0.01 * rng.random() for i in range(layers)],
    }
    return {"shift": shift, "tokens": 280, "cksim": cksim}


def cope_similarity_record(shift: int, rng: Random, layers: int = 8) -> dict[str, Any]:
    """The same of a CoPE model: only context moves its keys."""
    seen = [1.0 if not shift else 1 - 0.02 * i - 0.01 * rng.random() for i in range(layers)]
    position = {f"position_{how}": [1.0] * layers for how in ("cope", "ccpe")}
    other = {f"{why}_{how}": seen for why in ("context", "chain") for how in ("cope", "ccpe")}
    stale = [0.3 if shift else 1.0] * layers
    return {"shift": shift, "tokens": 280, "cksim": position | other | {"chain_stale": stale, "chain_delta": seen}}


def add_cope(root: Path, cfg: dict[str, Any], paths: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a configuration with an adapter adds to the run under `root`; returns configuration and paths."""
    rng = Random("cope")
    cfg = cfg | {"cope": {"adapter": "none", "systems": ["cacheslide"], "prompts": 5, "cksim_prompts": 4}}
    files = []
    for dataset in cfg["datasets"]:
        settings = {"run": cfg["run"], "dataset": dataset, "system": "cacheslide_cope", "title": "CacheSlide, CoPE"}
        mix = dataset.rpartition("-")[2]
        records = {
            f"test-{i}": accuracy_record("cacheslide", mix, rng, 5, 4) | {"prefill_seconds": None} for i in range(5)
        }
        files.append(write(root / "accuracy" / dataset / "cacheslide_cope.jsonl", settings | {"layer": 3}, records))
    records = {f"e{i}-{shift}": cope_similarity_record(shift, rng) for i in range(4) for shift in SHIFTS}
    more = {"accuracy": [*paths["accuracy"], *files], "cksim_cope": write(root / "cksim_cope.jsonl", {}, records)}
    moves = [
        {
            "example": f"e{i}",
            "displacement": 20.0 + i,
            "shift": {"cope": 2.0, "ccpe": 0.5},
            "unsaturated": {"cope": 0.5},
        }
        for i in range(4)
    ]
    more["prompts_cope"] = str(root / "prompts_cope.json")
    write_json(more["prompts_cope"], {"datasets": {d: {"moves": moves} for d in cfg["datasets"]}})
    return cfg, paths | more


def wca_summary(path: Path) -> Path:
    """A sweep's summary, of two models with the same numbers."""
    from harness.experiments.wca.cells import cells
    from harness.results.wca import tabulate

    rng, found = Random("wca"), {}
    for cell in cells(8):
        asked = {"depth": [0, 1, 2, 3], "volatile": [False, True, True, False]}
        about = {"mix": "deep", "device": "cpu", "alpha": None, "tokens_reused": 3, "tokens_recomputed": 1}
        found[cell.name] = {
            f"e{i}": asked
            | about
            | {"example": f"e{i}", "compute_fraction": rng.random()}
            | {"f1": [float(rng.random() < 0.7) for _ in range(4)]}
            for i in range(3)
        }
    write_json(path, tabulate({kind: ({"model": kind}, found) for kind in ("rope", "cope")}, cells(8)))
    return path


def prompts(datasets: list[str], count: int, rng: Random) -> dict[str, Any]:
    """Reusable shares and moves, as harness.experiments.study.prompts writes them."""
    out = {}
    for dataset in datasets:
        moves = []
        for i in range(count):
            d = rng.randrange(-40, 41)
            stale = 450 + 60 * rng.random()
            shift = dict.fromkeys([s for s in SYSTEMS if s not in ("recompute", "context_cache")], 0.0)
            shift |= {"cacheblend_stale": stale, "epic_stale": stale, "prompt_cache": 0.0}
            moves.append({"example": f"e{i}", "displacement": float(d), "shift": shift})
        out[dataset] = {"reusable_share": [0.86 + 0.03 * rng.random() for _ in range(count)], "moves": moves}
    return {"datasets": out, "titles": {s: v[-1] for s, v in SYSTEMS.items()}}


def write(path: Path, settings: dict[str, Any], records: dict[str, dict[str, Any]], failures: tuple = ()) -> str:
    """A record file through the real writer; `failures` are ids of failed requests."""
    writer = RecordWriter(path, settings)
    for name, record in records.items():
        writer.add({"id": name, **record})
    for name in failures:
        writer.fail(name, ValueError("made-up failure"))
    writer.finish()
    return str(path)


def make_run(root: Path, changes: dict[str, Any] | None = None, prompts_each: int = 19) -> tuple[dict, dict[str, Any]]:
    """Write a whole run under `root`; returns its configuration and the paths that `summarize` takes."""
    cfg = config(**(changes or {}))
    systems, datasets = cfg["systems"], cfg["datasets"]
    titles = {s: SYSTEMS[s][-1] for s in systems}
    paths: dict[str, Any] = {"accuracy": [], "equal_share": [], "latency": []}
    for stage in ("accuracy", "equal_share"):
        for dataset in datasets:
            for system in systems:
                settings = {"run": cfg["run"], "dataset": dataset, "system": system, "title": titles[system]}
                settings |= {
                    "layer": 3,
                    "recompute_ratio": None if stage == "accuracy" else 0.26,
                    "data_hash": "made-up",
                }
                rng = Random(f"{stage}-{dataset}-{system}")
                mix = dataset.rpartition("-")[2]
                records = {f"test-{i}": accuracy_record(system, mix, rng, prompts_each, 4) for i in range(prompts_each)}
                paths[stage].append(write(root / stage / dataset / f"{system}.jsonl", settings, records))
    for tokens in cfg["latency"]["tokens"]:
        rng, n = Random(f"latency-{tokens}"), cfg["latency"]["prompts"]
        records = {f"e{i}": latency_record(systems, tokens, rng, cfg["latency"]["repeats"]) for i in range(n)}
        settings = {"run": cfg["run"], "warmups": 1, "titles": titles}
        paths["latency"].append(write(root / "latency" / f"{tokens}.jsonl", settings, records))
    rng = Random("rest")
    records = {f"{s}-{b}": throughput_record(s, b, rng, 16) for s in systems for b in (1, 2, 4)}
    paths["throughput"] = write(root / "throughput.jsonl", {"titles": titles, "dataset": DATASETS[1]}, records)
    records = {f"e{i}-{shift}": similarity_record(shift, rng) for i in range(4) for shift in SHIFTS}
    paths["cksim"] = write(root / "cksim.jsonl", {"dataset": DATASETS[1]}, records)
    paths["prompts"], paths["layer"] = str(root / "prompts.json"), str(root / "selection_layer.json")
    agents = {a: {"reusable_share": [0.5, 0.6, 0.7], "tokens": [500, 600, 700], "episodes": 1} for a in ("memgpt",)}
    write_json(paths["prompts"], prompts(datasets, prompts_each, rng) | {"agents": agents})
    arms = {
        f"{s}@{i}": min(0.96, 0.55 + 0.13 * i - 0.1 * (s == "cacheblend"))
        for s in ("cacheslide", "cacheblend")
        for i in range(1, 8)
    }
    f1 = {d: {"recompute": 0.95} | {a: v - 0.03 * d.endswith("deep") for a, v in arms.items()} for d in datasets}
    write_json(paths["layer"], {"layer": 3, "recompute_ratio": 0.26, "margin": 0.015, "f1": f1})
    return cfg, paths
