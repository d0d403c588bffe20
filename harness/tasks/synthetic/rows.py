"""Synthetic prompts as rows in the schemas of HotPotQA (distractor) and SWE-bench (oracle), and back.

A prompt gives one row per question of the second turn ("t1"), and one row that carries the first turn ("t0"). Depth
and volatility are derived as for real data: from the supporting facts, and from the hints' `file:line` hops.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.tasks.example import Question, TaskExample
from harness.tasks.jsonlines import read_lines, write_lines
from harness.tasks.synthetic import render
from harness.tasks.synthetic.prompts import Prompt, prompts, segments, text

_ID = re.compile(r"(?P<split>[a-z]+)-(?P<prompt>\d{5})-t(?P<turn>[01])-q(?P<question>\d+)")
_LEVELS = {"sparse": "easy", "deep": "hard"}
_FILE = re.compile(r"\[start of (?P<path>[^\]\n]+)\]\n(?P<body>.*?)\[end of (?P=path)\]\n", re.DOTALL)
_ORACLE = "You will be provided with a partial code base and an issue statement explaining a problem to resolve.\n"
HOTPOT_FIELDS = ("id", "question", "answer", "type", "level", "supporting_facts", "context")
_NESTED = ("supporting_facts", "context")
SWE_FIELDS = (
    "instance_id",
    "text",
    "repo",
    "base_commit",
    "problem_statement",
    "hints_text",
    "created_at",
    "patch",
    "test_patch",
    "version",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
    "environment_setup_commit",
)


def rows(style: str, mix: str, split: str, seed: int, count: int, tokens: int) -> Iterator[dict]:
    """The rows of `count` prompts, in the style's schema."""
    make = _hotpot_row if style == "hotpotqa" else _swe_row
    for prompt in prompts(style, mix, split, seed, count, tokens):
        yield make(prompt, mix, 0, 0)
        for k in range(len(prompt.asked)):
            yield make(prompt, mix, 1, k)


def write_rows(path: Path, style: str, mix: str, split: str, seed: int, count: int, tokens: int) -> str:
    """Write the rows as JSONL, the same bytes every time, and return their SHA-256. Leaves no half-written file."""
    return write_lines(path, rows(style, mix, split, seed, count, tokens))


def read_rows(path: Path) -> Iterator[TaskExample]:
    """Task examples from a file that `write_rows` wrote; the schema tells the style. DataError on any other row."""
    parsed = (_read(row, where) for where, row in read_lines(path))
    for prompt, group in groupby(parsed, lambda r: f"{r['split']}-{r['prompt']}"):
        turns: dict[str, list[dict]] = {"0": [], "1": []}
        for row in group:
            turns[row["turn"]].append(row)
        if not turns["0"] or not turns["1"]:
            raise DataError(f"{path}: prompt {prompt} lacks the rows of a turn")
        first, before = turns["1"][0], turns["0"][0]
        meta = {k: first[k] for k in ("style", "mix", "split")}
        task = f"synthetic-{first['style']}"
        asked = tuple(r["asked"] for r in turns["1"])
        yield TaskExample(f"{prompt}-t1", task, first["segments"], before["segments"], asked, meta=meta)


def _read(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row is no object")
    style = "hotpotqa" if "supporting_facts" in row else "swebench"
    fields = HOTPOT_FIELDS if style == "hotpotqa" else SWE_FIELDS
    if missing := [f for f in fields if f not in row]:
        raise DataError(f"{where}: the row lacks the field {missing[0]!r}")
    if wrong := [f for f in fields if f not in _NESTED and not isinstance(row[f], str)]:
        raise DataError(f"{where}: the field {wrong[0]!r} is no text")
    key = row["id" if style == "hotpotqa" else "instance_id"]
    if not (match := _ID.fullmatch(key)):
        raise DataError(f"{where}: {key!r} is not the id of a synthetic row")
    read = _read_hotpot if style == "hotpotqa" else _read_swe
    try:
        return {**match.groupdict(), "style": style, **read(row, key)}
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):  # fields of other types or contents
        raise DataError(f"{where}: {key!r} does not hold what a synthetic row does") from None


