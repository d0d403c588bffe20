"""The GPU reproduction in one file: `python -m harness.results.reproduction --records DIR ... --out FILE`.

Records are those of `harness.experiments.serving.reproduction`, a folder a configuration, finished or not. Times are
of random weights where the configuration says so; divergence is of a real model at the same settings
(`harness.results.divergence_of`), F1 of the ledger task where --frontier gives it. The headline holds plain numbers;
what was not measured is null, and `missing` says why.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from cacheslide.policies.registry import load_policy
from harness.experiments.serving.arms import Arm
from harness.experiments.serving.reproduction.settings import Settings
from harness.experiments.serving.reproduction.stages import plan
from harness.results.divergence_of import SETTING, kl_of, kl_rows
from harness.results.provenance import machine
from harness.results.records import RecordFile, read_file, write_json
from harness.results.reproduction_rivals import rivals_of
from harness.results.reproduction_tables import RECOMPUTE, energy_rows, server_rows, ttft_rows
from harness.results.rounding import rounded
from harness.step import command

SCHEMA = "cacheslide.reproduction-tables/1"
HEADLINE = (
    "systems_timed_7b",
    "ttft_ratio_8k_7b",
    "ttft_ratio_16k_7b",
    "ttft_ratio_8k_70b",
    "mean_ttft_ratio_batch8",
    "correct_requests_ratio_batch8",
    "ttft_over_best_rival_8k",
    "joules_per_request_ratio_8k",
    "claims_reproduced",
    "claims_partly",
    "claims_not",
    "claims_not_testable",
)
CLAIMS = {"claims_reproduced": "reproduced", "claims_partly": "partly", "claims_not": "not reproduced",
          "claims_not_testable": "not testable here"}  # fmt: skip
SEVEN, SEVENTY = range(5, 10), range(60, 80)  # billions of weights
GIBIBYTE_WEIGHTS = 2**30 / 1e9 / 2  # billions of 16-bit weights in a GiB
CONDITIONS = {
    "ttft_ms": "of a batch its last first token, from arrival in the engine's front end; median over turns",
    "requests_ms": "TTFT of every request; with few turns p95 and p99 are about the largest",
    "prompts": "random ids: a system prompt, updated text, eight fixed chunks, updated text, new every turn",
    "prefix_cache": "the same prompts, plain, read vLLM's prefix cache: it holds the system prompt",
    "prefix_cache_ideal": "all fixed text stands first: the best case of a prefix cache",
    "servers": "a streaming client in a closed loop; every system one after another on its server, no turns",
    "joules": "of all GPUs of a model, requests back to back, the client's gaps included; idle power beside it",
    "pages_gib": "vLLM's blocks in use at most, polled every 0.1 s; chunk_gib: chunk KV read by all clients' requests",
    "kl": f"divergence from recompute on the answer, of a 270M model on real text, setting {SETTING!r}",
}
Row = dict[str, Any]


def read_stages(folder: Path) -> list[RecordFile]:
    """The stages' files of a folder, finished or not; DataError without any, or for files of other settings."""
    name = re.compile(r"\.?(\d+-[\w-]+\.jsonl)(\.part)?")
    files = {m[1]: p for p in sorted(folder.glob("*")) if (m := name.fullmatch(p.name))}  # a finished one wins
    stages = [read_file(path) for _, path in sorted(files.items())]
    if not stages:
        raise DataError(f"{folder} holds no stage of a reproduction")
    if any(s.settings.get("settings") != stages[0].settings.get("settings") for s in stages):
        raise DataError(f"{folder} holds stages of different settings")
    return stages


def tabulated(folder: Path, kl: Mapping[str, dict]) -> Row:
    """All tables of one configuration."""
    stages = read_stages(folder)
    raw = stages[0].settings["settings"]
    names = {f.name for f in fields(Settings)}
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in names})
    records = [r for stage in stages for r in stage.records]
    made = plan(settings)
    measured = {r["id"] for r in records}
    times = ttft_rows(records)
    for row in times:
        row["kl"] = kl_of(row["system"], kl)
    return {
        "settings": raw,
        "provenance": records[0]["provenance"] if records else None,
        "commits": sorted({str(r["provenance"]["git_commit"]) for r in records}),
        "engine": next((r["engine"] for r in records if "engine" in r), None),
        "weights_billions": settings.weight_gib * settings.tensor_parallel * GIBIBYTE_WEIGHTS,
        "ttft": times,
        "energy": energy_rows(records),
        "servers": server_rows(records, settings.token_gib),
        "rivals": rivals_of(records, settings, kl),
        "failed": [
            {"cell": r["id"], "arm": arm, "why": of["failed"]}
            for r in records
            for arm, of in r.get("arms", {}).items()
            if of["failed"]
        ],
        "left_out": made.left_out,
        "missing_cells": [c.id for s in made.stages for c in s.cells if c.id not in measured],
    }


def correct_shares(frontier: Mapping[str, Any] | None) -> dict[str, float]:
    """F1 of the ledger task by setting, from its frontier."""
    return {} if frontier is None else {row["setting"]: row["f1"]["value"] for row in frontier["rows"]}


