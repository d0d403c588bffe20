"""Sessions: the prompts of one agent or conversation, in the order they were sent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One part of a prompt. A `role` of "" is plain text (a completion's prompt) without a role header.

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
        Parts in the order sent.
    tools : str
        JSON text of the tool definitions, which are part of the prompt.
    token_ids : tuple of int, optional
        The prompt as token ids if the request gave them; `messages` is then empty.
    label : str
        The agent or model named in the request; "" for none.
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
        Unique among the sessions of its file.
    sha256 : str
        Hash of the source file.
    agent : str
        Sender of the prompts.
    turns : tuple of Turn
        At least one turn.
    lacks : tuple of str
        Parts of the sent prompts that the source lacks, in words.
    """

    id: str
    sha256: str
    agent: str
    turns: tuple[Turn, ...]
    lacks: tuple[str, ...] = ()
