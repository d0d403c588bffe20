"""The tiered store behind the connector (CPU): chunks outlive their engine, damage is computed again, nothing leaks."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.vllm.params import marks_of
from tests.conftest import save_random
from tests.test_vllm_engine import CHUNK, FIRST, SECOND, SHAPE, Served, logprobs, receipt, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("vllm"), **SHAPE)


@contextmanager
def life(path, folder, **options):
    """An engine over a store in `folder`, its paged cache full of garbage, until it is shut down."""
    store = {"path": str(folder), "file_gib": 0.25, "shards": 2, "direct": False, "segment_mib": 1} | options.pop(
        "store", {}
    )
    engine = Served(path, store=store, chunk_size=CHUNK, **options)
    engine.poison()
    try:
        yield engine
    finally:
        engine.core.shutdown()


def same(got, want) -> bool:
    return tokens(got) == tokens(want) and all(torch.equal(logprobs(got, i), logprobs(want, i)) for i in range(4))


def damage(folder) -> int:
    """Flip a bit in every record's last page; returns how many segments were touched."""
    files = sorted(folder.glob("shard-*/seg-*.log"))
    for file in files:
        raw = bytearray(file.read_bytes())
        at = max(i for i, byte in enumerate(raw) if byte)
        raw[at] ^= 1
        file.write_bytes(raw)
    return len(files)


def test_a_second_life_hits_what_the_first_stored(path, tmp_path):
    with life(path, tmp_path / "s") as engine:
        cold = receipt(engine.one(FIRST))
        assert cold["chunks_hit"] == 0 and cold["tiers"] == {} and "no chunk" in cold["fallback"]
        warm = engine.one(SECOND)
        assert receipt(warm)["chunks_hit"] == receipt(warm)["chunks"]
        assert receipt(warm)["tiers"] == {"host": {"chunks": 14, "bytes": receipt(warm)["bytes_loaded"]}}
        id_of_first_life = engine.scheduler.geometry.model_id
    with life(path, tmp_path / "s") as engine:
        assert engine.scheduler.geometry.model_id == id_of_first_life
        again = engine.one(SECOND)
        found = receipt(again)
        assert same(again, warm)
        assert found["chunks_hit"] == found["chunks"] == 14 and "store_failures" not in found
        assert found["tiers"] == {"file": {"chunks": 14, "bytes": found["bytes_loaded"]}}
        engine.poison()
        assert receipt(engine.one(SECOND))["tiers"] == {"host": found["tiers"]["file"]}
        assert not engine.scheduler.cold.coming and not engine.scheduler.index._leases
        other = engine.ask([SECOND], [marks_of(SECOND, namespace="somebody else")])[0]
        assert receipt(other)["chunks_hit"] == 0
        engine.scheduler.reset()  # new weights under the old name: what is on disk is not theirs
        engine.poison()
        assert receipt(engine.one(SECOND))["chunks_hit"] == 0
