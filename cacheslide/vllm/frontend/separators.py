"""Annotations by separator: cuts the prompt at each separator and removes the separators.

A separator in a text is found before tokenisation and the parts are tokenised one by one: a part has the same tokens
every turn, whatever its neighbours. In a prompt given as ids it is found by its ids.
"""

from collections.abc import Sequence
from typing import Any

from cacheslide.core.prompt import Role
from cacheslide.errors import PromptError
from cacheslide.vllm.limits import SEGMENTS, SEPARATOR, check_text, shown

Spans = list[tuple[int, int]]
_ROLES = frozenset(map(str, Role))


def cut(
    separator: str | Sequence[int], roles: Sequence[str] | None, text: str | None, ids: Sequence[int], tokenizer: Any
) -> tuple[list[int], Spans]:
    """Token ids without separators, and the fixed spans in them.

    Parameters
    ----------
    separator : str or sequence of int
        Text or token ids.
    roles : sequence of str, optional
        "reuse" or "recompute" for every part; by default parts alternate, starting with "reuse".
    text : str, optional
        The prompt's text, if it was given as text; `ids` are its tokens.
    tokenizer : Hugging Face tokenizer or None
        Needed for a text separator.

    Raises
    ------
    PromptError
        If the separator does not occur, is too long or gives too many parts, or if roles do not match the parts.
    """
    if not len(separator):
        raise PromptError("the separator is empty")
    if not isinstance(separator, str) and len(separator) > SEPARATOR:
        raise PromptError(f"the separator has {len(separator)} token ids, of at most {SEPARATOR}")
    if isinstance(separator, str):
        check_text("the separator", separator, SEPARATOR)
        if tokenizer is None:
            raise PromptError("a separator that is a text needs a tokenizer, which this server does not have: give ids")
        parts = _split_text(separator, text, ids, tokenizer) if text is not None else None
        if parts is None:
            wanted = tokenizer.encode(separator, add_special_tokens=False)
            parts = split_ids(ids, wanted)
            if len(parts) == 1:
                raise PromptError(
                    f"the separator {shown(separator)}, as token ids {shown(wanted)}, is not in the prompt, which came "
                    "as ids: between other text it may have other tokens; put these ids there, or send text"
                )
        elif len(parts) == 1:
            raise PromptError(f"the separator {shown(separator)} is not in the prompt")
    else:
        parts = split_ids(ids, separator)
        if len(parts) == 1:
            raise PromptError(f"the separator's token ids {shown(list(separator))} are not in the prompt")
    return _join(parts, _roles(roles, len(parts)))


def text_after(text: str, before: Sequence[int], after: Sequence[int], tokenizer: Any) -> str:
    """The text of `after`, the tokens left of a prompt; `text` is that of the tokens `before`.

    Special tokens that the tokenizer puts before the text are in neither text.
    """
    original, left = tokenizer.decode(before), tokenizer.decode(after)
    head = original.removesuffix(text) if text and original.endswith(text) else None
    if head is not None and left.startswith(head):
        return left[len(head) :]
    return tokenizer.decode(after, skip_special_tokens=True)


def split_ids(ids: Sequence[int], separator: Sequence[int]) -> list[list[int]]:
    """The parts of `ids` between the occurrences of `separator`; PromptError for too many."""
    ids, separator = list(ids), list(separator)
    if not separator:
        raise PromptError("the separator has no tokens")
    parts, start, at = [], 0, 0
    while True:
        if len(parts) >= SEGMENTS:
            raise PromptError(f"the separator cuts the prompt into more than {SEGMENTS} parts")
        try:
            at = ids.index(separator[0], at)
        except ValueError:
            return [*parts, ids[start:]]
        if ids[at : at + len(separator)] == separator:
            parts.append(ids[start:at])
            at = start = at + len(separator)
        else:
            at += 1


def _split_text(separator: str, text: str, ids: Sequence[int], tokenizer: Any) -> list[list[int]]:
    if text.count(separator) >= SEGMENTS:
        raise PromptError(f"the separator cuts the prompt into more than {SEGMENTS} parts")
    plain, ids = tokenizer.encode(text, add_special_tokens=False), list(ids)
    head = len(ids) - len(plain)  # special tokens that the tokenizer puts before the text
    if head < 0 or ids[head:] != plain:
        raise PromptError(
            "the prompt's tokens are not those of its text (was it truncated?): separate token ids instead"
        )
    parts = [tokenizer.encode(part, add_special_tokens=False) if part else [] for part in text.split(separator)]
    return [ids[:head] + parts[0], *parts[1:]]


def _roles(roles: Sequence[str] | None, parts: int) -> list[Role]:
    if roles is None:
        return [Role.RECOMPUTE if i % 2 else Role.REUSE for i in range(parts)]
    if not isinstance(roles, list | tuple):
        raise PromptError(f"roles must be a list of 'reuse' and 'recompute', not {shown(roles)}")
    if wrong := [r for r in roles if not isinstance(r, str) or r not in _ROLES]:
        raise PromptError(f"roles must be a list of 'reuse' and 'recompute': {shown(wrong[0])} is neither")
    if len(roles) != parts:
        raise PromptError(f"the separator cuts the prompt into {parts} parts, but {len(roles)} roles are given")
    return [Role(r) for r in roles]


def _join(parts: Sequence[Sequence[int]], roles: Sequence[Role]) -> tuple[list[int], Spans]:
    ids, spans = [], []
    for part, role in zip(parts, roles, strict=True):
        if role is Role.REUSE and len(part):
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    if not ids:
        raise PromptError("the prompt holds nothing but separators")
    return ids, spans
