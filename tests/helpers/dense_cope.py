"""A dense forward of a CoPE model."""

import torch

from cacheslide.models.adapter import RowGroup


def dense(model, prompt, slots=None):
    """Hidden states of every layer and the KV buffer of a plain forward."""
    ids = torch.tensor(prompt if isinstance(prompt, tuple) else prompt.token_ids)
    rows, kv = torch.arange(len(ids)), model.new_kv(len(ids))
    if slots:
        model.describe(kv, slots)
    hidden = [model.embed(ids)]
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden[-1], rows)
        kv.write(layer, rows, k, v)
        hidden.append(model.finish(layer, hidden[-1].clone(), model.attend(layer, q, [RowGroup(kv, rows)])))
    return hidden, kv
