"""The relevance proxy: rare shared tokens count, common ones do not."""

import math

import pytest

from harness.rag.proxy import TokenOverlap


def test_rare_tokens_weigh_more_and_common_ones_nothing():
    proxy = TokenOverlap([[1, 2, 3, 3], [1, 2, 4], [1, 5]])
    assert proxy.scores([3]) == pytest.approx([math.log(3), 0, 0])
    assert proxy.scores([2, 2, 5]) == pytest.approx([math.log(1.5), math.log(1.5), math.log(3)])
    assert proxy.scores([1, 99]) == proxy.scores([]) == [0, 0, 0]
