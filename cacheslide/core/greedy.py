"""Greedy decoding of several sequences in lockstep."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def greedy(
    logits: Sequence[Tensor] | Tensor,
    most: Sequence[int],
    stop: frozenset[int],
    advance: Callable[[list[int], list[int]], Sequence[Tensor] | Tensor],
    chosen: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue every sequence by its most probable tokens, up to and without the first one in `stop`.

    Parameters
    ----------
    logits : sequence of Tensor [vocab_size], or Tensor [sequences, vocab_size]
        Logits of each sequence's next token.
    most : sequence of int
        Maximum number of tokens of each sequence.
    stop : frozenset of int
    advance : callable
        (sequence numbers, their tokens) -> logits. Appends one token to each of these sequences and returns the logits
        behind it, in that order. The last token of a sequence is not appended.
    chosen : callable, optional
        Called with the numbers of the sequences whose next token, or stop, has just been determined: for timing.

    Returns
    -------
    list of list of int
        The tokens of each sequence.
    """
    out: list[list[int]] = [[] for _ in most]
    active = [i for i, count in enumerate(most) if count > 0]
    if len(active) < len(out):
        logits = [logits[i] for i in active]
    while active:
        tokens = (logits if isinstance(logits, Tensor) else torch.stack(tuple(logits))).argmax(-1).tolist()
        if chosen is not None:
            chosen(active)
        going = []
        for i, token in zip(active, tokens, strict=True):
            if token not in stop:
                out[i].append(token)
                if len(out[i]) < most[i]:
                    going.append(i)
        active = going
        if active:
            logits = advance(active, [out[i][-1] for i in active])
    return out
