"""What fits a budget, and bytes as tokens."""

import pytest

from harness.rag.token_budget import TokenBudgetCalculator, fitting
from tests.helpers.made_passages import gemma
from tests.helpers.rag import manager, prompts

pytestmark = pytest.mark.slow


def test_bytes_of_a_token_are_those_of_a_stored_chunk():
    calculator, made, sample = TokenBudgetCalculator.of(gemma().model), manager(), prompts()
    made.encode([sample.passages[0]], "device")
    n = len(sample.passages[0].token_ids)
    assert calculator.bytes_of(n) == made.device.nbytes - 8 * n  # positions aside
    assert calculator.tokens_in(calculator.bytes_of(7)) == 7 == calculator.tokens_in(calculator.bytes_of(8) - 1)


def test_passages_fit_in_their_order_and_up_to_the_budget():
    sample, ranked = prompts(), [3, 1, 0, 2, 5, 4]
    lengths = [len(sample.prompt(ranked[:n])) for n in range(7)]
    assert [sample.length(ranked[:n]) for n in range(7)] == lengths
    for n, length in enumerate(lengths):
        assert fitting(sample, ranked, length) == ranked[:n]
        assert fitting(sample, ranked, length - 1) == ranked[: max(0, n - 1)]
