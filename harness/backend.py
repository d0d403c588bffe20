"""The in-process backend: a tokenizer and the reference model, turning task examples into engine prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cacheslide.engine import Prefilled, ReuseEngine
from cacheslide.errors import ConfigError, ModelError
from cacheslide.model.reference import ReferenceLlama
from cacheslide.policy import ReusePolicy
from cacheslide.prompt import Prompt, Role, Segment
from cacheslide.store.base import ChunkStore
from harness.answering import answer_branches, branch_room
from harness.tasks.example import TaskExample, TextSegment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r} (known: {', '.join(DTYPES)})")
    return DTYPES[name]


@dataclass(frozen=True)
class EngineSettings:
    """How engines cut and keep chunks; the same for every system of a run."""

    chunk_size: int = 1024
    suffix_len: int = 1
    store_dtype: str = "float32"


class ReferenceBackend:
    """Loads a checkpoint folder with its tokenizer.

    Parameters
    ----------
    path : str or Path
    dtype, device : str
        What the model computes in, and where.
    """

    def __init__(self, path: str | Path, dtype: str = "float32", device: str = "cpu") -> None:
        self.model = ReferenceLlama.from_pretrained(path, dtype_of(dtype), device)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as missing:
            raise ModelError(f"no tokenizer in {path}: {missing}") from None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, without special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

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

    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of sequence and the newline."""
        newline = self.encode("\n")
        ids = {self.tokenizer.eos_token_id, newline[-1] if len(newline) == 1 else None}
        return frozenset(i for i in ids if i is not None)

    def engine(
        self,
        policy: ReusePolicy,
        store: ChunkStore,
        settings: EngineSettings,
        capture: frozenset[int] = frozenset(),
    ) -> ReuseEngine:
        """An engine for `policy` over this model."""
        return ReuseEngine(
            self.model,
            policy,
            store,
            chunk_size=settings.chunk_size,
            suffix_len=settings.suffix_len,
            store_dtype=dtype_of(settings.store_dtype),
            capture=capture,
        )

    def answers(self, state: Prefilled, example: TaskExample, max_new_tokens: int) -> list[str]:
        """The answers to all questions of `example` behind a prefilled context, decoded."""
        ids = [self.encode(q.text) for q in example.questions]
        found = answer_branches(self.model, state, ids, max_new_tokens, self.stop_ids())
        return [self.tokenizer.decode(a, skip_special_tokens=True).strip() for a in found]

    def room(self, example: TaskExample, max_new_tokens: int) -> int:
        """Rows to leave free behind a context for all of its questions and their answers."""
        return branch_room([self.encode(q.text) for q in example.questions], max_new_tokens)