def headline(runs: Sequence[Row], shares: Mapping[str, float], claims: Mapping[str, Any] | None) -> tuple[Row, Row]:
    """The headline, and for every null the reason."""
    out: Row = dict.fromkeys(HEADLINE)
    missing: Row = {}
    seven, seventy = (_of_size(runs, size) for size in (SEVEN, SEVENTY))

    def put(key: str, make: Callable[[], float | int | None], why: str) -> None:
        out[key] = make()
        if out[key] is None:
            missing[key] = why

    absent = "not measured, or its timings were disturbed"
    put("systems_timed_7b", lambda: _timed(seven), "no 7B records")
    put("ttft_ratio_8k_7b", lambda: _ratio(seven, 8192, 1, "recompute_over_ttft"), absent)
    put("ttft_ratio_16k_7b", lambda: _ratio(seven, 16384, 1, "recompute_over_ttft"), absent)
    put("ttft_ratio_8k_70b", lambda: _ratio(seventy, 8192, 1, "recompute_over_ttft"), absent)
    put("mean_ttft_ratio_batch8", lambda: _ratio(seven, 8192, 8, "recompute_over_mean_ttft"), absent)
    put("correct_requests_ratio_batch8", lambda: _correct(seven, shares),
        "not measured, or no F1 of the ledger task was given (--frontier)")  # fmt: skip
    put("ttft_over_best_rival_8k", lambda: _best_rival(seven), absent)
    put("joules_per_request_ratio_8k", lambda: _joules(seven), absent)
    for key, verdict in CLAIMS.items():
        put(
            key,
            lambda verdict=verdict: claims and claims["counts"].get(verdict),
            "no claims table was given (--claims)",
        )
    return out, missing


def _of_size(runs: Sequence[Row], billions: range) -> Row | None:
    return next((r for r in runs if int(r["weights_billions"]) in billions), None)


def _timed(run: Row | None) -> int | None:
    """Systems with a TTFT at any point, vLLM by itself and its prefix cache left aside."""
    if run is None:
        return None
    systems = {Arm.parse(r["system"]).system for r in run["ttft"] if "compute_fraction" in r and r["kind"] == "ttft"}
    return len(systems) or None


def _row(rows: Sequence[Row], system: str, tokens: int, batch: int, reused: float) -> Row | None:
    at = (system, tokens, batch, reused, True)
    return next(
        (r for r in rows if (r["system"], r["tokens"], r["batch"], r["reused"], r["prefix_caching"]) == at
         and r["axis"] in ("base", "tokens", "batch", "reused")), None)  # fmt: skip


def _ratio(run: Row | None, tokens: int, batch: int, name: str) -> float | None:
    if run is None:
        return None
    settings = run["settings"]
    row = _row(run["ttft"], settings["ours"], tokens, batch, settings["base"]["reused"])
    return row[name]["value"] if row and name in row else None


def _joules(run: Row | None) -> float | None:
    row = run and next(
        (r for r in run["energy"] if r["system"] == run["settings"]["ours"] and r["tokens"] == 8192), None
    )
    return row["recompute_over_joules"]["value"] if row and "recompute_over_joules" in row else None


def _best_rival(run: Row | None) -> float | None:
    best = run and next((r for r in run["rivals"]["summary"] if r["tokens"] == 8192), None)
    return best["fastest_rival_over_ours"]["value"] if best and best["fastest_rival_over_ours"] else None


def _correct(run: Row | None, shares: Mapping[str, float]) -> float | None:
    """Requests a second of ours over vLLM's with 8 clients, times the share of recompute's F1 that ours keeps."""
    if run is None:
        return None
    ours = run["settings"]["ours"]
    rates = {r["system"]: r["requests_per_second"] for r in run["servers"] if r["clients"] == 8 and not r["disturbed"]}
    ratio = load_policy(ours).correction.total_ratio
    title = next(
        (s for s in shares if re.fullmatch(rf"(?i)mixed, two thirds remembered,? {100 * ratio:g} ?%", s)), None
    )
    exact = shares.get("recompute", shares.get("Recompute"))
    if title is None or not exact or not {ours, "vllm"} <= rates.keys():
        return None
    return rates[ours] / rates["vllm"] * shares[title] / exact


def summarise(
    folders: Sequence[Path], real: Path, confirm: Path, frontier: Path | None = None, claims: Path | None = None
) -> Row:
    """The file's content."""
    kl = kl_rows(*(_json(path) or {} for path in (real, confirm)))
    runs = [tabulated(folder, kl) for folder in folders]
    numbers, missing = headline(runs, correct_shares(_json(frontier)), _json(claims))
    return {
        "schema": SCHEMA,
        "headline": numbers,
        "missing": missing,
        "conditions": CONDITIONS
        | {"arm": "the headline's ratios are recompute over `ours` at its own recompute ratio"},
        "runs": runs,
        "reference": RECOMPUTE,
        "provenance": machine(),
    }


def _json(path: Path | None) -> Any:
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as broken:
        raise DataError(f"{path}: {broken}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and print the headline."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--records", type=Path, nargs="+", required=True, help="a folder of stages each configuration")
    p.add_argument("--real", type=Path, default=Path("results/real/summary.json"))
    p.add_argument("--confirm", type=Path, default=Path("results/real/confirm.json"))
    p.add_argument("--frontier", type=Path, help="results/benchmark/frontier.json, where it was made")
    p.add_argument("--claims", type=Path, help="results/benchmark/claims.json")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    made = rounded(summarise(args.records, args.real, args.confirm, args.frontier, args.claims))
    write_json(args.out, made)
    print(json.dumps(made["headline"], indent=1))


if __name__ == "__main__":
    command(main)
