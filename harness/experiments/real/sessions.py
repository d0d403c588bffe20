"""Recorded sessions, tokens by kind: `python -m harness.experiments.real.sessions --data DIR --out FILE`.

Every file under DIR that is a log (`harness.agents.sessions`) is read; the record holds ids, hashes and numbers.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheslide.analysis.counting import ModelCounter, PatternCounter
from cacheslide.analysis.kinds import MIN_TOKENS
from cacheslide.analysis.session import Session
from cacheslide.analysis.traffic import MeasuredTurn, measure, summary
from cacheslide.errors import DataError
from cacheslide.plain_values import at_least
from harness.agents.sessions.registry import format_of, read_sessions, read_text
from harness.agents.sessions.swe_agent import FULL
from harness.results.provenance import file_hash, provenance
from harness.results.records import write_json
from harness.step import command

SCHEMA = "cacheslide.sessions/1"
SUFFIXES = (".traj", ".txt", ".jsonl", ".log")
NOTES = (
    "sessions are what could be had, not a sample: nothing here speaks of a population of agents",
    "the answers' own KV is not counted: a server that keeps it serves a longer prefix",
)


def group_of(session: Session) -> str:
    """The summary group of a session: its agent, marked if old observations could not be left out."""
    return f"{session.agent}-full" if FULL in session.lacks else session.agent


def task_of(session: Session) -> str:
    """The task of a session: runs of one issue differ in the file name after "__"."""
    return session.id.split("__")[0]


def notes(sessions: Sequence[Session]) -> list[str]:
    """Remarks that accompany the sessions' numbers."""
    tasks: dict[str, Counter[str]] = {}
    for session in sessions:
        tasks.setdefault(session.agent, Counter())[task_of(session)] += 1
    largest = {agent: counts.most_common(1)[0] for agent, counts in tasks.items()}
    same = [
        f"{n} of {tasks[agent].total()} sessions of {agent} are of one task, {task}"
        for agent, (task, n) in largest.items()
        if n > 1
    ]
    return [*same, *NOTES]


def find_sessions(folder: Path) -> list[tuple[Path, list[Session]]]:
    """The logs in a folder, by path; DataError if it holds none."""
    out = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        if format_of(read_text(path)[0]) is not None:
            out.append((path, read_sessions(path)))
    if not out:
        raise DataError(f"{folder} holds no recorded sessions ({', '.join(SUFFIXES)}; docs/real.md)")
    return out


def record(session: Session, file: str, turns: Sequence[MeasuredTurn]) -> dict[str, Any]:
    """One session in numbers; a span is [turn's index, tokens, shift, 1 if in order]."""
    spans = [[t, s.length, s.shift, int(s.in_order)] for t, turn in enumerate(turns) for s in turn.kinds.spans]
    rows = [turn.record for turn in turns]
    return {
        "id": session.id,
        "file": file,
        "sha256": session.sha256,
        "agent": session.agent,
        "group": group_of(session),
        "lacks": list(session.lacks),
        "task": task_of(session),
        "turns": {key: [row[key] for row in rows] for key in rows[0]},
        "spans": spans,
    }


def measure_folder(folder: Path, model: Path | None, min_tokens: int) -> dict[str, Any]:
    """Every session under `folder`, and a summary by group; each group has its own prefix cache."""
    found = find_sessions(folder)
    sessions = [(path, session) for path, members in found for session in members]
    turns = [turn for _, session in sessions for turn in session.turns]
    counter = PatternCounter() if model is None else ModelCounter(model, turns)
    groups: dict[str, dict[str, Any]] = {}
    records = []
    for name in sorted({group_of(session) for _, session in sessions}):
        members = [(path, session) for path, session in sessions if group_of(session) == name]
        measured = measure([session for _, session in members], counter, min_tokens)
        tasks = len({task_of(session) for _, session in members})
        groups[name] = summary(measured) | {"files": len({path for path, _ in members}), "tasks": tasks}
        records += [record(s, path.name, own) for (path, s), own in zip(members, measured, strict=True)]
    settings = {"min_tokens": min_tokens, "counted_with": counter.name if model is None else "the model's tokenizer"}
    tokenizer = "" if model is None else file_hash(model / "tokenizer.json")
    return {
        "schema": SCHEMA,
        **settings,
        "tokenizer_sha256": tokenizer,
        "notes": notes([session for _, session in sessions]),
        "groups": groups,
        "sessions": records,
        "provenance": provenance(settings, {path.name: file_hash(path) for path, _ in found}, tokenizer),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of recorded runs and logs")
    parser.add_argument("--model", type=Path, help="folder with tokenizer.json (default: an approximation)")
    parser.add_argument(
        "--min-tokens", type=at_least(1), default=MIN_TOKENS, help="shortest text that counts as reused"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        raise DataError(f"{args.data} is no folder")
    write_json(args.out, measure_folder(args.data, args.model, args.min_tokens))


if __name__ == "__main__":
    command(main)
