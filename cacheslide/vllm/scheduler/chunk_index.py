"""The scheduler's index of chunks: which ones the workers hold, and which leave when others need their room."""

from collections import Counter, OrderedDict
from collections.abc import Mapping

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError


class ChunkIndex:
    """Authoritative: workers retain and drop exactly what it says, in the order it says it.

    A chunk that is being read from storage has its room but is not "in" the index before it is loaded. Chunks under a
    lease stay until the request that waits with them has used them.

    Parameters
    ----------
    capacity : int
        Bytes of chunk KV a worker may hold.

    Attributes
    ----------
    scored : set of ChunkKey
        Chunks that have scores, or will have when the step is over that was planned last. One whose scores could not be
        made counts as well: it is not tried again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._generations: dict[ChunkKey, int] = {}  # of corrected chunks only
        self._pending: set[ChunkKey] = set()
        self.scored: set[ChunkKey] = set()
        self._leases: Counter[ChunkKey] = Counter()

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

    def generation(self, key: ChunkKey) -> int:
        """0 for exact KV; see `ChunkKV.generation`."""
        return self._generations.get(key, 0)

    def set_exact(self, keys) -> None:
        """Corrected chunks are about to be replaced by exact ones."""
        for key in keys:
            self._generations.pop(key, None)

    def reserve(self, sizes: Mapping[ChunkKey, int], generation: int = 0, pending: bool = False) -> list[ChunkKey]:
        """Make room for chunks of these sizes in bytes; returns the keys to evict first, oldest first.

        `generation` is that of the chunks which are new here; `pending` ones are there only after `on_loaded`.
        The chunks asked for are never evicted to make room for one another, nor are those under a lease or on their
        way: StoreError when there is no room beside them, and nothing has changed then.
        """
        if sum(sizes.values()) > self.capacity:
            raise StoreError(f"{sum(sizes.values())} bytes of chunks cannot fit a store of {self.capacity} bytes")
        added = {key: size for key, size in sizes.items() if key not in self._sizes}
        excess, evicted = self.nbytes + sum(added.values()) - self.capacity, []
        for key, size in self._sizes.items():
            if excess <= 0:
                break
            if key not in sizes and key not in self._pending and not self._leases[key]:
                evicted.append(key)
                excess -= size
        if excess > 0:
            raise StoreError(f"{excess} bytes more would have to leave than may: requests wait with their chunks")
        for key in evicted:
            self.discard(key)
        self.touch(sizes)
        self._sizes.update(added)
        self.nbytes += sum(added.values())
        if generation:
            self._generations.update(dict.fromkeys(added, generation))
        if pending:
            self._pending.update(added)
        else:
            self._pending.difference_update(sizes)
        return evicted

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
        """Forget a chunk that turned out to be missing."""
        self.nbytes -= self._sizes.pop(key, 0)
        self._generations.pop(key, None)
        self._pending.discard(key)
        self.scored.discard(key)

    def clear(self) -> None:
        """Forget everything; leases stay with those who took them."""
        self._sizes.clear()
        self._generations.clear()
        self._pending.clear()
        self.scored.clear()
        self.nbytes = 0
