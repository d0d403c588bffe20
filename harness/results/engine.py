"""The engine's figures in one file: `python -m harness.results.engine --records FILE ... --out FILE`.

TTFT, throughput and efficiency of one system inside vLLM (`serving.engine_ttft`), its effect on neighbours
(`serving.neighbours`), the cost for plain requests and retaining turns, the timeline of a request's parts, and the same
system's effect on answers: on prompts it was not chosen on (`results.real_confirm`) and on the stress task. The
headline is taken from these tables; a number that was not measured is null.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.policies.default import DEFAULT_SYSTEM
from harness.results.real import POOLED
from harness.results.real_confirm import OVER_NOTHING, OVER_RIVAL
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.serving import build
from harness.step import command

SCHEMA = "cacheslide.engine/1"
RATIO = 0.05  # of the headline for keys that name no ratio
LENGTHS = (4096, 8192, 16384)
MODEL, HOST = "model", "cpu"  # where the chunks are stored
Row = Mapping[str, Any]


def summarise(
    records: Sequence[Path], system: str, rule: str, confirm: Path, stress: Path, cell: str, others: Mapping[str, Path]
) -> dict[str, Any]:
    """The file's contents.

    Parameters
    ----------
    records : sequence of Path
        Files of `engine_ttft` and `neighbours`; the headline's rows come from the first file that has them.
    system, rule, cell : str
        The names of one rule: in the engine, in the study on a real model ("Mixed, two thirds remembered") and in the
        sweep of the stress task at the default's ratio ("mixed, two thirds remembered, 15%").
    others : mapping of str to Path
        JSON files to include parts of, by their names in `TAKEN`.
    """
    tables = build(records, None)
    rows = [row for run in tables["runs"] for row in run["table"]]
    real, task = json.loads(confirm.read_text()), _stress(json.loads(stress.read_text()), cell)
    overhead = next((run["plugin_overhead_pct"] for run in tables["runs"] if run["plugin_overhead_pct"]), None)
    answers = {
        f"{rule} {percent} %": {setting: _kl(real, setting, f"{rule} {percent} %") for setting in ("matter", "shift")}
        for percent in (5, 10, 15)
    }
    return {
        "schema": SCHEMA,
        "headline": headline(rows, system, answers[f"{rule} 10 %"]) | task,
        "system": {"engine": system, "real model": rule, "stress task": cell},
        "answers": answers,
        "host_over_device": host_over_device(rows),
        "plugin_overhead_pct": overhead,
        "serving": tables["runs"],
        "conditions": tables["conditions"],
        **{name: TAKEN[name](json.loads(path.read_text())) for name, path in others.items()},
    }


def headline(rows: Sequence[Row], system: str, kl: Mapping[str, Any]) -> dict[str, float | None]:
    """The headline as plain numbers; `kl` has, by setting, the KL relative to nothing recomputed at 10 %."""
    numbers: dict[str, float | None] = {
        f"ttft_ratio_{n // 1024}k": _value(rows, system, RATIO, n, 1, "recompute_over_ttft") for n in LENGTHS
    }
    numbers["ttft_ratio_8k_10pct"] = _value(rows, system, 0.1, 8192, 1, "recompute_over_ttft")
    numbers["ttft_ratio_16k_10pct"] = _value(rows, system, 0.1, 16384, 1, "recompute_over_ttft")
    numbers["mean_ttft_ratio_8x8k"] = _value(rows, system, RATIO, 8192, 8, "recompute_over_mean_ttft")
    numbers["requests_per_s_ratio_8x8k"] = _value(rows, system, RATIO, 8192, 8, "requests_per_s_over_recompute")
    numbers |= {f"efficiency_{n // 1024}k": _value(rows, system, RATIO, n, 1, "efficiency") for n in LENGTHS[1:]}
    for setting, ratios in kl.items():
        numbers[f"kl_over_nothing_{setting}_10pct"] = ratios and ratios[OVER_NOTHING]["value"]
    return numbers


def host_over_device(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Median TTFT with chunks in pinned host memory over that with chunks on the device, one line per cell."""
    ttft = {_cell(r): r["ttft_ms"]["value"] for r in rows if "@" in r["system"]}
    return [
        {"tokens": tokens, "batch": batch, "system": name, "ratio": ttft[tokens, batch, name, HOST] / value}
        for (tokens, batch, name, store), value in ttft.items()
        if store == MODEL and (tokens, batch, name, HOST) in ttft
    ]


def _cell(row: Row) -> tuple[int, int, str, str]:
    return row["tokens"], row["batch"], row["system"], row["store"]


def _value(rows: Sequence[Row], system: str, ratio: float, tokens: int, batch: int, name: str) -> float | None:
    wanted = tokens, batch, f"{system}@{ratio:g}", MODEL
    row = next((r for r in rows if _cell(r) == wanted and r.get(name)), None)
    return row and row[name]["value"]


def _kl(confirm: Mapping[str, Any], setting: str, arm: str) -> dict[str, Any] | None:
    """KL of an arm over that of its rivals, both data sets together; None if not measured."""
    row = next((r for r in confirm["ratios"] if r["key"] == [setting, POOLED, arm]), None)
    return row and {name: row.get(name) for name in (OVER_NOTHING, OVER_RIVAL)}


def _stress(sweep: Mapping[str, Any], cell: str) -> dict[str, float | None]:
    """F1 points that a rule loses on the stress task, and its compute fraction there."""
    rows = (row for model in sweep["models"].values() for mix in model["mixes"].values() for row in mix)
    row = next((r for r in rows if r["cell"] == cell), None)
    return {
        "stress_f1_loss_points": row and row["loss_points"]["value"],
        "stress_compute_fraction": row and row["compute_fraction"],
    }


def _retaining(made: Mapping[str, Any]) -> dict[str, Any]:
    """From `serving.retaining`: the cost of scoring, by when it happens."""
    return {name: made[name] for name in ("provenance", "table")}


def _time_lines(made: Mapping[str, Any]) -> dict[str, Any]:
    """From `serving.engine_profile`: the timeline of a request's parts, by length and system, without kernels."""
    wanted = "ttft_ms", "timeline", "device_us"
    lengths = {
        tokens: {system: {name: parts[name] for name in wanted} for system, parts in systems.items()}
        for tokens, systems in made["lengths"].items()
    }
    return {"provenance": made["provenance"], "lengths": lengths}


TAKEN = {"retaining": _retaining, "profile": _time_lines}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file and print the headline."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--records", type=Path, nargs="+", required=True, help="of engine_ttft and neighbours, packed or not"
    )
    p.add_argument("--system", default=DEFAULT_SYSTEM)
    p.add_argument("--rule", default="Mixed, two thirds remembered", help="its name in the study on a real model")
    p.add_argument("--confirm", type=Path, default=Path("results/real/confirm.json"))
    p.add_argument("--stress", type=Path, default=Path("results/rules/summary.json"))
    p.add_argument("--cell", default="mixed, two thirds remembered, 15%", help="its name in the stress sweep")
    p.add_argument("--retaining", type=Path, help="of serving.retaining")
    p.add_argument("--profile", type=Path, help="of serving.engine_profile")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    others = {name: path for name in TAKEN if (path := getattr(args, name)) is not None}
    made = summarise(args.records, args.system, args.rule, args.confirm, args.stress, args.cell, others)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, rounded(made))
    print(json.dumps(rounded(made["headline"]), indent=1))


if __name__ == "__main__":
    command(main)
