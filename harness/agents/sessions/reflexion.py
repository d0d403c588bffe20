"""Logs of Reflexion over HotpotQA (Shinn et al., 2023): trials, each with every question's scratchpad at its end.

A question is a session; its turns are the calls of the actor, trial after trial. ReAct asks the model twice a step: the
prompt up to "Thought n:" and the prompt up to "Action n:"; with given context (CoT) there is one step. A question that
was answered correctly is not run again, though later trials repeat its block.
"""

import hashlib
import re
from pathlib import Path

from cacheslide.analysis.session import Message, Session, Turn
from cacheslide.errors import DataError

TRIAL = re.compile(r"^#{10,}\nBEGIN TRIAL (\d+)\n.*\n#{10,}$", re.MULTILINE)
PART = re.compile(r"^-{5,} BEGIN (\w+) AGENTS -{5,}$", re.MULTILINE)
END = re.compile(r"^Correct answer:.*$", re.MULTILINE)
AGAIN = "You have attempted to answer"  # begins what Reflexion adds to a question after a failed trial
MARK = re.compile(r"^(Thought|Action)(?: (\d+))?:", re.MULTILINE)
DEMOS = "the instruction and the demonstrations in front of the question"
REFLECTING = "the calls that wrote the reflections"


def recognises(text: str) -> bool:
    """Whether a text is such a log: it announces a first trial."""
    first = TRIAL.search(text[:2000])
    return first is not None and first[1] == "1"


def read(path: Path, text: str, sha256: str) -> list[Session]:
    """A session a question, in the order in which the log names them; questions without any call are left out."""
    turns: dict[str, list[Turn]] = {}
    solved: set[str] = set()
    reflected: set[str] = set()
    absent: dict[str, list[str]] = {}
    for number, blocks in _trials(text, str(path)):
        for question in turns.keys() - blocks.keys() - solved:
            absent.setdefault(question, []).append(number)
        for question, (block, correct) in blocks.items():
            if question in solved:
                continue
            turns.setdefault(question, []).extend(_calls(block, f"{path}: trial {number}"))
            reflected |= {question} if AGAIN in block else set()
            solved |= {question} if correct else set()
    agent = "reflexion-react" if any(m[2] for m in MARK.finditer(text[:100_000])) else "reflexion-cot"
    return [
        Session(
            f"{path.stem}-{hashlib.sha256(question.encode()).hexdigest()[:12]}",
            sha256,
            agent,
            tuple(own),
            (
                DEMOS,
                *([REFLECTING] if question in reflected else []),
                *(f"trial {n}" for n in absent.get(question, [])),
            ),
        )
        for question, own in turns.items()
        if own
    ]


def _trials(text: str, path: str) -> list[tuple[str, dict[str, tuple[str, bool]]]]:
    """Per trial: its number, and by question its block and whether it was answered correctly."""
    heads = list(TRIAL.finditer(text))
    out = []
    for head, after in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : after.start() if after else len(text)]
        parts = list(PART.finditer(body))
        blocks: dict[str, tuple[str, bool]] = {}
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            section = body[part.end() : following.start() if following else len(body)]
            for block in filter(None, map(str.strip, END.split(section))):
                question = _question(block, f"{path}: trial {head[1]}")
                if question in blocks:
                    raise DataError(f"{path}: trial {head[1]} holds a question twice")
                blocks[question] = block, part[1] == "CORRECT"
        out.append((head[1], blocks))
    return out


def _question(block: str, where: str) -> str:
    if not block.startswith(("Question:", "Context:")):
        raise DataError(f"{where}: a block begins with neither Question: nor Context:")
    mark = MARK.search(block)
    asked = block[: mark.start()] if mark else block
    return asked.split(AGAIN)[0].strip()


def _calls(block: str, where: str) -> list[Turn]:
    """The prompts of a trial: the block up to each mark, in the order in which the agent writes them."""
    out, expected = [], ("Thought", 1)
    for mark in MARK.finditer(block):
        kind, number = mark[1], int(mark[2] or 1)
        if (kind, number) != expected:
            continue  # an observation that quotes such a line
        out.append(Turn((Message("", block[: mark.end()]),), label="reflexion"))
        expected = ("Action", number) if kind == "Thought" else ("Thought", number + 1)
    if not out:
        raise DataError(f"{where}: a question without a thought")
    return out
