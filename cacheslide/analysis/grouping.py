"""Groups requests into sessions, by their key or by the beginning of their text."""

from collections.abc import Sequence

from cacheslide.analysis.openai_requests import Request
from cacheslide.analysis.session import Session, Turn

BLOCK = 64  # characters or token ids: the units in which prompts without messages are compared


def group(requests: Sequence[Request], sha256: str) -> list[Session]:
    """Sessions in the order of their first request.

    A request with a key belongs to that key's session. One without a key joins the session of the earlier request with
    the longest common beginning: with messages, at least up to and including the first that is not a system message;
    without, at least half of that session's latest prompt. Otherwise it begins a session. Sessions whose first text
    changes from request to request can be separated only by a key.
    """
    grouped: dict[str, list[Request]] = {}
    beginnings = _Beginnings()
    for request in requests:
        name = f"key:{request.session}" if request.session else beginnings.session(request.turn)
        grouped.setdefault(name, []).append(request)
    return [
        Session(name, sha256, members[0].turn.label, tuple(m.turn for m in members), _lacks(members))
        for name, members in grouped.items()
    ]


def _lacks(members: Sequence[Request]) -> tuple[str, ...]:
    dropped = sum(member.dropped for member in members)
    return (f"{dropped} parts of messages that are no text",) if dropped else ()


class _Beginnings:
    """A trie of the prompts' units; each node holds the session whose request last passed it."""

    def __init__(self) -> None:
        self._edges: dict[tuple[int, object], int] = {}
        self._sessions: dict[int, str] = {}
        self._sizes: dict[str, int] = {}

    def session(self, turn: Turn) -> str:
        units, least = _units(turn)
        node, depth = 0, 0
        for unit in units:
            if (node, unit) not in self._edges:
                break
            node, depth = self._edges[node, unit], depth + 1
        name = self._sessions.get(node, "")
        if depth == 0 or depth < (self._sizes[name] / 2 if least is None else least):
            name = f"prefix:{len(self._sizes) + 1}"
        self._sizes[name] = len(units)
        node = 0
        for unit in units:
            node = self._edges.setdefault((node, unit), len(self._edges) + 1)
            self._sessions[node] = name
        return name


def _units(turn: Turn) -> tuple[list[object], int | None]:
    """Units to compare, and the minimum number that requests of a session share (None: half of the earlier prompt)."""
    text = turn.token_ids if turn.token_ids is not None else turn.messages[0].content
    if turn.token_ids is not None or not turn.messages[0].role:
        blocks = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
        return [block for block in blocks if len(block) == BLOCK] or blocks, None
    first = next((i for i, m in enumerate(turn.messages) if m.role not in ("system", "developer")), 0)
    return list(turn.messages), first + 1
