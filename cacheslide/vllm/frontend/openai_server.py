"""Adds to vLLM's OpenAI servers: receipts in streamed answers, and annotations in beam search.

vLLM sends `kv_transfer_params` with complete answers only. A stream gets one more event before [DONE], without choices
like the usage event, so that clients which read only choices skip it. vLLM's beam search drops the parameters before
it makes its requests; here they are passed on (`beams.py`).
"""

import copy
import inspect
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import wraps
from typing import Any

from cacheslide.vllm.frontend.admission import serves
from cacheslide.vllm.frontend.beams import Search, start_search
from cacheslide.vllm.frontend.bodies import MarksInPlace
from cacheslide.vllm.frontend.intake import taken
from cacheslide.vllm.guard import SERVER
from cacheslide.vllm.options import FIELD

_DONE = "data: [DONE]\n\n"
_STREAMS = (
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "completion_stream_generator"),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "chat_completion_stream_generator"),
)
_OBJECTS = {
    "completion_stream_generator": "text_completion",
    "chat_completion_stream_generator": "chat.completion.chunk",
}
_PROTOCOLS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest", "to_beam_search_params"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest", "to_beam_search_params"),
)
_BEAMS = ("vllm.entrypoints.generate.beam_search.online", "BeamSearchOnlineMixin", "beam_search")


_APP = ("vllm.entrypoints.launchers.app", None, "init_entrypoints_middleware")
_TOOLS = ("vllm.entrypoints.openai.responses.serving", "OpenAIServingResponses", "_generate_with_builtin_tools")


def adapt_servers(bodies: bool = False) -> None:
    """Wrap the servers that this process has loaded (each once); with `bodies`, also the app that will be built.

    A server whose code is not as expected is left unchanged.
    """
    try:
        if bodies:
            _adapt(*_APP, _reading)
        _adapt_loaded()
    except Exception as error:
        SERVER.note("server", error)


def _adapt_loaded() -> None:
    for stream in _STREAMS:
        _adapt(*stream, lambda plain: _with_receipt(plain, _OBJECTS[plain.__name__]))
    for protocol in _PROTOCOLS:
        _adapt(*protocol, _with_annotations)
    _adapt(*_BEAMS, _searched)
    _adapt(*_TOOLS, _checked)


def _adapt(module: str, owner: str | None, name: str, wrap: Callable) -> None:
    if (loaded := sys.modules.get(module)) is not None:
        original = loaded if owner is None else getattr(loaded, owner)
        plain = getattr(original, name)
        if not hasattr(plain, "adapted"):
            wrapped = wrap(plain)
            wrapped.adapted = True
            setattr(original, name, wrapped)


def _reading(plain):
    """Search every JSON body for misplaced annotations, behind vLLM's own middleware, which authenticates."""

    @wraps(plain)
    def init_entrypoints_middleware(args, app, *rest: Any, **kwargs: Any):
        app.add_middleware(MarksInPlace)
        return plain(args, app, *rest, **kwargs)

    return init_entrypoints_middleware


def _checked(plain):
    """Check requests of the Responses API early: vLLM starts them only after the stream has begun."""

    @wraps(plain)
    def _generate_with_builtin_tools(self, *args: Any, **kwargs: Any):
        call = inspect.signature(plain).bind(self, *args, **kwargs)
        given = call.arguments
        config, renderer = self.engine_client.vllm_config, self.engine_client.renderer
        if serves(config):
            checked = taken(config, renderer, given["engine_input"], given["sampling_params"], in_place=True)
            given["engine_input"], given["sampling_params"] = checked
        return plain(*call.args, **call.kwargs)

    return _generate_with_builtin_tools


def _with_annotations(plain):
    """Keep the request's `kv_transfer_params` in beam search parameters; vLLM drops them."""

    @wraps(plain)
    def to_beam_search_params(self, *args: Any, **kwargs: Any):
        params = plain(self, *args, **kwargs)
        params.kv_transfer_params = self.kv_transfer_params
        return params

    return to_beam_search_params


def _searched(plain):
    """Beam search with annotated steps and one receipt; invalid annotations are refused before it starts."""

    @wraps(plain)
    def beam_search(self, prompt, request_id, params, *args: Any, **kwargs: Any):
        transfer_params = getattr(params, "kv_transfer_params", None)
        search = start_search(self.engine_client.vllm_config, self.renderer, prompt, transfer_params, params.max_tokens)
        if search is None:
            return plain(self, prompt, request_id, params, *args, **kwargs)
        if search.max_tokens != params.max_tokens:
            params = copy.copy(params)
            params.max_tokens = search.max_tokens
        return _observed(plain(_Serving(self, search), search.prompt, request_id, params, *args, **kwargs), search)

    return beam_search


async def _observed(results: AsyncIterator[Any], search: Search) -> AsyncIterator[Any]:
    async for output in results:
        output.kv_transfer_params = search.kv_transfer_params
        yield output


class _Serving:
    """The attributes of a serving object that beam search uses; its engine client receives annotated steps."""

    def __init__(self, serving, search: Search) -> None:
        self.renderer, self.engine_client = serving.renderer, self
        self._engine, self._search = serving.engine_client, search

    async def generate(self, prompt, sampling_params, *args: Any, **kwargs: Any):
        """See vLLM's `EngineClient.generate`."""
        async for output in self._engine.generate(prompt, self._search.step(sampling_params), *args, **kwargs):
            try:
                self._search.on_output(output)
            except Exception as error:
                SERVER.note("server", error)
            yield output


def _with_receipt(plain, kind: str):
    signature = inspect.signature(plain)

    @wraps(plain)
    async def stream(self, request, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        call = signature.bind(self, request, *args, **kwargs)
        receipt: dict[str, Any] = {}
        call.arguments["result_generator"] = _watched(call.arguments["result_generator"], receipt)
        async for event in plain(*call.args, **call.kwargs):
            if event == _DONE and receipt and (last := _last(kind, call.arguments, receipt)):
                yield last
            yield event

    return stream


def _last(kind: str, call: dict[str, Any], receipt: dict[str, Any]) -> str:
    """The event with the receipt; "" if building it failed, so that the answer is not affected."""
    try:
        return f"data: {json.dumps(_event(kind, call, receipt))}\n\n"
    except Exception as error:
        SERVER.note("server", error)
        return ""


def _event(kind: str, call: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
    made = call.get("created_time", int(time.time()))
    head = {"id": call["request_id"], "object": kind, "created": made, "model": call["model_name"], "choices": []}
    return head | {"kv_transfer_params": receipt}


async def _watched(results: AsyncIterator[Any], receipt: dict[str, Any]) -> AsyncIterator[Any]:
    """Pass on the results, copying the first receipt among them into `receipt`."""
    async for result in results:
        try:
            output = result[1] if isinstance(result, tuple) else result
            if not receipt and FIELD in (output.kv_transfer_params or {}):
                receipt |= output.kv_transfer_params
        except Exception as error:
            SERVER.note("server", error)
        yield result
