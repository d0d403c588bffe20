"""Every log format by name, and the sessions of a file in any of them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cacheslide.analysis.grouping import group
from cacheslide.analysis.openai_requests import read_requests
from cacheslide.analysis.session import Session
from cacheslide.errors import DataError
from harness.agents.sessions import reflexion, swe_agent


@dataclass(frozen=True)
class Format:
    """`recognises(text)` identifies a file by its content; `read(path, text, sha256)` returns its sessions."""

    recognises: Callable[[str], bool]
    read: Callable[[Path, str, str], list[Session]]


def _is_requests(text: str) -> bool:
    try:
        first = json.loads(text.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    body = first.get("body", first) if isinstance(first, dict) else None
    return isinstance(body, dict) and ("messages" in body or "prompt" in body)


FORMATS: dict[str, Format] = {
    "swe-agent": Format(swe_agent.recognises, swe_agent.read),
    "reflexion": Format(reflexion.recognises, reflexion.read),
    "openai": Format(_is_requests, lambda path, text, sha256: group(*read_requests(path))),
}


def format_of(text: str) -> str | None:
    """The name of a text's format; None for an unknown one."""
    return next((name for name, form in FORMATS.items() if form.recognises(text)), None)


def read_sessions(path: str | Path) -> list[Session]:
    """The sessions of a recorded run or log.

    Raises
    ------
    DataError
        In one line that names the file: not readable, of no known format, damaged, or without any turn.
    """
    path = Path(path)
    text, digest = read_text(path)
    name = format_of(text)
    if name is None:
        raise DataError(f"{path}: no log format that is known ({', '.join(FORMATS)})")
    sessions = FORMATS[name].read(path, text, digest)
    if not sessions:
        raise DataError(f"{path}: holds no turns")
    return sessions


def read_text(path: Path) -> tuple[str, str]:
    """A file's text and SHA-256; DataError where it cannot be read."""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest()
    except OSError as failed:
        raise DataError(f"cannot read {path}: {failed.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
