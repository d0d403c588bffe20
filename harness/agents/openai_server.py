"""Any OpenAI-compatible server as a completer, over the harness's streaming client.

With a tokenizer the prompt is sent as token ids with the fixed spans annotated in `kv_transfer_params` (see
docs/vllm.md); without one it is sent as text without annotations.
"""

from typing import Any
from urllib.parse import urlsplit

from cacheslide.errors import ConfigError
from cacheslide.vllm.options import annotations_of
from harness.agents.completer import Completion, CompletionError, Request
from harness.backends import client
from harness.backends.http.client import HttpClient
from harness.backends.http.stream import Endpoint
from harness.backends.tokens import prompt_of


class OpenAIServer:
    """A server's `/v1/completions`.

    Parameters
    ----------
    url : str
        Up to and with the version, for example "http://localhost:8000/v1".
    model : str
        The server's name of it.
    tokenizer : transformers tokenizer or None
        The model's own.
    system : str
        Name of the measured system. With `policy`, the registered system that annotated requests ask the server for.
    api_key : str
    timeout : float
        Seconds without a byte after which a request has failed.
    salt : str, optional
        Requests of different salts share no cached blocks or chunks.
    layer : int, optional
        Selection layer that annotated requests ask for.
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
        salt: str | None = None,
        layer: int | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"a server's address looks like http://localhost:8000/v1, not {url!r}")
        if policy is not None and tokenizer is None:
            raise ConfigError("a policy is asked for by marking token spans: give the model's tokenizer too")
        endpoint = Endpoint(
            f"{parts.scheme}://{parts.netloc}",
            model,
            extensions=False,
            timeout=None,
            silence=timeout,
            api_key=api_key,
            path=f"{parts.path.rstrip('/')}/completions",
        )
        self.client = HttpClient(endpoint)
        self.tokenizer, self.system, self.salt = tokenizer, system, salt
        asked = {"policy": policy, "layer": layer}
        self.options = {name: value for name, value in asked.items() if value is not None}

    def complete(self, request: Request) -> Completion:
        """Greedy, streamed. CompletionError names the server's status and message."""
        prompt, params = None, None
        if self.tokenizer is not None:
            prompt = prompt_of(self.tokenizer, request.segments)
            params = annotations_of(prompt, **self.options)
        sent = request.text if prompt is None else prompt
        asked = client.Request(request.id, sent, request.max_tokens, params, self.salt, stop=request.stop)
        [done] = self.client.run([asked])
        if done.failure:
            raise CompletionError(f"no completion from {self.client.endpoint.url}: {done.failure}")
        return Completion.of(done, prompt)
