"""Systems that remember the deviation of tokens."""

from dataclasses import dataclass, replace

import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import ContentKeying, FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.policies.encodings import ENCODINGS
from cacheslide.policies.static import StaticCorrection
from cacheslide.store import MemoryChunkStore

CHUNK = 16


@dataclass(frozen=True)
class HighestScores(StaticCorrection):
    """A rule of this file's own that reads scores."""

    recompute_ratio: float = 0.25

    @property
    def needs_scores(self) -> bool:
        return True

    def known_before_start(self, reused: ReusedTokens) -> torch.Tensor:
        mask = torch.zeros(reused.count, dtype=torch.bool)
        if reused.scores is not None:
            mask[top_rows(reused.scores, tokens_of_ratio(self.recompute_ratio, reused.count))] = True
        return mask

    def at_ratio(self, ratio: float) -> "HighestScores":
        return replace(self, recompute_ratio=ratio)


def policy_of(encoding: str = "in_prompt", correction=None) -> ReusePolicy:
    keying = ContentKeying() if encoding.startswith("isolated") else FixedChainKeying()
    placement = Placement(slot=16 if encoding.endswith("slot") else 0)
    correction = HighestScores() if correction is None else correction
    return ReusePolicy("remembering", "Remembering", keying, ENCODINGS[encoding], placement, correction)


def chain_policy() -> ReusePolicy:
    """For an entry point: `policy_of` is one as well."""
    return policy_of("fixed_chain")


def engine_of(model, encoding: str = "in_prompt", correction=None, **options) -> ReuseEngine:
    return ReuseEngine(model, policy_of(encoding, correction), MemoryChunkStore(), chunk_size=CHUNK, **options)


@torch.inference_mode()
def spoil(state, layer: int, rows: list[int], worst: float = float("nan")) -> None:
    k, v = state.kv.read(layer, torch.tensor(rows))
    state.kv.write(layer, torch.tensor(rows), torch.full_like(k, worst), torch.full_like(v, worst))
