"""`python -m harness.frozen record FILE` runs the fixed request set; `... compare BEFORE AFTER` lists differences.

A refactoring must leave no difference on one machine. Files of two machines are compared with `--numbers`: receipts
and greedy tokens, no bits.
"""

import argparse
import sys
from pathlib import Path

from cacheslide.errors import DataError
from harness.frozen import compare, kernels, reference, served
from harness.results.provenance import machine
from harness.results.records import write_json

MODEL = "models/tiny-llama-12m"
PARTS = ("kernels", "reference", "served")


def record(parts: tuple[str, ...] = PARTS, model: str = MODEL) -> dict[str, dict]:
    """Outcomes by part."""
    runs = {"kernels": kernels.run, "reference": lambda: reference.run(model), "served": lambda: served.run(model)}
    return {part: runs[part]() for part in parts}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit status 1 if outcomes differ."""
    parser = argparse.ArgumentParser(prog="python -m harness.frozen", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record")
    making.add_argument("file", type=Path)
    making.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    making.add_argument("--model", default=MODEL)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--numbers", action="store_true", help="receipts and tokens only")
    args = parser.parse_args(argv)
    if args.command == "record":
        outcomes = record(tuple(args.parts), args.model)
        write_json(args.file, {"outcomes": outcomes, "machine": machine()})
        print(", ".join(f"{part}: {len(found)} outcomes" for part, found in outcomes.items()))
        return 0
    try:
        changed, added = compare.compared(args.before, args.after, bits=not args.numbers)
    except DataError as wrong:
        comparing.error(str(wrong))
    print("\n".join(changed) or "nothing differs")
    if added:
        print(f"{len(added)} outcomes are new: {added[0]}, ...")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
