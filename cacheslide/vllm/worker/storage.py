"""A worker's storage tiers: new chunks are written through, and chunks of waiting requests are read by threads.

Exact chunks are published. Corrected ones are stored only when evicted from memory, as private pages of this worker,
spilled and dropped by SLIDE's code (`spilled.py`).

No step waits: writes run behind it, with a bounded number of queued bytes (excess chunks are not written), and a failed
read is reported to the scheduler, never raised.
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

_IDLE_S = 0.002  # wait of an idle step for a read: shorter than a step, longer than a spin
_PASSAGE = 16  # pages of the tiered store's memory if the worker's own memory is the host tier


def storage_tier_config(config: StoreConfig, row_bytes: int) -> StoreConfig:
    """A configuration's storage tiers; the workers' own memory is its first tier.

    With a device tier the host tier is included, otherwise a worker's memory is the host tier.
    """
    host = config.host_gib if config.device_gib else 0.0
    changes = {} if host else {"write_back": "through"}
    passage = _PASSAGE * config.page_tokens * row_bytes / GIB
    return replace(config, device_gib=0.0, host_gib=max(host, passage), **changes)


def copied(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in `room`, uint8, by one thread: torch would start a thread team for every reader."""
    out = room.view(x.dtype).view(x.shape)
    bits = getattr(torch, f"int{8 * x.dtype.itemsize}")
    np.copyto(out.view(bits).numpy(), x.view(bits).numpy())
    return out


class PinnedFiles(Files):
    """Files read into pinned memory, which then holds the chunk: pages are used as stored on disk."""

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
        The server's configuration.
    row_bytes : int
        Bytes of one token's K and V in one layer of this rank.
    namespace : str
        The server's namespace; tenants are part of the chunk keys.
    rank, ranks : int
    memory : PinnedMemory, optional
        Destination of chunks; any memory without it.
    shape : ChunkShape, optional
        Shape of this rank's chunks: other chunks are not read.
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
        self.unwritten = 0  # chunks that arrived faster than they could be written
        self._queued, self._guard = 0, threading.Lock()
        self._writer = ThreadPoolExecutor(1, "cacheslide-through")
        self.spilled = SpilledChunks(self.store, bool(config.device_gib and config.host_gib), self._writer)
        self._readers = ThreadPoolExecutor(config.load_workers, "cacheslide-fetch")
        self._coming: dict[ChunkKey, tuple[int, Future[Fetched]]] = {}

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None" = None) -> None:
        """Queue a chunk for writing, once its tensors are complete (`done`; None: on the current stream).

        Exact chunks only: others that read them rely on it.
        """
        if not chunk.generation:
            self._submit(chunk, self._complete(chunk, done), self.store.put, key, chunk)

    def spill(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None" = None) -> None:
        """Take an evicted corrected chunk, asynchronously; nothing if it is stored already."""
        if self.spilled.possible and chunk.generation and key not in self.spilled:
            done = self._complete(chunk, done)
            if not self._submit(chunk, done, self.spilled.take, key, self.spilled.expect(key, chunk, done)):
                self.spilled.give_up(key)

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Release corrected chunks; queued ones are not written."""
        for key in keys:
            self.spilled.give_up(key)

    @staticmethod
    def _complete(chunk: ChunkKV, done: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        """The event after which a chunk's tensors are complete: `done`, or one recorded now; None on a CPU."""
        if done is None and chunk.k.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(chunk.k.device))
        return done

    def _submit(self, chunk: ChunkKV, done: "torch.cuda.Event | None", does: Callable, *args: Any) -> bool:
        """Queue `does` for the writer thread; False if too many bytes are queued."""
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

    # --- reading ---------------------------------------------------------------------------------------------------

    def fetch(self, key: ChunkKey, ticket: int, tokens: int | None = None) -> None:
        """Start reading a chunk of `tokens` tokens (None: any number)."""
        self._coming[key] = ticket, self._readers.submit(self._read, key, tokens)

    def _read(self, key: ChunkKey, tokens: int | None) -> Fetched:
        try:
            fetched = self.spilled.fetch(key, tokens) or self.store.fetch(key, tokens=tokens)
            if fetched.chunk is None:
                return fetched
            return replace(fetched, chunk=self._settled(fetched.chunk))
        except Exception as error:  # on any error the chunk is computed, and the receipt gives the reason
            return Fetched(None, why=f"read error: {error}")

    def _settled(self, chunk: ChunkKV) -> ChunkKV:
        """The chunk in pinned memory if configured: chunks from a server or the host tier are copied."""
        if self.memory is None or chunk.k.is_cuda or chunk.k.is_pinned():
            return chunk
        both = side_by_side(chunk.k, chunk.v)
        k, v = copied(both, self.memory.for_host(both.nbytes)).unbind(2)
        return replace(chunk, k=k, v=v)

    def arrivals(self, idle: bool) -> list[tuple[ChunkKey, int, Fetched]]:
        """Reads finished since the last call: key, ticket, result. An idle step waits a moment for them."""
        if idle and self._coming:
            wait([future for _, future in self._coming.values()], timeout=_IDLE_S, return_when=FIRST_COMPLETED)
        ended = [(key, *pair) for key, pair in self._coming.items() if pair[1].done()]
        for key, _, _ in ended:
            del self._coming[key]
        return [(key, ticket, future.result()) for key, ticket, future in ended]

    def drop(self, keys: Iterable[ChunkKey]) -> None:
        """Discard reads of these chunks."""
        for key in keys:
            if (pair := self._coming.pop(key, None)) is not None:
                pair[1].cancel()

    def forget(self) -> None:
        """Discard all reads and all corrected chunks (the weights have changed)."""
        self.drop(list(self._coming))
        self.release(self.spilled.keys())

    def flush(self) -> None:
        """Wait until all queued chunks are written."""
        self._writer.submit(lambda: None).result()
        self.store.flush()

    def close(self) -> None:
        """Write queued chunks, in bounded time, and close the files."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.release(self.spilled.keys())  # corrected chunks end with the process
        self._writer.shutdown(wait=True)
        self.store.close()
