"""Attention weights, read from the output of the model's own attention.

Scale, windows and positions are therefore the model's. If the value vectors are 1 in column c for the keys of group c
and 0 elsewhere, column c of the attention output is that group's weight; one call covers head_dim groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cacheslide.models.adapter import RowGroup


@dataclass
class OneLayerKV:
    """KV of one layer, as plain tensors [rows, kv_heads, head_dim], for attention outside of a request's KV."""

    layer: int
    keys: Tensor
    values: Tensor
    slots: None = None  # no updated slots for a CoPE model
    k: Mapping[int, Tensor] = field(init=False)
    v: Mapping[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.k, self.v = {self.layer: self.keys}, {self.layer: self.values}


def group_weights(model: Any, layer: int, q: Tensor, keys: Tensor, rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Attention weight of each group of keys, float32 [n, heads, count], for each query and head of this rank.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    keys : Tensor [keys, kv_heads, head_dim]
        Row j of the prompt at index j.
    rows : Tensor [n]
        Rows of the queries, ascending.
    groups : Tensor [keys], int64
        Group of each key; a key with a number outside [0, count) is in no group.
    """
    total, heads, dim = keys.shape
    parts = [q.new_empty((*q.shape[:2], 0), dtype=torch.float32)]
    for first in range(0, count, dim):
        width = min(dim, count - first)
        values = groups[:, None] == torch.arange(first, first + dim, device=keys.device)
        values = values.to(keys.dtype)[:, None].expand(total, heads, dim).contiguous()
        attended = model.attend(layer, q, [RowGroup(OneLayerKV(layer, keys, values), rows)])
        parts.append(attended[..., :width].float())
    return torch.cat(parts, dim=-1)


def weights_of(model: Any, layer: int, q: Tensor, keys: Tensor, rows: Tensor, share_of: Tensor | None = None) -> Tensor:
    """Attention weights of each key, float32 [keys], summed over the queries and over the heads of this rank.

    Parameters
    ----------
    q, keys, rows
        As in `group_weights`.
    share_of : Tensor [keys], bool, optional
        Each query's and head's weights are first divided by their sum over these keys, as if softmax ran over them
        alone; where that sum is 0 they count as 0.
    """
    total, _, dim = keys.shape
    each, scale = torch.arange(total, device=keys.device), 1.0
    if share_of is not None:
        within = group_weights(model, layer, q, keys, rows, (~share_of).long(), 1)
        scale = torch.where(within > 0, 1 / within, 0.0)
    out = torch.empty(0, device=keys.device)
    for first in range(0, total, dim):
        some = group_weights(model, layer, q, keys, rows, each - first, min(dim, total - first))
        out = torch.cat((out, (some * scale).sum(dim=(0, 1))))
    return out
