"""Numbers as the report prints them."""

import math
from collections.abc import Callable
from typing import Any


def number(x: float | None, digits: int = 2) -> str:
    """A plain number with a true minus sign; a dash when there is none."""
    if x is None:
        return "–"
    shown = f"{x:.{digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown.replace("-", "−")


def significant(x: float | None, digits: int = 3) -> str:
    """A number over many orders of magnitude, to `digits` significant digits."""
    if x is None or x == 0:
        return number(x, 0)
    return number(x, max(0, digits - 1 - math.floor(math.log10(abs(x)))))


def percent(x: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "–" if x is None else f"{number(100 * x, digits)} %"


def interval(estimate: dict[str, Any] | None, form: Callable[[float], str] = number) -> str:
    """The 95 % interval in brackets, or the reason for its absence."""
    if estimate is None:
        return ""
    if estimate["low"] is None or estimate["high"] is None:
        return "[no interval]"
    return f"[{form(estimate['low'])}, {form(estimate['high'])}]"


def cell(estimate: dict[str, Any] | None, digits: int = 3, scale: float = 1.0) -> str:
    """Value and interval for a table."""
    if estimate is None or estimate["value"] is None:
        return "–"

    def form(x: float) -> str:
        return number(x * scale, digits)

    return f"{form(estimate['value'])} {interval(estimate, form)}"


def prompts(estimate: dict[str, Any]) -> str:
    """Number of prompts of an estimate, in words."""
    return f"n = {estimate['n']} prompts"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def points(x: float) -> str:
    """A loss or a gain in points."""
    return f"loses {number(x, 1)} points" if x >= 0 else f"gains {number(-x, 1)} points"
