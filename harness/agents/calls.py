"""The model's output as a tool call: one line of words, or one JSON object.

Parsing never raises anything but `MalformedCall`, whose message is shown to the model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cacheslide.errors import CacheSlideError, ConfigError

OUTPUT_CHARS = 4000


class MalformedCall(CacheSlideError, ValueError):
    """The output does not call a known tool."""


class ToolError(CacheSlideError, RuntimeError):
    """A tool refused its arguments or failed; the message is shown to the model."""


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments, all text."""

    tool: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """A tool's function. `params` names the arguments; with `rest`, the last one takes the rest of the line."""

    name: str
    params: tuple[str, ...]
    run: Callable[..., str]
    rest: bool = False
    about: str = ""

    @property
    def usage(self) -> str:
        """`edit line text...`."""
        return " ".join((self.name, *self.params)) + ("..." if self.rest else "")


def parse(output: str, tools: Mapping[str, Tool], grammar: str = "line") -> Call:
    """The call in `output`; `grammar` is "line" or "json" (`{"name": ..., "arguments": {...}}`)."""
    if grammar not in ("line", "json"):
        raise ConfigError(f"unknown call grammar {grammar!r} (known: line, json)")
    if len(output) > OUTPUT_CHARS:
        raise MalformedCall(f"the call is {len(output)} characters long, at most {OUTPUT_CHARS} are read")
    if any((ord(c) < 32 and c not in "\n\t") or 0xD800 <= ord(c) < 0xE000 for c in output):
        raise MalformedCall("the call holds control characters or lone surrogates")
    return _line(output, tools) if grammar == "line" else _json(output, tools)


def _tool(name: str, tools: Mapping[str, Tool]) -> Tool:
    if name not in tools:
        raise MalformedCall(f"unknown tool {name[:40]!r} (known: {', '.join(tools)})")
    return tools[name]


def _line(output: str, tools: Mapping[str, Tool]) -> Call:
    line = output.strip().split("\n")[0].strip()
    if not line:
        raise MalformedCall(f"no call was given (known: {', '.join(tools)})")
    name, _, rest = line.partition(" ")
    tool = _tool(name, tools)
    count = len(tool.params)
    words = tuple(rest.split(None, count - 1) if tool.rest and count else rest.split())
    if len(words) != count:
        raise MalformedCall(f"usage: {tool.usage}")
    return Call(name, words)


def _json(output: str, tools: Mapping[str, Tool]) -> Call:
    try:
        raw: Any = json.loads(output)
    except (ValueError, RecursionError):
        raise MalformedCall('a call is one JSON object: {"name": ..., "arguments": {...}}') from None
    if not isinstance(raw, dict) or set(raw) != {"name", "arguments"} or not isinstance(raw["name"], str):
        raise MalformedCall('a call has exactly the keys "name" and "arguments"')
    tool, given = _tool(raw["name"], tools), raw["arguments"]
    if not isinstance(given, dict) or set(given) != set(tool.params):
        raise MalformedCall(f"{tool.name} takes the arguments {', '.join(tool.params) or 'none'}")
    if not all(isinstance(v, str | int) and not isinstance(v, bool) for v in given.values()):
        raise MalformedCall("arguments are strings or integers")
    return Call(tool.name, tuple(str(given[p]) for p in tool.params))


def render(call: Call, tools: Mapping[str, Tool], grammar: str = "line") -> str:
    """The text that `parse` reads back as `call`."""
    if grammar == "line":
        return " ".join((call.tool, *call.args))
    arguments = dict(zip(tools[call.tool].params, call.args, strict=True))
    return json.dumps({"name": call.tool, "arguments": arguments})
