"""Episodes as JSONL: one header, each segment's text once, one line a step, one end line. Replayable.

Segments are named by the SHA-256 of their text, so that a trace of a long history stays linear in its length, and so
that two runs' prompts can be compared by their hashes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from cacheslide.plain_values import parse_json
from harness.agents.calls import Call
from harness.agents.completer import Completer, Completion, Request
from harness.agents.loop import Episode, Step
from harness.tasks.example import TextSegment

SCHEMA = 1


def sha256(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes; lone surrogates, which cannot be encoded, keep their own bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_digest(segments: Iterable[TextSegment]) -> str:
    """Identifier of a prompt, from its segments' names, roles and text hashes in order."""
    return sha256(json.dumps([[s.name, s.role, sha256(s.text)] for s in segments]))


def write_episodes(path: Path, episodes: Iterable[Episode], run: dict[str, Any] | None = None) -> None:
    """Write episodes; `run` (provenance, seeds) goes into every header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for episode in episodes:
            for line in lines(episode, run or {}):
                file.write(json.dumps(line, sort_keys=True) + "\n")


def lines(episode: Episode, run: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The trace lines of one episode."""
    yield {
        "kind": "episode",
        "schema": SCHEMA,
        "agent": episode.agent,
        "task": episode.task_id,
        "system": episode.system,
        "run": run,
    }
    known: set[str] = set()
    for step in episode.steps:
        for s in step.segments:
            if (digest := sha256(s.text)) not in known:
                known.add(digest)
                yield {"kind": "text", "sha256": digest, "text": s.text}
        yield _step_line(step)
    end = {k: getattr(episode, k) for k in ("stop", "failure", "score", "seconds")}
    yield {"kind": "end", "steps": len(episode.steps), "solved_by": episode.solved_by, **end}


def _step_line(step: Step) -> dict[str, Any]:
    done = step.completion
    return {
        "kind": "step",
        "index": step.index,
        "turn": step.turn,
        "prompt": prompt_digest(step.segments),
        "segments": [[s.name, s.role, sha256(s.text)] for s in step.segments],
        "prompt_ids": done.prompt_ids,
        "output": done.text,
        "output_ids": done.output_ids,
        "token_s": done.token_s,
        "total_s": done.total_s,
        "receipt": done.receipt,
        "call": None if step.call is None else [step.call.tool, *step.call.args],
        "result": step.result,
        "error": step.error,
        "tool_s": step.tool_s,
    }


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a trace; DataError where it is damaged or of another schema."""
    out, texts, current = [], {}, None
    with path.open(encoding="utf-8") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = parse_json(raw)
                kind = line["kind"]
                if kind == "episode":
                    if line["schema"] != SCHEMA:
                        raise DataError(f"{path}:{number}: trace schema {line['schema']}, this reads {SCHEMA}")
                    current, texts = Episode(line["agent"], line["task"], line["system"]), {}
                elif kind == "text":
                    if sha256(line["text"]) != line["sha256"]:
                        raise DataError(f"{path}:{number}: the text does not have the hash it is stored under")
                    texts[line["sha256"]] = line["text"]
                elif kind == "step":
                    current.steps.append(_read_step(line, texts))
                elif kind == "end":
                    if line["steps"] != len(current.steps):
                        raise DataError(f"{path}:{number}: {len(current.steps)} of {line['steps']} steps are there")
                    for key in ("stop", "failure", "score", "seconds"):
                        setattr(current, key, line[key])
                    current.solved_by = line.get("solved_by", "")
                    out.append(current)
                    current = None
                else:
                    raise DataError(f"{path}:{number}: unknown line kind {kind!r}")
            except (KeyError, TypeError, AttributeError, ValueError) as wrong:
                raise DataError(f"{path}:{number}: not a trace line ({wrong!r})") from None
    if current is not None:
        raise DataError(f"{path}: the last episode has no end")
    return out


def _read_step(line: dict[str, Any], texts: dict[str, str]) -> Step:
    segments = tuple(TextSegment(name, texts[digest], role) for name, role, digest in line["segments"])
    ids = line["prompt_ids"]
    completion = Completion(
        line["output"],
        None if ids is None else tuple(map(tuple, ids)),
        None if line["output_ids"] is None else tuple(line["output_ids"]),
        tuple(line["token_s"]),
        line["total_s"],
        line["receipt"],
    )
    call = None if line["call"] is None else Call(line["call"][0], tuple(line["call"][1:]))
    fields = (line["result"], line["error"], line["tool_s"])
    return Step(line["index"], line["turn"], segments, completion, call, *fields)


@dataclass(frozen=True)
class Replayed:
    """One step served again: the prompt's digest, the recorded output, and the system's own output."""

    index: int
    prompt: str
    forced: str
    own: Completion

    @property
    def agrees(self) -> bool:
        """Whether the system's own output is the recorded one; a call is compared without surrounding blanks."""
        return self.own.text.strip() == self.forced.strip()


def replay(episode: Episode, completer: Completer, max_tokens: int) -> list[Replayed]:
    """Teacher-forced: serve the recorded prompts in order, for any answers of the system. No tool runs."""
    out = []
    for step in episode.steps:
        own = completer.complete(Request(episode.task_id, step.index, step.segments, max_tokens))
        out.append(Replayed(step.index, prompt_digest(step.segments), step.completion.text, own))
    return out


class Forced:
    """Teacher-forced inside the loop: `inner` serves every request, but the agent gets the recorded output.

    Tools run and every prompt is the recorded one, so any number of agents can be served at once with identical
    turns. `own` holds the system's own outputs, by session and step.
    """

    def __init__(self, inner: Completer, episodes: Iterable[Episode]) -> None:
        self.inner, self.system = inner, inner.system
        self.recorded = {e.task_id: Recorded(e) for e in episodes}
        self.own: dict[tuple[str, int], Replayed] = {}

    def complete(self, request: Request) -> Completion:
        """The recorded output with the times and the receipt of serving it here."""
        if request.session not in self.recorded:
            raise DataError(f"no episode of {request.session} was recorded")
        told = self.recorded[request.session].complete(request)
        own = self.inner.complete(request)
        digest = prompt_digest(request.segments)
        self.own[request.session, request.step] = Replayed(request.step, digest, told.text, own)
        return replace(own, text=told.text, output_ids=told.output_ids)


class Recorded:
    """A completer that gives a recorded episode's outputs, so that its loop and its tools run again.

    A prompt other than the recorded one is a DataError that names the segment. With `ignore`, segments with these
    name prefixes can differ: results that contain times or paths.
    """

    def __init__(self, episode: Episode, ignore: Sequence[str] = ()) -> None:
        self.system, self.episode, self.ignore = f"recorded:{episode.system}", episode, tuple(ignore)

    def complete(self, request: Request) -> Completion:
        """The recorded completion of this step."""
        if request.step >= len(self.episode.steps):
            raise DataError(f"{request.session}: the trace has {len(self.episode.steps)} steps, one more was asked for")
        step = self.episode.steps[request.step]
        if len(step.segments) != len(request.segments):
            raise DataError(f"{request.session} step {request.step}: the number of segments differs from the trace")
        for was, now in zip(step.segments, request.segments, strict=True):
            if was != now and not now.name.startswith(self.ignore or "\0"):
                raise DataError(f"{request.session} step {request.step}: segment {now.name!r} differs from the trace")
        return step.completion
