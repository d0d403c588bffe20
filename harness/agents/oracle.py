"""Scripted agents that solve every task from the prompt alone, which proves that the tasks are solvable.

An oracle reads only the request's segments, like a model.
"""

import re
from collections.abc import Callable, Mapping

from cacheslide.errors import ConfigError
from harness.agents.completer import Completer, Completion, Request, Scripted
from harness.agents.tasks.functions import OPERATIONS
from harness.tasks.synthetic.render import _CONSTANT_VERBS, _LINK_VERBS

QUESTION_SLOTS = ("question", "message", "job", "issue", "cue")
_CONSTANT = {v.strip() for v in _CONSTANT_VERBS}
_LINK = {v.strip() for v in _LINK_VERBS}


class NoContext:
    """The no-context baseline: the inner completer gets only the question and the cue of the prompt."""

    def __init__(self, inner: Completer) -> None:
        self.inner, self.system = inner, f"{inner.system}:no_context"

    def complete(self, request: Request) -> Completion:
        """The inner completer's answer to the reduced prompt."""
        kept = tuple(s for s in request.segments if s.name in QUESTION_SLOTS)
        return self.inner.complete(Request(request.session, request.step, kept, request.max_tokens, request.stop))


def slots(request: Request) -> dict[str, str]:
    """Slot name -> its text; a growing slot's entries are joined."""
    out: dict[str, str] = {}
    for s in request.segments:
        name = s.name.split("[")[0]
        out[name] = out.get(name, "") + s.text
    return out


def statements(*texts: str) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> value, name -> name it links to) that the texts state; later statements win."""
    values, links = {}, {}
    for text in texts:
        for sentence in re.split(r" \.|\n", text):
            words = sentence.rsplit(":", 1)[-1].split()
            if len(words) == 5 and words[2] in _CONSTANT:
                values[" ".join(words[:2])] = " ".join(words[3:])
            elif len(words) == 5 and words[2] in _LINK:
                links[" ".join(words[:2])] = " ".join(words[3:])
    return values, links


def resolve(name: str, values: Mapping[str, str], links: Mapping[str, str]) -> tuple[str, str]:
    """(value, "") or ("", the name at which the chain ends without one)."""
    for _ in range(len(links) + 1):
        if name in values:
            return values[name], ""
        if name not in links:
            break
        name = links[name]
    return "", name


def reflexion(request: Request) -> str:
    """Answers from notes, reflections and documents; turns feedback into a reflection."""
    s = slots(request)
    if found := re.search(r"wrong \. (\w+ \w+) is now (\w+ \w+) \.", s.get("feedback", "")):
        return f" reflect {found[1]} {found[2]}"
    values, links = statements(s.get("documents", ""), s.get("notes", ""), s.get("reflections", ""))
    name = re.search(r"what is (\w+ \w+) \?", s["question"])[1]
    return f" answer {resolve(name, values, links)[0] or 'glass zero'}"


def memgpt(request: Request) -> str:
    """Remembers told facts, recalls facts missing from its memory, replies."""
    s = slots(request)
    if told := re.search(r"User: (\w+ \w+) is now (\w+ \w+) \.", s["message"]):
        return f" remember {told[1]} {told[2]}"
    values, links = statements(s.get("sessions", ""), s.get("recalled", ""), s.get("memory", ""))
    name = re.search(r"what is (\w+ \w+) \?", s["message"])[1]
    value, unknown = resolve(name, values, links)
    if not value and "sessions" in s and "nothing" not in s.get("recalled", ""):
        return f" recall {unknown}"
    return f" reply {value or 'glass zero'}"


def swe_agent(request: Request) -> str:
    """Search, open, edit, test, submit: each chosen from the history and the window."""
    s = slots(request)
    name, what = re.search(r"Issue: (\w+ \w+) must (.+)", s["issue"]).groups()
    history, name = s.get("history", ""), name.replace(" ", "_")
    if "\nCall: test" in history or ("window" not in s and "system" not in s):
        return " submit"
    if "\nCall: edit" in history:
        return " test"
    if "\nCall: search" not in history:
        return f" search {name}"
    if "\nCall: open" not in history:
        return f" open {re.search(r'(conf/set_.[.]py) ', history.split('Result:')[1])[1]}"
    line = re.search(rf"\n(\d+) {name} = ", s["window"])[1]
    signs = {"sum": "+", "differ": "-", "multiply": "*"}
    if what in signs:
        right = f"lambda x, y: x {signs[what]} y"
    elif what.startswith("be "):
        right = f'"{what.removeprefix("be ")}"'
    else:
        right = what.removeprefix("follow ").replace(" ", "_")
    return f" edit {line} {name} = {right}"


def function_calling(request: Request) -> str:
    """Works the job from left to right: fetch two operands, apply, fetch the next one, go on."""
    s = slots(request)
    words = s["job"].split(":", 1)[1].split()
    if "system" not in s:
        return " finish 0"
    entries = re.findall(r"Assistant: (.+)\nExecutor: (.+)", s.get("history", "").split("job ended")[-1])
    held = {call.removeprefix("get "): result for call, result in entries if call.startswith("get ")}
    results = [result for call, result in entries if call.split()[0] in OPERATIONS]
    operands = [" ".join(words[i + 1 : i + 3]) for i in range(0, len(words), 3)]
    done = len(results)
    if done == len(operands) - 1:
        return f" finish {results[-1]}"
    for name in operands[: done + 2]:
        if name not in held:
            return f" get {name}"
    return f" {words[3 * (done + 1)]} {results[-1] if results else held[operands[0]]} {held[operands[done + 1]]}"


ORACLES: dict[str, Callable[[Request], str]] = {
    "reflexion": reflexion,
    "memgpt": memgpt,
    "swe_agent": swe_agent,
    "function_calling": function_calling,
}


def oracle(agent: str) -> Scripted:
    """The oracle of the agent called `agent`."""
    if agent not in ORACLES:
        raise ConfigError(f"unknown agent {agent!r} (known: {', '.join(ORACLES)})")
    return Scripted("oracle", ORACLES[agent])
