"""The client protocol of all backends: requests in, results out.

Implementations are `ReferenceClient`, `VllmClient` (an engine in this process) and `HttpClient` (a server). All decode
greedily. A refused or failed request gives a result with a `failure` and does not affect others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from cacheslide.core.prompt import Prompt
from cacheslide.errors import ConfigError, PromptError

_FAILURE_CHARS = 600
_UNRECORDED = ("text", "token_ids", "stop_id", "labels")


@dataclass(frozen=True)
class Request:
    """A greedy completion of at most `max_tokens` tokens.

    Attributes
    ----------
    id : str
    prompt : Prompt, sequence of int, or str
        Segments, token ids, or a text for the client's tokenizer. vLLM and servers get the ids of a `Prompt`, and its
        fixed spans from `params`; the reference engine serves its segments directly.
    max_tokens : int
    params : mapping or None
        `kv_transfer_params`, see `cacheslide.vllm.options.annotations_of`.
    salt : str or None
        Requests of different salts do not share cached KV.
    stream : bool
        False: a server sends its answer whole and tokens have no times. Other clients always record them.
    labels : mapping
        Copied into its result.
    stop : sequence of str
        The answer ends before the first of these texts.
    stop_ids : frozenset of int
        The answer ends before the first of these ids.
    ignore_eos : bool
        Whether the model's end of sequence is ignored unless it is in `stop_ids`.
    read_prefix_cache : bool
        Whether blocks of vLLM's prefix cache may be read.
    """

    id: str
    prompt: Prompt | Sequence[int] | str
    max_tokens: int
    params: Mapping[str, Any] | None = None
    salt: str | None = None
    stream: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = True
    read_prefix_cache: bool = True

    @property
    def sent_prompt(self) -> list[int] | str:
        """The prompt for vLLM: token ids or a text."""
        if isinstance(self.prompt, str):
            return self.prompt
        return list(self.prompt.token_ids if isinstance(self.prompt, Prompt) else self.prompt)


@dataclass
class Result:
    """Outcome of a request; times in seconds of `time.perf_counter`.

    Attributes
    ----------
    sent, finished : float
    token_times : list of float
        One per generated token, including the stop id's; tokens that arrive together share a time. Empty if a server
        did not stream.
    tokens : int
        Generated tokens, including the stop id.
    finish_reason : str or None
        "stop" or "length" for a complete answer.
    prompt_tokens, cached_tokens : int or None
        Length of the prompt, and its part in a prefix cache; None if the backend does not report them.
    receipt : dict or None
        The receipt of an annotated prompt; None for other prompts.
    failure : str
        One line; empty if the answer is complete.
    token_ids : list of int or None
        The answer without the id that ended it, which is `stop_id`. None if the backend sends texts only.
    text : str or None
        The answer's text, without a stop text; None if the backend has no tokenizer.
    """

    id: str
    sent: float
    finished: float = 0.0
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    receipt: dict[str, Any] | None = None
    failure: str = ""
    labels: dict[str, Any] = field(default_factory=dict)
    token_ids: list[int] | None = None
    stop_id: int | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token."""
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None with fewer than two."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.finished - self.sent

    @property
    def generated(self) -> list[int] | None:
        """`token_ids`, and the id that ended the answer."""
        if self.token_ids is None or self.stop_id is None:
            return self.token_ids
        return [*self.token_ids, self.stop_id]

    def checked(self) -> Self:
        """The result itself; PromptError if it has a failure."""
        if self.failure:
            raise PromptError(self.failure)
        return self

    def fail(self, reason: object) -> None:
        """Set the failure, in one line."""
        self.failure = " ".join(str(reason).split())[:_FAILURE_CHARS]

    def end(self, finish_reason: str | None, stop_reason: int | str | None, stop_ids: frozenset[int]) -> None:
        """Set the finish reason and remove the id that ended the answer from `token_ids`.

        `stop_reason` is vLLM's: a stop text, a stop id, or None for the end of sequence.
        """
        self.finish_reason = finish_reason
        by_id = finish_reason == "stop" and not isinstance(stop_reason, str)
        if self.token_ids and (by_id or self.token_ids[-1] in stop_ids):
            self.stop_id = self.token_ids.pop()

    def as_record(self, started: float) -> dict[str, Any]:
        """The result for a JSON file; times count from `started`."""
        out = {name: value for name, value in asdict(self).items() if name not in _UNRECORDED}
        for name in ("sent", "finished"):
            out[name] -= started
        out["token_times"] = [t - started for t in self.token_times]
        return dict(self.labels) | out | {"ttft": self.ttft, "tpot": self.tpot}


class Client(Protocol):
    """Serves requests; as a context manager it closes itself. Subclasses inherit that."""

    def run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """The results in the order of `requests`, with at most `clients` served at once (None: all).

        A closed loop: client k of `clients` sends requests k, k + `clients`, ..., each after its last one is answered.
        """
        ...

    def reset(self) -> None:
        """Drop all cached KV; ConfigError if the client cannot."""
        ...

    def close(self) -> None:
        """Free the client's resources; idempotent."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def at_once(requests: Sequence[Request], clients: int | None) -> int:
    """Number of `requests` that run at once with `clients` clients; ConfigError below 1."""
    if clients is not None and clients < 1:
        raise ConfigError(f"a closed loop needs at least 1 client, not {clients}")
    return len(requests) if clients is None else min(clients, len(requests))


def before(text: str, stop: Sequence[str]) -> str:
    """`text` up to and without the first of the texts in `stop`."""
    for end in stop:
        text = text.split(end, 1)[0]
    return text
