"""One streamed completion: token ids out, the time of every token back. A failure is an outcome, not an exception."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from cacheslide.vllm.options import receipt_in

_TOKEN_CHARS = 1000  # no tokenizer has longer ones
_EXPECTED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: `url` up to and without `path`.

    `extensions` sends fields that vLLM knows and other servers may refuse. `timeout` bounds a whole request, `silence`
    the time without a byte, both in seconds.
    """

    url: str
    model: str
    extensions: bool = True
    timeout: float | None = 600.0
    silence: float | None = None
    api_key: str = ""
    path: str = "/v1/completions"


@dataclass(frozen=True)
class Request:
    """A greedy completion of `max_tokens` tokens; `prompt` is token ids, or a text. It ends before a text in `stop`.

    `params` is its `kv_transfer_params` (see `cacheslide.vllm.options.annotations_of`); `salt` keeps it from reading
    what requests of another salt left in the server's caches; `labels` are copied into its outcome.
    """

    id: str
    prompt: Sequence[int] | str
    max_tokens: int
    params: Mapping[str, Any] | None = None
    salt: str | None = None
    stream: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The JSON to post."""
        out: dict[str, Any] = {
            "model": endpoint.model,
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": self.stream,
        }
        if self.stream:
            out["stream_options"] = {"include_usage": True}
        if endpoint.extensions:
            out["ignore_eos"] = True
            if self.stream:  # a chunk may hold several tokens; this says how many
                out["stream_options"]["continuous_usage_stats"] = True
        if self.stop:
            out["stop"] = list(self.stop)
        if self.params is not None:
            out["kv_transfer_params"] = dict(self.params)
        if self.salt is not None:
            out["cache_salt"] = self.salt
        return out


@dataclass
class Outcome:
    """What happened to a request; times in seconds of `time.perf_counter`.

    `token_times` has one entry a token (without `stream`, none); tokens that came in one piece share a time.
    `receipt` is the connector's, None where the server sent none; `failure` is empty when the answer is whole.
    """

    id: str
    sent: float
    finished: float = 0.0
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    receipt: dict[str, Any] | None = None
    failure: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token."""
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None with fewer than two."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    def as_record(self, started: float) -> dict[str, Any]:
        """For a JSON file: times count from `started`."""
        out = asdict(self)
        del out["text"]
        labels = out.pop("labels")
        for name in ("sent", "finished"):
            out[name] -= started
        out["token_times"] = [t - started for t in self.token_times]
        return labels | out | {"ttft": self.ttft, "tpot": self.tpot}

    def _usage(self, usage: Mapping[str, Any] | None) -> None:
        if not usage:
            return
        self.tokens = max(self.tokens, usage.get("completion_tokens") or 0)
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens", self.cached_tokens)

    def read(self, message: Mapping[str, Any], now: float) -> None:
        """Take in one piece of the answer; ValueError for an error sent in its place."""
        if "error" in message:
            raise ValueError(str(message["error"]))
        before = self.tokens
        for choice in message.get("choices", ()):
            self.text += choice.get("text") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if not message.get("usage") and choice.get("text"):
                self.tokens += 1  # a server that does not count: one a piece
        self._usage(message.get("usage"))
        if message.get("choices"):
            self.token_times += [now] * (self.tokens - before)
        if receipt := receipt_in(message.get("kv_transfer_params")):
            self.receipt = receipt


async def send(session: aiohttp.ClientSession, endpoint: Endpoint, request: Request) -> Outcome:
    """Send `request` and follow its answer to the end."""
    out = Outcome(request.id, time.perf_counter(), labels=dict(request.labels))
    try:
        async with session.post(
            endpoint.url + endpoint.path,
            json=request.body(endpoint),
            headers={"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else None,
            timeout=aiohttp.ClientTimeout(total=endpoint.timeout, sock_read=endpoint.silence),
        ) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {(await response.text())[:500]}")
            if request.stream:
                await _follow(response, out, request.max_tokens)
            else:
                out.read(json.loads(await response.read()), time.perf_counter())
                out.token_times = []
        if out.finish_reason not in ("stop", "length"):
            raise ValueError(f"the answer ended with finish_reason {out.finish_reason!r}")
    except _EXPECTED as error:
        out.failure = f"{type(error).__name__}: {error}"
    out.finished = time.perf_counter()
    return out


async def _follow(response: aiohttp.ClientResponse, out: Outcome, max_tokens: int) -> None:
    async for event in _events(response):
        now = time.perf_counter()
        if event == "[DONE]":
            return
        out.read(json.loads(event), now)
        if out.tokens > 4 * max_tokens or len(out.text) > _TOKEN_CHARS * max_tokens:
            raise ValueError(f"the server sent far more than the {max_tokens} tokens it was asked for")
    raise ValueError("the stream broke off before its end")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of server-sent events. Not aiohttp's lines, which are bounded."""
    rest = b""
    async for piece in response.content.iter_any():
        *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode()
