"""Which passages' KV is on the device, which is staged on the CPU, and which is a placeholder there.

Two `MemoryChunkStore`s hold the KV, the engine's own encoder computes it, and the engine reads the device's alone. A
placeholder is a chunk without KV: its token ids, all of them invalid. Promoting it computes its KV on the device. A
chunk that leaves the device for lack of memory, without a copy on the CPU, is a placeholder again.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cacheslide.core.keys import ChunkKey
from cacheslide.core.prompt import Prompt, Segment
from cacheslide.errors import ConfigError, PolicyError, StoreError
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkKV
from cacheslide.store.memory import MemoryChunkStore
from harness.backends.reference import EngineSettings, ReferenceBackend

Place = Literal["device", "cpu", "placeholder"]


class PlacedStore(MemoryChunkStore):
    """A `MemoryChunkStore` whose KV lies on one device."""

    def __init__(self, device: torch.device | str, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self.device = torch.device(device)

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        inputs = {layer: x.to(self.device) for layer, x in chunk.layer_inputs.items()}
        super().put(key, replace(chunk, k=chunk.k.to(self.device), v=chunk.v.to(self.device), layer_inputs=inputs))


@dataclass(frozen=True)
class Promotion:
    """One chunk brought to the device: from where, its bytes there, and the seconds it took."""

    source: Place
    nbytes: int
    seconds: float


class KVCacheManager:
    """Places chunks of passages for one model and system.

    Parameters
    ----------
    backend : ReferenceBackend
    policy : ReusePolicy
        A system whose chunks are keyed by content and encoded alone, as CacheBlend's and EPIC's.
    device_bytes : int, optional
        Bytes of KV on the device at most; the least recently used chunks leave it first. No limit by default.
    require_kernels : bool
        Refuse to run where the Triton kernels would not compute the prefill.

    Raises
    ------
    PolicyError
        For other systems, whose chunks depend on what stands before them, or that do not fit the model.
    ConfigError
        With `require_kernels` (`kernels_lack`).
    """

    def __init__(
        self,
        backend: ReferenceBackend,
        policy: ReusePolicy,
        *,
        device_bytes: int | None = None,
        require_kernels: bool = False,
    ) -> None:
        alone = policy.reuses and policy.encoding.separate and not policy.keying.follows_context
        if not alone or policy.memory.name:
            raise PolicyError(
                f"{policy.name}: the pipeline needs chunks encoded alone and keyed by content, as cacheblend"
            )
        policy.check(backend.num_layers)
        if require_kernels:
            raise ConfigError(f"kernels are required, but {kernels_lack(torch.device(backend.model.device))}")
        self.backend, self.policy, self._device_bytes = backend, policy, device_bytes
        dtype = str(backend.model.dtype).removeprefix("torch.")
        self._settings = EngineSettings(chunk_size=backend.model.max_positions, store_dtype=dtype)
        self.clear()

    def clear(self) -> None:
        """Drop all chunks."""
        self.device = PlacedStore(self.backend.model.device, self._device_bytes)
        self.host = PlacedStore("cpu")
        self._passages: dict[ChunkKey, Segment] = {}
        self.engine = self.backend.engine(self.policy, self.device, self._settings)
        self._stager = self.backend.engine(self.policy, self.host, self._settings)

    def key(self, passage: Segment) -> ChunkKey:
        """The key of a passage's chunk, the same in every prompt."""
        return self.engine.plan(Prompt((passage,))).keys[0]

    def where(self, key: ChunkKey) -> Place | None:
        """The fastest place of a chunk; None for one that was never placed."""
        if self.device.contains(key):
            return "device"
        if self.host.contains(key):
            return "cpu"
        return "placeholder" if key in self._passages else None

    def encode(self, passages: Iterable[Segment], place: Place) -> list[ChunkKey]:
        """Place passages: compute their KV for "device" and "cpu", or note them as placeholders."""
        keys = []
        for passage in passages:
            keys.append(self.key(passage))
            self._passages[keys[-1]] = passage
            if place != "placeholder":
                (self.engine if place == "device" else self._stager).build(Prompt((passage,)))
        return keys

    def put(self, passage: Segment, chunk: ChunkKV, place: Literal["device", "cpu"]) -> None:
        """Place KV of a passage that was computed before; StoreError if it is not this model's."""
        key = self.key(passage)
        if why := self.engine.encoder.shape.misfit_of(chunk, len(passage.token_ids)):
            raise StoreError(f"chunk {key[:12]} does not fit this model: {why}")
        self._passages[key] = passage
        (self.device if place == "device" else self.host).put(key, chunk)

    def chunk(self, key: ChunkKey) -> ChunkKV | None:
        """The KV of a placed chunk; None for a placeholder."""
        store = self.device if self.device.contains(key) else self.host
        return store.get(key) if store.contains(key) else None

    def promote(self, key: ChunkKey) -> Promotion | None:
        """Bring a chunk to the device: copy its KV, or compute a placeholder's. None if it is there already."""
        source = self.where(key)
        if source == "device":
            return None
        if source is None:
            raise StoreError(f"chunk {key[:12]} was never placed")
        began = time.perf_counter()
        if source == "cpu":
            self.device.put(key, self.host.get(key))
        else:
            self.engine.build(Prompt((self._passages[key],)))
        if self.device.device.type == "cuda":
            torch.cuda.synchronize(self.device.device)
        seconds = time.perf_counter() - began
        return Promotion(source, self.device.get(key).nbytes, seconds)

    def bring(self, passages: Sequence[Segment]) -> None:
        """Bring passages to the device and keep them there together; StoreError if its memory cannot hold them all."""
        keys = [self.key(passage) for passage in passages]
        for key in keys:
            if self.device.contains(key):
                self.device.get(key)  # used last: others leave first
        for key in keys:
            self.promote(key)
        if not all(self.device.contains(key) for key in keys):
            raise StoreError(f"{self._device_bytes} bytes on the device cannot hold a prompt's {len(keys)} chunks")


def kernels_lack(device: torch.device) -> str:
    """Why the Triton kernels do not compute this host's prefill, in one line."""
    if device.type != "cuda":
        return f"the model is on {device.type}: they run on CUDA"
    return "the reference host computes in plain PyTorch: they serve vLLM's paged cache (docs/vllm.md)"
