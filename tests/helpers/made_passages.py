"""Invented questions with passages, and a small random Gemma that reads them."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.backends.reference import ReferenceBackend
from harness.tasks.passages import PassageRow
from tests.helpers.checkpoints import save_random
from tests.helpers.made_sessions import WORDS, words

LAYERS = 6
TOKENIZER = Path("models/tiny-llama-12m")


def save_gemma(path: Path, layers: int = LAYERS) -> Path:
    """A random Gemma 3 of `layers` layers, every third of which attends to everything, with the task's tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    shape = {"vocab_size": 1280, "num_hidden_layers": layers, "max_position_embeddings": 4096}
    windows = {"sliding_window": 64, "sliding_window_pattern": 3}
    save_random(path, "gemma3", spread=0.2, initializer_range=0.12, **shape, **windows)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    return path


@cache
def gemma() -> ReferenceBackend:
    """The backend over such a model, float32."""
    with TemporaryDirectory() as folder:
        return ReferenceBackend(save_gemma(Path(folder)))


def passage_row(number: int, gold: tuple[int, ...] = (1, 3), passages: int = 6) -> PassageRow:
    """Row `number`; the needed passages hold its answer, which no other row has."""
    answer = f"{WORDS[number % len(WORDS)]} {number}"
    texts = [f"Title {number} {i}\n{words(12, 100 * number + i)}" for i in range(passages)]
    texts = [f"{t} and the {answer} ." if i in (1, 3) else t for i, t in enumerate(texts)]
    return PassageRow(
        f"id-{number}", f"{number:064x}", "made", f"Which one is {number}?", (answer,), tuple(texts), gold
    )


def passage_rows(count: int, **more: Any) -> list[PassageRow]:
    """`count` rows."""
    return [passage_row(number, **more) for number in range(count)]


def write_musique(path: Path, count: int) -> Path:
    """Rows in MuSiQue's schema."""
    rows = []
    for row in passage_rows(count):
        parts = [
            {"idx": i, "title": "", "paragraph_text": text, "is_supporting": i in row.gold}
            for i, text in enumerate(row.passages)
        ]
        rows.append({"id": row.id, "paragraphs": parts, "question": row.question, "answer": row.answers[0],
                     "answer_aliases": [], "question_decomposition": [], "answerable": True})  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
