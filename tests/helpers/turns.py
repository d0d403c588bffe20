"""A turn of an agent served by an engine."""

from cacheslide import Prompt
from tests.helpers.prompts import prompt


def turn(i: int) -> Prompt:
    """Turn `i` of a growing history: the updated segment changes its length, one more fixed segment each turn."""
    return prompt(5 + 3 * i, 100 + i, fixed=(23, 17, 19, 21, 18, 20)[: 1 + i])
