"""Attention weights read through a model's attention, against softmax written out."""

import pytest
import torch

from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.attention_weights import group_weights, weights_of
from tests.helpers.families import save_family

FAMILIES = ["llama", "gemma3-one-kv-head", "qwen3-windows"]


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tmp_path_factory) -> ReferenceDecoder:
    return ReferenceDecoder.from_pretrained(save_family(tmp_path_factory.mktemp("model"), request.param))


def made(decoder, count: int, rows: list[int]):
    torch.manual_seed(0)
    q = torch.randn(len(rows), decoder.config.num_heads, decoder.head_dim)
    return q, torch.randn(count, decoder.num_kv_heads, decoder.head_dim), torch.tensor(rows)


def plain(decoder, layer, q, keys, rows):
    """Weights [heads, n, keys]."""
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, keys) * (decoder.config.attention_scale or decoder.head_dim**-0.5)
    apart = rows[:, None] - torch.arange(len(keys))
    window = decoder.config.windows[layer] or len(keys)
    return logits.masked_fill((apart < 0) | (apart >= window), float("-inf")).softmax(-1)


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("rows", [[40, 41, 42], [3, 17, 42], [42]])
def test_weights_of_groups_and_of_keys(decoder, layer, rows):
    q, keys, where = made(decoder, 43, rows)
    want = plain(decoder, layer, q, keys, where)
    groups = torch.arange(43) % 9 - 1  # a group of no number, too
    got = group_weights(decoder, layer, q, keys, where, groups, 8)
    for group in range(8):
        torch.testing.assert_close(got[..., group], want[..., groups == group].sum(-1).T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights_of(decoder, layer, q, keys, where), want.sum((0, 1)), atol=1e-5, rtol=1e-4)
    some = torch.arange(43) < 30
    share = want * some / (want * some).sum(-1, keepdim=True).clamp_min(1e-30)
    got = weights_of(decoder, layer, q, keys, where, some)
    torch.testing.assert_close(got[some], share.sum((0, 1))[some], atol=1e-4, rtol=1e-3)


def test_more_groups_than_head_dim_take_more_calls(model):
    count = 3 * model.head_dim + 1
    q, keys, rows = made(model, count, [count - 2, count - 1])
    got = group_weights(model, 0, q, keys, rows, torch.arange(count), count)
    torch.testing.assert_close(got, plain(model, 0, q, keys, rows).transpose(0, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, q.shape[1]), atol=1e-5, rtol=1e-5)
