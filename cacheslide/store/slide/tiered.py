"""SLIDE's store (paper section 4.4): chunks in pages over GPU, host memory, files and a remote server.

Reference chunks are immutable and published once. WCA's changes are kept apart: `correct` gives an owner (a request or
a session) private versions of the pages with its selected rows; other pages stay shared. Evicting a clean page writes
nothing, evicting a private page spills it, and an owner's pages are dropped unwritten when it is done. Details:
docs/store.md.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.base import MAX_GENERATION, ChunkKV, ChunkStore, Fetched, bad_scores
from cacheslide.store.pages import PageLayout, as_bytes, from_payload, packed, paged, to_payload
from cacheslide.store.persistent.filetier import FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.record import Head
from cacheslide.store.persistent.shape import ChunkShape, Wanted
from cacheslide.store.persistent.tiers import PersistentTiers, RemoteTier, TieredStats
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.entry import Entry, empty_pages
from cacheslide.store.slide.mover import Mover
from cacheslide.store.slide.reader import Gone, PageReader
from cacheslide.store.slide.spill import SpillFile
from cacheslide.store.slide.table import PageTable
from cacheslide.store.slide.writer import PageWriter


class TieredChunkStore(ChunkStore):
    """One `ChunkStore` over tiers, for one tenant. Thread-safe.

    Parameters
    ----------
    page_tokens : int
        Tokens per page.
    page_bytes : int
        Bytes of a page of this model: the slot size of the memory tiers.
    device, host : Arena or None
        Memory tiers; at least one. Chunks are returned on the first one's device.
    file, remote : FileTier, RemoteTier or None
        Tiers in which pages outlive memory.
    spill : SpillFile or None
        Spill file of corrected pages; without it they are lost when memory is short, and the owner is told.
    namespace : str
        The tenant's namespace. Other namespaces cannot be read.
    rank, ranks : int
        Under tensor parallelism each rank stores its own KV heads separately under the same keys.
    write_back : str
        "through": a new chunk is queued for writing at once; "evict": when it is evicted from memory.
    queue_bytes, batch_bytes, stall_limit_s, workers
        See `WriteBack`.
    max_generation : int
        Chunks of a higher generation are refused: they must be re-encoded exactly.
    shape : ChunkShape, optional
        Shape of the model's chunks; records of another shape are misses.
    """

    def __init__(
        self,
        page_tokens: int,
        page_bytes: int,
        *,
        device: Arena | None = None,
        host: Arena | None = None,
        file: FileTier | None = None,
        remote: RemoteTier | None = None,
        spill: SpillFile | None = None,
        namespace: str = "",
        rank: int = 0,
        ranks: int = 1,
        write_back: str = "through",
        queue_bytes: int = 256 << 20,
        batch_bytes: int = 32 << 20,
        stall_limit_s: float = 10.0,
        workers: int = 1,
        max_generation: int = MAX_GENERATION,
        shape: ChunkShape | None = None,
    ) -> None:
        super().__init__()
        self.arenas = [a for a in (device, host) if a is not None]
        if not self.arenas:
            raise StoreError("a tiered store needs a device or a host tier")
        if write_back not in ("through", "evict"):
            raise StoreError(f"write_back must be 'through' or 'evict', not {write_back!r}")
        self.page_tokens, self.page_bytes, self.max_generation = page_tokens, page_bytes, max_generation
        self.wanted = Wanted(shape or ChunkShape(), page_tokens, page_bytes, max_generation)
        self.namespace, self.write_back = namespace_id(namespace, rank, ranks), write_back
        self.stats = TieredStats()
        self.persistent, self.spill = PersistentTiers(file, remote, self.stats), spill
        self.table = PageTable(self.arenas, spill, self.stats)
        self.writer = PageWriter(self.table, self.persistent, queue_bytes, batch_bytes, stall_limit_s, workers)
        self.queue = self.writer.queue
        self.mover = Mover(self.table, self.writer)
        self.reader = PageReader(self.table, self.mover, self.persistent, self.wanted)

    # --- the ChunkStore interface ----------------------------------------------------------------------------------

    def contains(self, key: ChunkKey) -> bool:
        return self.tier_of(key) is not None

    def tier_of(self, key: ChunkKey) -> str | None:
        """The highest tier with all of the chunk ("queue": it is queued for writing); None if there is none."""
        name = chunk_name(self.namespace, key)
        entry = self.table.version(name, None)
        if entry is not None and not entry.lost and (tier := self.table.tier_of(entry)):
            return tier
        return self.persistent.where(name)

    def get(self, key: ChunkKey, owner: str | None = None) -> ChunkKV | None:
        """The chunk, with the owner's corrections if one is given; None if it must be computed (again)."""
        return self.fetch(key, owner).chunk

    def fetch(
        self,
        key: ChunkKey,
        owner: str | None = None,
        shape: ChunkShape | None = None,
        tokens: int | None = None,
    ) -> Fetched:
        """As `get`, with the tier or the reason for a miss. Damage and failing tiers are reasons, never exceptions.

        A chunk of another shape (by default: than the store's), or of another number of tokens, is a miss.
        """
        wanted = replace(self.wanted, shape=shape or self.wanted.shape, tokens=tokens)
        name = chunk_name(self.namespace, key)
        entry = self.table.find(name, owner)
        try:
            if entry is None:
                result = self.reader.load(name, wanted)
            elif why := wanted.shape.misfit(entry.layout, entry.positions, tokens):
                raise Gone(f"misfit: {why}")
            else:
                content, tier = self.reader.pages(entry, range(entry.layout.pages))
                payload = packed(content, entry.layout)
                generation = entry.generation + (entry.owner is not None)
                positions = entry.positions.clone()
                result = from_payload(payload, entry.layout, positions, generation, entry.scores), tier
        except Gone as gone:
            self.stats.misses += 1
            self.stats.note(str(gone))
            return Fetched(None, why=str(gone))
        chunk, tier = result
        self.stats.hits += 1
        self.stats.bytes_read += chunk.nbytes
        setattr(self.stats, f"hits_{tier}", getattr(self.stats, f"hits_{tier}") + 1)
        if tier in ("device", "host"):
            self.persistent.touch(name)
        return Fetched(chunk, tier)

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """Store a chunk; StoreError if its pages do not fit this store's slots."""
        name = chunk_name(self.namespace, key)
        if chunk.generation > self.max_generation:
            self.stats.refused += 1
            return
        layout = PageLayout.of(chunk, self.page_tokens)
        self.check(layout)
        if self.contains(key):
            return
        fits = layout.pages <= len(self.arenas[0].slots)
        if not fits and not self.persistent.exists:
            raise StoreError(f"a chunk of {layout.pages} pages cannot fit {len(self.arenas[0].slots)} page slots")
        payload = to_payload(chunk, layout).to(self.arenas[0].device)
        with self.table.lock:  # an entry is visible only with its pages
            entry = self.table.entry(name, layout, chunk.positions.cpu().clone(), chunk.generation)
            self.table.begin(entry, payload, chunk.scores)  # no storage tier had it just now
        try:
            if self.persistent.exists and (self.write_back == "through" or not fits):
                self.writer.publish(entry, payload.cpu())
            if fits:
                pages = [(entry, p) for p in range(layout.pages)]
                self.mover.insert(self.arenas[0], pages, paged(payload, layout), only_current=True)
        finally:
            self.table.settled(entry)

    def rescore(self, key: ChunkKey, scores: Tensor, of: ChunkKV | None = None) -> bool:
        with self.table.lock:
            entry = self.table.version(chunk_name(self.namespace, key), None)
            if entry is None or entry.lost:
                return False
            if of is not None and not of.positions.equal(entry.positions):  # it was encoded in another prompt
                return False
            if why := bad_scores(scores, entry.layout.tokens):
                raise StoreError(why)
            entry.scores = scores.clone()
            return True

    def __len__(self) -> int:
        names = self.table.references()
        if self.persistent.file is not None:
            names |= {n for n in self.persistent.file.names() if n.startswith(self.namespace)}
        return len(names)

    @property
    def nbytes(self) -> int:
        """Bytes in memory and on disk together."""
        file, spill = self.persistent.file, self.spill
        on_disk = (0 if file is None else file.nbytes) + (0 if spill is None else spill.nbytes)
        return sum(a.nbytes for a in self.arenas) + on_disk

    # --- corrections -----------------------------------------------------------------------------------------------

    def correct(
        self,
        key: ChunkKey,
        owner: str,
        layer: int,
        rows: Tensor,
        k: Tensor,
        v: Tensor,
        reference: ChunkKV | None = None,
    ) -> None:
        """Give `owner` its own version of rows that WCA recomputed in one layer.

        Parameters
        ----------
        rows : Tensor [r], int64
            Ascending rows of the chunk. Their pages become dirty, with one more selected token per row.
        k, v : Tensor [r, kv_heads, head_dim]
            Keys rotated as the owner reads them back.
        reference : ChunkKV, optional
            The chunk as returned by `get`: saves reading the pages' other rows again.

        Raises StoreError if the chunk is gone: it must be stored again first.
        """
        name = chunk_name(self.namespace, key)
        entry = self._owned_entry(name, owner)
        layout, rows = entry.layout, rows.cpu()
        if not len(rows):
            return
        if k.shape != (len(rows), layout.kv_heads, layout.head_dim) or int(rows[-1]) >= layout.tokens:
            raise StoreError(f"corrected rows {tuple(k.shape)} do not fit a chunk of {layout}")
        n = layout.page_tokens
        numbers, at = np.unique(rows.numpy() // n, return_inverse=True)
        pages = [layout.page_of(layer, int(p) * n) for p in numbers]
        masks = {page: entry.selected.get(page, np.zeros(layout.rows_of(page), bool)).copy() for page in pages}
        for i, r in zip(at, rows.numpy() % n, strict=True):
            masks[pages[i]][r] = True
        fresh = [p for p in pages if masks[p].all() and p not in entry.selected]
        content = empty_pages(len(pages), layout.page_bytes, self.arenas[0].device)
        done = set(fresh)
        if reference is not None:
            known = [i for i, p in enumerate(pages) if p not in entry.selected and p not in done]
            for i in known:
                first = int(numbers[i]) * n
                cut = (reference.k[layer, first : first + n], reference.v[layer, first : first + n])
                piece = as_bytes(torch.stack(cut, 1)).to(content.device)
                content[i, : len(piece)] = piece
            done |= {pages[i] for i in known}
        rest = [i for i, p in enumerate(pages) if p not in done]
        try:
            if rest:
                content[torch.tensor(rest, device=content.device)] = self.reader.pages(entry, [pages[i] for i in rest])[
                    0
                ]
        except Gone as gone:
            self.release(owner)
            raise StoreError(f"chunk {key} cannot be corrected ({gone}): build it again") from None
        view = content.view(layout.torch_dtype).view(len(pages), n, 2, layout.kv_heads, layout.head_dim)
        view[torch.from_numpy(at).to(content.device), (rows % n).to(content.device)] = torch.stack((k, v), 1).to(view)
        self.table.correct(entry, masks)
        self.stats.corrected += len(pages)
        self.mover.insert(self.arenas[0], [(entry, p) for p in pages], content)

    def put_private(self, key: ChunkKey, owner: str, chunk: ChunkKV) -> None:
        """Give `owner` a whole chunk of corrected KV, which needs no reference version.

        All its pages are the owner's: spilled on eviction, never published, and dropped by `release`. StoreError if
        they do not fit this store's slots, if the owner has a version of the chunk already, and for exact chunks (use
        `put`).
        """
        if chunk.generation < 1:
            raise StoreError("exact KV is nobody's own: put it for all")
        layout, name = PageLayout.of(chunk, self.page_tokens), chunk_name(self.namespace, key)
        self.check(layout)
        payload = to_payload(chunk, layout).to(self.arenas[0].device)
        with self.table.lock:
            known = self.table.version(name, owner)
            if known is not None and not known.lost:
                raise StoreError(f"{owner!r} has a version of the chunk: release it first")
            positions = chunk.positions.cpu().clone()
            entry = self.table.entry(name, layout, positions, chunk.generation - 1, owner, scores=chunk.scores)
            self.table.begin_private(entry, payload)
            self.stats.corrected += layout.pages
        try:
            pages = [(entry, p) for p in range(layout.pages)]
            self.mover.insert(self.arenas[0], pages, paged(payload, layout))
        finally:
            self.table.settled(entry)

    def release(self, owner: str) -> int:
        """Drop an owner's private pages unwritten, when it is done or its update has changed; returns their number."""
        count = self.table.release(owner)
        self.stats.released += count
        return count

    def _owned_entry(self, name: bytes, owner: str) -> Entry:
        with self.table.lock:
            entry = self.table.version(name, owner)
            if entry is not None and entry.lost:
                raise StoreError(f"{entry.lost}: release {owner!r} and correct its chunks again")
            if entry is not None:
                return entry
            base = self.table.version(name, None)
        if base is None:
            record = self.persistent.read(name, [(0, 1)], self.wanted)
            if isinstance(record, str):
                raise StoreError(f"chunk {name[16:].hex()} cannot be corrected ({record}): build it again")
            head: Head = record[0]
            layout, positions, generation, scores = head.layout, head.positions, head.generation, head.scores
        else:
            layout, positions, generation, scores = base.layout, base.positions, base.generation, base.scores
        return self.table.entry(name, layout, positions, generation, owner, scores=scores)

    # --- housekeeping ----------------------------------------------------------------------------------------------

    def check(self, layout: PageLayout) -> None:
        """Raise StoreError unless pages of this layout fit the slots."""
        if layout.page_bytes > self.page_bytes or layout.page_tokens != self.page_tokens:
            raise StoreError(
                f"pages of {layout.page_tokens} tokens and {layout.page_bytes} bytes do not fit this store's "
                f"({self.page_tokens} tokens, {self.page_bytes} bytes): open one store a model"
            )

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued is written; False if `timeout_s` was too short."""
        return self.queue.flush(timeout_s)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Write what is queued and close files and server; False if `timeout_s` was too short."""
        done = self.queue.close(timeout_s)
        if self.spill is not None:
            self.spill.close()
        if self.persistent.remote is not None:
            self.persistent.remote.close()
        return done
