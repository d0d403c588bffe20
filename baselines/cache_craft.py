"""Cache-Craft (PIC, SIGMOD '25, arXiv 2502.15734): in-prompt chunks, each recomputed in part by its context impact.

Equation numbers are the paper's. A chunk C_i is cached with its attention in its prompt S_old, by layer:
inter(C_i, C_j), the attention of its tokens to an earlier chunk's (3), and intra(C_i), to its own (4). Then

    a, b    mean over layers of Σ_j inter(C_i, C_j) / (|C_i| |C_j|), and of intra(C_i) / |C_i|²           (9, 10)
    CCI     1 / (1 + exp(-a / b)), the cache's context impact                                             (11)
    β       Σ inter(C_i, C_j) over the chunks C_j of S_old that are also in S_new, over Σ for all C_j     (6)
    γ       Kendall's tau distance of the order of the common chunks, normalised to [0, 1]                (7)
    β'      β (1 - γ)                                                                                     (8)
    CFO     α CCI (1 - β'), the share of the chunk that is recomputed, at most 1                          (12)

and the ⌈CFO |C_i|⌉ tokens of the highest attention to earlier chunks are recomputed (14). α trades quality for work and
is 1 here; the paper chooses it on validation data.

Differences: the paper keeps several variants of a chunk and uses the one of the lowest CFO, here only the first
prompt's variant is kept; in the paper recomputed tokens may leave early and chunks may be loaded layer by layer, here
tokens stay to the last layer. Assumptions: attention is the mean over heads; updated text before a chunk counts as a
chunk of the prefix; if S_old is empty or has no attention, β is 1, since nothing is missing; of two equal texts in a
prefix the first counts for the order. A chunk without notes is recomputed whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.keys import ContentKeying, Keying, content_id
from cacheslide.core.placement import Placement
from cacheslide.core.reused import ReusedTokens
from cacheslide.core.tensors import tensor_of
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.attention_weights import group_weights
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.deviation import check_ratio, top_mask
from cacheslide.policies.encodings import InPrompt
from cacheslide.policies.memory import NoMemory, Notes
from cacheslide.policies.static import StaticCorrection

Parts = list[tuple[int, int, int]]  # first row, end row, and the text as a number


@dataclass(frozen=True)
class AnyPrompt(InPrompt):
    """Encodes a chunk in the prompt it first appears in; other prompts reuse it, corrected by `CacheFix`."""

    name: str = "any_prompt"

    def check(self, keying: Keying) -> None:
        """Any keying is accepted, since the preceding text is recorded in the chunk's notes."""


@dataclass(frozen=True)
class AttentionNotes(NoMemory):
    """Attention of a chunk of n tokens in its prompt, mean over heads and layers.

    Notes, for P texts before the chunk: `token` [n], each token's attention to all of these texts; `inter` [P] and
    `intra` [1], summed over the chunk's tokens; `length` [P] and `id` [P], int64, of the texts.
    """

    name: str = "attention"

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """See `Memory.notes`."""
        where, ids = plan.chunks[number], plan.prompt.token_ids
        before = prefix_parts(ids, [(c.start, c.end) for c in plan.chunks[:number]], where.start)
        weights = attended(model, plan, where.start, where.end, [b - a for a, b, _ in before], prompt())
        inter = weights[:, :-1]
        about = {"length": [b - a for a, b, _ in before], "id": [text for *_, text in before]}
        notes = {"token": inter.sum(1), "inter": inter.sum(0), "intra": weights[:, -1].sum()[None]}
        return notes | {name: torch.tensor(x, dtype=torch.int64) for name, x in about.items()}


def attended(model: Any, plan: Any, start: int, end: int, lengths: Sequence[int], kv: Any) -> Tensor:
    """Mean attention over heads and layers of a prompt's rows [start, end) to the texts before them and to themselves.

    Parameters
    ----------
    lengths : sequence of int
        Lengths of the texts, which fill rows [0, start).
    kv : KVBuffer
        Exact KV of the prompt.

    Returns
    -------
    Tensor [end - start, texts + 1], float32, on the host
    """
    device, count = model.device, len(lengths) + 1
    rows, seen = torch.arange(start, end, device=device), torch.arange(end, device=device)
    groups = torch.repeat_interleave(torch.arange(count), torch.tensor([*lengths, end - start])).to(device)
    positions = tensor_of(plan.positions[start:end]).to(device)
    hidden = model.embed(tensor_of(plan.prompt.token_ids[start:end]).to(device))
    total = torch.zeros((end - start, count), device=device)
    for layer in range(model.num_layers):
        q = model.qkv(layer, hidden, positions)[0]
        weights = group_weights(model, layer, q, kv.read(layer, seen)[0], rows, groups, count)
        total += weights.mean(1) / (model.num_layers * model.ranks)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return model.reduce_scores(total.flatten()).view(total.shape).cpu()


