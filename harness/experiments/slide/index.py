"""The store's index and its admission: start-up over 10^5 pages, lookup among 10^6 chunks, scan resistance."""

import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cacheslide.store.base import ChunkKV
from cacheslide.store.pages import PageLayout
from cacheslide.store.persistent.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.index import Location
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.tiered import TieredChunkStore
from harness.experiments.slide.faults import made_key

CHUNK = ChunkKV(torch.zeros(4, 32, 2, 16), torch.ones(4, 32, 2, 16), torch.arange(32))
NAMESPACE = namespace_id("")


def _write(folder: Path, records: int, chunk: ChunkKV, page_tokens: int) -> FileOptions:
    options = FileOptions(folder, 8 << 30, shards=16, durable=False)
    tier = FileTier(options)
    one = Encoded.of(bytes(36), chunk, page_tokens)
    for at in range(0, records, 2000):
        names = (chunk_name(NAMESPACE, made_key(i)) for i in range(at, min(at + 2000, records)))
        tier.write([replace(one, name=name) for name in names])
    return options


def _startup(folder: Path, records: int, chunk: ChunkKV, page_tokens: int, repeats: int = 5) -> dict[str, Any]:
    options = _write(folder, records, chunk, page_tokens)
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        tier = FileTier(options)
        seconds.append(time.perf_counter() - begun)
    pages = PageLayout.of(chunk, page_tokens).pages
    found = {"records": len(tier), "pages": len(tier) * pages, "median_s": statistics.median(seconds), "all_s": seconds}
    return found | {"disk_bytes": tier.nbytes}


def _lookup(folder: Path, chunks: int, samples: int = 20_000) -> dict[str, float]:
    """Lookup through the whole store's `contains`, for keys that are there and keys that are not.

    The index is filled directly with 10^6 locations: writing them would take a terabyte at a 7B model's chunk size.
    """
    tier = FileTier(FileOptions(folder, 8 << 30, shards=16, durable=False))
    for i in range(chunks):
        name = chunk_name(NAMESPACE, made_key(i))
        tier.shard(name).index.places[name] = Location(1, 4096, 8192, 4096, i)
    page = PageLayout.of(CHUNK, 16).page_bytes
    store = TieredChunkStore(16, page, host=Arena("host", 64 * page, page, "cpu", "clean-first"), file=tier)
    rng, out = random.Random(1), {}
    for what, low in (("present", 0), ("absent", chunks)):
        keys = [made_key(low + rng.randrange(chunks)) for _ in range(samples)]
        begun = time.perf_counter()
        found = sum(store.contains(k) for k in keys)
        out[f"{what}_us"] = (time.perf_counter() - begun) / samples * 1e6
        assert found == (samples if what == "present" else 0)
    store.close()
    return out


def figures(folder: Path) -> dict[str, Any]:
    """Start-up with one page a record (the worst case) and with chunks of 100 pages; lookup among a million."""
    single = ChunkKV(torch.zeros(1, 8, 1, 8), torch.zeros(1, 8, 1, 8), torch.arange(8))
    many = ChunkKV(torch.zeros(4, 200, 1, 8), torch.zeros(4, 200, 1, 8), torch.arange(200))
    return {
        "startup_one_page_a_record": _startup(folder / "single", 100_000, single, 8),
        "startup_100_pages_a_record": _startup(folder / "many", 1_000, many, 8),
        "lookup_1e6": _lookup(folder / "lookup", 1_000_000),
    }


def scan(
    folder: Path, queries: int = 2_000, every: int = 10, templates: int = 5, capacity: int = 150
) -> dict[str, Any]:
    """Novel queries through a full store, a known template every `every` queries: do the templates stay?

    A query has three chunks of its own; a template's are the same each time it returns. Memory holds 20 chunks, the
    disk `capacity`, which is what comes in between two returns of one template. A template is known when it was asked
    for twice before the store was filled up. What is missing is computed again and put, as the engine would. The first
    1,000 novel queries have 111 returns; there are twice as many, so that the first and the last 100 do not overlap.
    """
    layout = PageLayout.of(CHUNK, 16)
    size = Encoded.of(bytes(36), CHUNK, 16).size
    file = FileTier(FileOptions(folder, capacity * size, shards=1, durable=False))
    host = Arena("host", 20 * layout.pages * layout.page_bytes, layout.page_bytes, "cpu", "clean-first")
    store = TieredChunkStore(16, layout.page_bytes, host=host, file=file)
    hits: list[bool] = []
    most = 0

    def ask(number: int) -> bool:
        found = True
        for i in range(3):
            if store.get(made_key(3 * number + i)) is None:
                store.put(made_key(3 * number + i), CHUNK)
                found = False
        return found

    for number in [*range(templates), *range(templates)]:
        ask(10**6 + number)
        store.flush()
    for number in range(capacity // 3 + 1):  # full before counting starts
        ask(10**7 + number)
    returns = 0
    for query in range(queries * every // (every - 1)):
        if query % every == every - 1:
            hits.append(ask(10**6 + returns % templates))
            returns += 1
        else:
            ask(query)
        store.flush()
        most = max(most, sum(f.stat().st_size for f in folder.rglob("seg-*.log")))
    store.close()
    first, last = hits[:100], hits[-100:]
    return {
        "novel_queries": queries, "returns": len(hits), "templates": templates, "capacity_chunks": capacity,
        "hit_rate_first_100": sum(first) / len(first), "hit_rate_last_100": sum(last) / len(last),
        "capacity_bytes": capacity * size, "most_bytes_on_disk": most, "evicted": file.shards[0].stats.evicted,
        "moved_bytes": file.shards[0].stats.bytes_moved, "hits": "".join("1" if h else "0" for h in hits),
    }  # fmt: skip
