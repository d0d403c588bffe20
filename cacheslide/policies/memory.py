"""What a policy keeps beside its chunks, and what it makes of that where they are reused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# What stores can hold (`store.base.bad_notes`): of int64 or a chunk's dtypes, at most 4 dimensions.
Notes = dict[str, Tensor]


class Memory(Protocol):
    """The notes of a policy, tensors by name beside each chunk (`ChunkKV.notes`).

    They are made where a chunk is encoded, they may change its KV where it is reused, and a request that reused nothing
    may add to them. A chunk may have none: a store that holds no notes keeps a chunk without.

    Attributes
    ----------
    name : str
        Part of every chunk key, since chunks with notes are another kind of cache; empty where nothing is kept.
    """

    name: str

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """The notes of the plan's chunk `number`, just encoded.

        Parameters
        ----------
        model : ModelAdapter
        plan : Plan
        chunk : ChunkKV
            As it is going to be kept.
        prompt : callable
            Gives exact KV of the plan's prompt, a `KVBuffer`, up to its last chunk: a prefill where there is none yet.
        """
        ...

    def recall(self, model: Any, plan: Any, found: Any) -> tuple[Any, str]:
        """What a request reuses, `Found`, with the KV it is going to have; and why nothing is reused, if so.

        Chunks of `found` are not written to. Called before anything is computed.
        """
        ...

    def learn(self, model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes | None:
        """New notes of a stored chunk, the plan's `number`, from `kv`, exact KV of the plan's prompt; None for none."""
        ...


@dataclass(frozen=True)
class NoMemory:
    """Nothing is kept beside chunks; the base of memories that answer some of the questions."""

    name: str = ""

    def notes(self, model: Any, plan: Any, number: int, chunk: Any, prompt: Callable[[], Any]) -> Notes:
        """See `Memory.notes`."""
        return {}

    def recall(self, model: Any, plan: Any, found: Any) -> tuple[Any, str]:
        """See `Memory.recall`: chunks serve as they are."""
        return found, ""

    def learn(self, model: Any, plan: Any, number: int, chunk: Any, kv: Any) -> Notes | None:
        """See `Memory.learn`."""
        return None
