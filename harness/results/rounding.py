"""Numbers of records and tables to the digits that say something."""

from typing import Any

DIGITS = 6  # significant: more is noise in every line, and a third of a table's bytes


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """`value` with its floats to `digits` significant digits, in dicts and lists too."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return value
