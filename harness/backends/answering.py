"""Answers several questions behind one prefilled context in one packed decode.

Each question with its answer is a branch: it attends to the context and to itself, not to other branches. The answers
equal those of single requests (tested), with one prefill. Beam search uses the same branches (`beams.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.engine import Prefilled
from cacheslide.core.greedy import greedy
from cacheslide.errors import PromptError
from cacheslide.kernels.row_attention.reference import masked_attention
from cacheslide.models.reference import ReferenceDecoder


def branch_room(questions: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Rows that `answer_branches` needs behind the context."""
    return sum(len(q) + max_new_tokens for q in questions)


@torch.inference_mode()
def answer_branches(
    model: ReferenceDecoder,
    state: Prefilled,
    questions: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
) -> list[list[int]]:
    """Greedy answers, one per question, each up to and without its first stop id; `state` is unchanged.

    Overwrites the rows behind `state.length` in its KV buffer.
    """
    branches = Branches(model, state, [len(q) + max_new_tokens for q in questions])
    logits = branches.step(range(len(questions)), questions)
    each = [max_new_tokens] * len(questions)
    return greedy(logits, each, stop, lambda running, tokens: branches.step(running, [[t] for t in tokens]))


class Branches:
    """The tail of a KV buffer behind `state.length`, divided among branches of `rows` rows each."""

    def __init__(self, model: ReferenceDecoder, state: Prefilled, rows: Sequence[int]) -> None:
        self.model, self.kv, self.context = model, state.kv, state.length
        sizes = torch.tensor(rows)
        self.starts = (sizes.cumsum(0) - sizes).tolist()
        self.used = [0] * len(rows)
        self.position = state.next_position
        self.end = state.length + int(sizes.sum())
        self.owner = torch.repeat_interleave(torch.arange(len(rows)), sizes).to(model.device)
        self.begins = torch.tensor(self.starts, device=model.device)
        # Masked keys still enter the weighted sum with weight 0, and 0 * NaN of an unwritten row is NaN.
        self.kv.k[:, self.context : self.end] = 0
        self.kv.v[:, self.context : self.end] = 0

    def follow(self, parents: Sequence[int]) -> None:
        """Branch i continues branch `parents[i]`, whose rows are copied; all have used equally many."""
        used = self.used[parents[0]]
        if any(self.used[p] != used for p in parents):
            raise PromptError("branches follow only branches of one length")
        span = torch.arange(used, device=self.model.device) + self.context
        old = torch.cat([span + self.starts[p] for p in parents])
        new = torch.cat([span + self.starts[i] for i in range(len(parents))])
        for part in (self.kv.k, self.kv.v):
            part[:, new] = part[:, old]
        self.used[: len(parents)] = [used] * len(parents)

    def step(self, branches: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append `tokens[i]` to branch `branches[i]`; returns each one's next logits [branches, vocab_size]."""
        model, offsets, positions, lasts = self.model, [], [], []
        for branch, ids in zip(branches, tokens, strict=True):
            first = self.used[branch]
            offsets += range(self.starts[branch] + first, self.starts[branch] + first + len(ids))
            positions += range(self.position + first, self.position + first + len(ids))
            self.used[branch] += len(ids)
            lasts.append(len(offsets) - 1)
        device = model.device
        tail, where = torch.tensor(offsets, device=device), torch.tensor(positions, device=device)
        # The keys read by layers with and without a window, and those of them visible to each row.
        seen = {window: self._visible(tail, window) for window in set(model.config.windows)}
        hidden = model.embed(torch.tensor([t for ids in tokens for t in ids], device=device))
        for layer, window in enumerate(model.config.windows):
            q, k, v = model.qkv(layer, hidden, where)
            self.kv.write(layer, tail + self.context, k, v)
            span, mask = seen[window]
            keys, values = self.kv.k[layer, span], self.kv.v[layer, span]
            hidden = model.finish(layer, hidden, masked_attention(q, keys, values, mask, model.config.attention_scale))
        return model.logits(hidden[lasts])

    def _visible(self, tail: Tensor, window: int | None) -> tuple[slice, Tensor]:
        """A span of rows, and which of them each tail row attends to, bool [rows, span].

        These are the context and the row's own branch up to itself; with a window the last `window` of them, as if
        every branch followed the context directly.
        """
        first = 0 if window is None else max(0, self.context + 1 - window)
        places = torch.arange(len(self.owner), device=tail.device)
        mask = (self.owner[tail][:, None] == self.owner) & (places <= tail[:, None])
        mask = torch.cat((mask.new_ones(len(tail), self.context - first), mask), dim=1)
        if window is not None:
            depth = places - self.begins[self.owner]  # depth in its branch
            at = torch.cat((torch.arange(first, self.context, device=tail.device), self.context + depth))
            mask &= at > (self.context + depth[tail])[:, None] - window
        return slice(first, self.end), mask
