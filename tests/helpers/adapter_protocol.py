"""What every model adapter has."""

import inspect

import torch

from cacheslide.models.adapter import ModelAdapter
from cacheslide.store.persistent.shape import shape_of

MEMBERS = sorted(
    {name for base in ModelAdapter.__mro__ for name in inspect.get_annotations(base)}
    | {name for base in ModelAdapter.__mro__ for name in vars(base) if not name.startswith("_")}
)


def lacking(model) -> list[str]:
    """Members of the protocol that `model` does not have."""
    return [name for name in MEMBERS if not hasattr(model, name)]


def check(model) -> None:
    """An adapter in use: complete, and with the shape of its own chunks."""
    assert lacking(model) == [] and isinstance(model, ModelAdapter)
    hidden = model.embed(torch.tensor([1, 2], device=model.device))
    _, k, _ = model.qkv(0, hidden.clone(), torch.tensor([0, 1], device=model.device))
    assert hidden.shape == (2, model.hidden_size) and k.shape == (2, model.num_kv_heads, model.head_dim)
    shape = shape_of(model, model.dtype)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.hidden) == (
        model.num_layers,
        *k.shape[1:],
        hidden.shape[1],
    )
    assert shape.max_positions == model.max_positions > 1
