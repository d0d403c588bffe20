"""KVComm (PIC, arXiv 2510.12872): isolated chunks plus a KV offset predicted from earlier prefixes.

In the paper, text that agents share is cached once, without a prefix (its base). Under a prefix its KV differs by an
offset, with keys rotated to the same position. Offsets under earlier prefixes are kept as anchors; the offset under a
new prefix is interpolated from them, weighted by softmax(-distance) of embeddings. Without near anchors (none, or the
entropy of the weights exceeds γ = 0.3 of its maximum) the whole prompt is prefilled, and the resulting offset becomes
an anchor. At most 20 anchors are kept.

Differences: in the paper an agent's prefix is constant and its placeholders change, so that anchors are other texts
under the same prefix. A fixed chunk is one text under changing prefixes, so that its anchors are other prefixes of the
same text, compared by the mean of their input embeddings. Assumptions, since the paper does not cover such anchors: an
anchor counts if the prefix is nearer to it than to the empty prefix, whose offset is 0; a distance is that of the means
times the prefix's tokens, in norms of a token's embedding, since the paper's distances also grow with the text; one
anchor is enough (the authors' code requires two); an anchor of the identical prefix is used alone; the oldest anchor is
evicted, not the least used of the oldest five. There is no partial recomputation, as in the paper.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.keys import ContentKeying, content_id
from cacheslide.core.placement import Placement
from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.memory import NoMemory, Notes

ANCHORS, GAMMA, TEMPERATURE = 20, 0.3, 1.0  # the authors' settings


@dataclass(frozen=True)
class Anchors(NoMemory):
    """Offsets of a chunk's KV from its base, one for each prefix.

    Notes of a chunk with A anchors: `prefix` [A, hidden_size], float32, the prefixes' mean embeddings; `id` [A], int64,
    of their text; `k` and `v` [A * layers, n, kv_heads, head_dim], the offsets, in the chunk's dtype, of keys at the
    chunk's own positions.
    """

    name: str = "anchors"
    most: int = ANCHORS
    gamma: float = GAMMA
    temperature: float = TEMPERATURE
    least: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise PolicyError(f"least must lie in [1, most], not {self.least} of {self.most}")
        if not (0 <= self.gamma <= 1 and self.temperature > 0):
            raise PolicyError("gamma must lie in [0, 1], and temperature above 0")

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """See `Memory.notes`: one anchor, from the prompt the chunk first appears in; none without a prefix."""
        return anchor(model, plan, number, chunk, prompt()) if plan.chunks[number].start else {}

    def learn(self, model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes | None:
        """See `Memory.learn`: the latest `most` anchors, each prefix once."""
        start = plan.chunks[number].start
        if not start:
            return None
        old = chunk.notes if fits(chunk, model.hidden_size) else {}
        if old and bool((old["id"] == content_id(plan.prompt.token_ids[:start])).any()):
            return None
        new, keep = anchor(model, plan, number, chunk, kv), self.most - 1
        return new if not old else {name: torch.cat((last(old, name, keep), x)) for name, x in new.items()}

    def recall(self, model: Any, plan: Any, found: Any) -> tuple[Any, str]:
        """See `Memory.recall`: every chunk with its predicted offset, or none of them."""
        pieces = []
        for piece, span in zip(found.pieces, found.spans, strict=True):
            before = plan.prompt.token_ids[: span.start]
            weights = self.weights(model, piece.chunk, before) if before else torch.ones(0)
            if weights is None:
                return replace(found, pieces=[], spans=[]), "no anchors are near enough to the text before a chunk"
            pieces.append(replace(piece, chunk=shifted(piece.chunk, weights)))
        return replace(found, pieces=pieces), ""

    def weights(self, model: Any, chunk: Any, before: tuple[int, ...]) -> Tensor | None:
        """Weights [A] of a chunk's anchors after the text `before`, float32; None if no anchors are near enough."""
        if not fits(chunk, model.hidden_size):
            return None
        notes = chunk.notes
        same = (notes["id"] == content_id(before)).float()
        if bool(same.any()):
            return same / same.sum()
        embedded = embeddings(model, before)
        here, token = embedded.mean(0), embedded.norm(dim=1).mean().clamp_min(1e-12)
        apart = (notes["prefix"].to(here) - here).norm(dim=1)
        near, distance = apart < here.norm(), len(before) * apart / token
        count = int(near.sum())
        if count < self.least:
            return None
        weights = (-distance / self.temperature).masked_fill(~near, -math.inf).softmax(0)
        entropy = -torch.special.xlogy(weights, weights).sum()
        return None if float(entropy) > self.gamma * math.log(count) + 1e-6 else weights.cpu()


