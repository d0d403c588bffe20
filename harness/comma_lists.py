"""Comma-separated lists on a command line."""


def names(text: str) -> list[str]:
    """The values as strings."""
    return text.split(",")


def ints(text: str) -> list[int]:
    """The values as integers; ValueError if one is not an integer."""
    return [int(x) for x in text.split(",")]


def floats(text: str) -> list[float]:
    """The values as floats; ValueError if one is not a number."""
    return [float(x) for x in text.split(",")]
