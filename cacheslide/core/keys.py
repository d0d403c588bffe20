"""Chunk keys and keyings: which chunks count as the same (section 1 of docs/architecture.md).

PDC, PIC and RPDC differ only in what is hashed: everything up to the chunk's end (prefix), the chunk alone
(content), or the chain of fixed chunks with the updated segments skipped (fixed chain). Every key also covers the
model, the adapter, the dtype, the tenant's namespace and the encoding: KV computed under one of them is never served
under another.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cacheslide.core.prompt import Chunk, Prompt, Role

ChunkKey = str


def _digest(*parts: bytes) -> bytes:
    """BLAKE2b-160 over length-prefixed parts (the prefix keeps ("ab","c") and ("a","bc") apart)."""
    h = hashlib.blake2b(digest_size=20)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def _ids(token_ids: Sequence[int]) -> bytes:
    """Each id as four little-endian bytes; reading a tuple with numpy takes four times as long."""
    numbers = array("I", token_ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


@dataclass(frozen=True)
class CacheIdentity:
    """What a KV cache depends on besides the text: the model's weights, a LoRA/CoPE adapter, dtype, tenant."""

    model: str
    dtype: str
    adapter: str = ""
    namespace: str = ""

    def digest(self) -> bytes:
        """Twenty bytes that differ when any field differs."""
        fields = (self.model, self.dtype, self.adapter, self.namespace)
        return _digest(*(f.encode("utf-8", "surrogatepass") for f in fields))


class Keying(Protocol):
    """Gives each chunk of a prompt a digest; equal digests mean interchangeable KV.

    Attributes
    ----------
    name : str
        Part of the name of a chunk cache.
    matches : bool
        Whether the keying can match at all.
    exact : bool
        Equal digests mean equal KV: everything before the chunk is the same, so reuse corrects nothing.
    follows_context, follows_chain : bool
        Whether a chunk's digest covers at least the fixed chunks before it; whether it covers exactly that chain.
    """

    name: str
    matches: bool
    exact: bool
    follows_context: bool
    follows_chain: bool

    def digests(self, prompt: Prompt, chunks: Sequence[Chunk], positions: Sequence[int]) -> list[bytes]:
        """One digest per chunk; `positions` holds the position index of every row."""
        ...


@dataclass(frozen=True)
class NoKeying:
    """Nothing matches: plain recompute."""

    name: ClassVar[str] = "no"
    matches: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    follows_context: ClassVar[bool] = True
    follows_chain: ClassVar[bool] = False

    def digests(self, prompt: Prompt, chunks: Sequence[Chunk], positions: Sequence[int]) -> list[bytes]:
        return []


@dataclass(frozen=True)
class PrefixKeying:
    """PDC: all tokens from the prompt's start to the chunk's end."""

    name: ClassVar[str] = "prefix"
    matches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    follows_context: ClassVar[bool] = True
    follows_chain: ClassVar[bool] = False

    def digests(self, prompt: Prompt, chunks: Sequence[Chunk], positions: Sequence[int]) -> list[bytes]:
        out, at, link = [], 0, b"prefix"
        for chunk in chunks:
            link = _digest(link, _ids(prompt.token_ids[at : chunk.end]))
            at = chunk.end
            out.append(link)
        return out


@dataclass(frozen=True)
class ContentKeying:
    """PIC: the chunk's own tokens; with `positioned`, also its first position (one copy per position, PromptCache)."""

    positioned: bool = False
    name: ClassVar[str] = "content"
    matches: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    follows_context: ClassVar[bool] = False
    follows_chain: ClassVar[bool] = False

    def digests(self, prompt: Prompt, chunks: Sequence[Chunk], positions: Sequence[int]) -> list[bytes]:
        return [
            _digest(
                b"content",
                positions[c.start].to_bytes(4, "little") if self.positioned else b"",
                _ids(prompt.token_ids[c.start : c.end]),
            )
            for c in chunks
        ]


@dataclass(frozen=True)
class FixedChainKeying:
    """RPDC (section 3): the chain over the fixed chunks only; the updated segments between them are skipped.

    With `positioned` the chain also covers every chunk's first position: a schema's fixed text and its slots.
    """

    positioned: bool = False
    name: ClassVar[str] = "fixedchain"
    matches: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    follows_context: ClassVar[bool] = True
    follows_chain: ClassVar[bool] = True

    def digests(self, prompt: Prompt, chunks: Sequence[Chunk], positions: Sequence[int]) -> list[bytes]:
        out, link = [], b"fixed-chain"
        for chunk in chunks:
            where = (positions[chunk.start].to_bytes(4, "little"),) if self.positioned else ()
            link = _digest(link, *where, _ids(prompt.token_ids[chunk.start : chunk.end]))
            out.append(link)
        return out


def chunk_keys(
    keying: Keying,
    kind: str,
    identity: CacheIdentity,
    prompt: Prompt,
    chunks: Sequence[Chunk],
    positions: Sequence[int],
) -> list[ChunkKey]:
    """The store's keys of `chunks`, 40 hexadecimal characters each; empty when the keying matches nothing.

    `kind` identifies what the chunks contain (`ReusePolicy.kind`).
    """
    head = identity.digest()
    return [_digest(head, kind.encode(), d).hex() for d in keying.digests(prompt, chunks, positions)]


def content_id(token_ids: Sequence[int]) -> int:
    """A text as a number, int64: texts of one number are taken for the same."""
    return int.from_bytes(_digest(_ids(token_ids))[:8], "little", signed=True)


def fixed_text(prompt: Prompt) -> tuple[int, ...]:
    """The token ids of the fixed segments alone, in order: the text of the canonical chain."""
    return tuple(t for s in prompt.segments if s.role is Role.REUSE for t in s.token_ids)
