"""What vLLM's OpenAI servers leave out: receipts in streamed answers, and an answer to marks in beam search.

vLLM sends `kv_transfer_params` with whole answers only. A stream gets one event more before [DONE]; it has no choices,
as the event with the usage, so that clients which know only choices pass over it. Beam search drops the parameters:
every beam is a new request each token, and reuse would be paid for again each time. Marks are refused there.
"""

import inspect
import json
import sys
import time
from collections.abc import AsyncIterator
from functools import wraps
from typing import Any

from cacheslide.vllm.params import FIELD

_DONE = "data: [DONE]\n\n"
_STREAMS = (
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "completion_stream_generator"),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "chat_completion_stream_generator"),
)
_OBJECTS = {
    "completion_stream_generator": "text_completion",
    "chat_completion_stream_generator": "chat.completion.chunk",
}
_BEAMS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest", "to_beam_search_params"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest", "to_beam_search_params"),
)


def adapt_servers() -> None:
    """Wrap those servers that this process has loaded (each once)."""
    for module, owner, name in (*_STREAMS, *_BEAMS):
        if (loaded := sys.modules.get(module)) is not None:
            plain = getattr(getattr(loaded, owner), name)
            if not hasattr(plain, "adapted"):
                wrapped = _with_receipt(plain, _OBJECTS[name]) if name in _OBJECTS else _without_marks(plain)
                wrapped.adapted = True
                setattr(getattr(loaded, owner), name, wrapped)


def _without_marks(plain):
    @wraps(plain)
    def to_beam_search_params(self, *args: Any, **kwargs: Any):
        from vllm.exceptions import VLLMValidationError

        if FIELD in (self.kv_transfer_params or {}):
            raise VLLMValidationError(
                "beam search starts every beam anew each token and would pay for reuse each time: "
                "send it without marks, or ask for n samples",
                parameter="kv_transfer_params",
            )
        return plain(self, *args, **kwargs)

    return to_beam_search_params


def _with_receipt(plain, kind: str):
    signature = inspect.signature(plain)

    @wraps(plain)
    async def stream(self, request, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        call = signature.bind(self, request, *args, **kwargs)
        found: dict[str, Any] = {}
        call.arguments["result_generator"] = _watched(call.arguments["result_generator"], found)
        async for event in plain(*call.args, **call.kwargs):
            if event == _DONE and found:
                yield f"data: {json.dumps(_event(kind, call.arguments, found))}\n\n"
            yield event

    return stream


def _event(kind: str, call: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
    made = call.get("created_time", int(time.time()))
    head = {"id": call["request_id"], "object": kind, "created": made, "model": call["model_name"], "choices": []}
    return head | {"kv_transfer_params": receipt}


async def _watched(results: AsyncIterator[Any], found: dict[str, Any]) -> AsyncIterator[Any]:
    """The results, with the receipt of the first one that has one left in `found`."""
    async for result in results:
        output = result[1] if isinstance(result, tuple) else result
        if not found and FIELD in (output.kv_transfer_params or {}):
            found |= output.kv_transfer_params
        yield result
