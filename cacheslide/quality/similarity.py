"""CKSim, the paper's similarity of reused and recomputed KV (section 3)."""

import torch
from torch import Tensor


def cksim(recomputed: Tensor, reused: Tensor) -> Tensor:
    """Mean over heads of the cosine between recomputed and reused keys.

    Parameters
    ----------
    recomputed, reused : Tensor [..., heads, head_dim]

    Returns
    -------
    Tensor [...], float32, in [-1, 1].
    """
    return torch.nn.functional.cosine_similarity(recomputed.float(), reused.float(), dim=-1).mean(dim=-1)
