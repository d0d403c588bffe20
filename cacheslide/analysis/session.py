"""Sessions: the prompts of one agent or conversation, in the order in which they were sent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One part of a prompt. A `role` of "" is text as it stands (a completion's prompt), without a role's header.

    `calls` is the JSON text of a message's tool calls.
    """

    role: str
    content: str
    name: str = ""
    calls: str = ""


@dataclass(frozen=True)
class Turn:
    """One request's prompt.

    Parameters
    ----------
    messages : tuple of Message
        The parts, as sent.
    tools : str
        JSON text of the tool definitions, which stand in the prompt too.
    token_ids : tuple of int, optional
        The prompt where a request gave token ids; `messages` is empty then.
    label : str
        The agent or model that the request names; "" for none.
    """

    messages: tuple[Message, ...]
    tools: str = ""
    token_ids: tuple[int, ...] | None = None
    label: str = ""


@dataclass(frozen=True)
class Session:
    """Successive prompts of one session.

    Parameters
    ----------
    id : str
        Names the session among those of its file.
    sha256 : str
        Hash of the file that it was read from.
    agent : str
        Who sent the prompts.
    turns : tuple of Turn
        At least one.
    lacks : tuple of str
        What the source does not hold of the prompts as sent, in words.
    """

    id: str
    sha256: str
    agent: str
    turns: tuple[Turn, ...]
    lacks: tuple[str, ...] = ()
