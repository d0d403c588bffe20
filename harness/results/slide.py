"""Summary of SLIDE's experiments, beside the paper's claims."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from harness.experiments.slide.replay import pages_in_use
from harness.experiments.slide.trace import Template
from harness.metrics.bootstrap import mean
from harness.results.undisturbed import pick, together, too_few

PAPER = {
    "lru_over_clean_first_bytes": [3.11, 3.62],
    "write_stall_reduction_pct": [66.9, 73.5],
    "layer_latency_reduction_pct": [26.7, 51.5],
    "prompt_cache_over_cacheslide_gpu_bytes": [1.63, 1.9],
    "lookup_us_1e6": 50,
    "startup_s_1e5_pages": 2,
}
MAIN = ("main sparse", "main deep")
PAGES_OF = "deep@1"  # the trace whose pages in GPU memory are counted


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reduction(less: list[float], more: list[float], resamples: int = 10_000) -> dict[str, Any]:
    """1 - sum(less) / sum(more) in percent, with a bootstrap interval over the pairs; None if `more` is all zero."""
    a, b = np.asarray(less, float), np.asarray(more, float)
    if b.sum() <= 0:
        return {"value": None, "low": None, "high": None, "n": len(a), "why": "nothing to reduce was measured"}
    pick = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    tops, bottoms = a[pick].sum(1), b[pick].sum(1)
    draws = 100 * (1 - tops[bottoms > 0] / bottoms[bottoms > 0])
    low, high = np.quantile(draws, [0.025, 0.975]) if len(a) > 1 else (None, None)
    value = float(100 * (1 - a.sum() / b.sum()))
    return {"value": value, "low": low and float(low), "high": high and float(high), "n": len(a)}


def _ratio(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Mean of a / b over pairs; None if a b is 0."""
    if any(b == 0 for _, b in pairs):
        return {
            "value": None,
            "low": None,
            "high": None,
            "n": len(pairs),
            "why": "clean-first wrote nothing in some run",
        }
    return asdict(mean([a / b for a, b in pairs]))


def compare(runs: list[dict[str, Any]], conditions: tuple[str, ...]) -> dict[str, Any] | None:
    """Clean-first against LRU and FIFO on the same conditions and seeds; times are those of undisturbed runs."""
    by: dict[str, dict[tuple, dict]] = defaultdict(dict)
    quiet: dict[tuple, list] = defaultdict(list)
    for r in runs:
        if r["condition"] in conditions:
            by[r["policy"]][r["condition"], r["seed"]] = r["counts"]
            quiet[r["condition"], r["seed"]].append(r.get("quiet"))
    units = sorted(set(by["clean-first"]) & set(by["lru"]) & set(by["fifo"]))
    if not units:
        return None

    def total(c: dict[str, Any]) -> float:
        return c["spill_bytes"] + c["record_bytes"]

    readings = [together(quiet[u]) for u in units]
    few, calm = too_few(readings), pick(units, readings)
    traces = sorted({r["trace"] for r in runs if r["condition"] in conditions})
    out: dict[str, Any] = {"units": len(units), "traces": traces, "disturbed": few, "policies": {}}
    for policy in ("clean-first", "lru", "fifo"):
        rows = [by[policy][u] for u in units]
        out["policies"][policy] = {
            "bytes_written": asdict(mean([total(c) for c in rows])),
            "proc_write_bytes": asdict(mean([c["proc_write_bytes"] for c in rows])),
            "proc_read_bytes": asdict(mean([c["proc_read_bytes"] for c in rows])),
            "stall_s": asdict(mean([by[policy][u]["stall_s"] for u in calm])),
            "seconds": asdict(mean([by[policy][u]["seconds"] for u in calm])),
            "pages_written_dirty": asdict(mean([c["dirty_written"] for c in rows])),
            "pages_dropped_clean": asdict(mean([c["clean_dropped"] for c in rows])),
            "pages_a_sequential_write": float(np.mean([c["dirty_written"] / max(1, c["extents"]) for c in rows])),
            "bytes_without_dirty_bits": asdict(
                mean([(c["dirty_written"] + c["clean_dropped"]) * c["page_bytes"] for c in rows])
            ),
        }
    for other in ("lru", "fifo"):
        out[f"{other}_over_clean_first_bytes"] = _ratio(
            [(total(by[other][u]), total(by["clean-first"][u])) for u in units]
        )
        stalls = [[by[policy][u]["stall_s"] for u in calm] for policy in ("clean-first", other)]
        none = {"value": None, "low": None, "high": None, "n": len(calm), "why": few}
        out[f"write_stall_reduction_pct_against_{other}"] = none if few else reduction(*stalls)
    one = by["lru"][units[0]]
    out["setting"] = {k: one[k] for k in ("memory_bytes", "reference_pages", "corrected_pages", "page_bytes", "slices")}
    return out


def gpu_pages(templates: list[Template], page_tokens: int, batches=(2, 4, 6, 8)) -> list[dict[str, Any]]:
    """GPU bytes in pages, computed: B requests on one template, and B requests on B templates.

    PromptCache as published copies its modules into every request; with shared pages it would store them once.
    CacheSlide shares pages that WCA left unchanged and stores a private page for each one with corrected rows; the
    reference page under a private one may be evicted.
    """
    out = []
    for batch in batches:
        chosen = [templates[i % len(templates)] for i in range(batch)]
        for kind, group in (("one template", [chosen[0]] * batch), ("a template each", chosen)):
            distinct = {id(t): t for t in group}.values()
            reference = sum(pages_in_use([t], page_tokens)[0] for t in distinct)
            copies = sum(pages_in_use([t], page_tokens)[0] for t in group)
            private = sum(pages_in_use([t], page_tokens)[1] for t in group)
            left = reference - sum(pages_in_use([t], page_tokens)[1] for t in distinct)
            out.append(
                {
                    "batch": batch, "requests_on": kind, "prompt_cache_copies": reference + copies,
                    "prompt_cache_shared": reference, "cacheslide": private + left,
                    "ratio": (reference + copies) / (private + left),
                }
            )  # fmt: skip
    return out


