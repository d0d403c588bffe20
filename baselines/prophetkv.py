"""ProphetKV (PIC, arXiv 2602.02579): isolated chunks; the tokens that the user's query attends to are recomputed.

The paper has two stages. The query's tokens alone pass all layers over the cached chunks, re-rotated to their
positions; every layer yields an attention weight for each context token, the layers' weights are fused, and the tokens
of the highest 20 % (the paper's ratio) are recomputed from layer 0 together with the query.

Taken from public implementations, the only source of the paper's Algorithm 1 that was available: softmax runs over the
context's keys only, a layer's weights are the mean over the query's tokens and heads, and layers count equally (their
sum). Differences: the query is all of the updated text after the last fixed text; other updated text has no KV in the
first stage and is not attended to; a ratio rounds half up. A request without a query (in vLLM, requests end with the
last cached chunk) recomputes its first tokens (`QuestionRule`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.attention_weights import weights_of
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.question_aware import QuestionRule, asking

SHARE = 0.20  # the paper's setting


@dataclass(frozen=True)
class QueryDriven(QuestionRule):
    """`QuestionRule` by the query's attention in all layers."""

    recompute_ratio: float = SHARE

    def mass(self, request: Any, model: Any, n: int) -> Tensor:
        """See `QuestionRule.mass`: softmax over context keys, mean over query and heads, summed over layers."""
        total = torch.zeros(len(request.reused), device=request.token_ids.device)
        for layer, q, keys, rows in asking(request, model, model.num_layers, n):
            context = torch.arange(len(keys), device=keys.device) < len(keys) - n
            weights = weights_of(model, layer, q, keys, rows, context) / (n * q.shape[1] * model.ranks)
            total += weights[request.start : len(keys) - n]
        return model.reduce_scores(total)

    def passes(self, layers: int) -> int:
        """See `QuestionRule.passes`."""
        return layers


def policy() -> ReusePolicy:
    """Cached keys are re-rotated to their new positions."""
    return ReusePolicy(
        "prophetkv",
        "ProphetKV",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=QueryDriven(),
    )
