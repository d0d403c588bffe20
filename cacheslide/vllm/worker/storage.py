"""A worker's storage tier: new chunks are written through to it, waiting requests' chunks read by threads.

Exact chunks are published. Corrected ones come here only when they must leave memory: as pages that are this worker's
alone, spilled and dropped by SLIDE's code (`spilled.py`).

Nothing here makes a step wait: writing happens behind it, a bounded number of bytes at a time (what is too much is not
written), and a read that fails is a reason for the scheduler, never an exception.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import CacheSlideError
from cacheslide.store.base import ChunkKV, Fetched
from cacheslide.store.config import StoreConfig, open_store
from cacheslide.store.files import BLOCK, Files
from cacheslide.store.pages import side_by_side
from cacheslide.store.persistent.shape import ChunkShape
from cacheslide.units import GIB, MIB
from cacheslide.vllm.worker.pinned import PinnedMemory
from cacheslide.vllm.worker.spilled import SpilledChunks

logger = logging.getLogger("vllm.cacheslide")

_IDLE_S = 0.002  # an idle step waits so long for a read: shorter than a step, longer than a spin
_PASSAGE = 16  # pages of memory that the tiered store gets where the worker's own memory is the host tier


def storage_tier_config(config: StoreConfig, row_bytes: int) -> StoreConfig:
    """The storage tier of a configuration; the workers' own memory is its first tier.

    With a device tier the host tier is part of it, else a worker's memory is the host tier.
    """
    host = config.host_gib if config.device_gib else 0.0
    changes = {} if host else {"write_back": "through"}
    passage = _PASSAGE * config.page_tokens * row_bytes / GIB
    return replace(config, device_gib=0.0, host_gib=max(host, passage), **changes)


def copied(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in `room`, uint8, by one thread: torch's own would have every reader call up a team of them."""
    out = room.view(x.dtype).view(x.shape)
    bits = getattr(torch, f"int{8 * x.dtype.itemsize}")
    np.copyto(out.view(bits).numpy(), x.view(bits).numpy())
    return out


class PinnedFiles(Files):
    """Files whose records are read into pinned memory, where they then stay: pages are served as they lie on disk."""

    def __init__(self, memory: PinnedMemory) -> None:
        self.memory = memory

    def buffer(self, nbytes: int) -> torch.Tensor:
        """See `Files.buffer`."""
        room = self.memory.for_host(nbytes)
        return super().buffer(nbytes) if room.data_ptr() % BLOCK else room


