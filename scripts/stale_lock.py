"""Removes the lock of a killed Snakemake run, so that the next one can start; keeps the lock of a running one.

Snakemake locks its working folder and does not detect an abandoned lock. `make smoke` and `make full` call this
first; by hand it is `snakemake --unlock`.

    python scripts/stale_lock.py [FOLDER]
"""

import shutil
import sys
from pathlib import Path


def holders(folder: Path) -> list[int]:
    """Snakemake processes with working folder `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = process.joinpath("cmdline").read_bytes().split(b"\0")
            here = process.joinpath("cwd").resolve() == folder
        except OSError:  # it has ended, or belongs to another user
            continue
        if here and any(Path(word.decode(errors="replace")).name == "snakemake" for word in words[:4]):
            found.append(int(process.name))
    return sorted(found)


def main(argv: list[str]) -> int:
    """Status 2, and one line, where a run is active."""
    folder = Path(argv[0] if argv else ".").resolve()
    locks = folder / ".snakemake" / "locks"
    if not locks.is_dir() or not any(locks.iterdir()):
        return 0
    if living := holders(folder):
        print(f"a Snakemake run is at work in {folder} (process {living[0]}): wait for it, or end it", file=sys.stderr)
        return 2
    shutil.rmtree(locks)
    print("the lock of a run that was killed is removed; finished steps are not repeated", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