def prefix_parts(ids: Sequence[int], fixed: Sequence[tuple[int, int]], end: int) -> Parts:
    """Rows [0, end) as the texts before a chunk: fixed chunks, and updated text between them."""
    out, at = [], 0
    for start, stop in (*fixed, (end, end)):
        out += [(a, b, content_id(ids[a:b])) for a, b in ((at, start), (start, stop)) if a < b]
        at = stop
    return out


@dataclass(frozen=True)
class CacheFix(StaticCorrection):
    """Recomputes the share CFO of every chunk, or `recompute_ratio` if given: the tokens that attend most to others."""

    alpha: float = 1.0
    recompute_ratio: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise PolicyError(f"alpha must be a number above 0, not {self.alpha}")
        if self.recompute_ratio is not None:
            check_ratio("recompute_ratio", self.recompute_ratio)

    def at_ratio(self, ratio: float) -> "CacheFix":
        """The same order of tokens, with the share `ratio` of every chunk."""
        return replace(self, recompute_ratio=ratio)

    @property
    def total_ratio(self) -> float | None:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        ids = tensor_of(reused.token_ids).tolist()
        runs = [(start, start + n) for start, n in zip(reused.starts, reused.lengths, strict=True)]
        texts = prefix_parts(ids, runs, runs[-1][1] if runs else 0)
        chosen = [torch.zeros(0, dtype=torch.bool)]
        for number, (start, end) in enumerate(runs):
            notes = reused.notes[number] if reused.notes else {}
            if not fits(notes, end - start):
                chosen.append(torch.ones(end - start, dtype=torch.bool))
                continue
            share = self.recompute_ratio
            if share is None:
                share = fix_overhead(notes, [text for _, stop, text in texts if stop <= start], self.alpha)
            count = math.ceil(share * len(notes["token"]) - 1e-6)
            chosen.append(top_mask(notes["token"], count)[: end - start])
        return torch.cat(chosen)


def fits(notes: Mapping[str, Tensor], tokens: int) -> bool:
    """Whether notes have the form of `AttentionNotes`, with at least `tokens` tokens; stored notes are untrusted."""
    if notes.keys() != {"token", "inter", "intra", "length", "id"} or any(x.dim() != 1 for x in notes.values()):
        return False
    real = [notes[name] for name in ("token", "inter", "intra")]
    whole = [notes[name] for name in ("length", "id")]
    if any(not x.is_floating_point() for x in real) or any(x.dtype != torch.int64 for x in whole):
        return False
    counts = len(notes["token"]) >= tokens and len(notes["intra"]) == 1
    real = [x.float() for x in real]  # 8-bit types lack the operations used below
    counts = counts and len(notes["inter"]) == len(notes["length"]) == len(notes["id"])
    return counts and all(bool((x.isfinite() & (x >= 0)).all()) for x in real) and bool((notes["length"] > 0).all())


def context_impact(notes: Mapping[str, Tensor]) -> float:
    """CCI, equations (9) to (11), in [0.5, 1]."""
    n = len(notes["token"])
    outside = float((notes["inter"].double() / notes["length"]).sum()) / n
    inside = float(notes["intra"][0]) / n**2
    return 1 / (1 + math.exp(-outside / inside)) if inside else 1.0 if outside else 0.5


def order_penalty(old: Sequence[int], new: Sequence[int]) -> float:
    """γ, equation (7): the share of pairs of common texts whose order differs."""
    at = {text: place for place, text in reversed(list(enumerate(new)))}
    common = [at[text] for text in dict.fromkeys(old) if text in at]
    pairs = list(combinations(common, 2))
    return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0


def prefix_overlap(notes: Mapping[str, Tensor], new: Sequence[int]) -> float:
    """β', equations (6) to (8), in [0, 1]: 1 if all earlier texts precede the chunk again, in the same order."""
    old, total = notes["id"].tolist(), float(notes["inter"].double().sum())
    kept = float(notes["inter"][torch.isin(notes["id"], torch.tensor(new, dtype=torch.int64))].double().sum())
    beta = kept / total if total else 1.0
    return beta * (1 - order_penalty(old, new))


def fix_overhead(notes: Mapping[str, Tensor], new: Sequence[int], alpha: float) -> float:
    """CFO, equation (12), in [0, 1], after the texts `new`."""
    return min(1.0, alpha * context_impact(notes) * (1 - prefix_overlap(notes, new)))


def policy() -> ReusePolicy:
    """In-prompt chunks with re-rotated keys."""
    return ReusePolicy(
        "cache_craft",
        "Cache-Craft",
        keying=ContentKeying(),
        encoding=AnyPrompt(),
        placement=Placement("delta"),
        correction=CacheFix(),
        memory=AttentionNotes(),
    )
