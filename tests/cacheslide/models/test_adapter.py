"""Every adapter has every member of the protocol, and what it says of itself is what its KV looks like."""

import pytest
import torch

from cacheslide.training.load import load_cope
from tests.helpers.adapter_protocol import MEMBERS, check, lacking
from tests.helpers.checkpoints import save_random_adapter


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
