"""Audit of a task for shortcuts: `python -m harness.experiments.rules.static_choices --model DIR --out FILE`.

Tokens chosen by form alone are recomputed at 3, 10 and 26 % and compared with random ones (`static_cells.py`). Records
go beside FILE, which holds F1 with intervals, the gain over random in points, and the headline numbers:
`static_choice_gain_points` (the largest gain of a static choice at 10 or 26 %), `naive_loss_points` and
`isolated_loss_points` (against recompute), `stale_loss_points` (stale positions against the same in place, with nothing
recomputed) and `stale_corrected_loss_points` (with 26 % by remembered deviation).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from time import monotonic
from typing import Any

from cacheslide.models.weights import fingerprint
from harness.backends.reference import ReferenceBackend
from harness.experiments.rules.static_cells import ISOLATED, NAIVE, STALE, Forms, static_cells
from harness.experiments.wca.sweep import Job, sweep
from harness.results.provenance import file_hash, provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.wca import DIGITS, read_sweep, tabulate
from harness.step import command
from harness.tasks.data import draw_examples, family_of, read_examples, synthetic_names
from harness.tasks.example import TaskExample

SCHEMA = "cacheslide.static_choices/1"
JUDGED = ("10%", "26%")  # ratios at which a static choice may not beat random tokens
SPLIT = "validation"


def prompts_of(datasets: Sequence[str], count: int, tokens: int, seed: int) -> list[TaskExample]:
    """`count` prompts of every data set."""
    return taking_turns(draw_examples(name, SPLIT, seed, count, tokens) for name in datasets)


def taking_turns(kinds: Iterable[Sequence[TaskExample]]) -> list[TaskExample]:
    """Interleave the kinds, so that a run that ends early covers all of them."""
    return [x for group in zip_longest(*kinds) for x in group if x is not None]


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The headline numbers of a task, from one mix's table."""
    by_name = {r["cell"]: r for r in rows}
    static = [r for r in rows if r["factor"] == "static" and r["option"] in JUDGED and r["gain_points"]]
    best = max(static, key=lambda r: r["gain_points"]["value"], default=None)
    out: dict[str, Any] = {}
    if best:
        out["static_choice_gain_points"] = best["gain_points"] | {"choice": best["cell"]}
    for name, cell in (("naive_loss_points", NAIVE), ("isolated_loss_points", ISOLATED)):
        if cell in by_name:
            out[name] = by_name[cell]["loss_points"]
    corrected = f"remembered, {STALE}, 26%"
    for name, cell in (("stale_loss_points", STALE), ("stale_corrected_loss_points", corrected)):
        if cell in by_name and by_name[cell]["gain_points"]:
            out[name] = negated(by_name[cell]["gain_points"])  # a gain over the same tokens in place
    return out


def negated(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate of the negative value: the ends of its interval, and of its spread over seeds, change places."""
    out = dict(estimate)
    for low, high in (("low", "high"), ("lowest", "highest"), ("value", "value")):
        if low in estimate:
            pair = estimate[high], estimate[low]
            out[low], out[high] = (None if x is None else -x for x in pair)
    return out


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """One mix's table as lines of text."""
    lines = []
    for row in rows:
        gain, f1 = row["gain_points"], row["f1"]
        said = f"{gain['value']:+6.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain and gain["n"] > 1 else ""
        lines.append(f"{row['cell']:48s} {f1['value']:.3f}  compute {row['compute_fraction']:.2f}  {said}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-llama-12m"))
    parser.add_argument("--datasets", nargs="+", default=["hotpotqa-deep", "swebench-deep"], choices=synthetic_names())
    parser.add_argument("--data", nargs="+", type=Path, help="files of such data sets, in place of prompts drawn here")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of every data set")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=0, help="processes side by side; 0: none but this one")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop measuring after this many")
    args = parser.parse_args(argv)
    about: dict[str, Any] = {"model": fingerprint(args.model)}
    if args.data:
        about["data"] = {path.stem: file_hash(path) for path in args.data}
        given = taking_turns(read_examples(path, args.prompts) for path in args.data)
    else:
        about |= {"split": SPLIT, "tokens": args.tokens, "seed": args.seed, "datasets": args.datasets}
        given = prompts_of(args.datasets, args.prompts, args.tokens, args.seed)
    backend = ReferenceBackend(args.model)
    cells = partial(static_cells, forms=Forms.of(backend.tokenizer))
    records = args.out.with_suffix(".jsonl")
    sweep(
        Job(str(args.model), None, False, args.device, 1, cells),
        records,
        about,
        given,
        args.jobs,
        monotonic() + 60 * args.minutes,
    )
    tables = tabulate({"rope": read_sweep(records)}, cells(backend.num_layers))["models"]["rope"]["mixes"]
    for mix, rows in tables.items():
        print(f"{mix}\n{show(rows)}", flush=True)
    families = sorted({family_of(name) for name in about.get("data", args.datasets)})
    result = {"schema": SCHEMA, "settings": about, "families": families}
    result |= {"headline": {mix: headline(rows) for mix, rows in tables.items()}, "mixes": tables}
    write_json(args.out, rounded(result, DIGITS) | {"provenance": provenance(about, {}, about["model"])})


if __name__ == "__main__":
    command(main)
