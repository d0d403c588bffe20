"""Tables from the records of `engine_ttft` and `neighbours` (`harness.experiments.serving`):

`python -m harness.results.serving --records FILE ... --kernels FILE --out results/h200/serving.json`.

A batch's time is that until its last first token; rows also have the mean and requests per second. Ratios compare
medians over turns that alternate between systems. Executor efficiency is (share of row-layers computed x recompute's
TTFT) / CacheSlide's TTFT: 1 if a row-layer costs what it costs in vLLM's own prefill and nothing else costs anything.
Disturbed turns are left out; if too few are left, a row has no ratio, and `disturbed` gives the reason.
"""

import argparse
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import DataError
from harness.metrics.bootstrap import ratio_of_medians
from harness.results import neighbours
from harness.results.intervals import as_json, median
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.undisturbed import Readings, pick, together, too_few
from harness.step import command

_ESTIMATE = ("value", "low", "high")
HEADLINE = (8192, 1, "cacheslide@0.26", "model")  # tokens, batch, system, store


def read(path: Path) -> list[dict[str, Any]]:
    """The records of one run, plain or packed (`.xz`); a torn last line is left out."""
    records = []
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            lines = file.read().splitlines()
    except (lzma.LZMAError, EOFError) as torn:
        raise DataError(f"{path}: {torn}") from None
    for number, line in enumerate(lines, 1):
        try:
            records.append(renamed.record(json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as torn:
            if number < len(lines):
                raise DataError(f"{path}:{number}: {torn}") from None
    if not records or records[0].get("kind") != "start":
        raise DataError(f"{path}: not a record file of engine_ttft")
    return records


def tables(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per measured cell; TTFT in ms, efficiency and ratios with intervals."""
    cells = [r for r in records if r["kind"] == "cell" and r["runs"] and not r["failed"]]
    recompute = {(c["tokens"], c["batch"]): c for c in cells if c["system"] == "recompute"}
    rows = []
    for cell in cells:
        complete, base = cell, recompute.get((cell["tokens"], cell["batch"]))
        few = too_few(_readings(complete))
        cell = complete | {"runs": pick(complete["runs"], _readings(complete))}
        own = _makespans(cell)
        row = {name: cell[name] for name in ("tokens", "batch", "system", "store")}
        row |= {"ttft_ms": median([1e3 * x for x in own]), "mean_ttft_ms": 1e3 * _median(_means(cell))}
        row["requests_per_s"] = cell["batch"] / _median(_seconds(cell))
        if "compute_fraction" in cell["runs"][0]:  # an arm with reuse, which has receipts
            share = _median([x for run in cell["runs"] for x in run["compute_fraction"]])
            row |= {"compute_fraction": share, "bytes_loaded": cell["runs"][0]["bytes_loaded"][0]}
        if base and cell["system"] != "recompute":
            turns = min(len(base["runs"]), len(complete["runs"]))
            both = [together(pair) for pair in zip(_readings(base)[:turns], _readings(complete)[:turns], strict=True)]
            few = few or too_few(both)
        row["disturbed"] = few
        if base and cell["system"] != "recompute" and not few:
            row["recompute_over_ttft"] = ratio = _over(base, complete, both, _makespans)
            if cell["batch"] > 1:
                row["recompute_over_mean_ttft"] = _over(base, complete, both, _means)
                row["requests_per_s_over_recompute"] = _over(base, complete, both, _seconds)
            if "compute_fraction" in row:
                row["efficiency"] = ratio | {k: share * v for k, v in ratio.items() if k in _ESTIMATE and v is not None}
        rows.append(row)
    return rows


def _over(
    base: dict[str, Any], cell: dict[str, Any], both: Readings, times: Callable[[dict[str, Any]], list[float]]
) -> dict[str, Any]:
    """Medians of `times` of `base` over those of `cell`, in turns undisturbed for both."""
    return as_json(ratio_of_medians(*(pick(times(c)[: len(both)], both) for c in (base, cell))))


def _readings(cell: dict[str, Any]) -> Readings:
    return [run.get("quiet") for run in cell["runs"]]


def _makespans(cell: dict[str, Any]) -> list[float]:
    return [max(run["ttft"]) for run in cell["runs"]]


def _means(cell: dict[str, Any]) -> list[float]:
    return [sum(run["ttft"]) / len(run["ttft"]) for run in cell["runs"]]


def _seconds(cell: dict[str, Any]) -> list[float]:
    """Seconds of each whole batch; older records only have the last first token."""
    return [run.get("seconds", max(run["ttft"])) for run in cell["runs"]]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def plugin_overhead(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The connector's cost for plain requests in per cent: prefill of one prompt, and a batch of decodes."""
    record = next((r for r in records if r["kind"] == "overhead"), None)
    if record is None:
        return None
    out: dict[str, Any] = {"tokens": record["tokens"], "decode_tokens": record["decode_tokens"]}
    quiet = record.get("quiet", [])
    if few := too_few(quiet):
        return out | {"disturbed": few}
    for part in ("ttft", "decode"):
        pairs = [pick(record["runs"][engine][part], quiet) for engine in ("plugin", "vanilla")]
        ratio = as_json(ratio_of_medians(*pairs))
        scaled = {k: 100 * (ratio[k] - 1) if ratio[k] is not None else None for k in ("value", "low", "high")}
        out[part] = ratio | scaled
    return out


def build(paths: Sequence[Path], kernels: Path | None) -> dict[str, Any]:
    """All runs, and the headline of runs that have it."""
    runs, headline = [], {}
    for path in paths:
        records = read(path)
        start = records[0]
        run = {
            "settings": start["settings"],
            "provenance": start["provenance"],
            "engine": next((r for r in records if r["kind"] == "engine"), None),
            "table": tables(records),
            "neighbours": neighbours.table(records),
            "plugin_overhead_pct": plugin_overhead(records),
            "failed": [
                {k: r[k] for k in ("tokens", "batch", "system", "store", "failed") if k in r}
                for r in records
                if r["kind"] in ("cell", "neighbours") and r["failed"]
            ],
            "errors": [r["error"] for r in records if r["kind"] == "error"],
            "complete": records[-1]["kind"] == "end",
        }
        runs.append(run)
        headline |= _headline(run)
    if kernels is not None:
        case = next(
            c
            for c in json.loads(kernels.read_text())["attention"]
            if (c["shape"], c["context_tokens"], c["active_share"], c["block_size"]) == ("gqa", [8192], 0.26, 16)
        )
        headline["row_attention_vs_flash"] = case["ratio_to_flash_at_equal_flops"]
    conditions = {
        "ttft": "from the request's arrival in the front end to its first token there; of a batch, the last one's",
        "requests_per_s": "of a batch: its requests over the time until the last answer is whole",
        "prompts": "random ids; 5 % updated text, eight fixed chunks of together 90 %, 5 % updated text",
        "prefix_cache_ideal": "the eight chunks stand first and unchanged: vLLM's prefix cache holds them",
        "store": "'model': chunks on the GPU; 'cpu': in pinned host memory",
        "efficiency": "share of row-layers computed x TTFT of recompute / TTFT",
        "plugin_overhead_pct": "the larger of the two medians' differences; plain requests, engines in turns",
        "neighbours": "where a run's machine had more GPUs than the run, other jobs were at work on them: what waits "
        "for the host (4k, small shares) varies there; ttft_mistral7b_alone had a machine of its own",
        "weights": "random; what reuse does to answers is measured elsewhere, with trained weights",
    }
    return {"schema": 1, "headline": headline, "conditions": conditions, "runs": runs}


def _headline(run: dict[str, Any]) -> dict[str, float]:
    numbers = {}
    if run["settings"]["shape"] == "mistral-7b":
        for row in run["table"]:
            if (row["tokens"], row["batch"], row["system"], row["store"]) == HEADLINE and "efficiency" in row:
                numbers["executor_efficiency_8k"] = row["efficiency"]["value"]
                numbers["ttft_ratio_8k_topk26"] = row["recompute_over_ttft"]["value"]
    if (overhead := run["plugin_overhead_pct"]) is not None and not overhead.get("disturbed"):
        numbers["plugin_overhead_pct"] = max(overhead["ttft"]["value"], overhead["decode"]["value"])
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--records", type=Path, nargs="+", required=True, help="later files win the headline")
    p.add_argument("--kernels", type=Path, help="the sweep of harness.experiments.kernels.row_attention")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    made = build(args.records, args.kernels)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, rounded(made))
    print(json.dumps(made["headline"], indent=1))


if __name__ == "__main__":
    command(main)
