"""Token ids of the small vocabulary."""

import torch


def random_ids(n: int, seed: int) -> tuple[int, ...]:
    """`n` token ids of the small vocabulary."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (n,), generator=g).tolist())
