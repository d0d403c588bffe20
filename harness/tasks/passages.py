"""Questions with passages, read from files of several schemas, for the measurements on real text.

The schema is detected from the first row: HotpotQA's and 2WikiMultihopQA's official releases, MuSiQue's, CacheBlend's
inputs, LongBench's jsonl. Records name rows by id and hash and never hold their text.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.metrics.answers import normalize_answer
from harness.results.provenance import file_hash
from harness.tasks import cacheblend, hotpotqa, layout, longbench, multihop, musique
from harness.tasks.hub import json_rows

__all__ = ["PassageRow", "answer_passages", "file_hash", "others_than", "read_passages", "row_hash"]


@dataclass(frozen=True)
class PassageRow:
    """One question.

    Parameters
    ----------
    id : str
        The row's own id, or one made from its hash where the set has none.
    sha256 : str
        Hash of the row's JSON, independent of key order and layout.
    dataset : str
        The set's name.
    question : str
        The question.
    answers : tuple of str
        Accepted answers, at least one.
    passages : tuple of str
        Texts in the file's order, each after the line of its title, if any.
    gold : tuple of int
        Indices of the passages that the answer needs; () where the set does not say.
    """

    id: str
    sha256: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    gold: tuple[int, ...]


def read_passages(path: str | Path) -> list[PassageRow]:
    """The rows of a file in one of the schemas above; DataError names file, row and what is missing."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    out: dict[str, PassageRow] = {}
    reader: Callable[[Mapping[str, Any], str, str], PassageRow] | None = None
    for number, raw in json_rows(path):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict):
            raise DataError(f"{where}: expected an object with fields")
        reader = reader or _reader(raw, where)
        row = reader(raw, where, path.stem)
        if not row.passages or not any(row.answers):
            raise DataError(f"{where}: no {'answer' if row.passages else 'passage'}")
        if row.id in out:
            raise DataError(f"{where}: id {row.id!r} stands twice")
        out[row.id] = row
    if not out:
        raise DataError(f"{path}: holds no rows")
    return list(out.values())


def answer_passages(row: PassageRow) -> tuple[int, ...]:
    """Indices of the passages that hold one of the answers, as whole words after HotPotQA's normalisation."""
    return tuple(i for i, text in enumerate(row.passages) if layout.mentions(text, row.answers))


def others_than(rows: Sequence[PassageRow], known: Iterable[PassageRow]) -> list[PassageRow]:
    """The rows that share neither id, hash nor question (after HotpotQA's normalisation) with a row of `known`.

    Questions are compared too, since ids differ between schemas.
    """
    known = list(known)
    names = {name for row in known for name in (row.id, row.sha256)}
    asked = {normalize_answer(row.question) for row in known}
    return [r for r in rows if not names & {r.id, r.sha256} and normalize_answer(r.question) not in asked]


def row_hash(raw: Mapping[str, Any]) -> str:
    """SHA-256 of a row's JSON, independent of key order and layout."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _row(raw: Mapping[str, Any], id: str | None, dataset: str, question: str, answers, texts, gold=()) -> PassageRow:
    digest = row_hash(raw)
    name = f"{dataset}-{digest[:16]}" if id is None else id
    return PassageRow(name, digest, dataset, question, tuple(answers), tuple(texts), tuple(gold))


def _titled(title: str, text: str) -> str:
    return f"{title}\n{text}" if title else text


def _supported(raw: Mapping[str, Any], where: str, stem: str) -> PassageRow:
    """HotpotQA, and 2WikiMultihopQA, which has the same fields and evidences."""
    fields = hotpotqa.SOURCE.schema.check(hotpotqa.adapt({"level": "", **raw}, where), where)
    context, titles = fields["context"], fields["context"]["title"]
    texts = multihop.joined(titles, context["sentences"], where)
    needed = set(fields["supporting_facts"]["title"])
    gold = [i for i, title in enumerate(titles) if title in needed]
    dataset = "2wikimqa" if "evidences" in raw else hotpotqa.TASK
    parts = [_titled(*part) for part in texts]
    return _row(raw, fields["id"], dataset, fields["question"], [fields["answer"]], parts, gold)


def _musique(raw: Mapping[str, Any], where: str, stem: str) -> PassageRow:
    fields = musique.SOURCE.schema.check(raw, where)
    ordered = sorted(fields["paragraphs"], key=lambda p: p["idx"])
    parts = [_titled(p["title"], p["paragraph_text"]) for p in ordered]
    gold = [i for i, p in enumerate(ordered) if p["is_supporting"]]
    answers = [fields["answer"], *fields["answer_aliases"]]
    return _row(raw, fields["id"], musique.TASK, fields["question"], answers, parts, gold)


def _cacheblend(raw: Mapping[str, Any], where: str, stem: str) -> PassageRow:
    fields = cacheblend.SCHEMA.check(raw, where)
    parts = [_titled(c["title"], c["text"]) for c in fields["ctxs"]]
    return _row(raw, None, stem.removesuffix("_s"), fields["question"], fields["answers"], parts)


def _longbench(raw: Mapping[str, Any], where: str, stem: str) -> PassageRow:
    fields = longbench.SCHEMA.check(raw, where)
    parts = longbench.passages(fields["context"], where)
    return _row(raw, fields["_id"], fields["dataset"], fields["input"], fields["answers"], parts)


READERS: dict[str, Callable[[Mapping[str, Any], str, str], PassageRow]] = {  # by the field unique to the schema
    "ctxs": _cacheblend,
    "paragraphs": _musique,
    "all_classes": _longbench,
    "input": _longbench,
    "supporting_facts": _supported,
    "context": _supported,
}


def _reader(raw: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any], str, str], PassageRow]:
    for field, reader in READERS.items():
        if field in raw:
            return reader
    raise DataError(
        f"{where}: no schema that is known (HotpotQA has 'supporting_facts', MuSiQue 'paragraphs', CacheBlend's inputs "
        "'ctxs', LongBench 'input' and 'context')"
    )
