"""Places of chunks: what promotion brings is what a cold encoding gives, and memory is bounded."""

import pytest
import torch

from cacheslide.core.encoder import prefill_exact, read_chunk
from cacheslide.errors import ConfigError, PolicyError, StoreError
from tests.helpers.made_passages import gemma
from tests.helpers.rag import manager, prompts

pytestmark = pytest.mark.slow


def alone(passage):
    ids = passage.token_ids
    return read_chunk(gemma().model, prefill_exact(gemma().model, ids), range(len(ids)), 0, len(ids))


@pytest.mark.parametrize("place", ["cpu", "placeholder"])
def test_a_promoted_chunk_is_the_passage_encoded_alone(place):
    made, passage = manager(), prompts().passages[0]
    [key] = made.encode([passage], place)
    assert made.where(key) == place and (made.chunk(key) is None) == (place == "placeholder")
    promotion = made.promote(key)
    assert promotion.source == place and promotion.nbytes == made.device.nbytes > 0
    assert made.where(key) == "device" and made.promote(key) is None
    torch.testing.assert_close(made.chunk(key).k, alone(passage).k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.chunk(key).v, alone(passage).v, atol=1e-5, rtol=1e-4)


def test_the_engine_reads_chunks_on_the_device_alone():
    made, sample = manager(), prompts()
    made.encode([sample.head], "device")
    keys = made.encode(sample.passages[:2], "cpu") + made.encode(sample.passages[2:3], "placeholder")
    prompt = sample.prompt([0, 1, 2])
    assert made.engine.plan(prompt).keys[1:] == tuple(keys)
    hits = [made.engine.prefill(prompt).receipt.chunks_hit]
    for key in keys:
        made.promote(key)
        hits.append(made.engine.prefill(prompt).receipt.chunks_hit)
    assert hits == [1, 2, 3, 4]


def test_a_full_device_drops_the_least_recently_used_chunk():
    sample = prompts()
    free = manager()
    free.encode([sample.passages[0]], "device")
    made = manager(device_bytes=int(free.device.nbytes * 2.5))
    keys = made.encode(sample.passages[:3], "device")
    assert [made.where(key) for key in keys] == ["placeholder", "device", "device"]
    assert made.promote(keys[0]).source == "placeholder" and made.where(keys[1]) == "placeholder"
    with pytest.raises(StoreError, match="cannot fit"):
        manager(device_bytes=10).encode([sample.passages[0]], "device")


def test_kv_of_another_model_or_text_is_refused():
    made, sample = manager(), prompts()
    chunk = alone(sample.passages[0])
    with pytest.raises(StoreError, match="does not fit this model: dtype"):
        made.put(sample.passages[0], chunk.to(torch.float16), "device")
    with pytest.raises(StoreError, match="does not fit this model: tokens"):
        made.put(sample.head, chunk, "device")
    with pytest.raises(StoreError, match="was never placed"):
        made.promote("00")


@pytest.mark.parametrize("system", ["recompute", "cacheslide", "kvcomm", "context_cache"])
def test_systems_whose_chunks_depend_on_others_are_refused(system):
    with pytest.raises(PolicyError, match=f"^{system}: the pipeline needs chunks encoded alone"):
        manager(system)


def test_required_kernels_are_missed_in_one_line():
    with pytest.raises(ConfigError, match=r"^kernels are required, but the model is on cpu: they run on CUDA$"):
        manager(require_kernels=True)
