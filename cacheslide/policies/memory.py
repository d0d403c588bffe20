"""Notes that a policy stores beside its chunks and applies when they are reused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Stores hold tensors of int64 or a chunk's dtypes, of at most 4 dimensions (`store.base.bad_notes`).
Notes = dict[str, Tensor]


class Memory(Protocol):
    """The notes of a policy, tensors by name beside each chunk (`ChunkKV.notes`).

    They are made when a chunk is encoded, may change its KV when it is reused, and may be extended by a request that
    reused nothing. A chunk may have none: a store without support for notes keeps the chunk alone.

    Attributes
    ----------
    name : str
        Part of every chunk key, since chunks with notes are another kind of cache; empty without notes.
    """

    name: str

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """The notes of the plan's chunk `number`, just encoded.

        Parameters
        ----------
        model : ModelAdapter
        plan : Plan
        chunk : ChunkKV
            The chunk as it will be stored.
        prompt : callable
            Returns exact KV of the plan's prompt up to its last chunk, a `KVBuffer`; runs a prefill if needed.
        """
        ...

    def recall(self, model: Any, plan: Any, found: Any) -> tuple[Any, str]:
        """The request's `Found` with the KV to use, and the reason if nothing is reused (else "").

        Chunks of `found` are not modified. Called before anything is computed.
        """
        ...

    def learn(self, model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes | None:
        """New notes of the plan's stored chunk `number`, from exact KV `kv` of its prompt; None without any."""
        ...


@dataclass(frozen=True)
class NoMemory:
    """No notes; also the base class of memories that override only some methods."""

    name: str = ""

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """See `Memory.notes`."""
        return {}

    def recall(self, model: Any, plan: Any, found: Any) -> tuple[Any, str]:
        """See `Memory.recall`: chunks are reused unchanged."""
        return found, ""

    def learn(self, model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes | None:
        """See `Memory.learn`."""
        return None
