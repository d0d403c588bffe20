"""The interface between an agent and any model server: request, completion, completer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cacheslide.core.prompt import Prompt
from cacheslide.errors import CacheSlideError
from harness.backends.client import Result
from harness.tasks.example import TextSegment


class CompletionError(CacheSlideError, RuntimeError):
    """A server refused or failed a request; the episode ends with it as a recorded failure."""


@dataclass(frozen=True)
class Request:
    """One prompt. `session` names the episode and `step` counts its requests."""

    session: str
    step: int
    segments: tuple[TextSegment, ...]
    max_tokens: int
    stop: tuple[str, ...] = ("\n",)

    @property
    def id(self) -> str:
        """Identifier within a run."""
        return f"{self.session}-{self.step}"

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return "".join(s.text for s in self.segments)


@dataclass(frozen=True)
class Completion:
    """A server's answer.

    Attributes
    ----------
    text : str
        The output, up to and without its stop text.
    prompt_ids : tuple of tuples of int or None
        Per segment, the token ids that were sent; None where the tokenizer is not known.
    output_ids : tuple of int or None
    token_s : tuple of float
        Seconds from the request to each token (or streamed piece); the first one is the time to first token.
    total_s : float
    receipt : dict or None
        The server's report of the reuse.
    """

    text: str
    prompt_ids: tuple[tuple[int, ...], ...] | None = None
    output_ids: tuple[int, ...] | None = None
    token_s: tuple[float, ...] = ()
    total_s: float = 0.0
    receipt: dict[str, Any] | None = field(default=None)

    @classmethod
    def of(cls, result: Result, prompt: Prompt | None = None) -> "Completion":
        """The completion of an answered request; `prompt` is the sent prompt, where the tokenizer is known."""
        return cls(
            result.text or "",
            None if prompt is None else tuple(s.token_ids for s in prompt.segments),
            None if result.token_ids is None else tuple(result.token_ids),
            tuple(t - result.sent for t in result.token_times),
            result.seconds,
            result.receipt,
        )

    @property
    def ttft_s(self) -> float | None:
        """Time to first token in seconds."""
        return self.token_s[0] if self.token_s else None


class Completer(Protocol):
    """A model behind one interface. `system` names the serving system."""

    system: str

    def complete(self, request: Request) -> Completion:
        """The greedy continuation; CompletionError or PromptError when there is none."""
        ...


class Scripted:
    """A completer that is a function of the request: oracles, baselines and hostile models."""

    def __init__(self, system: str, function: Callable[[Request], str]) -> None:
        self.system, self.function = system, function

    def complete(self, request: Request) -> Completion:
        """The function's text, timed."""
        begin = time.perf_counter()
        text = self.function(request)
        seconds = time.perf_counter() - begin
        return Completion(text, token_s=(seconds,), total_s=seconds)
