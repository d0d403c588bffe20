"""Plain placement against delta rotation, and what it refuses."""

import pytest
import torch

from cacheslide.kernels import api as kernels
from cacheslide.positions.rope import Rotary, inverse_frequencies
from tests.helpers.paged_rows import other_layout


@pytest.mark.parametrize("moved", [True, False])
def test_plain_placement_is_delta_rotation(moved):
    rotary, layers, n = Rotary(inverse_frequencies(10, 1e4), 128), 3, 30
    k, v = torch.randn(layers, n, 2, 10), torch.randn(layers, n, 2, 10)
    source, target = torch.arange(n) + 40, torch.arange(n) * 3
    caches = [other_layout(torch.full((6, 2, 16, 20), float("nan"))) for _ in range(layers)]
    slots = torch.randperm(96)[:n]
    slots[4:9] = -1
    kernels.place_layers(k, v, slots, (target - source).int() if moved else None, caches, rotary)
    written = slots[slots >= 0]
    for layer, kv in enumerate(caches):
        want = rotary.move(k[layer], source, target) if moved else k[layer]
        got = kv[written // 16, :, written % 16]
        torch.testing.assert_close(got, torch.cat((want, v[layer]), -1)[slots >= 0])
        assert int(kv.isnan().sum()) == (96 - len(written)) * 2 * 20  # nothing else was touched


def test_placement_refuses_what_does_not_fit():
    rotary, kv = Rotary(inverse_frequencies(8, 1e4), 64), torch.zeros(2, 2, 16, 16)
    k, slots = torch.zeros(1, 3, 2, 8), torch.arange(3)
    with pytest.raises(ValueError, match="disagree"):
        kernels.place_layers(k, k, slots[:2], None, [kv], rotary)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.place_layers(k[:, :, :1], k[:, :, :1], slots, None, [kv], rotary)
    with pytest.raises(ValueError, match="disagree"):
        kernels.row_deviation(k[0], k[0, :2], None, rotary)
