"""A system that only this file knows: its correction and its encoding run in the reference host and in vLLM."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.prompt import Prompt
from cacheslide.core.reused import ReusedTokens
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies import registry
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.encodings import Encoded
from cacheslide.policies.registry import load_policy, policy_names
from cacheslide.policies.static import StaticCorrection
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt

NAME = "every_other"


@dataclass(frozen=True)
class EveryNth(StaticCorrection):
    """Recompute a share of the reused tokens, evenly spread over all of them."""

    recompute_ratio: float = 0.5

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        rows = reused.count
        count = tokens_of_ratio(self.recompute_ratio, rows)
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[torch.arange(count) * rows // max(count, 1)] = True
        return mask

    @property
    def total_ratio(self) -> float:
        return self.recompute_ratio

    def at_ratio(self, ratio: float) -> "EveryNth":
        return replace(self, recompute_ratio=ratio)


@dataclass(frozen=True)
class BehindTheFirst:
    """Every chunk behind the first fixed one alone."""

    name: str = "behind_the_first"
    in_prompt: bool = False
    at_slot: bool = False
    position_free: bool = False
    separate: bool = False

    def check(self, keying) -> None:
        """The first chunk is part of every key of the chain."""

    def tokens(self, chunks, missing) -> int:
        first = len(chunks[0])
        return sum(len(c) + (first if i else 0) for i, (c, m) in enumerate(zip(chunks, missing, strict=True)) if m)

    def encode(self, encoder, prompt, positions, chunks, keys, missing) -> Iterator[Encoded]:
        ids, first = prompt.token_ids, chunks[0]
        head = ids[first.start : first.end]
        for i, (chunk, new) in enumerate(zip(chunks, missing, strict=True)):
            if new:
                before = head if i else ()
                text = (*before, *ids[chunk.start : chunk.end])
                yield i, encoder.prefill(text, range(len(text))), len(before), len(text)


def make() -> ReusePolicy:
    return ReusePolicy(NAME, "Every other", FixedChainKeying(), BehindTheFirst(), correction=EveryNth())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_own", {NAME: make})


def test_a_registered_system_is_known_by_name():
    assert NAME in policy_names() and load_policy(NAME) == make()
    registry.register("not a policy", lambda: 3)
    with pytest.raises(registry.PolicyError, match="returned int, not a ReusePolicy"):
        load_policy("not a policy")


def prefilled(model: ReferenceDecoder, share: float, turns: Sequence[Prompt], chunk: int):
    engine = ReuseEngine(model, load_policy(NAME).at_ratio(share), MemoryChunkStore(), chunk_size=chunk)
    engine.build(turns[0])
    return engine, engine.prefill(turns[1], room=4)


def test_it_runs_in_the_reference_host(model):
    turns = prompt(9, 3), prompt(14, 5)
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(turns[1])
    _, half = prefilled(model, 0.5, turns, 16)
    receipt = half.receipt
    assert receipt.chunks_hit == receipt.chunks > 3
    assert abs(receipt.tokens_recomputed - receipt.tokens_reused) <= 1
    assert (half.logits - exact.logits).abs().max() > 1e-4
    _, whole = prefilled(model, 1.0, turns, 16)
    torch.testing.assert_close(whole.logits, exact.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
def test_it_is_served_by_vllm(tmp_path):
    pytest.importorskip("vllm")
    from tests.helpers.checkpoints import save_random
    from tests.helpers.served import CHUNK, FIRST, SECOND, SHAPE, Served, receipt, tokens

    save_random(tmp_path, **SHAPE)
    engine, want = prefilled(ReferenceDecoder.from_pretrained(tmp_path), 0.5, (FIRST, SECOND), CHUNK)
    said = engine.generate(want, want.logits, 4, frozenset())
    with closing(Served(tmp_path)) as served:
        served.one(FIRST, policy=NAME)
        served.poison()
        got = served.one(SECOND, policy=NAME, recompute_ratio=0.5)
        assert tokens(got) == said
        for key in ("tokens", "tokens_reused", "tokens_recomputed", "chunks", "chunks_hit", "system"):
            assert receipt(got)[key] == want.receipt.as_dict()[key]
        assert receipt(got)["tokens_reused"] > 0
