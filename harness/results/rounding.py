"""Rounds numbers of records and tables to significant digits."""

from typing import Any

DIGITS = 6  # significant: further ones are noise, and a third of a table's bytes


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """`value` with its floats rounded to `digits` significant digits, also inside dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return value
