"""The contexts in which a chunk's KV is computed: its prompt, the chain of fixed chunks, or the chunk alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cacheslide.core.keys import ChunkKey, Keying, fixed_text
from cacheslide.core.placement import Piece
from cacheslide.core.prompt import Chunk, Prompt
from cacheslide.errors import PolicyError
from cacheslide.positions.ccpe import slots_between, slots_in

Encoded = tuple[int, Any, int, int]  # see `Encoding.encode`


@dataclass(frozen=True)
class InPrompt:
    """Encodes a chunk in the prompt it first appears in."""

    name: str = "in_prompt"
    in_prompt: bool = True
    at_slot: bool = False
    position_free: bool = False
    separate: bool = False

    def check(self, keying: Keying) -> None:
        """The keying must include the preceding text, on which the KV depends."""
        if not keying.follows_context:
            raise PolicyError("KV encoded in a prompt must be keyed by what came before it")

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """The rows up to the last fixed token: later ones cannot influence it."""
        return chunks[-1].end if any(missing) else 0

    def encode(
        self,
        encoder: Any,
        prompt: Prompt,
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        keys: Sequence[ChunkKey],
        missing: Sequence[bool],
    ) -> Iterator[Encoded]:
        """See `Encoding.encode`."""
        end = chunks[-1].end
        exact = encoder.prefill(prompt.token_ids[:end], positions[:end], slots=slots_in(prompt))
        for number, (chunk, new) in enumerate(zip(chunks, missing, strict=True)):
            if new:
                yield number, exact, chunk.start, chunk.end


@dataclass(frozen=True)
class FixedChain:
    """Encodes a chunk after the fixed chunks before it, without any updated segment.

    Canonical: the KV is the same whichever turn filled the cache.
    """

    name: str = "fixed_chain"
    in_prompt: bool = False
    at_slot: bool = False
    position_free: bool = False
    separate: bool = False

    def check(self, keying: Keying) -> None:
        """The keying must include the preceding chain, on which the KV depends."""
        if not keying.follows_chain:
            raise PolicyError("a fixed-chain encoding needs the fixed-chain keying")

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """Tokens of the chain from the first missing chunk on; earlier chunks are exact in this chain."""
        lengths = [len(c) for c in chunks]
        return sum(lengths[list(missing).index(True) :]) if any(missing) else 0

    def encode(
        self,
        encoder: Any,
        prompt: Prompt,
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        keys: Sequence[ChunkKey],
        missing: Sequence[bool],
    ) -> Iterator[Encoded]:
        """See `Encoding.encode`."""
        text = fixed_text(prompt)
        ends = [sum(len(c) for c in chunks[: i + 1]) for i in range(len(chunks))]
        known = list(missing).index(True)  # only the tail of a grown history is new
        pieces = []
        for key, chunk in zip(keys[:known], chunks, strict=False):
            found = encoder.store.fetch(key, shape=encoder.shape, tokens=len(chunk)).chunk
            if found is None:  # later rows would be taken for its rows
                break
            pieces.append(Piece(found, len(chunk)))
        exact = encoder.prefill(text, range(len(text)), pieces, slots_between(prompt))
        for number, (chunk, end, new) in enumerate(zip(chunks, ends, missing, strict=True)):
            if new:
                yield number, exact, end - len(chunk), end


@dataclass(frozen=True)
class Isolated:
    """Encodes a chunk alone, from position 0, or with `at_slot` from its position in the schema."""

    at_slot: bool = False
    in_prompt: bool = False
    separate: bool = True

    @property
    def name(self) -> str:
        """See `Encoding.name`."""
        return "isolated_at_slot" if self.at_slot else "isolated"

    @property
    def position_free(self) -> bool:
        """True for one copy for all positions, false for one per slot."""
        return not self.at_slot

    def check(self, keying: Keying) -> None:
        """Any keying is accepted, since the KV depends on the chunk alone."""

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """Tokens of the missing chunks."""
        return sum(len(c) for c, m in zip(chunks, missing, strict=True) if m)

    def encode(
        self,
        encoder: Any,
        prompt: Prompt,
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        keys: Sequence[ChunkKey],
        missing: Sequence[bool],
    ) -> Iterator[Encoded]:
        """See `Encoding.encode`."""
        for number, (chunk, new) in enumerate(zip(chunks, missing, strict=True)):
            if new:
                first = positions[chunk.start] if self.at_slot else 0
                span = range(first, first + len(chunk))
                exact = encoder.prefill(prompt.token_ids[chunk.start : chunk.end], span)
                yield number, exact, 0, len(chunk)


ENCODINGS = {encoding.name: encoding for encoding in (InPrompt(), FixedChain(), Isolated(), Isolated(at_slot=True))}
