"""Every adapter has every member of the protocol, and what it says of itself is what its KV looks like."""

import inspect

import pytest
import torch

from cacheslide.models.adapter import ModelAdapter
from cacheslide.store.persistent.shape import shape_of
from cacheslide.training.load import load_cope
from tests.conftest import save_random_adapter

MEMBERS = sorted(
    {name for base in ModelAdapter.__mro__ for name in inspect.get_annotations(base)}
    | {name for base in ModelAdapter.__mro__ for name in vars(base) if not name.startswith("_")}
)


def lacking(model) -> list[str]:
    """Members of the protocol that `model` does not have."""
    return [name for name in MEMBERS if not hasattr(model, name)]


def test_the_members_are_those_that_the_engine_asks_for():
    steps = {"embed", "qkv", "write", "attend", "finish", "logits", "reduce_scores", "new_kv", "describe"}
    facts = {"num_layers", "ranks", "model_id", "dtype", "device", "num_kv_heads", "head_dim", "hidden_size"}
    assert set(MEMBERS) == steps | facts | {"max_positions", "rotaries", "rotates"}
    assert lacking(object()) == MEMBERS


@pytest.mark.parametrize("kind", ["reference", "cope"])
def test_reference_adapters_are_complete(kind, model, checkpoint, tmp_path):
    if kind == "cope":
        save_random_adapter(tmp_path, checkpoint)
        model = load_cope(checkpoint, tmp_path, live=True)
    check(model)
    kv = model.new_kv(3)
    keys = torch.ones(2, model.num_kv_heads, model.head_dim, dtype=model.dtype)
    kv.write(0, torch.tensor([0, 2]), keys, keys)
    turned = model.rotaries[0].rotate(keys, torch.tensor([1, 2]))
    assert torch.equal(turned, keys) is not model.rotates, "rotates says whether moving a key changes it"


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
