"""Any OpenAI-compatible server as a completer, streaming, over the standard library's HTTP client.

With a tokenizer the prompt is sent as token ids with the fixed spans marked in `kv_transfer_params` (see
docs/vllm.md); without one it is sent as text and the server sees no marks.
"""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from cacheslide.errors import ConfigError
from cacheslide.prompt import Prompt, Role, Segment
from cacheslide.vllm.params import marks_of
from harness.agents.completer import Completion, CompletionError, Request

_PIECE_CHARS = 10_000


class OpenAIServer:
    """A server's `/v1/completions`.

    Parameters
    ----------
    url : str
        Up to and with the version, for example "http://localhost:8000/v1".
    model : str
        As the server names it.
    tokenizer : transformers tokenizer or None
        The model's own.
    system : str
        Name of what is measured. With `policy`, the registered system that marked requests ask the server for.
    api_key : str
    timeout : float
        Seconds without a byte after which a request has failed.
    salt : str
        Requests of different salts share no cached blocks or chunks.
    layer : int, optional
        Selection layer that marked requests ask for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any = None,
        system: str = "server",
        policy: str | None = None,
        api_key: str = "",
        timeout: float = 120.0,
        salt: str = "",
        layer: int | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"a server's address looks like http://localhost:8000/v1, not {url!r}")
        if policy is not None and tokenizer is None:
            raise ConfigError("a policy is asked for by marking token spans: give the model's tokenizer too")
        self.parts, self.model, self.tokenizer, self.system = parts, model, tokenizer, system
        self.api_key, self.timeout, self.salt = api_key, timeout, salt
        asked = {"policy": policy, "layer": layer}
        self.options = {name: value for name, value in asked.items() if value is not None}

    def complete(self, request: Request) -> Completion:
        """Greedy, streamed. CompletionError names the server's status and message."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stop": list(request.stop),
            "stream": True,
        }
        if self.salt:
            body["cache_salt"] = self.salt
        sent = None
        if self.tokenizer is None:
            body["prompt"] = request.text
        else:
            prompt = self._prompt(request)
            sent = tuple(s.token_ids for s in prompt.segments)
            body["prompt"] = list(prompt.token_ids)
            body["kv_transfer_params"] = marks_of(prompt, **self.options)
        begin, pieces, times, receipt = time.perf_counter(), [], [], None
        for event in self._events(body):
            if "error" in event:
                raise CompletionError(f"the server failed while streaming: {event['error']}")
            receipt = event.get("kv_transfer_params") or receipt
            text = "".join(c.get("text") or "" for c in event.get("choices", ()))
            if text:
                pieces.append(text)
                if len(pieces) > 4 * request.max_tokens or len(text) > _PIECE_CHARS:
                    raise CompletionError(
                        f"the server sent far more than the {request.max_tokens} tokens it was asked for"
                    )
                times.append(time.perf_counter() - begin)
        total = time.perf_counter() - begin
        return Completion("".join(pieces), sent, None, tuple(times), total, receipt)

    def _prompt(self, request: Request) -> Prompt:
        bos = self.tokenizer.bos_token_id
        first, out = (() if bos is None else (bos,)), []
        for s in request.segments:
            ids = tuple(self.tokenizer.encode(s.text, add_special_tokens=False))
            out.append(Segment(first + ids, Role(s.role), s.name))
            first = ()
        return Prompt(tuple(out))

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.hostname, self.parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request("POST", f"{self.parts.path.rstrip('/')}/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                message = response.read(2000).decode(errors="replace")
                raise CompletionError(f"the server answered {response.status}: {message}")
            for line in response:
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield json.loads(data)
            raise CompletionError("the server's stream ended before it was done")
        except (OSError, http.client.HTTPException, ValueError) as broken:
            raise CompletionError(f"no completion from {self.parts.geturl()}: {broken}") from None
        finally:
            connection.close()
