"""Prompts as token ids, by a model's tokenizer and chat template or by a regular expression."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from cacheslide.analysis.session import Message, Turn
from cacheslide.core.prompt_file import load_tokenizer
from cacheslide.core.tokenizing import encode, opening

# Words of at most eight letters, numbers of at most three digits, punctuation one by one, blanks with what follows.
PATTERN = re.compile(r" ?[^\W\d_]{1,8}| ?\d{1,3}| ?[^\s\w]|_|\s+(?=\S)|\s+")


class TokenCounter(Protocol):
    """Tokenises prompts; `name` is the method's name in reports."""

    name: str

    def ids(self, turn: Turn) -> np.ndarray:
        """Token ids of a prompt, int64, at least 0."""
        ...


class PatternCounter:
    """Tokens by a regular expression: counts close to a tokenizer's for English; equal text gives equal tokens."""

    name = "a built-in regular expression, an approximation"

    def __init__(self) -> None:
        self._known: dict[str | int, int] = {}

    def ids(self, turn: Turn) -> np.ndarray:
        """Token ids, numbered in the order of first occurrence."""
        if turn.token_ids is not None:
            tokens: Iterable[str | int] = turn.token_ids
        else:
            tokens = PATTERN.findall("".join(plain_parts(turn)))
        known = self._known
        return np.array([known.setdefault(token, len(known)) for token in tokens], dtype=np.int64)


class ModelCounter:
    """Tokens of a model's tokenizer.

    Messages go through the tokenizer's chat template if it accepts all of `turns`; otherwise each follows a header with
    its role. Parts are then encoded one by one, so that equal messages are equal tokens.

    Parameters
    ----------
    folder : str or Path
        Checkpoint folder; only its tokenizer is read.
    turns : sequence of Turn
        All turns to be counted.

    Raises
    ------
    ModelError
        If the folder has no tokenizer.
    """

    def __init__(self, folder, turns: Sequence[Turn]) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._parts: dict[str, tuple[int, ...]] = {}
        self.template, self.name = False, f"the tokenizer in {folder}"
        chats = [turn for turn in turns if any(m.role for m in turn.messages)]
        if chats:
            self.template, why = self._takes(chats)
            self.name += " and its chat template" if self.template else f"; messages behind role headers ({why})"

    def ids(self, turn: Turn) -> np.ndarray:
        """Ids of the whole prompt, BOS included."""
        if turn.token_ids is not None:
            return np.array(turn.token_ids, dtype=np.int64)
        if self.template and any(m.role for m in turn.messages):
            return np.array(encode(self.tokenizer, self._templated(turn)), dtype=np.int64)
        ids = list(opening(self.tokenizer))
        for part in plain_parts(turn):
            if part not in self._parts:
                self._parts[part] = encode(self.tokenizer, part)
            ids += self._parts[part]
        return np.array(ids, dtype=np.int64)

    def _takes(self, chats: Sequence[Turn]) -> tuple[bool, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            return False, "it has no chat template"
        for turn in chats:
            try:
                self._templated(turn)
            except Exception as refused:  # a chat template is a program and may raise any exception
                return False, f"its chat template refuses them: {(str(refused).splitlines() or [''])[0][:80]}"
        return True, ""

    def _templated(self, turn: Turn) -> str:
        chat = [_as_sent(message) for message in turn.messages]
        tools = json.loads(turn.tools) if turn.tools else None
        return self.tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)


def plain_parts(turn: Turn) -> list[str]:
    """The texts of a prompt without a chat template: a header before every message with a role."""
    parts = [f"<|tools|>\n{turn.tools}\n"] if turn.tools else []
    for m in turn.messages:
        text = m.content + (f"\n{m.calls}" if m.calls else "")
        parts.append(f"<|{m.role}{' ' if m.name else ''}{m.name}|>\n{text}\n" if m.role else text)
    return parts


def _as_sent(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        out["name"] = message.name
    if message.calls:
        out["tool_calls"] = json.loads(message.calls)
    return out
