"""Annotations by chat message: which messages are fixed text, and their token spans in the rendered chat.

A boundary after message k is used only if the first k messages, rendered and tokenised alone, give the prompt's first
tokens; a template that renders a message differently when others follow has no boundary there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacheslide.core.prompt import Role
from cacheslide.errors import PromptError
from cacheslide.vllm.limits import NOTE, sayable, shown
from cacheslide.vllm.options import FIELD

_KEYS = ("roles", "updated", "fixed")
_RENDERED = 64  # maximum number of boundaries tried in a chat: each renders and tokenises the messages before it


@dataclass(frozen=True)
class AnnotatedChat:
    """A rendered chat: its tokens, their fixed spans, and the boundaries that the template did not allow."""

    token_ids: list[int]
    segments: list[tuple[int, int]]
    note: str = ""

    def params(self, **options: Any) -> dict[str, Any]:
        """`kv_transfer_params` for a request with these tokens, or with the messages they were rendered from."""
        annotations = {"segments": [list(s) for s in self.segments], **options}
        return {FIELD: annotations | ({"note": sayable(self.note, NOTE)} if self.note else {})}


def message_roles(annotations: Any, messages: Sequence[Mapping[str, Any]]) -> list[Role]:
    """A role for every message.

    Parameters
    ----------
    annotations : "auto", list or mapping
        "auto": everything is fixed except the last user message. A list gives one role per message ("reuse" or
        "recompute"). A mapping changes "auto": `roles` gives a role to all messages of a sender ({"tool":
        "recompute"}), then `updated` and `fixed` set single messages by index (-1 is the last one).
    """
    if isinstance(annotations, list | tuple):
        if len(annotations) != len(messages):
            raise PromptError(f"messages: {len(annotations)} roles for {len(messages)} messages")
        return [_role(m) for m in annotations]
    if annotations != "auto" and not isinstance(annotations, Mapping):
        raise PromptError(f"messages must be 'auto', a list of roles or an object, not {shown(annotations)}")
    given = {} if annotations == "auto" else annotations
    if wrong := [key for key in given if key not in _KEYS]:
        raise PromptError(f"messages: unknown key {sayable(str(wrong[0]), 80)} (known: {', '.join(_KEYS)})")
    senders = given.get("roles", {})
    if not isinstance(senders, Mapping):
        raise PromptError(f"messages: roles must be an object from sender to role, not {shown(senders)}")
    given_roles = {sender: _role(role) for sender, role in senders.items()}
    roles = [given_roles.get(m.get("role"), Role.REUSE) for m in messages]
    users = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    if users:
        roles[users[-1]] = Role.RECOMPUTE
    for key, role in (("updated", Role.RECOMPUTE), ("fixed", Role.REUSE)):
        indices = given.get(key, ())
        if not isinstance(indices, list | tuple):
            raise PromptError(f"messages: {key} must be a list of messages by index, not {shown(indices)}")
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or not -len(roles) <= index < len(roles):
                raise PromptError(f"messages: {key} names message {shown(index)}, but there are {len(roles)}")
            roles[index] = role
    return roles


def _role(value: Any) -> Role:
    if not isinstance(value, str) or value not in list(Role):
        raise PromptError(f"messages: a role must be 'reuse' or 'recompute', not {shown(value)}")
    return Role(value)


def spans_of(
    roles: Sequence[Role], token_ids: Sequence[int], prefix: Callable[[int], Sequence[int]]
) -> tuple[list[tuple[int, int]], str]:
    """Fixed spans of a rendered chat, and a note on boundaries that the template did not allow.

    `prefix(k)` returns the tokens of the first k messages alone and may raise. Runs of fixed messages are shortened at
    their edges until a boundary holds. At most `_RENDERED` calls of `prefix` are made.
    """
    rows: dict[int, int | None] = {0: 0}
    why: list[str] = []

    def at(k: int) -> int | None:
        if k not in rows:
            rows[k] = None
            if len(rows) > _RENDERED:
                why.append(f"more than {_RENDERED} boundaries between fixed and updated messages")
                return None
            try:
                alone = list(prefix(k))
            except Exception as error:  # a template may raise any exception
                why.append(
                    f"the chat template does not render the first {k} messages alone ({sayable(str(error), 200)})"
                )
                return None
            if list(token_ids[: len(alone)]) == alone:
                rows[k] = len(alone)
            else:
                why.append(f"the chat template renders the first {k} messages differently when others follow")
        return rows[k]

    spans = []
    for first, end in _runs(roles):
        while first < end and at(first) is None:
            first += 1
        while end > first and at(end) is None:
            end -= 1
        if end > first and at(end) > at(first):
            spans.append((at(first), at(end)))
    return spans, "; ".join(dict.fromkeys(why))


def _runs(roles: Sequence[Role]) -> list[tuple[int, int]]:
    """Half-open runs of fixed messages."""
    runs: list[tuple[int, int]] = []
    for i, role in enumerate(roles):
        if role is Role.REUSE:
            joined = bool(runs) and runs[-1][1] == i
            runs[-1:] = [(runs[-1][0], i + 1)] if joined else [*runs[-1:], (i, i + 1)]
    return runs


def annotate_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    annotations: Any = "auto",
    *,
    add_generation_prompt: bool = True,
    **template: Any,
) -> AnnotatedChat:
    """Render a chat on the client and annotate it.

    Parameters
    ----------
    tokenizer : Hugging Face tokenizer
    messages, annotations : see `message_roles`
    **template
        Further arguments of `apply_chat_template`: tools, chat_template, variables of the template.
    """
    messages = [dict(m) for m in messages]
    roles = message_roles(annotations, messages)

    def tokens(part: Sequence[Mapping[str, Any]], prompted: bool) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompted, **template)
        return tokenizer.encode(text, add_special_tokens=False)

    ids = tokens(messages, add_generation_prompt)
    spans, why = spans_of(roles, ids, lambda k: tokens(messages[:k], False))
    return AnnotatedChat(ids, spans, why)
