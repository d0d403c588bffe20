"""Answers several questions behind one prefilled context in one packed decode.

Each question and its answer is a branch: it sees the context and itself, never the other branches. That gives what
asking them one by one gives (tested), for the price of one. Beam search branches the same way (`beams.py`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.core.engine import Prefilled
from cacheslide.core.greedy import greedy
from cacheslide.errors import PromptError
from cacheslide.models.reference import ReferenceLlama


def branch_room(questions: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Rows that `answer_branches` needs behind the context."""
    return sum(len(q) + max_new_tokens for q in questions)


@torch.inference_mode()
def answer_branches(
    model: ReferenceLlama,
    state: Prefilled,
    questions: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
) -> list[list[int]]:
    """Greedy answers, one per question, each up to and without its first stop id; `state` is left as it was.

    The rows behind `state.length` in its KV buffer are overwritten.
    """
    branches = Branches(model, state, [len(q) + max_new_tokens for q in questions])
    logits = branches.step(range(len(questions)), questions)
    each = [max_new_tokens] * len(questions)
    return greedy(logits, each, stop, lambda running, tokens: branches.step(running, [[t] for t in tokens]))


class Branches:
    """The tail of a KV buffer behind `state.length`, divided among branches of `rows` rows each."""

    def __init__(self, model: ReferenceLlama, state: Prefilled, rows: Sequence[int]) -> None:
        self.model, self.kv, self.context = model, state.kv, state.length
        sizes = torch.tensor(rows)
        self.starts = (sizes.cumsum(0) - sizes).tolist()
        self.used = [0] * len(rows)
        self.position = state.next_position
        self.end = state.length + int(sizes.sum())
        self.owner = torch.repeat_interleave(torch.arange(len(rows)), sizes).to(model.device)
        # Masked keys still enter the weighted sum with weight 0, which does not swallow an unwritten row's NaN.
        self.kv.k[:, self.context : self.end] = 0
        self.kv.v[:, self.context : self.end] = 0

    def follow(self, parents: Sequence[int]) -> None:
        """Branch i goes on from branch `parents[i]`, whose rows it takes over; all have used equally many."""
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
        visible = self._visible(tail)
        hidden = model.embed(torch.tensor([t for ids in tokens for t in ids], device=device))
        for layer in range(model.num_layers):
            q, k, v = model.qkv(layer, hidden, where)
            self.kv.write(layer, tail + self.context, k, v)
            hidden = model.finish(layer, hidden, self._attend(layer, q, visible))
        return model.logits(hidden[lasts])

    def _visible(self, tail: Tensor) -> Tensor:
        """Bool [rows, end]: the context, and the row's own branch up to itself."""
        own = (self.owner[tail][:, None] == self.owner) & (
            torch.arange(len(self.owner), device=tail.device) <= tail[:, None]
        )
        return torch.cat((own.new_ones(len(tail), self.context), own), dim=1)

    def _attend(self, layer: int, q: Tensor, visible: Tensor) -> Tensor:
        k, v = (t[layer, : self.end].transpose(0, 1)[None] for t in (self.kv.k, self.kv.v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, visible, enable_gqa=grouped)[0].transpose(
            0, 1
        )
