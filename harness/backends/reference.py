"""The reference backend: the plain-PyTorch model and its tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cacheslide.core.engine import Prefilled, ReuseEngine
from cacheslide.errors import ConfigError
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkStore
from harness.backends.answering import answer_branches, branch_room
from harness.backends.checkpoints import find_checkpoint
from harness.backends.tokens import Tokens
from harness.tasks.example import TaskExample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r} (known: {', '.join(DTYPES)})")
    return DTYPES[name]


def exact_arithmetic() -> None:
    """Set float32 products to full precision on a GPU too. Call before the first one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic order of sums
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class EngineSettings:
    """How engines cut and store chunks; the same for every system of a run."""

    chunk_size: int = 1024
    suffix_len: int = 1
    store_dtype: str = "float32"


class ReferenceBackend(Tokens):
    """Loads a checkpoint with its tokenizer.

    Parameters
    ----------
    path : str or Path
        A folder, or a name on the Hugging Face hub.
    dtype, device : str
        The model's dtype and device.
    """

    def __init__(self, path: str | Path, dtype: str = "float32", device: str = "cpu") -> None:
        path = find_checkpoint(path)
        self.model = ReferenceDecoder.from_pretrained(path, dtype_of(dtype), device)
        super().__init__(path)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.num_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        return self.model.embedding.shape[0]

    def engine(
        self,
        policy: ReusePolicy,
        store: ChunkStore,
        settings: EngineSettings,
        capture: frozenset[int] = frozenset(),
        corrected: ChunkStore | None = None,
        namespace: str = "",
    ) -> ReuseEngine:
        """An engine for `policy` over this model; `corrected` holds what `ReuseEngine.retain` copies."""
        return ReuseEngine(
            self.model,
            policy,
            store,
            chunk_size=settings.chunk_size,
            suffix_len=settings.suffix_len,
            store_dtype=dtype_of(settings.store_dtype),
            capture=capture,
            corrected=corrected,
            namespace=namespace,
        )

    def answers(self, state: Prefilled, example: TaskExample, max_new_tokens: int) -> list[str]:
        """The answers to all questions of `example` behind a prefilled context, decoded."""
        ids = answer_branches(self.model, state, self.questions(example), max_new_tokens, self.stop_ids())
        return [self.decode(a) for a in ids]

    def answers_each(
        self, engine: ReuseEngine, example: TaskExample, max_new_tokens: int
    ) -> tuple[list[str], list[Prefilled]]:
        """The answers where each question is part of a prompt of its own, decoded, and what each prefill left."""
        texts, states = [], []
        for question in example.questions:
            state = engine.prefill(self.prompt(example.segments, question.text), room=max_new_tokens)
            states.append(state)
            texts.append(self.decode(engine.generate(state, state.logits, max_new_tokens, self.stop_ids())))
        return texts, states

    def room(self, example: TaskExample, max_new_tokens: int) -> int:
        """Rows behind a context for all of its questions and their answers."""
        return branch_room(self.questions(example), max_new_tokens)


def device_of(name: str) -> str:
    """The name, checked to be a device known to torch."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as missing:
        raise ConfigError(f"no device {name!r} here: {str(missing).splitlines()[0]}") from None
    return name
