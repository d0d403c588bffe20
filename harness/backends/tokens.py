"""Task text as token ids, equal for every backend."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.prompt_file import load_tokenizer
from cacheslide.core.tokenizing import encode, encode_parts
from harness.tasks.example import TaskExample, TextSegment


def prompt_of(tokenizer: PreTrainedTokenizerBase, segments: Sequence[TextSegment]) -> Prompt:
    """Segments tokenised one by one, so that no token spans two of them; the first begins with BOS."""
    parts = encode_parts(tokenizer, [s.text for s in segments])
    return Prompt(tuple(Segment(ids, Role(s.role), s.name) for s, ids in zip(segments, parts, strict=True)))


class Tokens:
    """A checkpoint folder's tokenizer."""

    def __init__(self, path: str | Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, without special tokens."""
        return encode(self.tokenizer, text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def prompt(self, segments: Sequence[TextSegment], question: str = "") -> Prompt:
        """See `prompt_of`; a question follows the segments."""
        last = (TextSegment("question", question, "recompute"),) if question else ()
        return prompt_of(self.tokenizer, (*segments, *last))

    def questions(self, example: TaskExample) -> list[tuple[int, ...]]:
        """Token ids of every question of `example`."""
        return [self.encode(q.text) for q in example.questions]

    def eos_ids(self) -> frozenset[int]:
        """The id that ends a sequence, if the tokenizer has one."""
        return frozenset() if self.tokenizer.eos_token_id is None else frozenset({self.tokenizer.eos_token_id})

    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of sequence and the newline."""
        newline = self.encode("\n")
        return self.eos_ids() | (frozenset(newline) if len(newline) == 1 else frozenset())
