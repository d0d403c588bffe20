"""The tiered store behind the connector (CPU): chunks outlive their engine, damage is computed again, nothing leaks."""

import threading

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams

from cacheslide.vllm.options import annotations_of
from tests.helpers.checkpoints import save_random
from tests.helpers.lives import life, same
from tests.helpers.served import FIRST, SECOND, SHAPE, logprobs, receipt, tokens
from tests.helpers.valkey import SERVER, server

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("vllm"), **SHAPE)


def annotated(p) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=0, extra_args={"kv_transfer_params": annotations_of(p)})


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
        id_of_first_life = engine.scheduler.planner.geometry.model_id
    with life(path, tmp_path / "s") as engine:
        assert engine.scheduler.planner.geometry.model_id == id_of_first_life
        again = engine.one(SECOND)
        found = receipt(again)
        assert same(again, warm)
        assert found["chunks_hit"] == found["chunks"] == 14 and "store_failures" not in found
        assert found["tiers"] == {"file": {"chunks": 14, "bytes": found["bytes_loaded"]}}
        engine.poison()
        assert receipt(engine.one(SECOND))["tiers"] == {"host": found["tiers"]["file"]}
        assert not engine.scheduler.storage_tier.coming and not engine.scheduler.index._leases
        other = engine.ask([SECOND], [annotations_of(SECOND, namespace="somebody else")])[0]
        assert receipt(other)["chunks_hit"] == 0
        engine.scheduler.reset()  # new weights under the old name: what is on disk is not theirs
        engine.poison()
        assert receipt(engine.one(SECOND))["chunks_hit"] == 0


def test_a_flipped_bit_is_computed_again_and_named(path, tmp_path):
    with life(path, tmp_path / "s") as engine:
        engine.one(FIRST, policy="naive_reuse")
        exact = engine.plain(FIRST)
        keys = set(engine.scheduler.index.keys())
    assert damage(tmp_path / "s") == 2
    with life(path, tmp_path / "s") as engine:
        again = engine.one(FIRST, policy="naive_reuse")  # of the same prompt: exact rows, so there is one right answer
        found = receipt(again)
        assert set(found["store_failures"]) < keys and len(found["store_failures"]) == 2
        assert all(why.startswith("damaged: ") for why in found["store_failures"].values())
        assert found["chunks_hit"] == found["tiers"]["file"]["chunks"] == found["chunks"] - 2
        assert tokens(again) == tokens(exact)
        for at in range(4):
            assert (logprobs(again, at) - logprobs(exact, at)).abs().max() < 1e-4
        engine.worker.storage_tier.flush()  # they have been encoded anew, and what lies on disk is sound again
        for key in found["store_failures"]:
            assert key in engine.scheduler.index and engine.worker.storage_tier.store.fetch(key).chunk is not None


def test_requests_with_warm_chunks_pass_one_that_waits_for_its_own(path, tmp_path):
    with life(path, tmp_path / "s") as engine:
        engine.one(FIRST)
    with life(path, tmp_path / "s", store={"stall_limit_s": 600.0}) as engine:  # nobody gives up before the gate opens
        gate, read = threading.Event(), engine.worker.storage_tier.store.fetch

        def held_back(key, **wanted):
            assert gate.wait(60)
            return read(key, **wanted)

        engine.worker.storage_tier.store.fetch = held_back
        order, llm = [], engine.llm.llm_engine
        llm.add_request("on disk", {"prompt_token_ids": list(SECOND.token_ids)}, annotated(SECOND))
        llm.add_request("plain", {"prompt_token_ids": list(FIRST.token_ids)}, SamplingParams(max_tokens=8))
        while llm.has_unfinished_requests():
            order += [o.request_id for o in llm.step() if o.finished]
            if order == ["plain"]:
                gate.set()
        assert order == ["plain", "on disk"]
        # One that goes away while its chunks are read leaves nothing behind.
        engine.worker.store.clear()
        engine.scheduler.index.clear()
        gate.clear()
        llm.add_request("gone", {"prompt_token_ids": list(SECOND.token_ids)}, annotated(SECOND))
        for _ in range(3):
            llm.step()
        assert engine.scheduler.storage_tier.coming
        llm.abort_request(["gone"])
        gate.set()
        assert receipt(engine.one(SECOND))["chunks_hit"] == 14
        assert not engine.scheduler.storage_tier.coming and not engine.scheduler.index._leases


def test_what_memory_has_no_room_for_is_computed(path, tmp_path):
    with life(path, tmp_path / "s") as engine:
        engine.one(FIRST)
        size = engine.scheduler.index.nbytes
    with life(path, tmp_path / "s", store_gib=size / 2 / 2**30) as engine:
        found = receipt(engine.one(SECOND))
        assert 0 < found["chunks_hit"] < found["chunks"]
        assert set(found["store_failures"].values()) == {"no room: memory is full of chunks that requests wait with"}
        assert engine.worker.store.nbytes <= size / 2


@pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed")
def test_lives_on_two_hosts_meet_at_a_server_until_it_is_gone(path, tmp_path):
    with server(tmp_path) as port:
        options = {
            "cache.server.host": "tcp://127.0.0.1",
            "cache.server.port": port,
            "store": {"remote_timeout_s": 60.0},
        }
        with life(path, "", **options) as engine:
            engine.one(FIRST)
            warm = engine.one(SECOND)
        with life(path, "", **options) as engine:
            again = engine.one(SECOND)
            assert same(again, warm) and receipt(again)["tiers"]["remote"]["chunks"] == 14
    with life(path, "", **options) as engine:
        found = receipt(engine.one(SECOND))
        assert found["chunks_hit"] == 0 and "no chunk" in found["fallback"]
