"""PromptCache's schema computed in one pass: fixed text attends to earlier fixed text, and to placeholders in slots."""

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
    """The schema up to the fixed segment `last`: each updated segment is replaced by placeholders that fill its slot.

    Parameters
    ----------
    positions : sequence of int
        Position of every row of `prompt`; in the result, a row's position is its index.
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

    As in the public code of PromptCache for a schema without alternatives (yale-sys/prompt-cache,
    `SchemaCache._process`): one causal forward over the tokens of the whole scaffold, with the tokenizer's unknown
    token for parameters, of which the KV of text is kept. It contains no updated text of any turn. A schema that
    grew by a segment is recomputed as a whole, since placeholders are not kept.

    Attributes
    ----------
    placeholder : int
        The id that fills a slot: 0, Llama's unknown token.
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
        """The keying must include the preceding chain, on which the KV depends."""
        if not keying.follows_chain:
            raise PolicyError("modules that are encoded jointly need the fixed-chain keying")

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """The schema's rows up to the last fixed token; a slot that is not full has more places than prompt rows."""
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