def summarise(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Headline and tables from the records in `out`; numbers not measured are null, with the reason."""
    runs = _lines(out / "volume.jsonl")
    faults, index, scan = _read(out / "faults.json"), _read(out / "index.json"), _read(out / "scan.json")
    orders = _orders(out)
    volume = {c: compare(runs, (c,)) for c in dict.fromkeys(r["condition"] for r in runs)}
    main = compare(runs, MAIN)
    traces = {k: [Template.from_dict(t) for t in v] for k, v in (_read(out / "trace.json") or {}).items()}
    latency, latency_why = _latency(orders["cuda"])
    pages = [row | {"trace": PAGES_OF} for row in gpu_pages(traces[PAGES_OF], 16)] if traces else None
    headline = {
        "lru_over_clean_first_bytes": main and main["lru_over_clean_first_bytes"]["value"],
        "write_stall_reduction_pct": main and main["write_stall_reduction_pct_against_lru"]["value"],
        "layer_latency_reduction_pct": latency,
        "lookup_us_1e6": index and index["lookup_1e6"]["present_us"],
        "startup_s_1e5_pages": index and index["startup_one_page_a_record"]["median_s"],
        "faults_injected": faults and sum(v["faults"] for v in faults["faults"]),
        "wrong_pages_served": faults and sum(v["wrong_pages"] for v in faults["faults"]),
    }
    held = {r["condition"] for r in runs if r.get("write_bytes_per_s")}
    slow = [f"{name}: {_stalls(of)}" for name, of in volume.items() if name in held]
    notes = {
        "lru_over_clean_first_bytes": "SWE-style turns, memory for a third of the pages in use; mean over runs",
        "write_stall_reduction_pct": "seconds the workload waited for the write-back queue; this disk at full speed, "
        "where stalls are short and the interval is wide (main); with writes held to 100 MiB/s: "
        + ("; ".join(slow) or "not measured"),
        "layer_latency_reduction_pct": latency_why,
        "wrong_pages_served": "every page of every chunk that was served after a fault was compared",
    }
    wrong = sum(r["counts"]["wrong_rows"] for r in runs)
    return {
        "headline": headline,
        "notes": notes,
        "paper": PAPER,
        "main": main,
        "conditions": volume,
        "workload": {
            "dirty_page_share": {
                name: {str(p): float(np.mean([t.dirty_share(p) for t in ts])) for p in (4, 8, 16, 32)}
                for name, ts in traces.items()
            },
            "wrong_rows_read": wrong,
            "runs": len(runs),
        },
        "gpu_pages_computed": pages,
        "orders": orders,
        "scan": scan,
        "index": index,
        "faults": faults,
        "provenance": about,
    }


def _stalls(condition: dict[str, Any] | None) -> str:
    """A condition's reduction of write stalls against LRU, as text."""
    e = condition and condition["write_stall_reduction_pct_against_lru"]
    return "not measured" if not e or e["value"] is None else "{value:.1f} [{low:.1f}, {high:.1f}]".format(**e)


def _orders(out: Path) -> dict[str, Any]:
    """The load-write orders' records by device kind; the newest of several GPUs."""
    orders = {"cuda": None, "cpu": _read(out / "orders_cpu.json")}
    for path in sorted(out.glob("orders_*.json"), key=lambda p: p.stat().st_mtime):
        if path.name != "orders_cpu.json":
            orders["cuda"] = _read(path)
    return orders


def _latency(measured: dict[str, Any] | None) -> tuple[float | None, str]:
    """Mean reduction over batches of `disjoint` relative to `locked`, from host memory, on a GPU; and a text for it."""
    if measured is None:
        return None, "not measured: needs a GPU (python -m harness.experiments.slide.steps orders summary)"
    host = {(r["order"], r["staging"]) for r in measured["rows"] if r["source"] == "host"}
    if not host >= {("disjoint", 1), ("relocate", 1), ("disjoint", 2)}:
        return None, "not measured: the run on the GPU ended before it had chunks in host memory"
    value, text = reductions(measured, "disjoint", 1)
    paper, ahead = reductions(measured, "relocate", 1), reductions(measured, "disjoint", 2)
    return value, (
        "order 'disjoint' against 'locked', chunks in pinned host memory, a layer's load starting with the layer; mean "
        f"over batches, which were {text}. The paper's order, 'relocate': {paper[0]:.1f} ({paper[1]}). With the next "
        f"layer's load running ahead in both, 'disjoint': {ahead[0]:.1f} ({ahead[1]})"
    )


def reductions(measured: dict[str, Any], order: str, staging: int) -> tuple[float, str]:
    """Mean reduction of an order in percent over batches, with chunks in host memory; and each batch as text."""
    rows = [r for r in measured["rows"] if (r["source"], r["order"], r["staging"]) == ("host", order, staging)]
    texts = []
    for r in rows:
        e = r["reduction_pct"]
        limits = "no interval" if e["low"] is None else f"{e['low']:.1f}, {e['high']:.1f}"
        texts.append(f"batch {r['batch']}: {e['value']:.1f} [{limits}]")
    return float(np.mean([r["reduction_pct"]["value"] for r in rows])), ", ".join(texts)
