"""The scheduler's index of chunks: which ones the workers hold, and which leave when others need their room."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.slide.eviction import Eviction, eviction

# Times as much as fits has made room for others since a corrected chunk was used: nobody comes back for it.
PATIENCE = 8


class ChunkIndex:
    """Authoritative: workers retain and drop exactly what it says, in the order it says it.

    A chunk that is being read from storage has its room but is not "in" the index before it is loaded. Chunks under a
    lease stay until the request that waits with them has used them.

    What leaves first is the choice of one of SLIDE's eviction policies (`store/slide/eviction.py`), with bytes for the
    dirty count. Exact chunks are clean, since they are queued for storage when they are made, and so are corrected ones
    that came back from storage, where their pages still are. Corrected ones made here are dirty: leaving costs a write.
    A session that never says that it has ended leaves such chunks behind, so under clean-first those that were not used
    for `PATIENCE` times as long as least recently used chunks would stay leave before clean ones do.

    Parameters
    ----------
    capacity : int
        Bytes of chunk KV a worker may hold.
    policy : str
        "clean-first", "lru" or "fifo".

    Attributes
    ----------
    scored : set of ChunkKey
        Chunks that have scores, or will have when the step is over that was planned last. One whose scores could not be
        made counts as well: it is not tried again.
    """

    def __init__(self, capacity: int, policy: str = "lru") -> None:
        self.capacity, self.nbytes = capacity, 0
        self.order: Eviction[ChunkKey] = eviction(policy)
        self.patience = PATIENCE * capacity if policy == "clean-first" else None
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._generations: dict[ChunkKey, int] = {}  # of corrected chunks only
        self._dirty: set[ChunkKey] = set()
        self._used: dict[ChunkKey, int] = {}  # bytes that had made room when a chunk was last used
        self._made_room = 0
        self._pending: set[ChunkKey] = set()
        self.scored: set[ChunkKey] = set()
        self._leases: Counter[ChunkKey] = Counter()
        self._counts: Counter[str] = Counter()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._sizes and key not in self._pending

    def __len__(self) -> int:
        return len(self._sizes)

    def keys(self) -> list[ChunkKey]:
        """Everything that has room, the least recently used first."""
        return list(self._sizes)

    def has_room(self, key: ChunkKey) -> bool:
        """Whether the workers hold the chunk, or will when it is loaded."""
        return key in self._sizes

    def touch(self, keys) -> None:
        """Mark `keys` as just used."""
        for key in keys:
            if key in self._sizes:
                self._sizes.move_to_end(key)
                self._used[key] = self._made_room
                self.order.touch(key)

    def generation(self, key: ChunkKey) -> int:
        """0 for exact KV; see `ChunkKV.generation`."""
        return self._generations.get(key, 0)

    def is_exact(self, key: ChunkKey) -> bool:
        """Whether the chunk is here, and its KV exact."""
        return key in self and key not in self._generations

    def set_exact(self, keys) -> None:
        """Corrected chunks are about to be replaced by exact ones."""
        for key in keys:
            self._generations.pop(key, None)
            self._mark(key, False)

    def _mark(self, key: ChunkKey, dirty: bool) -> None:
        """Whether a chunk that has room is nowhere but in memory, and worth a write when it leaves."""
        (self._dirty.add if dirty else self._dirty.discard)(key)
        if key in self._sizes:
            self.order.mark(key, self._sizes[key] if dirty else 0)

    def reserve(self, sizes: Mapping[ChunkKey, int], generation: int = 0, pending: bool = False) -> list[ChunkKey]:
        """Make room for chunks of these sizes in bytes; returns the keys to evict first, in the policy's order.

        `generation` is that of the chunks which are new here; `pending` ones are there only after `on_loaded`.
        The chunks asked for are never evicted to make room for one another, nor are those under a lease or on their
        way: StoreError when there is no room beside them, and nothing has changed then.
        """
        if sum(sizes.values()) > self.capacity:
            raise StoreError(f"{sum(sizes.values())} bytes of chunks cannot fit a store of {self.capacity} bytes")
        added = {key: size for key, size in sizes.items() if key not in self._sizes}
        made = [key for key in sizes if key not in self]
        excess, evicted = self.nbytes + sum(added.values()) - self.capacity, []
        for key in self._victims() if excess > 0 else ():
            if key not in sizes and key not in self._pending and not self._leases[key]:
                evicted.append(key)
                excess -= self._sizes[key]
                if excess <= 0:
                    break
        if excess > 0:
            raise StoreError(f"{excess} bytes more would have to leave than may: requests wait with their chunks")
        for key in evicted:
            kind = "dirty" if key in self._dirty else "clean"
            self._counts.update({f"evictions.{kind}": 1, f"evicted_bytes.{kind}": self._sizes[key]})
            self._made_room += self._sizes[key]
            self.discard(key)
        for key, size in added.items():
            self._sizes[key] = size
            self.order.add(key, 0)
            self._used[key] = self._made_room
        self.nbytes += sum(added.values())
        self.touch(sizes)
        if pending:
            self._pending.update(added)
            return evicted
        self._pending.difference_update(sizes)
        for key in made if generation else ():
            self._generations[key] = generation
            self._mark(key, True)
        return evicted

    def _victims(self) -> Iterator[ChunkKey]:
        """Keys in the order in which they should leave: those given up, then as the policy says."""
        given_up = set()
        for key in self._sizes if self.patience is not None else ():
            if self._made_room - self._used[key] <= self.patience:
                break
            if key in self._dirty:
                given_up.add(key)
                yield key
        yield from (key for key in self.order.victims() if key not in given_up)

    def take_counts(self) -> dict[str, int]:
        """Chunks that made room since the last call, and their bytes, by whether a write was due for them."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def on_loaded(self, key: ChunkKey, generation: int, scored: bool = False) -> None:
        """A pending chunk is in all workers' memory; one that was stored anew meanwhile stays as it is."""
        if key in self._pending:
            self._pending.remove(key)
            if generation:
                self._generations[key] = generation
            if scored:
                self.scored.add(key)

    def failed(self, key: ChunkKey) -> bool:
        """A pending chunk could not be read: its room is free again; False where it was stored anew meanwhile."""
        if key not in self._pending:
            return False
        self.discard(key)
        return True

    def lease(self, keys) -> None:
        """Keep `keys` from leaving until they are released as often."""
        self._leases.update(keys)

    def release(self, keys) -> None:
        """End a lease."""
        self._leases.subtract(keys)
        self._leases += Counter()  # drops what is zero

    def discard(self, key: ChunkKey) -> None:
        """Forget a chunk that makes room, or that turned out to be missing."""
        if key in self._sizes:
            self.nbytes -= self._sizes.pop(key)
            self.order.remove(key)
        self._used.pop(key, None)
        self._dirty.discard(key)
        self._generations.pop(key, None)
        self._pending.discard(key)
        self.scored.discard(key)

    def clear(self) -> None:
        """Forget everything; leases stay with those who took them."""
        for key in self.keys():
            self.discard(key)
