"""The scheduler's index of chunks: which ones the workers hold, and which leave when others need their room."""

from collections import OrderedDict
from collections.abc import Mapping

from cacheslide.errors import StoreError
from cacheslide.keys import ChunkKey


class ChunkIndex:
    """Authoritative: workers keep and drop exactly what it says, in the order it says it.

    Parameters
    ----------
    capacity : int
        Bytes of chunk KV a worker may hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._generations: dict[ChunkKey, int] = {}  # of corrected chunks only

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

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

    def reserve(self, sizes: Mapping[ChunkKey, int], generation: int = 0) -> list[ChunkKey]:
        """Make room for chunks of these sizes in bytes; returns the keys to evict first, oldest first.

        `generation` is that of the chunks which are new here.
        The chunks asked for are never evicted to make room for one another: StoreError when they do not fit together.
        """
        if sum(sizes.values()) > self.capacity:
            raise StoreError(f"{sum(sizes.values())} bytes of chunks cannot fit a store of {self.capacity} bytes")
        self.touch(sizes)
        added = {key: size for key, size in sizes.items() if key not in self._sizes}
        self._sizes.update(added)
        if generation:
            self._generations.update(dict.fromkeys(added, generation))
        self.nbytes += sum(added.values())
        evicted = []
        while self.nbytes > self.capacity:  # those asked for stand at the end and fit: the loop stops before them
            key, size = self._sizes.popitem(last=False)
            self.nbytes -= size
            self._generations.pop(key, None)
            evicted.append(key)
        return evicted

    def discard(self, key: ChunkKey) -> None:
        """Forget a chunk that turned out to be missing."""
        self.nbytes -= self._sizes.pop(key, 0)
        self._generations.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._sizes.clear()
        self._generations.clear()
        self.nbytes = 0
