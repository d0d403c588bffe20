"""Checked reading of JSON and YAML values from users' files; every defect is a one-line error."""

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category

LARGEST = 2**63 - 1
DEPTH, VALUES = 32, 100_000
SHOWN = 60  # characters of a value in a message


class _Refused(ValueError):
    pass


def _refuse(text: str) -> NoReturn:
    raise _Refused(f"{text} is no number")


def _whole(text: str) -> int:
    if len(text) > 20:
        raise _Refused(f"a number of {len(text)} digits")
    return int(text)


def read_json(path: str | Path, error: type[Exception]) -> Any:
    """The JSON value in a file; raises `error`, in one line, if it cannot be read or parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as failed:
        raise error(f"cannot read {path}: {failed.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not valid JSON: not UTF-8") from None
    try:
        return parse_json(text)
    except ValueError as wrong:
        raise error(f"{path} is not valid JSON: {wrong}") from None


def parse_json(text: str) -> Any:
    """The JSON value in a text; one-line ValueError for invalid JSON, NaN, numbers beyond 20 digits, deep nesting."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(text: str) -> dict[str, Any]:
    """argparse type: the JSON object in an argument; one-line ArgumentTypeError for anything else."""
    try:
        value = parse_json(text)
        check_plain(value, ValueError)
    except ValueError as wrong:
        raise ArgumentTypeError(f"not valid JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"a JSON object is expected, not {text[:SHOWN]!r}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `least`; ArgumentTypeError for anything else."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise ArgumentTypeError(f"an integer of at least {least} is expected, not {text[:SHOWN]!r}")
        return number

    return read


def check_plain(value: Any, error: type[Exception], where: str = "", text: bool = False) -> None:
    """Raise `error`, naming the key, for a value that no setting can have.

    Numbers are finite and fit in 64 bits; keys are strings; strings hold no control characters (unless `text`) and no
    unpaired surrogates; the value is at most `DEPTH` deep and `VALUES` large (YAML's anchors multiply).
    """
    left = VALUES
    stack: list[tuple[str, Any, int]] = [(where, value, 0)]
    while stack:
        at, item, depth = stack.pop()
        left -= 1
        if left < 0 or depth > DEPTH:
            raise error(f"{_name(at)}: {'nested too deeply' if depth > DEPTH else 'too many values'}")
        if isinstance(item, dict):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise error(f"{_name(at)}: keys are names, not {shown(key)}")
                if why := _wrong_text(key, False):
                    raise error(f"{_name(at)}: the key {shown(key)} {why}")
                stack.append((f"{at}.{key}" if at else key, inner, depth + 1))
        elif isinstance(item, list | tuple):
            stack += [(f"{at}.{i}", inner, depth + 1) for i, inner in enumerate(item)]
        elif isinstance(item, str):
            if why := _wrong_text(item, text):
                raise error(f"{_name(at)}: {shown(item)} {why}")
        elif isinstance(item, float) and not math.isfinite(item):
            raise error(f"{_name(at)}: {item} is no number")
        elif isinstance(item, int) and abs(item) > LARGEST:
            raise error(f"{_name(at)}: a number beyond 64 bits")


def shown(value: Any) -> str:
    """A value for a message: one line of ASCII, cut at `SHOWN` characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _name(at: str) -> str:
    return shown(at)[1:-1] if at else "the file"


def _wrong_text(text: str, free: bool) -> str:
    if not free and any(category(c) in ("Cc", "Zl", "Zp") for c in text):
        return "holds a line break or another control character"
    return "holds half of a surrogate pair" if any(0xD800 <= ord(c) <= 0xDFFF for c in text) else ""
