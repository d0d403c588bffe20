"""`cacheslide analyse`: the savings of prefix caching and of order-preserving reuse on recorded traffic."""

import argparse
import json
from pathlib import Path
from typing import Any

from cacheslide.plain_values import at_least, shown

ROWS = {  # key of a row: its label
    "cached": "a prefix cache over all requests serves",
    "on_top": "order-preserving reuse serves on top",
    "reordered": "occurred before in another order or is a second copy",
    "new": "new",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `analyse`."""
    parser.add_argument("requests", type=Path, help="JSON lines: bodies of OpenAI requests, or {'body': ...}")
    parser.add_argument("--model", type=Path, help="folder of the model's tokenizer (default: an approximation)")
    parser.add_argument("--min-tokens", type=at_least(1), default=32, help="shortest text that counts as reused (32)")
    parser.add_argument("--json", action="store_true", help="everything as JSON, every turn included")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    report = analyse(args.requests, args.model, args.min_tokens)
    print(json.dumps(report, indent=1) if args.json else "\n".join(_lines(report)))
    return 0


def analyse(path: Path, model: Path | None, min_tokens: int) -> dict[str, Any]:
    """All results for a file as JSON-serialisable values. One-line DataError or ModelError."""
    from cacheslide.analysis.counting import ModelCounter, PatternCounter
    from cacheslide.analysis.grouping import group
    from cacheslide.analysis.openai_requests import read_requests
    from cacheslide.analysis.traffic import measure, summary
    from cacheslide.analysis.verdict import verdict

    requests, digest = read_requests(path)
    sessions = group(requests, digest)
    counter = PatternCounter() if model is None else ModelCounter(model, [request.turn for request in requests])
    measured = measure(sessions, counter, min_tokens)
    total = summary(measured)
    labels = sorted({session.agent for session in sessions})
    return {
        "file": str(path),
        "sha256": digest,
        "requests": len(requests),
        "keyed": sum(bool(request.session) for request in requests),
        "dropped": sum(request.dropped for request in requests),
        "counted_with": counter.name,
        "min_tokens": min_tokens,
        "verdict": verdict(total),
        "total": total,
        "by": {
            label: summary([m for s, m in zip(sessions, measured, strict=True) if s.agent == label]) for label in labels
        },
        "per_session": [
            {"id": session.id, "agent": session.agent, "turns": [turn.record for turn in turns]}
            for session, turns in zip(sessions, measured, strict=True)
        ],
    }


def _lines(report: dict[str, Any]) -> list[str]:
    total, keyed = report["total"], report["keyed"]
    grouping = f"{keyed} requests by a key" if keyed else ""
    if keyed < report["requests"]:
        grouping += f"{', ' if grouping else ''}{report['requests'] - keyed} by what they begin with"
    lines = [
        str(report["file"]),
        f"sessions told apart: {grouping}",
        f"tokens counted with {report['counted_with']}",
    ]
    if report["dropped"]:
        lines.append(f"left out: {report['dropped']} parts of messages that are no text (images, audio)")
    lines += ["", *_table("all requests", total)]
    if len(report["by"]) > 1:
        for label, own in report["by"].items():
            title = label if label.isprintable() else shown(label)
            lines += ["", *_table(title or "(no agent or model named)", own)]
    return [*lines, "", *report["verdict"]]


def _table(title: str, own: dict[str, Any]) -> list[str]:
    tokens, length = own["tokens"], own["prompt_tokens"]
    behind = dict(tokens, new=length - tokens["cached"] - tokens["on_top"] - tokens["reordered_on_top"])
    behind["reordered"] = tokens["reordered_on_top"]
    lines = [f"{title}: {own['turns']} requests, {own['sessions']} sessions, {length} prompt tokens"]
    lines += [f"  {100 * behind[key] / length if length else 0:5.1f} %  {label}" for key, label in ROWS.items()]
    if shift := own["shift"]:
        size, moved = own["span_tokens"]["median"], 100 * own["moved"]
        ends = f"{shift['min']:+.0f} to {shift['max']:+.0f} tokens (median {shift['median']:+.0f})"
        lines.append(
            f"  reused in order: {size:.0f} tokens at a time (median), moved by {ends}, {moved:.0f} % of it at all"
        )
    return lines
