"""The scheduler's view of the storage tiers under its workers' memory: look-ups, reads and leases.

A request with chunks in files or on a server is put off step by step while the workers' threads read them; other
requests proceed. A chunk enters the index only when every rank has loaded it, so that all ranks do the same work.
Chunks that cannot be read are computed, and the receipt gives the reason.
"""

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from cacheslide.core.keys import ChunkKey
from cacheslide.core.prompt import Chunk
from cacheslide.errors import StoreError
from cacheslide.store.config import StoreConfig, open_persistent
from cacheslide.store.persistent.filetier import chunk_name, namespace_id
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.protocol import ChunkLoaded, FetchPlan, WorkerReport
from cacheslide.vllm.scheduler.chunk_index import ChunkIndex
from cacheslide.vllm.scheduler.request_state import Tracked

logger = logging.getLogger("vllm.cacheslide")

_PATIENCE_S = 0.002  # maximum wait of a claim for a pending look-up
_EVICTED = 100_000  # evicted keys remembered: the workers' storage tiers may hold them before any file does


@dataclass
class _Coming:
    """A chunk being read by the workers: results per rank, and the requests that wait for it."""

    ticket: int
    waiters: list[Tracked]
    since: float  # monotonic seconds
    loaded: list[ChunkLoaded] = field(default_factory=list)


