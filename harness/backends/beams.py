"""Beam search over one prefilled prompt: the prompt's KV is computed once and shared; each beam has its own tail.

A step decodes the last token of every live beam in one packed run (`answering.Branches`). A beam that continues another
one copies its tail rows inside the KV buffer; nothing is computed twice.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.engine import Prefilled
from cacheslide.errors import ConfigError
from cacheslide.models.reference import ReferenceDecoder
from harness.backends.answering import Branches


@dataclass(frozen=True)
class Beam:
    """A continuation without its stop id, and the sum of its tokens' log-probabilities, including the stop's."""

    token_ids: tuple[int, ...]
    logprob: float
    ended: bool

    @property
    def score(self) -> float:
        """Log-probability per token, by which vLLM ranks beams by default."""
        return self.logprob / (len(self.token_ids) + self.ended)


@torch.inference_mode()
def beam_search(
    model: ReferenceDecoder,
    state: Prefilled,
    logits: Tensor,
    width: int,
    max_new_tokens: int,
    stop: frozenset[int],
) -> tuple[list[Beam], list[float]]:
    """The `width` best continuations, best first, and the time of each step's choice (`time.perf_counter`).

    Parameters
    ----------
    state : Prefilled
        With room for `width` x `max_new_tokens` rows, which are overwritten; otherwise unchanged.
    logits : Tensor [vocab_size]
        Logits of the prompt's last row.
    stop : frozenset of int
        A beam ends with the first of these; the search ends when `width` beams have ended.
    """
    if width < 1 or max_new_tokens < 1:
        raise ConfigError(f"beam search needs a width and a length of at least 1, not {width} and {max_new_tokens}")
    branches = Branches(model, state, [max_new_tokens] * width)
    done: list[Beam] = []
    live, times = [Beam((), 0.0, False)], []
    rows = logits[None]
    for step in range(max_new_tokens):
        live, parents, ended = _grow(live, rows, width, stop)
        done += ended
        times.append(time.perf_counter())
        if not live or len(done) >= width or step == max_new_tokens - 1:
            break
        if step:
            branches.follow(parents)
        rows = branches.step(list(range(len(live))), [b.token_ids[-1:] for b in live])
    beams = done if len(done) >= width else [*done, *live]
    return sorted(beams, key=lambda b: -b.score)[:width], times


def _grow(
    live: Sequence[Beam], rows: Tensor, width: int, stop: frozenset[int]
) -> tuple[list[Beam], list[int], list[Beam]]:
    """The `width` best live beams, the parent of each, and the beams that end in this step.

    A beam has one candidate per stop id, so `width` of `width` x (1 + stop ids) candidates continue.
    """
    scores = rows.float().log_softmax(dim=-1) + rows.new_tensor([b.logprob for b in live], dtype=torch.float32)[:, None]
    count = min(scores.numel(), width * (1 + len(stop)))
    values, flat = scores.flatten().topk(count)
    going, parents, ended = [], [], []
    for value, at in zip(values.tolist(), flat.tolist(), strict=True):
        parent, token = divmod(at, scores.shape[1])
        before = live[parent].token_ids
        if token in stop:
            if len(going) + len(ended) < width:  # among the best, as in vLLM
                ended.append(Beam(before, value, True))
        elif len(going) < width:
            going.append(Beam((*before, token), value, False))
            parents.append(parent)
    return going, parents, ended
