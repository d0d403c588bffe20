"""The rule of what is retained of a served request, as a table."""

import pytest

from cacheslide.core.retention import generation_of_copy
from cacheslide.policies.registry import load_policy

ANEW = None  # only an exact encoding may be retained


@pytest.mark.parametrize(
    ("system", "exact", "oldest", "limit", "in_place", "generation"),
    [
        ("naive_reuse", True, 0, 0, True, 0),  # the prompt's own exact prefill
        ("naive_reuse", True, 3, 0, True, 0),  # what it might have reused does not count
        ("naive_reuse", False, 0, 0, True, ANEW),  # built on reused rows, and nothing corrected may be retained
        ("naive_reuse", False, 0, 1, True, 1),
        ("naive_reuse", False, 1, 2, True, 2),
        ("naive_reuse", False, 2, 2, True, ANEW),  # too far from exact
        ("naive_reuse", True, 0, 9, False, ANEW),  # the KV is another prompt's, or lies at other positions
        ("context_cache", False, 0, 0, True, 0),  # a prefix decides its KV alone: reuse corrected nothing
        ("context_cache", False, 0, 0, False, ANEW),
        ("cacheslide", True, 0, 9, True, ANEW),  # encoded in the chain of fixed chunks, not in the prompt
        ("cacheslide_first_turn", False, 0, 1, True, 1),
        ("epic", True, 0, 9, True, ANEW),  # encoded alone
        ("recompute", True, 0, 0, True, 0),
    ],
)
def test_what_is_retained_and_at_which_generation(system, exact, oldest, limit, in_place, generation):
    policy = load_policy(system)
    assert generation_of_copy(policy, exact=exact, oldest=oldest, limit=limit, in_place=in_place) == generation


def test_chunks_that_need_layer_inputs_are_never_copied():
    from dataclasses import replace

    from cacheslide.policies.encodings import InPrompt

    policy = replace(load_policy("cacheslide_promote"), encoding=InPrompt())
    assert policy.probe_layers and not policy.copyable
    assert generation_of_copy(policy, exact=True, oldest=0, limit=9, in_place=True) is None
