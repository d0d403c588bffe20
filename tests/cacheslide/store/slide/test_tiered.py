"""The tiered store: every tier returns what went in, corrections belong to their owner, limits hold, order matters."""

import random
import threading
from contextlib import suppress

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.errors import ConfigError, StoreError
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore, open_store
from cacheslide.store.base import ChunkKV
from cacheslide.store.files import Files
from cacheslide.store.pages import PageLayout
from cacheslide.store.slide.eviction import eviction
from cacheslide.store.slide.tiered import TieredChunkStore
from tests.helpers.chunks import assert_same, chunk
from tests.helpers.tiered import PAGE, PAGES, N, key, store
from tests.helpers.token_ids import random_ids

pytestmark = pytest.mark.slow


SHAPES = [{"host": 3 * PAGES}, {"device": 2 * PAGES, "host": 2 * PAGES}, {"device": PAGES // 2 * 3}, {"device": 5}]


@pytest.mark.parametrize("write_back", ["through", "evict"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_survive_any_memory(tmp_path, shape, write_back):
    if write_back == "evict" and shape == {"device": 5}:
        pytest.skip("a chunk larger than memory is always written through")
    s = store(tmp_path, write_back=write_back, **shape)
    for i in range(8):
        s.put(key(i), chunk(i))
        s.put(key(i), chunk(i))
    for i in random.Random(1).choices(range(8), k=40):
        assert s.contains(key(i))
        assert_same(s.get(key(i)), chunk(i))
        assert all(a.nbytes <= a.capacity for a in s.arenas)
    assert s.get(key(99)) is None and s.fetch(key(99)).why == "absent"
    assert s.stats.hits == 40 and len(s) == 8
    assert s.close() and not s.queue.errors


def oracle_correct(want: ChunkKV, layer, rows, k, v):
    want.k[layer, rows], want.v[layer, rows] = k, v


@pytest.mark.parametrize("policy", ["clean-first", "lru", "fifo"])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_work_agrees_with_an_oracle(tmp_path, shape, policy):
    """Puts, reads, corrections and releases of several owners, with memory for a part of the pages."""
    s, rng, g = store(tmp_path, policy=policy, **shape), random.Random(7), torch.Generator().manual_seed(7)
    base = {i: chunk(i) for i in range(6)}
    owned: dict[tuple[int, str], ChunkKV] = {}
    for i, c in base.items():
        s.put(key(i), c)
    for _ in range(150):
        i, owner = rng.randrange(6), rng.choice("abc")
        match rng.choice(["get", "own", "own", "correct", "correct", "correct", "release"]):
            case "get":
                assert_same(s.get(key(i)), base[i])
            case "own":
                got, want = s.get(key(i), owner), owned.get((i, owner), base[i])
                assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
                assert got.generation == want.generation + ((i, owner) in owned)
            case "correct":
                rows = torch.tensor(sorted(rng.sample(range(40), rng.randint(1, 40))))
                layer = rng.randrange(3)
                k, v = torch.randn(2, len(rows), 2, 8, generator=g)
                s.correct(key(i), owner, layer, rows, k, v, reference=base[i] if rng.random() < 0.5 else None)
                oracle_correct(owned.setdefault((i, owner), chunk(i)), layer, rows, k, v)
            case "release":
                s.release(owner)
                owned = {at: c for at, c in owned.items() if at[1] != owner}
        assert all(a.nbytes <= a.capacity for a in s.arenas)
    for owner in "abc":
        s.release(owner)
    assert s.flush(10) and s.spill.nbytes == 0 and not s.queue.errors
    assert not s.table._flight and not any(o for _, o in s.table._places)


def test_owners_and_tenants_do_not_see_each_other(tmp_path):
    s = store(tmp_path, host=4 * PAGES, namespace="a")
    s.put(key(1), chunk(1))
    s.correct(key(1), "one", 0, torch.tensor([3]), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    assert_same(s.get(key(1)), chunk(1))
    assert_same(s.get(key(1), "two"), chunk(1))
    assert torch.equal(s.get(key(1), "one").k[0, 3], torch.zeros(2, 8))
    s.flush()
    other = store(tmp_path, host=4 * PAGES, namespace="b")
    assert other.get(key(1)) is None and len(other) == 0
    again = store(tmp_path, host=4 * PAGES, namespace="a")
    assert_same(again.get(key(1), "one"), chunk(1))  # corrections end with their process
    assert again.fetch(key(1)).tier == "host" and again.stats.hits_file == 1


def test_what_wca_leaves_alone_costs_no_page(tmp_path):
    """One selected row dirties one page of one layer; a page counts its selected rows once."""
    s = store(tmp_path, host=8 * PAGES)
    s.put(key(1), chunk(1))
    before = s.arenas[0].nbytes
    for rows in ([9, 11], [11], [12]):
        s.correct(key(1), "o", 1, torch.tensor(rows), *torch.ones(2, len(rows), 2, 8))
    assert s.arenas[0].nbytes == before + PAGE
    entry = s._owned_entry(next(iter(s.table._owned["o"])), "o")
    assert {p: entry.dirty(p) for p in entry.selected} == {PageLayout.of(chunk(), N).page_of(1, 9): 3}
    assert s.release("o") == 1 and s.arenas[0].nbytes == before
    with pytest.raises(StoreError, match="build it again"):
        s.correct(key(5), "o", 1, torch.tensor([1]), *torch.ones(2, 1, 2, 8))


def corrected(seed: int, generation: int = 1) -> ChunkKV:
    c = chunk(seed)
    return ChunkKV(c.k, c.v, c.positions, c.layer_inputs, generation)


@pytest.mark.parametrize("policy", ["clean-first", "lru"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_private_chunk_leaves_memory_as_corrected_pages_do(tmp_path, shape, policy):
    """Whole chunks of corrected KV: spilled when memory is short, read back whole, and published to nobody."""
    s = store(tmp_path, policy=policy, **shape)
    for i in range(6):
        s.put_private(key(i), f"o{i}", corrected(i, 1 + i % 3))
        s.put(key(10 + i), chunk(10 + i))
    assert s.flush(10) and s.stats.dirty_written > 0
    for i in random.Random(1).choices(range(6), k=12):
        got = s.get(key(i), f"o{i}")
        assert got.generation == 1 + i % 3
        assert_same(got, corrected(i, 1 + i % 3))
        assert_same(s.get(key(10 + i)), chunk(10 + i))
        assert s.get(key(i)) is None and s.get(key(i), "somebody else") is None
    assert not any(store(tmp_path, host=4 * PAGES).contains(key(i)) for i in range(6))
    with pytest.raises(StoreError, match="release it first"):
        s.put_private(key(0), "o0", corrected(0, 3))
    with pytest.raises(StoreError, match="nobody's own"):
        s.put_private(key(7), "o7", corrected(7, 0))
    s.release("o0")
    s.put_private(key(0), "o0", corrected(9))
    assert_same(s.get(key(0), "o0"), corrected(9))
    assert all(s.release(f"o{i}") == PAGES for i in range(6))
    assert s.flush(10) and s.spill.nbytes == 0 and s.get(key(0), "o0") is None
    assert s.close() and not s.queue.errors


def test_victims_leave_in_the_order_of_their_policy():
    pages = {1: 0, 2: 5, 3: 0, 4: 2, 5: 5}
    orders = {}
    for name in ("clean-first", "lru", "fifo"):
        o = eviction(name)
        for page, dirty in pages.items():
            o.add(page, dirty)
        o.touch(1)
        o.touch(2)
        o.mark(4, 7)
        orders[name] = list(o.victims())
    assert orders == {"clean-first": [3, 1, 4, 5, 2], "lru": [3, 4, 5, 1, 2], "fifo": [1, 2, 3, 4, 5]}
    with pytest.raises(ConfigError, match="clean-first, lru, fifo"):
        eviction("random")


def test_policies_differ_in_their_order_alone(tmp_path):
    """A clean page costs no write under any policy; clean-first keeps the corrected pages and writes less."""
    spilled = {}
    for policy in ("clean-first", "lru", "fifo"):
        s = store(tmp_path / policy, host=3 * PAGES, policy=policy, write_back="through")
        for i in range(3):
            s.put(key(i), chunk(i))
        s.flush()
        for layer in range(3):
            s.correct(key(0), "o", layer, torch.arange(40), *torch.zeros(2, 40, 2, 8))
        for i in (1, 2, 3, 4, 1, 2):
            s.put(key(i), chunk(i))
            s.get(key(i))
            s.flush()
        assert s.get(key(0), "o").k.abs().sum() == 0
        s.flush()
        spilled[policy] = s.stats.dirty_written
        assert s.stats.clean_dropped > 0
        s.close()
    assert spilled["clean-first"] == 0 < spilled["lru"] <= spilled["fifo"]


@pytest.mark.parametrize("write_back", ["through", "evict"])
def test_a_chunk_that_is_evicted_while_it_comes_in_is_whole(tmp_path, write_back, monkeypatch):
    """Its own first pages can be the next victims; what is published then must not miss the others."""
    monkeypatch.setattr("cacheslide.store.slide.mover._BATCH", 1)
    s = store(tmp_path, host=PAGES + PAGES // 2, write_back=write_back)
    s.put(key(0), chunk(0))
    for layer in range(3):
        s.correct(key(0), "o", layer, torch.arange(0, 40, N), *torch.ones(2, 5, 2, 8))
    s.flush()
    s.arenas[0].slots[sorted(s.arenas[0]._free)] = 255
    for i in (1, 2, 3):
        s.put(key(i), chunk(i))
    s.flush()
    for i in range(4):
        assert_same(s.get(key(i)), chunk(i))
        assert_same(store(tmp_path, host=2 * PAGES).get(key(i)) or chunk(i), chunk(i))
    assert s.stats.lost == 0


def test_spilled_pages_are_written_in_runs(tmp_path):
    s = store(tmp_path, host=2 * PAGES)
    for i in range(6):
        s.put(key(i), chunk(i))
        for layer in range(3):
            s.correct(key(i), "o", layer, torch.arange(40), *torch.full((2, 40, 2, 8), float(i)))
    s.flush()
    assert s.stats.dirty_written >= 40 and s.spill.extents <= s.stats.dirty_written // 8
    assert all((s.get(key(i), "o").k == i).all() for i in range(6))


class Gate(Files):
    """Large writes wait until they are let through."""

    def __init__(self):
        self.open_gate = threading.Event()

    def write(self, fd, buffer, offset):
        if len(buffer) > 4096:
            assert self.open_gate.wait(60)
        super().write(fd, buffer, offset)


def test_back_pressure_bounds_the_queue_and_a_dead_disk_stops_nobody(tmp_path):
    gate = Gate()
    size = PageLayout.of(chunk(), N).payload_bytes
    s = store(tmp_path, host=3 * PAGES, files=gate, queue_bytes=2 * size, batch_bytes=size, stall_limit_s=0.05)
    for i in range(8):
        s.put(key(i), chunk(i))
        assert s.queue._taken <= 2 * size
    assert s.queue.stalls > 0 and s.queue.stall_s >= 0.05 and s.queue.peak <= 2 * size
    held = [i for i in range(8) if s.contains(key(i))]
    assert held and len(held) < 8  # the rest was given up, not waited for
    for i in held:
        assert_same(s.get(key(i)), chunk(i))
    gate.open_gate.set()
    assert s.flush(10)
    for i in range(8):
        got = s.get(key(i))
        assert got is None or assert_same(got, chunk(i)) is None
    s.close()


def test_a_page_given_up_in_the_queue_is_not_written(tmp_path):
    gate = Gate()
    s = store(tmp_path, host=2 * PAGES, slow=gate, batch_bytes=1)  # one job a write: the others wait behind the gate
    s.put(key(0), chunk(0))
    owners = "opqrstuvwx"
    for o in owners:
        for layer in range(3):
            s.correct(key(0), o, layer, torch.arange(40), *torch.ones(2, 40, 2, 8))
    assert len(s.queue._jobs) > 1
    for o in owners:
        s.release(o)
    gate.open_gate.set()
    assert s.flush(10)
    assert s.stats.cancelled > 0 and s.spill.nbytes == 0 and not s.table._flight


def test_without_room_to_spill_the_owner_is_told(tmp_path):
    s = store(tmp_path, host=2 * PAGES, spill=0)
    s.put(key(0), chunk(0))
    for o in "abcd":
        for layer in range(3):
            with suppress(StoreError):
                s.correct(key(0), o, layer, torch.arange(40), *torch.ones(2, 40, 2, 8))
    answers = [s.fetch(key(0), o) for o in "abcd"]
    assert any(a.chunk is None and "corrected pages were lost" in a.why for a in answers)
    assert all(a.chunk is None or (a.chunk.k == 1).all() for a in answers)
    assert_same(s.get(key(0)), chunk(0))


def test_what_does_not_belong_is_refused(tmp_path):
    s = store(tmp_path, host=2 * PAGES, max_generation=1)
    with pytest.raises(StoreError, match="one store a model"):
        s.put(key(1), chunk(1, heads=4))
    with pytest.raises(StoreError, match="malformed"):
        s.get("../../x")
    old = chunk(1)
    s.put(key(1), ChunkKV(old.k, old.v, old.positions, generation=2))
    assert s.stats.refused == 1 and not s.contains(key(1))
    s.put(key(1), old)
    with pytest.raises(StoreError, match="do not fit"):
        s.correct(key(1), "o", 0, torch.tensor([40]), *torch.ones(2, 1, 2, 8))
    with pytest.raises(StoreError, match="device or a host"):
        TieredChunkStore(N, PAGE)


def run(work, n: int) -> None:
    """`work(i)` in `n` threads; daemons, so that two that wait for each other fail the test and end with it."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads)


@pytest.mark.parametrize("write_back", ["through", "evict"])
def test_threads_correct_side_by_side(tmp_path, write_back):
    """Owners in several threads over a queue that two of them could block for each other: no wait, no wrong row."""
    narrow = {"queue_bytes": 4 * PAGE, "batch_bytes": PAGE, "stall_limit_s": 600.0}
    s = store(tmp_path, device=2 * PAGES, host=2 * PAGES, write_back=write_back, **narrow)
    wrong = []

    def work(n):
        rng, want = random.Random(n), {}
        try:
            for _ in range(40):
                i = rng.randrange(6)
                if s.get(key(i)) is None:
                    s.put(key(i), chunk(i))
                with suppress(StoreError):
                    s.correct(key(i), f"o{n}", rng.randrange(3), torch.arange(40), *torch.full((2, 40, 2, 8), float(n)))
                    want[i] = n
                for j in want:
                    got = s.get(key(j), f"o{n}")
                    assert got is None or ((got.k == n) | (got.k == chunk(j).k)).all()
        except Exception as error:
            wrong.append(repr(error))

    run(work, 4)
    assert not wrong and not s.queue.errors
    assert s.flush(60) and s.queue._taken == 0


def test_threads_share_a_store(tmp_path):
    s = store(tmp_path, device=2 * PAGES, host=2 * PAGES)
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(60):
                i = rng.randrange(10)
                got = s.get(key(i))
                if got is None:
                    s.put(key(i), chunk(i))
                else:
                    assert_same(got, chunk(i))
        except Exception as error:
            wrong.append(repr(error))

    run(work, 4)
    assert not wrong and not s.queue.errors and s.close()


@pytest.mark.parametrize("name", ["cacheslide", "cacheslide_promote", "prompt_cache"])
def test_the_engine_gives_the_same_over_tiers(model, tmp_path, name):
    """Chunks that were evicted to disk and come back, layer inputs included, against the in-memory store."""
    policy, ids = load_policy(name), random_ids(150, 5)
    prompts = [Prompt.from_spans(ids[:at] + random_ids(9, at) + ids[at:], [(0, at), (at + 9, 150)]) for at in (40, 41)]
    config = {"path": str(tmp_path), "host_gib": 30 * 16 * 160 / 2**30, "file_gib": 0.1, "shards": 1, "direct": False}
    tiers = open_store(config, row_bytes=2 * 2 * 10 * 4)
    answers = []
    for held in (MemoryChunkStore(), tiers):
        engine = ReuseEngine(model, policy, held, chunk_size=16)
        for prompt in prompts:
            engine.build(prompt)
        tiers.flush()
        answers.append([engine.prefill(p) for p in prompts])
    for want, got in zip(*answers, strict=True):
        assert torch.equal(want.logits, got.logits)
        assert want.receipt.as_dict() == got.receipt.as_dict() and got.receipt.tokens_reused > 0
    assert tiers.stats.hits_file > 0
    assert tiers.close()
