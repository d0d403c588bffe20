"""A policy's plan of a prompt, made without a model or a store; both hosts use it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cacheslide.core.keys import CacheIdentity, ChunkKey, chunk_keys
from cacheslide.core.prompt import Chunk, Prompt
from cacheslide.errors import PromptError
from cacheslide.policies.base import ReusePolicy


@dataclass(frozen=True)
class Plan:
    """A (transformed) prompt, the position index of every row, its chunks and their keys.

    `positions` is a `range` where a row's position is its index, so that a plan sent to another process holds the
    prompt's numbers once.
    """

    prompt: Prompt
    positions: Sequence[int]
    chunks: tuple[Chunk, ...]
    keys: tuple[ChunkKey, ...]

    @property
    def schema(self) -> bool:
        """Whether rows sit at other positions than their indices."""
        return self.positions[-1] != len(self.prompt) - 1

    @property
    def keyed(self) -> tuple[tuple[ChunkKey, Chunk], ...]:
        """The chunks with their keys, in prompt order."""
        return tuple(zip(self.keys, self.chunks, strict=True))

    def parts(self) -> "list[Plan]":
        """The same prompt once for each chunk, with that chunk alone."""
        return [replace(self, chunks=(chunk,), keys=(key,)) for key, chunk in self.keyed]


def make_plan(
    policy: ReusePolicy, identity: CacheIdentity, prompt: Prompt, chunk_size: int, max_positions: int
) -> Plan:
    """Plan `prompt` under `policy`. Needs no model: vLLM's scheduler calls it too.

    PromptError where the prompt needs more than `max_positions` positions.
    """
    prompt = policy.transform(prompt)
    positions = policy.placement.positions(prompt)
    if positions[-1] >= max_positions:
        raise PromptError(f"the prompt needs {positions[-1] + 1} positions, the model has {max_positions}")
    chunks = prompt.chunks(chunk_size) if policy.reuses else ()
    keys = chunk_keys(policy.keying, policy.kind, identity, prompt, chunks, positions)
    return Plan(prompt, positions, chunks, tuple(keys))
