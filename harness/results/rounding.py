"""Numbers of records and tables to the digits that say something."""

from typing import Any

DIGITS = 6  # significant: more is noise in every line, and a third of a table's bytes


def rounded(value: Any) -> Any:
    """`value` with its floats to six significant digits, in dicts and lists too."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value
