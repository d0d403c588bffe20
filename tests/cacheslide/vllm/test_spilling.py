"""Corrected chunks that leave a worker's memory: they come back as they were, or are dropped unwritten."""

import threading
from contextlib import closing

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.errors import PromptError
from cacheslide.store.base import ChunkKV
from cacheslide.store.files import Files
from cacheslide.vllm.options import Annotations, ServerOptions
from cacheslide.vllm.protocol import ChunkLoaded, SavePlan, StepPlan, WorkerReport
from cacheslide.vllm.worker.chunk_store import WorkerStore
from cacheslide.vllm.worker.side import WorkerSide
from cacheslide.vllm.worker.storage import StorageTier
from tests.helpers.scheduling import TURN, finished, request, step_output
from tests.helpers.storage_ranks import CONFIG, ROW, arrived, chunk_kv, rank, side
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow

A, B = "ab" * 20, "cd" * 20


def corrected(seed: int, generation: int = 1, tokens: int = 40) -> ChunkKV:
    c = chunk_kv(tokens, seed)
    return ChunkKV(c.k, c.v, c.positions, generation=generation)


def same(got: ChunkKV, want: ChunkKV) -> bool:
    return torch.equal(got.k, want.k) and torch.equal(got.v, want.v) and got.generation == want.generation


def fetched(tier: StorageTier, key: str, tokens: int = 40):
    tier.fetch(key, 0, tokens)
    [(_, _, found)] = arrived(tier, 1)
    return found


