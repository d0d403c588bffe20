"""Window padding cuts and pads the updated text alone."""

import pytest

from baselines.window_padding import pad
from cacheslide.errors import PolicyError
from tests.helpers.prompts import prompt


def test_window_padding_cuts_pads_and_leaves_the_question():
    p = prompt(13, 5)
    for window in (4, 20):
        fitted = pad(p, window)
        assert [len(s.token_ids) for s in fitted.segments] == [6, window, 23, 31, 17, 5]
    assert pad(p, 4).segments[1].token_ids == p.segments[1].token_ids[-4:]
    assert pad(p, 20).segments[1].token_ids[7:] == p.segments[1].token_ids
    with pytest.raises(PolicyError, match="window"):
        pad(p, 0)
