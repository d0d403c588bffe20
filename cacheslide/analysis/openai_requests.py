"""Reads recorded OpenAI requests, one JSON object a line, as sent to chat completions or completions."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.analysis.session import Message, Turn
from cacheslide.errors import DataError
from cacheslide.plain_values import parse_json, shown


@dataclass(frozen=True)
class Request:
    """One prompt, the session named in its request ("" for none), and its number of parts that are not text."""

    turn: Turn
    session: str
    dropped: int = 0


def read_requests(path: str | Path) -> tuple[list[Request], str]:
    """The requests of a file, in order, and the file's SHA-256.

    A line is a body with `messages` or `prompt`, or an object with such a `body`, as in OpenAI's batch files. A body
    with several prompts gives several requests.

    Raises
    ------
    DataError
        In one line with the file and line number: not readable, not JSON, another schema, or no prompt in the file.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as failed:
        raise DataError(f"cannot read {path}: {failed.strerror}") from None
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                body = parse_json(line)
                json.dumps(body, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise DataError(f"{where} holds half of a surrogate pair") from None
            except (ValueError, RecursionError) as wrong:
                raise DataError(f"{where} is not valid JSON: {wrong}") from None
            out += _requests(body, where)
    if not out:
        raise DataError(f"{path} holds no requests")
    return out, hashlib.sha256(raw).hexdigest()


def _requests(body: Any, where: str) -> Iterator[Request]:
    if isinstance(body, dict) and isinstance(body.get("body"), dict):
        body = body["body"]
    if not isinstance(body, dict):
        raise DataError(f"{where}: a request is a JSON object, not {shown(body)}")
    about = body.get("metadata") if isinstance(body.get("metadata"), dict) else {}
    keys = (about.get("session_id"), body.get("prompt_cache_key"), body.get("user"))
    session = next((str(key) for key in keys if key not in (None, "")), "")
    label = str(about.get("agent") or body.get("model") or "")
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: messages must be a list of at least one message, not {shown(messages)}")
        parts = [_message(message, f"{where}: message {i}") for i, message in enumerate(messages, 1)]
        tools = json.dumps(body["tools"]) if body.get("tools") else ""
        turn = Turn(tuple(part for part, _ in parts), tools, label=label)
        yield Request(turn, session, sum(dropped for _, dropped in parts))
    elif "prompt" in body:
        for prompt in _prompts(body["prompt"], where):
            if isinstance(prompt, str):
                yield Request(Turn((Message("", prompt),), label=label), session)
            else:
                yield Request(Turn((), token_ids=prompt, label=label), session)
    else:
        raise DataError(f"{where}: neither messages nor prompt: not a request to chat completions or completions")


def _prompts(prompt: Any, where: str) -> list[str | tuple[int, ...]]:
    """The prompts of a completions body: a text, token ids, or a list of either."""
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    out: list[str | tuple[int, ...]] = []
    for one in prompts:
        if isinstance(one, list) and one and all(type(i) is int and 0 <= i < 2**31 for i in one):
            out.append(tuple(one))
        elif isinstance(one, str) and one:
            out.append(one)
        else:
            raise DataError(f"{where}: a prompt is text or a list of token ids, at least one, not {shown(one)}")
    return out


def _message(message: Any, where: str) -> tuple[Message, int]:
    """A message, and its number of parts that are not text (images, audio)."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"{where} must be an object with a role, not {shown(message)}")
    content, dropped = message.get("content"), 0
    if isinstance(content, list):
        texts = [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
        content, dropped = "".join(texts), len(content) - len(texts)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: content is text or a list of parts, not {shown(content)}")
    calls = message.get("tool_calls")
    name = message.get("name") or ""
    if not isinstance(name, str):
        raise DataError(f"{where}: name is text, not {shown(name)}")
    return Message(message["role"], content or "", name, json.dumps(calls) if calls else ""), dropped
