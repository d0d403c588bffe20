"""Limits on annotations, and short display of invalid ones: a check is cheap whatever a client sends."""

import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec

from cacheslide.errors import PromptError

SEGMENTS = 4096  # fixed spans of a request, and parts cut by a separator
NAME = 256  # characters of a namespace, a system's name, a sender
NOTE = 1024  # characters of the note copied into a receipt
SEPARATOR = 256  # characters or token ids
MESSAGES = 4096  # roles and indices
ROW = 2**31  # upper bound of rows and layers
DEPTH = 32  # levels of objects and lists in kv_transfer_params
_NESTED = frozenset((dict, list, tuple))
_SAID = 2000  # characters of an error message


class _Short(reprlib.Repr):
    """`repr` in bounded time and length, whatever the value."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """`value` for an error message: short, and encodable as UTF-8."""
    return sayable(_SHORT.repr(value))


def sayable(text: str, most: int = _SAID) -> str:
    """`text`, which may hold lone surrogates, cut to `most` characters and made encodable as UTF-8."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def check_text(name: str, value: Any, most: int) -> None:
    """Raise PromptError unless `value` is a text of at most `most` characters that encodes as UTF-8."""
    if not isinstance(value, str):
        raise PromptError(f"{name} must be a string, not {shown(value)}")
    if len(value) > most:
        raise PromptError(f"{name} has {len(value)} characters, of at most {most}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{name} is no text that can be encoded: {shown(value)}") from None


def check_depth(params: Mapping[str, Any], name: str = "kv_transfer_params") -> None:
    """Raise PromptError if `params`, called `name`, are nested more than `DEPTH` levels deep; linear in their size."""
    level: list[Any] = [params]
    for _ in range(DEPTH):
        below: list[Any] = []
        for outer in level:
            below += [x for x in (outer.values() if isinstance(outer, Mapping) else outer) if type(x) in _NESTED]
        if not below:
            return
        level = below
    raise PromptError(f"{name} is nested more than {DEPTH} levels deep")


def check_sendable(params: Mapping[str, Any]) -> None:
    """Raise PromptError for `kv_transfer_params` that cannot be sent to the engine (msgpack: 64 bits, UTF-8)."""
    try:
        msgspec.msgpack.encode(params, enc_hook=lambda _: None)
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"kv_transfer_params cannot be handed to the engine: {sayable(str(error), 200)}") from None
