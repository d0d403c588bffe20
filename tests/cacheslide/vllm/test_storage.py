"""Chunks in storage tiers as the scheduler sees them, without an engine: leases, ranks that disagree, late reports."""

import argparse
import json
from concurrent.futures import Future

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.cli import serve
from cacheslide.errors import ConfigError, StoreError
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.geometry import content_id
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import ChunkLoaded, FetchPlan, WorkerReport
from cacheslide.vllm.scheduler.chunk_index import ChunkIndex
from cacheslide.vllm.worker.chunk_store import WorkerStore
from cacheslide.vllm.worker.storage import StorageTier, copied, storage_tier_config
from tests.helpers.checkpoints import save_random
from tests.helpers.scheduling import TURN, request, step_output
from tests.helpers.storage_ranks import ROW, arrived, chunk_kv, planner, rank, side

pytestmark = pytest.mark.slow

CROSSCACHE = {
    "Basic": {"Port": 5555, "ChunkSize": 256, "PoolSize": 4, "CacheDir": "/var/log/crosscache"},
    "Request": {"LoadWorker": 4, "StoreWorker": 4, "CommWorker": 2},
    "Cache": {"IOWorker": 4, "CopyWorker": 4, "LookupMapScale": 4096},
}


def filled(folder, ranks=1) -> tuple:
    """A store that holds the turn's chunks, as an earlier life left them; their keys and lengths."""
    scheduler = side(folder, ranks)
    scheduler.arrive(request())
    plan = scheduler.tracked["r"].plan
    for number in range(ranks):
        tier = rank(folder, number, ranks)
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        for i, (key, chunk) in enumerate(zip(plan.keys, plan.chunks, strict=True)):
            store.put(key, chunk_kv(len(chunk), 100 * number + i))
        tier.flush()
        tier.close()
    return plan.keys, [len(c) for c in plan.chunks]


def claimed(scheduler, asked):
    """The claim, once look-ups are over."""
    lookup = scheduler.tracked[asked.request_id].storage.lookup
    if lookup is not None:
        lookup.result(60)
    return scheduler.claim(asked, 0)


def served(scheduler, asked) -> dict:
    """The receipt of a request that claims, loads, and ends."""
    rows = scheduler.claim(asked, 0)
    assert rows > 0 and not scheduler.index._leases
    scheduler.allocated(asked, rows)
    step = scheduler.step(step_output({asked.request_id: len(TURN) - rows}, {asked.request_id: rows}))
    assert len(step.loads) == 1
    return scheduler.finish(asked)


def loaded(fetch) -> WorkerReport:
    """One rank's."""
    return WorkerReport(loaded={fetch.key: [ChunkLoaded(fetch.ticket, "file", 64, 0)]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_copy_is_contiguous_and_its_own(dtype):
    pages = torch.randn(3, 5, 2, 4, 8).to(dtype)
    for x in (pages[:, :, 1], pages[:, :, 0], pages):
        room = torch.full((x.numel() * x.element_size(),), 255, dtype=torch.uint8)
        out = copied(x, room)
        assert out.is_contiguous() and out.dtype == dtype and torch.equal(out.float(), x.float())
        assert out.data_ptr() == room.data_ptr()


def test_a_request_waits_for_its_chunks_and_claims_what_was_loaded(tmp_path):
    keys, lengths = filled(tmp_path / "s")
    scheduler, asked = side(tmp_path / "s"), request()
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) is None
    step = scheduler.step(step_output({}, {}))
    assert step.idle and {f.key for f in step.fetches} == set(keys) and not step.loads
    assert len(scheduler.index) == len(keys) and not any(k in scheduler.index for k in keys)
    tier, store = rank(tmp_path / "s"), WorkerStore(torch.device("cpu"))
    for fetch in step.fetches:
        tier.fetch(fetch.key, fetch.ticket)
    report = WorkerReport()
    for key, ticket, found in arrived(tier, len(keys)):
        store.put_loaded(key, found.chunk)
        report.loaded[key] = [ChunkLoaded(ticket, found.tier, found.chunk.nbytes, found.chunk.generation)]
    for i, (key, n) in enumerate(zip(keys, lengths, strict=True)):
        got, want = store.get(key), chunk_kv(n, i)
        assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
    scheduler.on_worker_report(report)
    receipt = served(scheduler, asked)
    assert receipt["chunks_hit"] == len(keys)
    assert receipt["tiers"] == {"file": {"chunks": len(keys), "bytes": store.nbytes}}
    tier.close()


def test_a_chunk_is_there_when_every_rank_has_it_and_gone_when_one_has_not(tmp_path):
    keys, _ = filled(tmp_path / "s", ranks=2)
    scheduler, asked = side(tmp_path / "s", ranks=2, encode="off"), request()
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) is None
    fetches = scheduler.step(step_output({}, {})).fetches
    lame, late, fine = fetches[0], fetches[1], fetches[2:]
    for fetch in fine:
        scheduler.on_worker_report(loaded(fetch).aggregate(loaded(fetch)))
        assert fetch.key in scheduler.index
    scheduler.on_worker_report(loaded(late))
    failed = WorkerReport(failed={lame.key: (lame.ticket, "damaged: page 3")})
    scheduler.on_worker_report(loaded(lame).aggregate(failed))
    assert late.key not in scheduler.index and lame.key not in scheduler.index
    assert scheduler.claim(asked, 0) is None  # one rank is late
    step = scheduler.step(step_output({}, {}))
    assert step.drops == [lame.key] and not step.fetches  # the other rank lets go of it; nobody asks twice
    scheduler.on_worker_report(loaded(late))
    receipt = served(scheduler, asked)
    assert receipt["store_failures"] == {lame.key: "damaged: page 3"}
    assert receipt["chunks_hit"] == len(keys) - 1 == receipt["tiers"]["file"]["chunks"]
    counts = scheduler.take_stats().data
    assert counts["store_failures.damaged"] == 1
    assert (counts["store_chunks.file"], counts["store_bytes.file"]) == (len(keys) - 1, 64 * (len(keys) - 1))
    again = request("again")
    scheduler.arrive(again)
    assert claimed(scheduler, again) is None
    [fetch] = scheduler.step(step_output({}, {})).fetches
    scheduler.on_worker_report(loaded(lame))  # a report of the first attempt
    scheduler.on_worker_report(loaded(fetch))
    assert fetch.key not in scheduler.index
    scheduler.on_worker_report(loaded(fetch))
    assert fetch.key in scheduler.index


