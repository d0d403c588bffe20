"""Write synthetic rows: `python -m harness.tasks.synthetic --style hotpotqa --mix deep --out FILE`."""

import argparse
import sys
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.tasks.synthetic import MIXES, SPLITS, STYLES, write_rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m harness.tasks.synthetic", description=__doc__)
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--mix", choices=list(MIXES), required=True)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        digest = write_rows(args.out, args.style, args.mix, args.split, args.seed, args.prompts, args.tokens)
    except (CacheSlideError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{digest}  {args.out.name}")


if __name__ == "__main__":
    main()
