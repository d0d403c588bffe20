"""Text as token ids, tokenised one part at a time, so that no token spans two segments."""

from collections.abc import Sequence


def encode(tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of `text` alone, without special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def opening(tokenizer) -> tuple[int, ...]:
    """The first ids of a prompt: BOS, if the tokenizer has one."""
    return () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)


def encode_parts(tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of every part of a prompt; the first part begins with BOS (`opening`)."""
    first = opening(tokenizer)
    return [(first if i == 0 else ()) + encode(tokenizer, text) for i, text in enumerate(texts)]
