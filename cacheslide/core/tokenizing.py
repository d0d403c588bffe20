"""Text as token ids, one part at a time: no token straddles two segments."""

from collections.abc import Sequence


def encode(tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of `text` alone, without special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def opening(tokenizer) -> tuple[int, ...]:
    """What a prompt begins with: BOS, where the tokenizer has one."""
    return () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)


def encode_parts(tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of every part of a prompt; its opening belongs to the first."""
    first = opening(tokenizer)
    return [(first if i == 0 else ()) + encode(tokenizer, text) for i, text in enumerate(texts)]
