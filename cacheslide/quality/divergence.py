"""Divergence of a prefill with reused KV from full recompute: next-token distributions over the same targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.errors import PromptError


@dataclass(frozen=True)
class Divergence:
    """One prompt and one run of target tokens, teacher-forced.

    Attributes
    ----------
    tokens : int
        Number of target tokens.
    kl, kl_max : float
        KL(recompute || system) of the next-token distribution, in nats: mean over the targets, and the largest.
    agreement : float
        Share of targets at which both distributions have the same most likely token.
    nll, nll_change : float
        The system's negative log-likelihood of the targets in nats per token, and its excess over recompute's.
    greedy_equal : bool
        Whether the system's most likely token is the target at every position. If the targets are recompute's greedy
        continuation, this is whether greedy decoding gives the same tokens: both decode the same text up to the first
        difference.
    """

    tokens: int
    kl: float
    kl_max: float
    agreement: float
    nll: float
    nll_change: float
    greedy_equal: bool


@torch.inference_mode()
def divergence(recomputed: Tensor, logits: Tensor, targets: Sequence[int]) -> Divergence:
    """Compare two runs on one prompt.

    Parameters
    ----------
    recomputed, logits : Tensor [n, vocab_size]
        Logits that predict each target, of full recompute and of the system; compared in float32.
    targets : sequence of int [n]

    Raises
    ------
    PromptError
        Without targets, if shapes differ, or if logits are not finite.
    """
    if not targets or recomputed.shape != logits.shape or len(targets) != len(logits):
        shapes = f"{tuple(recomputed.shape)} and {tuple(logits.shape)}"
        raise PromptError(f"{len(targets)} targets do not go with logits of {shapes}")
    ids = torch.tensor(list(targets), device=logits.device)[:, None]
    exact, system = recomputed.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (exact.exp() * (exact - system)).sum(-1).clamp_min(0)
    best = logits.argmax(-1)  # of the raw logits, as in decoding: after normalisation two close ones may be equal
    agree = (recomputed.argmax(-1) == best).float()
    nll = -system.gather(1, ids)[:, 0]
    change = nll + exact.gather(1, ids)[:, 0]
    all_equal = (best == ids[:, 0]).all()
    figures = torch.stack((kl.mean(), kl.max(), agree.mean(), nll.mean(), change.mean(), all_equal.float())).tolist()
    if not all(map(math.isfinite, figures)):
        raise PromptError("logits that are not finite have no distribution to compare")
    return Divergence(len(targets), *figures[:5], bool(figures[5]))
