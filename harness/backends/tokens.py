"""Task text as token ids: the same for every backend."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.prompt_file import load_tokenizer
from harness.tasks.example import TaskExample, TextSegment


class Tokens:
    """A checkpoint folder's tokenizer."""

    def __init__(self, path: str | Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, without special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def prompt(self, segments: Sequence[TextSegment], question: str = "") -> Prompt:
        """Segments tokenised one by one, so that no token straddles a boundary; BOS goes into the first."""
        first = () if self.tokenizer.bos_token_id is None else (self.tokenizer.bos_token_id,)
        out = []
        for s in segments:
            out.append(Segment(first + self.encode(s.text), Role(s.role), s.name))
            first = ()
        if question:
            out.append(Segment(self.encode(question), Role.RECOMPUTE, "question"))
        return Prompt(tuple(out))

    def questions(self, example: TaskExample) -> list[tuple[int, ...]]:
        """Token ids of every question of `example`."""
        return [self.encode(q.text) for q in example.questions]

    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of sequence and the newline."""
        newline = self.encode("\n")
        ids = {self.tokenizer.eos_token_id, newline[-1] if len(newline) == 1 else None}
        return frozenset(i for i in ids if i is not None)