def embeddings(model: Any, token_ids: tuple[int, ...]) -> Tensor:
    """Input embeddings of a text of n tokens, float32 [n, hidden_size]."""
    return model.embed(torch.tensor(token_ids, device=model.device)).float()


def anchor(model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes:
    """One anchor: the text before the plan's chunk `number`, and the offset of its KV in `kv` from its base `chunk`."""
    where = plan.chunks[number]
    rows = torch.arange(where.start, where.end, device=model.device)
    back = (chunk.positions - torch.tensor(plan.positions[where.start : where.end])).to(model.device)
    offsets: dict[str, list[Tensor]] = {"k": [], "v": []}
    for layer in range(model.num_layers):
        k, v = kv.read(layer, rows)
        k = model.rotaries[layer].rotate(k.float(), back) if model.rotates else k
        for name, there, base in (("k", k, chunk.k), ("v", v, chunk.v)):
            offsets[name].append((there.float() - base[layer].to(there.device).float()).to(base.dtype).cpu())
    before = plan.prompt.token_ids[: where.start]
    about = {"prefix": embeddings(model, before).mean(0)[None].cpu(), "id": torch.tensor([content_id(before)])}
    return about | {name: torch.stack(x) for name, x in offsets.items()}


def last(notes: Notes, name: str, count: int) -> Tensor:
    """The part of the note `name` that belongs to the latest `count` anchors."""
    return notes[name][max(0, len(notes["id"]) - count) * (len(notes[name]) // len(notes["id"])) :]


def shifted(chunk: Any, weights: Tensor) -> Any:
    """A copy of the chunk plus the weighted sum of its anchors' offsets; weights [A], float32."""
    if not len(weights):
        return chunk
    parts = {}
    for name in "kv":
        base, offsets = getattr(chunk, name), chunk.notes[name].float()
        added = torch.einsum("a,alnhd->lnhd", weights, offsets.unflatten(0, (len(weights), -1)))
        parts[name] = (base.float() + added.to(base.device)).to(base.dtype)
    return replace(chunk, **parts)


def fits(chunk: Any, width: int) -> bool:
    """Whether a chunk's notes have the form of `Anchors`, of embedding size `width`; stored notes are untrusted."""
    notes = chunk.notes
    if notes.keys() != {"prefix", "id", "k", "v"} or notes["id"].dim() != 1 or notes["prefix"].dim() != 2:
        return False
    if notes["id"].dtype != torch.int64 or not all(notes[n].is_floating_point() for n in ("prefix", "k", "v")):
        return False
    count, layers, shape = len(notes["id"]), len(chunk.k), chunk.k.shape[1:]
    offsets = all(notes[n].shape == (count * layers, *shape) and bool(notes[n].float().isfinite().all()) for n in "kv")
    return (
        count > 0
        and offsets
        and notes["prefix"].shape == (count, width)
        and bool(notes["prefix"].float().isfinite().all())
    )


def policy() -> ReusePolicy:
    """Re-rotated keys with their predicted offsets."""
    return ReusePolicy(
        "kvcomm",
        "KVComm",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        memory=Anchors(),
    )
