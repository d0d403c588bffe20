"""Strict parsing of small JSON objects from files and servers."""

import json
from typing import Any

_DIGITS = 20  # maximum digits of an integer: more than 64 bits need


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} where whole numbers are expected")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def parse_object(raw: bytes, limit: int = 1 << 16) -> dict[str, Any]:
    """The JSON object in `raw`, of at most `limit` bytes; ValueError for anything else.

    Numbers are integers of at most 20 characters; NaN, infinities, fractions and duplicate keys are refused.
    """
    if len(raw) > limit:
        raise ValueError(f"{len(raw)} bytes of JSON where {limit} are the most")
    try:
        value = json.loads(raw, parse_int=_whole, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def is_count(value: Any, least: int = 0, most: int = (1 << 62) - 1) -> bool:
    """Whether `value` is an integer in [least, most]; bool does not count."""
    return type(value) is int and least <= value <= most
