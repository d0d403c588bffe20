"""The scheduler's index of chunks: which ones the workers hold, and the order of eviction."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.slide.eviction import Eviction, eviction

# A corrected chunk is taken as abandoned once chunks of this many times the capacity made room since its last use.
PATIENCE = 8


class ChunkIndex:
    """Authoritative: workers store and drop exactly what the index says, in its order.

    A chunk being read from storage has room reserved, but is in the index only once loaded. Leased chunks stay until
    the request that waits for them has used them.

    The order of eviction is one of SLIDE's policies (`store/slide/eviction.py`), with bytes as the dirty count. Exact
    chunks are clean, since they are queued for storage when made, and so are corrected ones that came back from
    storage, where their pages still are. Corrected chunks made here are dirty: evicting one costs a write. Sessions
    that never end explicitly leave such chunks behind; under clean-first, those unused for `PATIENCE` times as long as
    least recently used chunks would stay are evicted before clean ones.

    Parameters
    ----------
    capacity : int
        Capacity of a worker for chunk KV, in bytes.
    policy : str
        "clean-first", "lru" or "fifo".

    Attributes
    ----------
    scored : set of ChunkKey
        Chunks that have scores, or will have at the end of the last planned step. A chunk whose scores could not be
        computed is included: it is not tried again.
    """

    def __init__(self, capacity: int, policy: str = "lru") -> None:
        self.capacity, self.nbytes = capacity, 0
        self.order: Eviction[ChunkKey] = eviction(policy)
        self.patience = PATIENCE * capacity if policy == "clean-first" else None
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._generations: dict[ChunkKey, int] = {}  # corrected chunks only
        self._dirty: set[ChunkKey] = set()
        self._used: dict[ChunkKey, int] = {}  # total bytes that had made room at a chunk's last use
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
        """All keys with room, the least recently used first."""
        return list(self._sizes)

    def has_room(self, key: ChunkKey) -> bool:
        """Whether the workers hold the chunk, or will once it is loaded."""
        return key in self._sizes

    def touch(self, keys) -> None:
        """Mark `keys` as just used."""
        for key in keys:
            if key in self._sizes:
                self._sizes.move_to_end(key)
                self._used[key] = self._made_room
                self.order.touch(key)

    def generation(self, key: ChunkKey) -> int:
        """The chunk's `ChunkKV.generation`; 0 for exact KV."""
        return self._generations.get(key, 0)

    def is_exact(self, key: ChunkKey) -> bool:
        """Whether the chunk is in the index and its KV exact."""
        return key in self and key not in self._generations

    def set_exact(self, keys) -> None:
        """Mark corrected chunks as exact: they are about to be replaced."""
        for key in keys:
            self._generations.pop(key, None)
            self._mark(key, False)

    def _mark(self, key: ChunkKey, dirty: bool) -> None:
        """Set whether a chunk exists only in memory and is worth a write on eviction."""
        (self._dirty.add if dirty else self._dirty.discard)(key)
        if key in self._sizes:
            self.order.mark(key, self._sizes[key] if dirty else 0)

    def reserve(self, sizes: Mapping[ChunkKey, int], generation: int = 0, pending: bool = False) -> list[ChunkKey]:
        """Make room for chunks of these sizes in bytes; returns the keys to evict first, in the policy's order.

        `generation` is that of the new chunks; `pending` ones are in the index only after `on_loaded`. The given chunks
        are never evicted for one another, nor are leased or pending ones. StoreError, with nothing changed, if there is
        no room beside them.
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
        """Keys in the order of eviction: abandoned ones, then by policy."""
        given_up = set()
        for key in self._sizes if self.patience is not None else ():
            if self._made_room - self._used[key] <= self.patience:
                break
            if key in self._dirty:
                given_up.add(key)
                yield key
        yield from (key for key in self.order.victims() if key not in given_up)

    def take_counts(self) -> dict[str, int]:
        """Numbers and bytes of chunks evicted since the last call, by whether they had to be written."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def on_loaded(self, key: ChunkKey, generation: int, scored: bool = False) -> None:
        """A pending chunk is in all workers' memory; one stored anew meanwhile is left as it is."""
        if key in self._pending:
            self._pending.remove(key)
            if generation:
                self._generations[key] = generation
            if scored:
                self.scored.add(key)

    def failed(self, key: ChunkKey) -> bool:
        """Free the room of a pending chunk that could not be read; False if it was stored anew meanwhile."""
        if key not in self._pending:
            return False
        self.discard(key)
        return True

    def lease(self, keys) -> None:
        """Protect `keys` from eviction until released as many times."""
        self._leases.update(keys)

    def release(self, keys) -> None:
        """End a lease."""
        self._leases.subtract(keys)
        self._leases += Counter()  # drops zero counts

    def discard(self, key: ChunkKey) -> None:
        """Remove a chunk that was evicted or found missing."""
        if key in self._sizes:
            self.nbytes -= self._sizes.pop(key)
            self.order.remove(key)
        self._used.pop(key, None)
        self._dirty.discard(key)
        self._generations.pop(key, None)
        self._pending.discard(key)
        self.scored.discard(key)

    def clear(self) -> None:
        """Remove all chunks; leases stay."""
        for key in self.keys():
            self.discard(key)
