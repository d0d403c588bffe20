"""The prompt model, and which chunks each keying calls the same."""

import pytest

from cacheslide.core.keys import CacheIdentity, ContentKeying, FixedChainKeying, NoKeying, PrefixKeying, chunk_keys
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PromptError

ME = CacheIdentity("m", "float32")


def make(updated=(9, 9), a=(1, 2, 3, 4, 5), b=(6, 7, 8)) -> Prompt:
    return Prompt((Segment(a, Role.REUSE), Segment(updated, Role.RECOMPUTE), Segment(b, Role.REUSE)))


def keys(keying, prompt, size=3, encoding="e", slot=0, identity=ME):
    positions = Placement("stored", slot).positions(prompt)
    return chunk_keys(keying, encoding, identity, prompt, prompt.chunks(size), positions)


def test_chunks_are_cut_from_each_segments_start():
    assert [(c.segment, c.start, c.end) for c in make().chunks(3)] == [(0, 0, 3), (0, 3, 5), (2, 7, 10)]
    assert make().reusable_share() == 0.8


def test_spans_become_segments_with_updated_gaps():
    p = Prompt.from_spans(range(10), [(6, 8), (0, 2)])
    assert [(s.role.value, s.token_ids) for s in p.segments] == [
        ("reuse", (0, 1)),
        ("recompute", (2, 3, 4, 5)),
        ("reuse", (6, 7)),
        ("recompute", (8, 9)),
    ]


@pytest.mark.parametrize(
    ("spans", "said"),
    [([(0, 3), (2, 5)], "overlaps"), ([(3, 3)], "empty"), ([(8, 11)], "outside"), ([(-1, 2)], "outside")],
)
def test_bad_spans_are_refused(spans, said):
    with pytest.raises(PromptError, match=said):
        Prompt.from_spans(range(10), spans)


@pytest.mark.parametrize("ids", [(-1,), (1.5,), ("a",), (True,)])
def test_bad_ids_are_refused(ids):
    with pytest.raises(PromptError, match="integers"):
        Segment(ids, Role.REUSE)


def test_empty_prompt_and_role():
    with pytest.raises(PromptError, match="empty"):
        Prompt((Segment((), Role.REUSE),))
    with pytest.raises(PromptError, match="role"):
        Segment((1,), "maybe")
    with pytest.raises(PromptError, match="chunk_size"):
        make().chunks(0)


def test_a_longer_update_breaks_prefix_keys_only():
    before, after = make((9, 9)), make((9, 9, 9))
    assert keys(NoKeying(), before) == []
    prefix = [a == b for a, b in zip(keys(PrefixKeying(), before), keys(PrefixKeying(), after), strict=True)]
    assert prefix == [True, True, False]
    for keying in (ContentKeying(), FixedChainKeying()):
        assert keys(keying, before) == keys(keying, after)


def test_a_changed_earlier_chunk_breaks_the_chain_but_not_content():
    before, after = make(), make(a=(1, 2, 3, 4, 6))
    content = [a == b for a, b in zip(keys(ContentKeying(), before), keys(ContentKeying(), after), strict=True)]
    chain = [a == b for a, b in zip(keys(FixedChainKeying(), before), keys(FixedChainKeying(), after), strict=True)]
    assert (content, chain) == ([True, False, True], [True, False, False])


def test_appending_keeps_old_chain_keys():
    before, after = make(), make(b=(6, 7, 8, 1, 2, 3, 4))
    assert keys(FixedChainKeying(), after)[:3] == keys(FixedChainKeying(), before)


def test_slots_hold_positions_until_outgrown():
    near, same, far = (keys(ContentKeying(True), make((9,) * n), slot=4) for n in (2, 4, 5))
    assert near == same
    assert [a == b for a, b in zip(near, far, strict=True)] == [True, True, False]
    assert Placement("stored", 4).positions(make((9,) * 5))[10] == 13


def test_keys_cover_model_dtype_tenant_and_encoding():
    p = make()
    variants = [
        keys(ContentKeying(), p),
        keys(ContentKeying(), p, encoding="f"),
        keys(FixedChainKeying(), p),
        *(keys(ContentKeying(), p, identity=i) for i in (CacheIdentity("n", "float32"), CacheIdentity("m", "bf16"))),
        keys(ContentKeying(), p, identity=CacheIdentity("m", "float32", namespace="tenant")),
        keys(ContentKeying(), p, identity=CacheIdentity("m", "float32", adapter="lora")),
    ]
    flat = [k for v in variants for k in v]
    assert len(set(flat)) == len(flat)