class StorageTier:
    """A rank's storage tiers under memory (host under a GPU, files, server).

    Parameters
    ----------
    config : StoreConfig
        As the server was given it.
    row_bytes : int
        Bytes of one token's K and V in one layer of this rank.
    namespace : str
        The server's; tenants are part of the chunk keys.
    rank, ranks : int
    memory : PinnedMemory, optional
        Where chunks are wanted; without it in any memory.
    shape : ChunkShape, optional
        Of this rank's chunks: what others stored and looks otherwise is not read.
    """

    def __init__(
        self,
        config: StoreConfig,
        row_bytes: int,
        namespace: str = "",
        rank: int = 0,
        ranks: int = 1,
        memory: PinnedMemory | None = None,
        shape: ChunkShape | None = None,
    ) -> None:
        self.store = open_store(
            storage_tier_config(config, row_bytes),
            row_bytes,
            namespace=namespace,
            rank=rank,
            ranks=ranks,
            files=Files() if memory is None else PinnedFiles(memory),
            shape=shape,
        )
        self.memory, self.limit = memory, config.queue_mib * MIB
        self.unwritten = 0  # chunks that came faster than they could be written
        self._queued, self._guard = 0, threading.Lock()
        self._writer = ThreadPoolExecutor(1, "cacheslide-through")
        self.spilled = SpilledChunks(self.store, bool(config.device_gib and config.host_gib), self._writer)
        self._readers = ThreadPoolExecutor(config.load_workers, "cacheslide-fetch")
        self._coming: dict[ChunkKey, tuple[int, Future[Fetched]]] = {}

    # --- down ------------------------------------------------------------------------------------------------------

    def write(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None" = None) -> None:
        """Have a chunk written behind the step, once its tensors are complete (`done`; None: on the current stream).

        Only exact KV is: what others find here is as good as computed.
        """
        if not chunk.generation:
            self._submit(chunk, self._complete(chunk, done), self.store.put, key, chunk)

    def spill(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None" = None) -> None:
        """Take a corrected chunk that leaves memory, behind the step; nothing where it is here already."""
        if self.spilled.possible and chunk.generation and key not in self.spilled:
            done = self._complete(chunk, done)
            if not self._submit(chunk, done, self.spilled.take, key, self.spilled.expect(key, chunk, done)):
                self.spilled.give_up(key)

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Corrected chunks that nobody wants any more: those on their way are not written."""
        for key in keys:
            self.spilled.give_up(key)

    @staticmethod
    def _complete(chunk: ChunkKV, done: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        """When a chunk's tensors are complete; None for now."""
        if done is None and chunk.k.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(chunk.k.device))
        return done

    def _submit(self, chunk: ChunkKV, done: "torch.cuda.Event | None", does: Callable, *args: Any) -> bool:
        """Have the writer do something with a chunk; False where too many bytes wait for it."""
        with self._guard:
            if self._queued and self._queued + chunk.nbytes > self.limit:
                self.unwritten += 1
                return False
            self._queued += chunk.nbytes
        self._writer.submit(self._write, chunk.nbytes, done, does, *args)
        return True

    def _write(self, nbytes: int, done: "torch.cuda.Event | None", does: Callable, *args: Any) -> None:
        try:
            if done is not None:
                done.synchronize()
            does(*args)
        except (CacheSlideError, OSError, RuntimeError) as error:
            logger.warning("CacheSlide could not write a chunk to the storage tier: %s", error)
        finally:
            with self._guard:
                self._queued -= nbytes

    # --- up --------------------------------------------------------------------------------------------------------

    def fetch(self, key: ChunkKey, ticket: int, tokens: int | None = None) -> None:
        """Start reading a chunk of `tokens` tokens (None: of any number)."""
        self._coming[key] = ticket, self._readers.submit(self._read, key, tokens)

    def _read(self, key: ChunkKey, tokens: int | None) -> Fetched:
        try:
            found = self.spilled.fetch(key, tokens) or self.store.fetch(key, tokens=tokens)
            if found.chunk is None:
                return found
            return replace(found, chunk=self._settled(found.chunk))
        except Exception as error:  # whatever it is: the chunk is computed instead, and the receipt says why
            return Fetched(None, why=f"read error: {error}")

    def _settled(self, chunk: ChunkKV) -> ChunkKV:
        """The chunk in pinned memory, if that is wanted: a server's, or one that the host tier still had, is not."""
        if self.memory is None or chunk.k.is_cuda or chunk.k.is_pinned():
            return chunk
        both = side_by_side(chunk.k, chunk.v)
        k, v = copied(both, self.memory.for_host(both.nbytes)).unbind(2)
        return replace(chunk, k=k, v=v)

    def arrivals(self, idle: bool) -> list[tuple[ChunkKey, int, Fetched]]:
        """Reads that have ended since the last call: key, ticket, chunk. With nothing else to do, wait a moment."""
        if idle and self._coming:
            wait([future for _, future in self._coming.values()], timeout=_IDLE_S, return_when=FIRST_COMPLETED)
        ended = [(key, *pair) for key, pair in self._coming.items() if pair[1].done()]
        for key, _, _ in ended:
            del self._coming[key]
        return [(key, ticket, future.result()) for key, ticket, future in ended]

    def drop(self, keys: Iterable[ChunkKey]) -> None:
        """Nobody waits for these any more."""
        for key in keys:
            if (pair := self._coming.pop(key, None)) is not None:
                pair[1].cancel()

    def forget(self) -> None:
        """Nobody waits for anything any more, and no corrected chunk is what its key says."""
        self.drop(list(self._coming))
        self.release(self.spilled.keys())

    def flush(self) -> None:
        """Wait until everything that was put is written."""
        self._writer.submit(lambda: None).result()
        self.store.flush()

    def close(self) -> None:
        """Write what is queued, in bounded time, and let go of the files."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.release(self.spilled.keys())  # what is corrected ends with the process
        self._writer.shutdown(wait=True)
        self.store.close()
