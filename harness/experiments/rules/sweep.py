"""Sweep of correction rules on the stress task: `python -m harness.experiments.rules.sweep --model DIR --out DIR`.

Every cell of `rules/cells.py` answers the same questions: F1 lost to recompute, in points, against the share of
row-layers computed. Records go to `OUT/rope.jsonl`, the tables to `OUT/summary.json`, in the form of the sweep of WCA's
open points (`harness.experiments.wca.sweep`), whose code it uses: finished records are not measured again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from cacheslide.models.weights import fingerprint
from harness.backends.reference import ReferenceBackend
from harness.experiments.rules.cells import cells
from harness.experiments.wca.sweep import SPLIT, Job, prompts_of, sweep
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.wca import DIGITS, read_sweep, tabulate
from harness.step import command


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-llama-12m"))
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of every style and mix")
    parser.add_argument("--mixes", nargs="+", default=["deep"], choices=["deep", "sparse"])
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side; 0: none but this one")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop measuring after this many")
    args = parser.parse_args(argv)
    given = prompts_of(args.mixes, args.prompts, args.tokens, args.seed)
    about = {"split": SPLIT, "tokens": args.tokens, "seed": args.seed, "model": fingerprint(args.model)}
    job = Job(str(args.model), None, False, args.device, 1, cells)
    records = args.out / "rope.jsonl"
    sweep(job, records, about, given, args.jobs, monotonic() + 60 * args.minutes)
    tables = tabulate({"rope": read_sweep(records)}, cells(ReferenceBackend(args.model).num_layers))
    origin = provenance({"mixes": args.mixes} | about, {}, about["model"])
    write_json(args.out / "summary.json", rounded(tables | {"provenance": origin}, DIGITS))


if __name__ == "__main__":
    command(main)
