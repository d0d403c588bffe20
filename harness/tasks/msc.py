"""Multi-Session Chat (Xu et al., 2022) as MemGPT sees it: earlier sessions are fixed, the working memory changes.

Two layouts, two loaders. `load` reads the hub's table of sessions (one row a session, grouped here by conversation)
and asks for the next utterance. `load_self_instruct` reads the rows of the original release (one row a conversation)
with MemGPT's question and answer about it, and falls back on the next utterance for rows that have none.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Features, List, Value

from cacheslide.errors import DataError
from harness.tasks import hub, layout
from harness.tasks.example import Question, TaskExample
from harness.tasks.schema import Schema

SYSTEM = (
    "You are a conversational companion who remembers earlier sessions. The working memory holds what you have "
    "noted about both speakers; the sessions follow in order, the oldest first."
)
SPEAKERS = ("Speaker 1", "Speaker 2")
Turn = tuple[str, str]  # speaker, text

SESSIONS = hub.Source(
    name="msc",
    repo="nayohan/multi_session_chat",
    files={split: f"data/{split}-*.parquet" for split in ("train", "validation", "test")},
    schema=Schema(
        Features(
            {
                "dialoug_id": Value("int64"),  # the spelling in the data
                "session_id": Value("int64"),
                "persona1": List(Value("string")),
                "persona2": List(Value("string")),
                "dialogue": List(Value("string")),
                "speaker": List(Value("string")),
            }
        )
    ),
)
CONVERSATIONS = hub.Source(
    name="msc_self_instruct",
    repo="MemGPT/MSC-Self-Instruct",
    files={"train": "msc_self_instruct.jsonl"},
    schema=Schema(
        Features(
            {
                "personas": List(List(Value("string"))),
                "previous_dialogs": List({"dialog": List({"text": Value("string")})}),
                "dialog": List({"id": Value("string"), "text": Value("string")}),
                "metadata": {"initial_data_id": Value("string")},
                "self_instruct": {"A": Value("string"), "B": Value("string")},
            }
        ),
        optional=frozenset({"metadata", "self_instruct"}),
    ),
)


def load(split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Iterator[TaskExample]:
    """Conversations of two sessions or more; those of one (part of the training split) are left out.

    The whole split is read before the first example, because a conversation's sessions need not be neighbours.
    Nothing is drawn at random, so `seed` has no effect. See `registry.load` for the parameters.
    """
    return hub.limited(_from_sessions(hub.rows(SESSIONS, split, path), split), limit)


def load_self_instruct(
    split: str = "train", path: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Iterator[TaskExample]:
    """MemGPT's questions about earlier sessions. Nothing is drawn at random, so `seed` has no effect."""
    rows = enumerate(hub.rows(CONVERSATIONS, split, path))
    return hub.limited((_from_conversation(row, i, split) for i, row in rows), limit)


def _from_sessions(rows: Iterator[hub.Row], split: str) -> Iterator[TaskExample]:
    conversations: dict[int, dict[int, hub.Row]] = {}
    for row in rows:
        conversations.setdefault(row["dialoug_id"], {})[row["session_id"]] = row
    for number, sessions in conversations.items():
        *earlier, last = (sessions[i] for i in sorted(sessions))
        if earlier:
            yield _example(
                task=SESSIONS.name,
                id=f"msc-{split}-{number}",
                personas=(last["persona1"], last["persona2"]),
                earlier=[_session_turns(row) for row in earlier],
                current=_session_turns(last),
                asked=None,
                row=last,
                split=split,
            )


def _session_turns(row: hub.Row) -> list[Turn]:
    texts, speakers = row["dialogue"], row["speaker"]
    if len(texts) != len(speakers):
        raise DataError(f"{row.where}: field 'speaker' has {len(speakers)} entries, 'dialogue' has {len(texts)}")
    return list(zip(speakers, texts, strict=True))


def _from_conversation(row: hub.Row, index: int, split: str) -> TaskExample:
    asked = row.fields.get("self_instruct")
    number = row.fields.get("metadata", {}).get("initial_data_id", str(index))
    if not row["previous_dialogs"]:
        raise DataError(f"{row.where}: field 'previous_dialogs' is empty")
    return _example(
        task=CONVERSATIONS.name,
        id=f"msc-{number}",
        personas=row["personas"],
        # the turns of earlier sessions carry no speaker in the release: the speakers alternate
        earlier=[
            [(SPEAKERS[i % 2], turn["text"]) for i, turn in enumerate(session["dialog"])]
            for session in row["previous_dialogs"]
        ],
        current=[(turn["id"], turn["text"]) for turn in row["dialog"]],
        asked=(asked["B"], asked["A"]) if asked else None,
        row=row,
        split=split,
    )


def _example(
    *,
    task: str,
    id: str,
    personas: Sequence[Sequence[str]],
    earlier: list[list[Turn]],
    current: list[Turn],
    asked: tuple[str, str] | None,
    row: hub.Row,
    split: str,
) -> TaskExample:
    if asked:
        question, answer = (
            f"Current session:\n{_lines(current)}\nQuestion: {asked[0].strip()}\nAnswer:",
            asked[1].strip(),
        )
    elif current:
        *heard, (speaker, answer) = current
        question = f"Current session:\n{_lines(heard)}\n{speaker}:"
    else:
        raise DataError(f"{row.where}: the last session has no utterance to ask for")
    return layout.example(
        id=id,
        task=task,
        system=SYSTEM,
        updated=("working_memory", *working_memory(personas, answer)),
        fixed=[(f"session_{i}", f"Session {i}:\n{_lines(turns)}") for i, turns in enumerate(earlier, start=1)],
        question=Question(id=id, text=question, answers=(answer,)),
        metric="rouge_l",
        meta={"file": row.file, "split": split},
    )


def working_memory(personas: Sequence[Sequence[str]], answer: str) -> tuple[str, str]:
    """The memory now and the one before: all notes on each speaker, and the first half of them.

    Notes that hold the answer are left out, so that the answer is only in the sessions.
    """
    now, before = ["Working memory:"], ["Working memory of the turn before:"]
    for speaker, notes in zip(SPEAKERS, personas, strict=False):
        kept = [f"- {speaker}: {note.strip()}" for note in notes if not layout.mentions(note, [answer])]
        now += kept
        before += kept[: len(kept) // 2]
    return "\n".join(now), "\n".join(before)


def _lines(turns: list[Turn]) -> str:
    return "\n".join(f"{speaker}: {text.strip()}" for speaker, text in turns)
