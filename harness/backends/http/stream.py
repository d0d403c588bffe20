"""One streamed completion with the time of every token. A failure is a result, not an exception."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from cacheslide.vllm.options import receipt_in
from harness.backends.client import Request, Result

_TOKEN_CHARS = 1000  # no tokenizer has longer tokens
_EXPECTED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


@dataclass(frozen=True)
class Endpoint:
    """Destination of requests: `url`, without `path`.

    `extensions` sends fields of vLLM that other servers may refuse. With `token_ids` vLLM also sends the ids of answer
    and prompt. `timeout` limits a whole request, `silence` the time without a byte, both in seconds.
    """

    url: str
    model: str
    extensions: bool = True
    token_ids: bool = False
    timeout: float | None = 600.0
    silence: float | None = None
    api_key: str = ""
    path: str = "/v1/completions"


def body_of(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """The JSON body; ValueError for a request that a server cannot serve."""
    if not request.read_prefix_cache:
        raise ValueError("a server's requests cannot decline its prefix cache: give them a salt of their own")
    if request.stop_ids and not endpoint.extensions:
        raise ValueError("only vLLM ends answers at token ids: give stop texts")
    out: dict[str, Any] = {
        "model": endpoint.model,
        "prompt": request.sent_prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": request.stream,
    }
    if request.stream:
        out["stream_options"] = {"include_usage": True}
    if endpoint.extensions:
        out["ignore_eos"] = request.ignore_eos
        if request.stream:  # a chunk may hold several tokens; this gives their number
            out["stream_options"]["continuous_usage_stats"] = True
        if endpoint.token_ids:
            out["return_token_ids"] = True
    if request.stop:
        out["stop"] = list(request.stop)
    if request.stop_ids:
        out["stop_token_ids"] = sorted(request.stop_ids)
    if request.params is not None:
        out["kv_transfer_params"] = dict(request.params)
    if request.salt is not None:
        out["cache_salt"] = request.salt
    return out


def take(result: Result, message: Mapping[str, Any], now: float, stop_ids: frozenset[int] = frozenset()) -> None:
    """Add one piece of an answer to its result; ValueError for an error sent in its place."""
    if "error" in message:
        raise ValueError(str(message["error"]))
    before, usage = result.tokens, message.get("usage")
    for choice in message.get("choices", ()):
        result.text = (result.text or "") + (choice.get("text") or "")
        if ids := choice.get("token_ids"):
            result.token_ids = (result.token_ids or []) + ids
        if reason := choice.get("finish_reason"):
            result.end(reason, choice.get("stop_reason"), stop_ids)
        if not usage and choice.get("text"):
            result.tokens += 1  # for servers that do not count: one per piece
    if usage:
        result.tokens = max(result.tokens, usage.get("completion_tokens") or 0)
        result.prompt_tokens = usage.get("prompt_tokens", result.prompt_tokens)
        details = usage.get("prompt_tokens_details") or {}
        result.cached_tokens = details.get("cached_tokens", result.cached_tokens)
    if message.get("choices"):
        result.token_times += [now] * (result.tokens - before)
    if receipt := receipt_in(message.get("kv_transfer_params")):
        result.receipt = receipt


async def send(session: aiohttp.ClientSession, endpoint: Endpoint, request: Request) -> Result:
    """Send `request` and follow its answer to the end."""
    out = Result(request.id, time.perf_counter(), labels=dict(request.labels))
    try:
        async with session.post(
            endpoint.url + endpoint.path,
            json=body_of(request, endpoint),
            headers={"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else None,
            timeout=aiohttp.ClientTimeout(total=endpoint.timeout, sock_read=endpoint.silence),
        ) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {(await response.text())[:500]}")
            if request.stream:
                await _follow(response, out, request)
            else:
                take(out, json.loads(await response.read()), time.perf_counter(), request.stop_ids)
                out.token_times = []
        if out.finish_reason not in ("stop", "length"):
            raise ValueError(f"the answer ended with finish_reason {out.finish_reason!r}")
    except _EXPECTED as error:
        out.fail(f"{type(error).__name__}: {error}")
    out.finished = time.perf_counter()
    return out


async def _follow(response: aiohttp.ClientResponse, out: Result, request: Request) -> None:
    most = request.max_tokens
    async for event in _events(response):
        now = time.perf_counter()
        if event == "[DONE]":
            return
        take(out, json.loads(event), now, request.stop_ids)
        if out.tokens > 4 * most or len(out.text or "") > _TOKEN_CHARS * most:
            raise ValueError(f"the server sent far more than the {most} tokens it was asked for")
    raise ValueError("the stream broke off before its end")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of server-sent events, read without aiohttp's bounded lines."""
    rest = b""
    async for piece in response.content.iter_any():
        *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode()
