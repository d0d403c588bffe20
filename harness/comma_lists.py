"""Lists on a command line: values with commas between them."""


def names(text: str) -> list[str]:
    """Strings as they stand."""
    return text.split(",")


def ints(text: str) -> list[int]:
    """Whole numbers; ValueError where one is none."""
    return [int(x) for x in text.split(",")]


def floats(text: str) -> list[float]:
    """Numbers; ValueError where one is none."""
    return [float(x) for x in text.split(",")]
