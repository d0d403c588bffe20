"""PromptCache's schema computed in one pass: fixed text sees the fixed text before it, and placeholders in slots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cacheslide.core.keys import ChunkKey, Keying
from cacheslide.core.prompt import Chunk, Prompt, Role, Segment
from cacheslide.errors import PolicyError
from cacheslide.policies.encodings import Encoded
from cacheslide.positions.ccpe import slots_in


def scaffold(prompt: Prompt, positions: Sequence[int], last: int, placeholder: int) -> Prompt:
    """The schema up to segment `last`, a fixed one: an updated segment is as many placeholders as its slot has places.

    Parameters
    ----------
    positions : sequence of int
        Of every row of `prompt`; a row of the result is its own position.
    """
    segments = prompt.segments[: last + 1]
    widths = [positions[b] - positions[a] for a, b in pairwise(prompt.starts[: last + 1])]
    filled = [
        s if s.role is Role.REUSE else Segment((placeholder,) * width, s.role, s.name)
        for s, width in zip(segments[:-1], widths, strict=True)
    ]
    return Prompt((*filled, segments[-1]))


@dataclass(frozen=True)
class JointModules:
    """All fixed segments in one prefill of the schema, each updated segment replaced by its slot's placeholders.

    That is what the public code of PromptCache does for a schema without alternatives (yale-sys/prompt-cache,
    `SchemaCache._process`): one causal forward over the tokens of the whole scaffold, whose parameters are the
    tokenizer's unknown token, and of its KV what belongs to text is kept. No updated text of any turn is in it. A
    schema that grew by a segment is computed anew as a whole, since placeholders are not kept.

    Attributes
    ----------
    placeholder : int
        The id that stands in a slot: 0, Llama's unknown token.
    """

    placeholder: int = 0
    in_prompt: bool = False
    at_slot: bool = True
    position_free: bool = False
    separate: bool = False

    def __post_init__(self) -> None:
        if self.placeholder < 0:
            raise PolicyError(f"placeholder is a token id of at least 0, not {self.placeholder}")

    @property
    def name(self) -> str:
        """See `Encoding.name`."""
        return "joint" if not self.placeholder else f"joint_{self.placeholder}"

    def check(self, keying: Keying) -> None:
        """The chain before a chunk is part of its KV."""
        if not keying.follows_chain:
            raise PolicyError("modules that are encoded jointly need the fixed-chain keying")

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """The rows up to the last fixed token; slots that are not full have more places than rows."""
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
        schema = scaffold(prompt, positions, chunks[-1].segment, self.placeholder)
        exact = encoder.prefill(schema.token_ids, range(len(schema)), slots=slots_in(schema))
        for number, (chunk, new) in enumerate(zip(chunks, missing, strict=True)):
            if new:
                first = positions[chunk.start]
                yield number, exact, first, first + len(chunk)