def test_a_tier_that_hangs_holds_nobody_up(tmp_path):
    keys, _ = filled(tmp_path / "s")
    scheduler, asked = side(tmp_path / "s", encode="off"), request()
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) is None and scheduler.claim(asked, 0) is None
    late = scheduler.step(step_output({}, {})).fetches[0]
    scheduler.storage_tier.limit_s = 0.0
    assert scheduler.claim(asked, 0) == 0
    assert set(scheduler.step(step_output({}, {})).drops) == set(keys)
    scheduler.on_worker_report(loaded(late))  # too late
    assert len(scheduler.index) == 0 and not scheduler.index._leases
    assert set(scheduler.finish(asked)["store_failures"].values()) == {"read error"}
    hung, again = Future(), request("again")
    scheduler.storage_tier._pool.submit = lambda *_: hung
    scheduler.arrive(again)
    assert scheduler.claim(again, 0) == 0  # nor does a look-up
    scheduler.storage_tier.limit_s = 10.0
    more = request("more")
    scheduler.arrive(more)
    assert scheduler.claim(more, 0) is None


def test_the_hosts_memory_below_a_gpu_takes_what_leaves_it():
    options = ServerOptions(chunk_size=16, store={"device_gib": 0.01, "host_gib": 0.01}, store_device="model")
    scheduler, asked = planner(options), request()
    tier = StorageTier(options.tiers, ROW)
    store = WorkerStore(torch.device("cpu"), storage_tier=tier)
    scheduler.arrive(asked)
    plan = scheduler.tracked["r"].plan
    for i, (key, chunk) in enumerate(zip(plan.keys, plan.chunks, strict=True)):
        store.put(key, chunk_kv(len(chunk), i))
    tier.flush()
    gone, never = plan.keys[1:], plan.keys[0]
    store.clear()
    scheduler.storage_tier.evicted(gone)
    assert claimed(scheduler, asked) == 0  # looked up when it came: nothing had left by then
    scheduler.finish(asked)
    asked = request("again")
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) is None
    fetches = scheduler.step(step_output({}, {})).fetches
    assert {f.key for f in fetches} == set(gone) and never not in scheduler.index
    for fetch in fetches:
        tier.fetch(fetch.key, fetch.ticket)
    report = WorkerReport()
    for key, ticket, found in arrived(tier, len(gone)):
        report.loaded[key] = [ChunkLoaded(ticket, found.tier, found.chunk.nbytes, 0)]
    scheduler.on_worker_report(report)
    assert served(scheduler, asked)["tiers"].keys() == {"host"}
    tier.close()


def test_a_chunk_that_was_stored_anew_is_not_dropped_at_the_steps_end(tmp_path):
    scheduler = side(tmp_path / "s")
    scheduler.index.reserve({"a": 1})
    scheduler.storage_tier.fetches = [FetchPlan("c", ("a", "b"), 0)]
    scheduler.storage_tier.drops = ["a", "d"]
    step = scheduler.step(step_output({}, {}))
    assert step.fetches == [FetchPlan("c", ("b",), 0)] and step.drops == ["d"]