def test_a_corrected_chunk_comes_back_as_it_was_and_is_written_once(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        chunks = {f"{i:040x}": corrected(i, 1 + i % 3) for i in range(12)}  # more pages than pass through memory
        for key, chunk in chunks.items():
            store.put(key, chunk)
        tier.flush()
        assert not tier.store.stats.spill_bytes and not tier.spilled.keys()  # in memory it costs nothing
        store.evict(chunks)
        tier.flush()
        assert not len(store) and tier.store.stats.spill_bytes > 0
        for _ in range(2):
            for key, chunk in chunks.items():
                found = fetched(tier, key)
                assert same(found.chunk, chunk) and found.tier in ("host", "file")
                store.put_loaded(key, found.chunk)
            written = tier.store.stats.spill_bytes
            store.evict(chunks)
            tier.flush()
        assert tier.store.stats.spill_bytes == written and not tier.store.stats.record_bytes
        assert not any(tier.store.contains(key) for key in chunks)  # published to nobody
        assert fetched(tier, A).why == "absent"


class Gate(Files):
    """Pages wait to be written."""

    def __init__(self) -> None:
        self.open_gate = threading.Event()

    def write(self, fd, buffer, offset) -> None:
        assert self.open_gate.wait(60)
        super().write(fd, buffer, offset)


def test_what_is_released_is_not_written_and_not_read(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        gate = Gate()
        tier.store.spill.files = gate
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        chunks = {f"{i:040x}": corrected(i, tokens=200) for i in range(8)}
        for key, chunk in chunks.items():
            store.put(key, chunk)
        store.evict(chunks)
        assert same(fetched(tier, f"{7:040x}", 200).chunk, chunks[f"{7:040x}"])  # on its way down
        store.release(chunks)
        gate.open_gate.set()
        tier.flush()
        assert tier.store.spill.nbytes == 0 and tier.spilled.cancelled + tier.store.stats.cancelled > 0
        assert fetched(tier, f"{0:040x}", 200).why == "absent"


def test_exact_chunks_stay_and_newer_versions_take_the_place_of_older_ones(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        store.put(A, corrected(1))
        store.put(B, chunk_kv(40, 2))
        store.evict([A])
        tier.flush()
        store.put(A, corrected(3, generation=2))
        store.evict([A])
        tier.flush()
        assert same(fetched(tier, A).chunk, corrected(3, generation=2))
        store.put(A, chunk_kv(40, 4))  # renewed exactly, and written through
        store.release([A, B])
        store.evict([A, B])
        tier.flush()
        assert same(fetched(tier, A).chunk, chunk_kv(40, 4)) and same(fetched(tier, B).chunk, chunk_kv(40, 2))
        store.put(A, corrected(5))
        store.evict([A])
        tier.forget()  # other weights: no corrected chunk is what its key says
        tier.flush()
        assert A not in tier.spilled and tier.store.spill.nbytes == 0


def test_without_room_a_corrected_chunk_is_lost_and_says_so(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        store.put(A, corrected(1))
        tier.limit, tier._queued = 1, 1  # as if too many bytes waited
        store.evict([A])
        assert tier.unwritten == 1 and fetched(tier, A).why == "absent"
        tier.limit, tier._queued, tier.store.spill.capacity = 1 << 30, 0, 0  # and no room on disk
        for i in range(8):
            store.put(f"{i:040x}", corrected(i, tokens=200))
        store.evict([f"{i:040x}" for i in range(8)])
        tier.flush()
        found = [fetched(tier, f"{i:040x}", 200) for i in range(8)]
        assert any(f.chunk is None for f in found) and tier.store.stats.dirty_dropped
        assert all(f.chunk is None or same(f.chunk, corrected(i, tokens=200)) for i, f in enumerate(found))
    none = StorageTier(ServerOptions(store={"path": str(tmp_path / "n"), "spill_gib": 0} | CONFIG).tiers, ROW)
    with closing(none) as tier:
        tier.spill(A, corrected(1))
        assert A not in tier.spilled


def test_a_spill_that_fails_costs_the_chunk_and_no_step(tmp_path):
    class Broken(StorageTier):
        def spill(self, *_) -> None:
            raise OSError("broken")

    worker = WorkerSide.__new__(WorkerSide)
    noted, worker.unsure = [], set()
    worker.faults = type("Faults", (), {"note": lambda self, *fault: noted.append(fault)})()
    tier = Broken(ServerOptions(store={"path": str(tmp_path / "s")} | CONFIG).tiers, ROW)
    with closing(tier):
        worker.store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        worker.store.put(A, corrected(1))
        worker.evict([A])
        assert worker.unsure == {A} and len(noted) == 1 and not worker.holds(A)
        worker.drop(list(worker.unsure))
        assert not worker.unsure and not len(worker.store)


def test_the_host_tier_below_a_gpu_spills_by_its_policy(tmp_path):
    """There SLIDE's pages are the host tier itself: exact and corrected chunks share it."""
    corrections, exact = [f"{i:040x}" for i in range(4)], [f"{100 + i:040x}" for i in range(12)]
    room = 6 * chunk_kv(48, 0).nbytes / (1 << 30)  # of sixteen chunks
    spilled = {}
    for policy in ("clean-first", "lru"):
        memory = {"device_gib": 0.01, "host_gib": room, "policy": policy, "path": str(tmp_path / policy)}
        with closing(StorageTier(ServerOptions(store=memory | CONFIG).tiers, ROW)) as tier:
            store = WorkerStore(torch.device("cpu"), storage_tier=tier)
            for i, key in enumerate(corrections):
                store.put(key, corrected(i, tokens=48))
            store.evict(corrections)
            for i, key in enumerate(exact):
                store.put(key, chunk_kv(48, 100 + i))
            tier.flush()
            store.clear()
            for i, key in enumerate(exact):
                assert same(fetched(tier, key, 48).chunk, chunk_kv(48, 100 + i))
            for i, key in enumerate(corrections):
                assert same(fetched(tier, key, 48).chunk, corrected(i, tokens=48))
            tier.flush()
            spilled[policy] = tier.store.stats.spill_bytes
    assert spilled["clean-first"] == 0 < spilled["lru"]


def loaded_turn(folder, **annotations):
    """A scheduler that knows the turn's chunks, the first corrected, and the request about to end."""
    scheduler, asked = side(folder, encode="off"), request(**annotations)
    scheduler.arrive(asked)
    keys = scheduler.tracked["r"].plan.keys
    scheduler.index.reserve({keys[0]: 1}, generation=1)
    scheduler.index.reserve(dict.fromkeys(keys[1:-1], 1))
    return scheduler, asked, keys


def test_a_sessions_last_request_releases_corrected_chunks_alone(tmp_path):
    scheduler, asked, keys = loaded_turn(tmp_path / "s", release=True)
    assert not scheduler.retention.pending
    scheduler.finish(finished(asked, 0))
    assert scheduler.retention.pending and keys[0] not in scheduler.index  # an idle engine steps once more
    assert all(key in scheduler.index for key in keys[1:-1])
    step = scheduler.step(step_output({}, {}))
    assert step.released == [keys[0], keys[-1]] and not scheduler.retention.pending  # the last may be in storage
    assert not scheduler.step(step_output({}, {})).released
    scheduler, asked, keys = loaded_turn(tmp_path / "s")
    scheduler.finish(finished(asked, 0))
    assert keys[0] in scheduler.index and not scheduler.step(step_output({}, {})).released


def test_what_is_being_saved_or_read_is_not_released(tmp_path):
    scheduler, asked, keys = loaded_turn(tmp_path / "s", release=True)
    scheduler.retention.history_saves.append(SavePlan([1], ((keys[0], TURN),), (), 1))
    scheduler.storage_tier.coming[keys[-1]] = None
    scheduler.finish(finished(asked, 0))
    del scheduler.storage_tier.coming[keys[-1]]
    assert keys[0] in scheduler.index and scheduler.step(step_output({}, {})).released == []


def test_a_workers_step_releases_first_of_all(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        worker = WorkerSide.__new__(WorkerSide)
        worker.model = type("Model", (), {"slot_offsets": None})()
        worker.store, worker.storage_tier, worker.memory, worker.unsure = store, tier, None, set()
        worker.report = WorkerReport()
        store.put(A, corrected(1))
        store.put(B, chunk_kv(40, 2))
        worker.begin(StepPlan(released=[A, B]))
        assert not worker.holds(A) and worker.holds(B)


def test_chunks_that_left_are_looked_up_and_come_back_with_their_generation(tmp_path):
    scheduler, asked, keys = loaded_turn(tmp_path / "s")
    scheduler.index.capacity = scheduler.index.nbytes
    scheduler.storage_tier.evicted(scheduler.retention.index.reserve({"x": len(keys) - 2}))
    assert keys[0] in scheduler.index  # clean ones have left
    scheduler.index.discard("x")
    scheduler.index.discard(keys[0])
    scheduler.storage_tier.evicted([keys[0]])
    scheduler.index.capacity = 1 << 20
    scheduler.finish(asked)
    again = request("again")
    scheduler.arrive(again)
    scheduler.tracked["again"].storage.lookup.result(60)
    assert scheduler.claim(again, 0) is None
    fetch = next(f for f in scheduler.step(step_output({}, {})).fetches if f.key == keys[0])
    scheduler.on_worker_report(WorkerReport(loaded={fetch.key: [ChunkLoaded(fetch.ticket, "file", 64, 1)]}))
    assert scheduler.index.generation(keys[0]) == 1 and keys[0] not in scheduler.index._dirty


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [({"release": 1}, "true or false"), ({"release": True, "history": 3}, "give one of them")],
)
def test_release_is_a_bool_and_no_history_goes_with_it(annotations, reason):
    with pytest.raises(PromptError, match=reason):
        Annotations.parse({"cacheslide": {"segments": [[0, 3]]} | annotations})


def test_spill_files_of_a_server_end_with_it(tmp_path):
    with closing(rank(tmp_path / "s")) as tier:
        store = WorkerStore(torch.device("cpu"), storage_tier=tier)
        for i in range(8):
            store.put(f"{i:040x}", corrected(i, tokens=200))
        store.evict([f"{i:040x}" for i in range(8)])
        assert eventually(lambda: list((tmp_path / "s" / "spill").glob("*.spill")))
    assert not list((tmp_path / "s" / "spill").glob("*.spill"))
