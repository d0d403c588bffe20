"""Placement in plain PyTorch: runs on the CPU, and is the reference of the tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.positions.rope import Rotary


def place_layers(
    k: Tensor, v: Tensor, slots: Tensor, deltas: Tensor | None, caches: Sequence[Tensor], rotary: Rotary
) -> None:
    """See `cacheslide.kernels.placement.api.place_layers`."""
    kept = (slots >= 0).nonzero()[:, 0]
    for keys, values, kv in zip(k, v, caches, strict=True):
        at, index = slots[kept], kept.to(keys.device)
        moved = keys[index].to(kv.device)
        if deltas is not None:
            moved = rotary.rotate(moved, deltas[kept])
        both = torch.cat((moved, values[index].to(kv.device)), dim=-1)
        kv[at // kv.shape[2], :, at % kv.shape[2]] = both.to(kv.dtype)


def row_deviation(fresh: Tensor, cached: Tensor, deltas: Tensor | None, rotary: Rotary) -> Tensor:
    """See `cacheslide.kernels.placement.api.row_deviation`."""
    moved = cached if deltas is None else rotary.rotate(cached, deltas)
    return (fresh.float() - moved.float()).square().sum(dim=(1, 2))
