"""Redraw the committed figures from committed records, without a job of the study: `make figures`."""

import argparse
import lzma
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cacheslide.errors import CacheSlideError, DataError
from harness.inventory import AGENT_FIGURES, FIGURES
from harness.plots.render import render
from harness.results.provenance import ROOT

PACKED = "records.tar.xz"
RUN = "cpu"  # the configuration whose records are committed
STUDY = FIGURES | {name: f"agents/{section}.jsonl" for section, name in AGENT_FIGURES.items()}
APART = {  # figures of separate records, under figures/ and results/
    "h200/serving": "h200/serving.json",
    **{f"slide/fig12{part}": "slide/summary.json" for part in "abcd"},
    "real/real": "real/summary.json",
    "real/fig03_real": "real/sessions.json",
    "benchmark/frontier": "benchmark/frontier.json",
}


def redraw(results: Path, out: Path) -> Iterator[tuple[str, bool]]:
    """Draw every figure under `out`, as SVG; yields its name and whether it was drawn (False: no committed source)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, RUN)
        unpack(results / RUN, run)
        sources = {f"{RUN}/{name}": run / source for name, source in STUDY.items()}
        sources |= {name: results / source for name, source in APART.items()}
        for name, source in sources.items():
            there = source.is_file()
            if there:
                render(Path(name).name, source, [out / f"{name}.svg"])
            yield name, there


def unpack(run: Path, into: Path) -> None:
    """A run's packed records beside its other results, in the new folder `into`; DataError if there are none."""
    into.mkdir()
    try:
        with tarfile.open(run / PACKED, "r:xz") as packed:
            packed.extractall(into, filter="data")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as broken:
        raise DataError(f"{run / PACKED} cannot be read: {' '.join(str(broken).split())}") from None
    for path in run.glob("*.json"):
        if not (into / path.name).exists():
            (into / path.name).symlink_to(path.resolve())


def main(args: list[str] | None = None) -> int:
    """Command line; an error a user can act on is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m harness.plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the figures")
    given = parser.parse_args(args)
    try:
        for name, drawn in redraw(given.results, given.out):
            print(f"{given.out / name}.svg" if drawn else f"left out: {name}, whose record is not committed")
    except (CacheSlideError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
