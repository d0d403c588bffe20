"""Shared parts of the multi-hop question sets: paragraphs as fixed segments, a Reflexion scratchpad as the updated one.

Reflexion (Shinn et al., 2023) lets an agent try a question several times; before each new try it writes down what
went wrong. Here the first turn has an empty scratchpad and the second one a generated one, so that the paragraphs
after it move. The scratchpad depends on the seed and the row only and never mentions the answer.
"""

import random
from collections.abc import Sequence
from typing import Any

from cacheslide.errors import DataError
from harness.tasks import layout
from harness.tasks.example import Question, TaskExample
from harness.tasks.hub import Row

SYSTEM = (
    "You answer questions from the documents below. A question may need facts from several of them. "
    "The scratchpad holds your notes on earlier attempts. Reply with the shortest answer, without an explanation."
)
EMPTY_SCRATCHPAD = "Scratchpad: nothing has been tried so far."
FAILURES = (
    "I stopped at the opening sentence and replied too early.",
    "I mixed up two names that look alike.",
    "I followed a link that led away from the question.",
    "I replied with the name in the middle of the chain instead of the one at its end.",
    "I repeated a search that had already failed.",
    "I ran out of steps while reading about side issues.",
)
PLANS = (
    "Next time I will write down each link of the chain before replying.",
    "Next time I will compare the dates and places in both documents.",
    "Next time I will read every document that the question points to, in order.",
    "Next time I will look for the person or place that connects the documents.",
    "Next time I will check that the reply has the kind of value that is asked for.",
)


def scratchpad(rng: random.Random, question: str, titles: Sequence[str], answers: Sequence[str]) -> str:
    """Notes on one to three failed attempts that mention neither an answer nor a title the question names.

    Leaving out the titles that the question names matters for comparisons: their answer is one of those titles,
    and mentioning the other one alone would point at it.
    """
    shut = (question, *answers)
    open_titles = [
        t for t in titles if not layout.mentions(t, answers) and not any(layout.mentions(x, [t]) for x in shut)
    ]
    lines = []
    for attempt in range(1, rng.randint(1, 3) + 1):
        read = rng.sample(open_titles, min(2, len(open_titles)))
        lines.append(f"Attempt {attempt}: I read " + (" and ".join(read) or "a few documents") + ".")
        lines.append(rng.choice(FAILURES))
        lines.append(rng.choice(PLANS))
    kept = [line for line in lines if not layout.mentions(line, answers)]
    return "\n".join(["Scratchpad of failed attempts:", *kept])


def qa_example(
    *,
    task: str,
    row: Row,
    row_id: str,
    rng: random.Random,
    paragraphs: Sequence[tuple[str, str]],
    answers: Sequence[str],
    depth: int | None,
    meta: dict[str, str],
) -> TaskExample:
    """One question with its paragraphs, (title, text) each, as a `TaskExample` scored by token F1."""
    answers = tuple(dict.fromkeys(a.strip() for a in answers if a.strip()))
    if not answers:
        raise DataError(f"{row.where}: field 'answer' is empty; this split has no gold answers to score against")
    if not paragraphs:
        raise DataError(f"{row.where}: the row has no paragraphs")
    titles = [title for title, _ in paragraphs]
    return layout.example(
        id=row_id,
        task=task,
        system=SYSTEM,
        updated=("scratchpad", scratchpad(rng, row["question"], titles, answers), EMPTY_SCRATCHPAD),
        fixed=[(f"document_{i}", f"Title: {title}\n{text}") for i, (title, text) in enumerate(paragraphs)],
        question=Question(
            id=row_id,
            text=f"Question: {row['question'].strip()}\nAnswer:",
            answers=answers,
            depth=depth,
            volatile=False,
        ),
        metric="f1",
        meta={"file": row.file, **meta},
    )


def columns(value: Any, names: tuple[str, ...]) -> Any:
    """Turn a list of records `[[a, b], …]`, as in the original releases, into columns `{name: [a, …], …}`.

    Anything else is returned unchanged, for the schema check.
    """
    if isinstance(value, list) and all(isinstance(item, list) and len(item) == len(names) for item in value):
        return {name: [item[i] for item in value] for i, name in enumerate(names)}
    return value


def joined(titles: Sequence[str], sentences: Sequence[Sequence[str]], where: str) -> list[tuple[str, str]]:
    """Paragraphs as (title, text) from parallel columns; HotPotQA's sentences carry their own leading space."""
    if len(titles) != len(sentences):
        raise DataError(f"{where}: field 'context' has {len(titles)} titles but {len(sentences)} paragraphs")
    return [(title, " ".join(s.strip() for s in parts)) for title, parts in zip(titles, sentences, strict=True)]
