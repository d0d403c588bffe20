"""SWE-agent's trajectories (`.traj`, Yang et al., 2024): one JSON object, one session.

`history` holds every message once, in full: system prompt, demonstration, issue, answers, observations. Less was
sent where a history processor leaves old observations out. Newer files show it (`query`: the prompt of a step;
`messages`: everything after a step, which is the prompt of the next). Otherwise the configuration in the file can name
the processors, whose rule is applied here; where neither exists, observations are kept in full and `lacks` records it.
"""

import json
from pathlib import Path
from typing import Any

from cacheslide.analysis.session import Message, Session, Turn
from cacheslide.errors import DataError
from harness.tasks.jsontext import parse

FULL = "which history processors ran: observations stand in full"
BY_RULE = "the prompts as sent: observations are left out by the rule that the configuration names"
TOOLS = "the tool definitions, which function calling sends beside the messages"
REPLAYED = "a model's own answers: the file counts no tokens, recorded actions were replayed"
KNOWN = ("default", "last_n_observations", "cache_control", "tag_tool_call_observations")  # the others only mark


def recognises(text: str) -> bool:
    """Whether a text is a trajectory: an object with history and trajectory, each a list."""
    head = text.lstrip()
    return head.startswith("{") and '"trajectory"' in text and '"history"' in text


def read(path: Path, text: str, sha256: str) -> list[Session]:
    """The session of a trajectory file; none where the agent never answered."""
    run = parse(text, f"{path}:")
    history, steps = run.get("history"), run.get("trajectory")
    if not isinstance(history, list) or not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise DataError(f"{path}: history and trajectory must be lists of messages and steps")
    messages = [_message(m, f"{path}: history message {i}") for i, m in enumerate(history, 1)]
    answers = [i for i, m in enumerate(history) if m["role"] == "assistant" and not m.get("is_demo")]
    answers = [i for i in answers if history[i].get("agent") == history[answers[0]].get("agent")]
    processors = _processors(run, str(path))
    turns, built = [], False
    for t, end in enumerate(answers):
        sent = _shown(steps, t, end, str(path))
        if sent is None:
            sent = _elided(history[:end], messages[:end], processors)
            built |= t > 0 and (processors is None or sent != messages[:end])  # the first prompt has no observation
        turns.append(Turn(tuple(sent), label="swe-agent"))
    if not turns:
        return []
    return [Session(path.stem, sha256, "swe-agent", tuple(turns), _lacks(run, history, processors, built))]


def _lacks(run: dict[str, Any], history: list, processors: list | None, built: bool) -> tuple[str, ...]:
    out = []
    if built:
        out.append(FULL if processors is None else BY_RULE)
    if unknown := [p.get("type") for p in processors or [] if p.get("type") not in KNOWN]:
        out.append(f"what history processors of type {', '.join(map(str, unknown))} change")
    if any(message.get("tool_calls") for message in history):
        out.append(TOOLS)
    info = run.get("info")
    stats = info.get("model_stats") if isinstance(info, dict) else None
    if isinstance(stats, dict) and stats.get("tokens_sent") == 0:
        out.append(REPLAYED)
    return tuple(out)


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise DataError(f"{where} has no role")
    content = raw.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str | None):
        raise DataError(f"{where}: content is neither text nor a list of parts")
    calls = raw.get("tool_calls")
    return Message(raw["role"], content or "", calls=json.dumps(calls) if calls else "")


def _shown(steps: list[dict[str, Any]], turn: int, end: int, path: str) -> list[Message] | None:
    """The prompt of a turn where the file shows it."""
    own = steps[turn].get("query") if turn < len(steps) else None
    after = steps[turn - 1].get("messages") if 0 < turn <= len(steps) else None
    for shown in (own, after if isinstance(after, list) and len(after) == end else None):
        if shown and isinstance(shown, list):
            return [_message(m, f"{path}: step {turn + 1}, message {i}") for i, m in enumerate(shown, 1)]
    return None


def _processors(run: dict[str, Any], path: str) -> list[dict[str, Any]] | None:
    """The history processors in the file's configuration, in order; None where it has no such entry."""
    config = run.get("replay_config")
    if isinstance(config, str):
        config = parse(config, f"{path}: replay_config is")
    agent = config.get("agent") if isinstance(config, dict) else None
    if not isinstance(agent, dict):
        return None
    one = agent.get("history_processor")
    many = agent.get("history_processors", None if one is None else [one])
    return None if not isinstance(many, list) else [p for p in many if isinstance(p, dict)]


def _elided(history: list[dict[str, Any]], messages: list[Message], processors: list | None) -> list[Message]:
    """The messages after the processors' omissions: `last_n_observations` keeps the issue and the last n."""
    out = list(messages)
    for processor in processors or []:
        if processor.get("type") != "last_n_observations":
            continue
        seen = [i for i, m in enumerate(history) if m["role"] in ("user", "tool") and not m.get("is_demo")]
        n, polling = (v if type(v := processor.get(key)) is int and v > 0 else 1 for key in ("n", "polling"))
        for i in seen[1 : max(0, len(seen) // polling * polling - n)]:
            lines = len(messages[i].content.splitlines())
            out[i] = Message(messages[i].role, f"Old environment output: ({lines} lines omitted)")
    return out