def _hotpot_row(prompt: Prompt, mix: str, turn: int, k: int) -> dict:
    documents, node, value = _shown(prompt, turn, k)
    facts = _hops(prompt, documents, prompt.asked[k])
    return {
        "id": f"{prompt.id}-t{turn}-q{k}",
        "question": f"what is {' '.join(node.name)} ?",
        "answer": value,
        "type": "bridge",
        "level": _LEVELS[mix],
        "supporting_facts": {"title": [t for t, _ in facts], "sent_id": [i for _, i in facts]},
        "context": {
            "title": [d.title for d in documents],
            "sentences": [[text(s.pieces) for s in d.sentences] for d in documents],
        },
    }


def _read_hotpot(row: dict, key: str) -> dict:
    context, facts = row["context"], row["supporting_facts"]
    bodies = [f"\n{t}:{''.join(s)}" for t, s in zip(context["title"], context["sentences"], strict=True)]
    name = row["question"].removeprefix("what is ").removesuffix(" ?").split()
    volatile = render.NOTES_TITLE in facts["title"]
    ask = text(render.question("hotpotqa", (name[0], name[1])))
    shown = segments("hotpotqa", bodies[0], list(zip(context["title"][1:], bodies[1:], strict=True)))
    mix = next(m for m, level in _LEVELS.items() if level == row["level"])
    asked = Question(key, ask, (row["answer"],), len(facts["title"]) - 1, volatile)
    return {"segments": shown, "asked": asked, "mix": mix}


def _swe_row(prompt: Prompt, mix: str, turn: int, k: int) -> dict:
    documents, node, value = _shown(prompt, turn, k)
    files = "".join(f"{text(d.pieces())[1:]}[end of {d.title}]\n" for d in documents)
    name, commit = " ".join(node.name), hashlib.sha1(files.encode()).hexdigest()
    test = f"test_{'_'.join(node.name)}"
    return {
        "instance_id": f"{prompt.id}-t{turn}-q{k}",
        "text": f"{_ORACLE}<issue>\nresolve {name}\n</issue>\n<code>\n{files}</code>\n",
        "repo": "synthetic/settings",
        "base_commit": commit,
        "problem_statement": f"resolve {name}",
        "hints_text": "\n".join(f"{path}:{line + 1}" for path, line in _hops(prompt, documents, prompt.asked[k])),
        "created_at": "2026-01-01T00:00:00Z",
        "patch": _diff("resolved.ini", f" {name} = unset", f" {name} = {value}"),
        "test_patch": _diff("test_resolved.py", f"# {test}: open", f"# {test}: {value}"),
        "version": mix,
        "FAIL_TO_PASS": json.dumps([test]),
        "PASS_TO_PASS": "[]",
        "environment_setup_commit": commit,
    }


def _read_swe(row: dict, key: str) -> dict:
    files = [(m["path"], f"\n[start of {m['path']}]\n{m['body']}") for m in _FILE.finditer(row["text"])]
    hops = row["hints_text"].split("\n")
    added = next(x for x in row["patch"].split("\n") if x.startswith("+ "))
    name = row["problem_statement"].removeprefix("resolve ").split()
    ask = text(render.question("swebench", (name[0], name[1])))
    volatile = any(h.startswith(render.NOTES_PATH + ":") for h in hops)
    asked = Question(key, ask, (added.split(" = ")[1],), len(hops) - 1, volatile)
    return {"segments": segments("swebench", files[0][1], files[1:]), "asked": asked, "mix": row["version"]}


def _diff(path: str, old: str, new: str) -> str:
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-{old}\n+{new}\n"


def _shown(prompt: Prompt, turn: int, k: int):
    node = prompt.asked[k]
    value = " ".join(prompt.world.resolve(node, prompt.values[turn]))
    return (prompt.notes[turn], *prompt.documents), prompt.world.nodes[node], value


def _hops(prompt: Prompt, documents, node: int) -> list[tuple[str, int]]:
    places = {s.node: (d.title, i) for d in documents for i, s in enumerate(d.sentences) if s.node is not None}
    return [places[n] for n in prompt.world.chain(node)]
