"""The ledger model's tokenizer: each word of the task is one token, and any other text falls back to bytes."""

from functools import cache

from tokenizers import Tokenizer

from harness.tasks.ledger.prompts import HEADS, question, system_pieces
from harness.tasks.ledger.sentences import STYLES, form_pieces
from harness.tasks.ledger.world import FIELDS
from harness.tasks.synthetic import render, words
from harness.training.tokenizer import word_tokenizer


def ledger_pieces() -> list[str]:
    """Every piece that the task can render, sorted."""
    found = {f" {w}" for w in (*words.FIRST, *words.SECOND, *words.MATERIAL, *words.MARK, *FIELDS)}
    found |= {f" {w}" for group in words.FILLER.values() for w in group} | set("0123456789") | set(form_pieces())
    for style in STYLES:
        found |= {p for sentence in render.filler_pool(style) for p in sentence}
        found |= set(system_pieces(style)) | set(question(style, ("amber", "acorn")))
        found |= {p for _, head in HEADS[style] for p in head.split("|")}
    return sorted(found | {"Report", " conf"})


@cache
def ledger_tokenizer() -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer, and piece -> id."""
    tokenizer = word_tokenizer(ledger_pieces())
    table = {p: tokenizer.encode(p, add_special_tokens=False).ids for p in ledger_pieces()}
    return tokenizer, {p: ids[0] for p, ids in table.items() if len(ids) == 1}