def test_chunks_on_their_way_and_under_a_lease_do_not_leave():
    index = ChunkIndex(100)
    index.reserve({"a": 40, "b": 30})
    index.lease(["a"])
    assert index.reserve({"c": 60}, pending=True) == ["b"] and "c" not in index and index.nbytes == 100
    with pytest.raises(StoreError, match="requests wait"):
        index.reserve({"d": 10})
    assert index.nbytes == 100 and "d" not in index
    index.on_loaded("c", 2)
    assert "c" in index and index.generation("c") == 2
    index.release(["a"])
    assert index.reserve({"d": 40}) == ["a"]
    other = ChunkIndex(100)
    other.reserve({"c": 60, "e": 5}, pending=True)
    other.reserve({"c": 60})
    assert "c" in other and not other.failed("c") and "c" in other  # stored anew: the failed read changes nothing
    assert other.failed("e") and other.nbytes == 60


def test_new_weights_never_meet_old_chunks(tmp_path):
    keys, _ = filled(tmp_path / "s")
    scheduler = side(tmp_path / "s")
    scheduler.reset()
    asked = request()
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) == 0 and not set(scheduler.tracked["r"].plan.keys) & set(keys)


def test_corrected_chunks_and_too_many_at_once_stay_in_memory(tmp_path):
    tier = rank(tmp_path / "s")
    store = WorkerStore(torch.device("cpu"), storage_tier=tier)
    store.put("ab" * 20, chunk_kv(8, 1))
    corrected = chunk_kv(8, 2)
    store.put("cd" * 20, ChunkKV(corrected.k, corrected.v, corrected.positions, generation=1))
    tier.flush()
    assert tier.store.contains("ab" * 20) and not tier.store.contains("cd" * 20)
    tier.limit, tier._queued = 1, 1
    store.put("ef" * 20, chunk_kv(8, 3))
    assert tier.unwritten == 1 and store.contains("ef" * 20)
    tier.close()


def test_crosscache_files_and_connector_options_open_the_store(tmp_path):
    file = tmp_path / "config.cfg"
    file.write_text(json.dumps(CROSSCACHE))
    options = ServerOptions.from_extra_config({"store": str(file), "cache.server.host": "tcp://10.0.0.7"})
    assert (options.chunk_size, options.store_gib, options.store_device) == (256, 4.0, "cpu")
    tiers = options.tiers
    assert (tiers.path, tiers.remote_host, tiers.remote_port) == ("/var/log/crosscache", "10.0.0.7", 5555)
    assert ServerOptions.from_extra_config({"store": CROSSCACHE, "chunk_size": 64}).chunk_size == 64
    alone = ServerOptions.from_extra_config({"cache.server.host": "tcp://127.0.0.1", "cache.server.port": 5555})
    assert alone.tiers.remote_port == 5555 and not alone.tiers.path
    on_device = ServerOptions.from_extra_config({"store": {"device_gib": 2, "host_gib": 8, "path": "x"}})
    assert (on_device.store_device, on_device.store_gib) == ("model", 2)
    assert (
        storage_tier_config(on_device.tiers, ROW).host_gib == 8
        and storage_tier_config(options.tiers, ROW).host_gib < 0.01
    )
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    line = serve.command(parser.parse_args(["model", "--store", str(file)]), [])
    sent = json.loads(line[line.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert sent == {"store": str(file)} and ServerOptions.from_extra_config(sent).chunk_size == 256
    assert ServerOptions.from_extra_config({"store": {"host_gib": 3}}).tiers is None  # memory alone is no storage tier
    for wrong, said in (({"store": {"hots_gib": 1}}, "unknown store option"), ({"store": "/nowhere"}, "cannot read")):
        with pytest.raises(ConfigError, match=said):
            ServerOptions.from_extra_config(wrong)


def test_weights_are_named_by_content(tmp_path):
    one, two = save_random(tmp_path / "one"), save_random(tmp_path / "two")
    config = {"layers": 2, "_name_or_path": "one"}
    name = content_id(str(one), None, config, None, False)
    assert name == content_id(str(two), "main", config | {"_name_or_path": "two"}, None, False)
    assert name != content_id(str(one), None, config | {"layers": 3}, None, False)
    assert name != content_id(str(one), None, config, "fp8", False)
    raw = bytearray((two / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (two / "model.safetensors").write_bytes(raw)
    assert name != content_id(str(two), None, config, None, False)
    with pytest.raises(ConfigError, match="named by the weights' content"):
        content_id(str(tmp_path / "none"), None, config, None, False)


def test_prompts_without_chunks_on_disk_do_not_wait(tmp_path):
    scheduler, asked = side(tmp_path / "s"), request()
    scheduler.arrive(asked)
    assert claimed(scheduler, asked) == 0
    receipt = scheduler.finish(asked)
    assert receipt["tiers"] == {} and "store_failures" not in receipt and len(TURN) == receipt["tokens"]
