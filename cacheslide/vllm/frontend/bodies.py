"""Searches an HTTP server's JSON bodies for misplaced annotations (`misplaced.py`).

vLLM drops unknown keys silently. Only bodies that contain the annotations' name are parsed here; others cost one search
of their bytes.
"""

import json
import re
from typing import Any

from cacheslide.vllm.frontend.misplaced import misplaced

# The name as the end of a key, each letter plain or as JSON's escape; or a body of two or four bytes a character.
_LETTERS = (rb"(?:%c|%c|\\u00(?:%02x|%02x))" % (c, c - 32, c, c - 32) for c in b"cacheslide")
_SIGN = rb"(?:[-_]|\\u00(?:2[dD]|5[fF]))*"
_OURS = re.compile(rb"\0|" + _SIGN.join(_LETTERS), re.IGNORECASE)


class MarksInPlace:
    """ASGI middleware: answers misplaced annotations with a 400 naming the right place, and passes on all else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self.app(scope, receive, send)
            return
        body, last = await _read(receive)
        if last is None and (wrong := _wrong(scope, body)):
            await _refuse(send, wrong)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}] if last is None else [last]

        async def again() -> dict[str, Any]:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)


def _is_json(scope: dict[str, Any]) -> bool:
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"application/json")
    return b"json" in kind.lower()


async def _read(receive: Any) -> tuple[bytes, dict[str, Any] | None]:
    """A request's whole body, and the message that ended it early, if any."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts), message
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts), None


def _wrong(scope: dict[str, Any], body: bytes) -> str:
    if not _OURS.search(body):
        return ""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):  # vLLM's parser refuses it too
        return ""
    return misplaced(scope["path"].removeprefix(scope.get("root_path", "")), parsed)


async def _refuse(send: Any, wrong: str) -> None:
    error = {"message": wrong, "type": "BadRequestError", "param": "kv_transfer_params", "code": 400}
    answer = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