class StorageTierView:
    """Look-ups and reads in storage tiers, for one scheduler.

    Parameters
    ----------
    config : StoreConfig
    namespace : str
        The server's namespace.
    ranks : int
        Number of workers; each has its own KV heads.
    index : ChunkIndex
    geometry : Geometry
    """

    def __init__(self, config: StoreConfig, namespace: str, ranks: int, index: ChunkIndex, geometry: Geometry) -> None:
        self.index, self.geometry, self.ranks, self.limit_s = index, geometry, ranks, config.stall_limit_s
        self.persistent = open_persistent(config)
        self.namespace = namespace_id(namespace, 0, ranks)  # normally all ranks hold the same chunks
        self.coming: dict[ChunkKey, _Coming] = {}
        self.fetches: list[FetchPlan] = []
        self.drops: list[ChunkKey] = []
        self._evicted: OrderedDict[ChunkKey, None] = OrderedDict()
        self._tickets = itertools.count()
        self._pool = ThreadPoolExecutor(2, "cacheslide-look")

    # --- a request's way -------------------------------------------------------------------------------------------

    def look(self, tracked: Tracked, keys: Iterable[ChunkKey]) -> None:
        """Start to look up those of `keys` that are not in memory."""
        unknown = [k for k in keys if k not in self.index and k not in tracked.storage.places]
        if unknown:
            tracked.storage.lookup, tracked.storage.since = self._pool.submit(self._where, unknown), time.monotonic()

    def _where(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, str]:
        places = {k: self.persistent.where(chunk_name(self.namespace, k)) for k in keys}
        return {k: place or ("memory" if k in self._evicted else "") for k, place in places.items()}

    def waits(self, tracked: Tracked, wanted: Sequence[tuple[ChunkKey, Chunk]]) -> bool:
        """Whether a request should wait for look-ups or reads of its chunks; starts them as needed."""
        if tracked.storage.lookup is None:
            self.look(tracked, [key for key, _ in wanted])
        if tracked.storage.lookup is not None:
            try:
                tracked.storage.places |= tracked.storage.lookup.result(timeout=_PATIENCE_S)
            except TimeoutError:
                if time.monotonic() - tracked.storage.since < self.limit_s:
                    return True
                tracked.storage.places |= dict.fromkeys((key for key, _ in wanted), "")  # a hanging tier is empty
            tracked.storage.lookup = None
        for key, chunk in wanted:
            if key in self.index or key in tracked.storage.tried:
                continue
            if key in self.coming:
                self.coming[key].waiters.append(tracked)
            elif not tracked.storage.places.get(key) or not self._start(tracked, key, chunk):
                continue
            tracked.storage.tried.add(key)
        waiting = [key for key, _ in wanted if key in self.coming]
        for key in waiting:
            if time.monotonic() - self.coming[key].since >= self.limit_s:
                self._fail(key, f"read error: no answer in {self.limit_s:g} s", everywhere=True)
        waiting = any(key in self.coming for key in waiting)
        if waiting:
            self._lease(tracked, [key for key, _ in wanted])
        return waiting

    def _start(self, tracked: Tracked, key: ChunkKey, chunk: Chunk) -> bool:
        size = self.geometry.chunk_bytes(len(chunk), len(tracked.policy.probe_layers), tracked.policy.needs_scores)
        try:
            evict = self.index.reserve({key: size}, pending=True)
        except StoreError:
            tracked.storage.failures[key] = "no room: memory is full of chunks that requests wait with"
            return False
        self.evicted(evict)
        self.coming[key] = _Coming(next(self._tickets), [tracked], time.monotonic())
        self.fetches.append(FetchPlan(key, tuple(evict), self.coming[key].ticket, len(chunk)))
        self._lease(tracked, [key])  # before room is made for the next one
        return True

    def _lease(self, tracked: Tracked, keys: Iterable[ChunkKey]) -> None:
        new = set(keys) - tracked.storage.leased
        tracked.storage.leased |= new
        self.index.lease(new)

    def release(self, tracked: Tracked) -> None:
        """Release a request's leases: its chunks are loaded in this step, or not needed."""
        self.index.release(tracked.storage.leased)
        tracked.storage.leased = set()
        tracked.storage.tried.clear()  # after a preemption it tries again

    def evicted(self, keys: Iterable[ChunkKey]) -> None:
        """Record keys evicted from the workers' memory."""
        for key in keys:
            self._evicted[key] = None
        while len(self._evicted) > _EVICTED:
            self._evicted.popitem(last=False)

    # --- steps -----------------------------------------------------------------------------------------------------

    def take(self) -> tuple[list[FetchPlan], list[ChunkKey]]:
        """Reads to start and chunks to drop in this step, after its other plans are made."""
        late = time.monotonic() - 2 * self.limit_s  # abandoned, and its report was lost
        for key in [k for k, coming in self.coming.items() if coming.since < late]:
            self._fail(key, "read error: no answer", everywhere=True)
        # A chunk evicted by a read may have been stored anew in this step, and is dropped at the step's end.
        fetches = [replace(f, evict=tuple(k for k in f.evict if not self.index.has_room(k))) for f in self.fetches]
        drops = [k for k in self.drops if not self.index.has_room(k)]
        self.fetches, self.drops = [], []
        return fetches, drops

    def on_worker_report(self, report: WorkerReport) -> None:
        """Take the results of reads."""
        for key, parts in report.loaded.items():
            coming = self.coming.get(key)
            if coming is None:
                continue
            coming.loaded += [p for p in parts if p.ticket == coming.ticket]
            if len(coming.loaded) == self.ranks:
                del self.coming[key]
                scored = all(p.scored for p in coming.loaded)
                self.index.on_loaded(key, max(p.generation for p in coming.loaded), scored)
                lowest = max(coming.loaded, key=lambda p: ("host", "file", "remote").index(p.tier))
                for waiter in coming.waiters:
                    waiter.storage.tiers[key] = lowest.tier, coming.loaded[0].nbytes
        for key, (ticket, why) in report.failed.items():
            coming = self.coming.get(key)
            if coming is None or coming.ticket != ticket:
                continue
            self._fail(key, why, everywhere=self.ranks > 1)

    def _fail(self, key: ChunkKey, why: str, everywhere: bool) -> None:
        """A chunk is not available; with `everywhere` ranks that hold or still read it drop it."""
        coming = self.coming.pop(key)
        self._evicted.pop(key, None)
        if self.index.failed(key) and everywhere:
            self.drops.append(key)
        for waiter in coming.waiters:
            waiter.storage.places[key] = ""
            if why != "absent":
                # Receipts are sent to clients: no file paths or server addresses.
                waiter.storage.failures[key] = why if why.startswith("damaged") else why.split(":")[0]
                logger.warning("CacheSlide computes chunk %s again: %s", key, why)

    def forget(self) -> None:
        """The weights have changed: discard all current reads."""
        for coming in self.coming.values():
            for waiter in coming.waiters:
                waiter.storage.places.clear()
        self.coming.clear()
        self.fetches.clear()
        self._evicted.clear()

    def close(self) -> None:
        """Stop the look-up threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
