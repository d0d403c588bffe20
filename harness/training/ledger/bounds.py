"""Bounds on the numbers of a training run of the ledger model; ConfigError in one line outside them."""

import math
from random import Random
from typing import Any

from cacheslide.errors import ConfigError, DataError
from harness.tasks.ledger.prompts import documents_for
from harness.tasks.ledger.world import Shape
from harness.training.ledger.data import RowSpec, prompt_rows
from harness.training.ledger.losses import Plan
from harness.training.ledger.model import Size
from harness.training.ledger.tokens import ledger_tokenizer

TRIES = 20  # prompts tried for a row that fits before a row spec is refused; a stream would search forever
COUNTS = {"seed": 0, "warmup": 1, "again": 1, "workers": 0, "log_every": 1, "eval_prompts": 1}
SHARES = ("links", "volatile", "rebound", "deeper", "lead", "tail", "joined", "decoys")
WHOLE = ("roots", "update_roots", "overruled", "depth", "notes_filler")


def count(value: Any, least: int, where: str) -> None:
    """ConfigError unless `value` is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{where} must be an integer of at least {least}, not {value!r}")


def number(value: Any, where: str, least: float = 0.0, most: float = math.inf) -> None:
    """ConfigError unless `value` is a finite number in [least, most]."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        upper = "" if most == math.inf else f" and at most {most:g}"
        raise ConfigError(f"{where} must be a number of at least {least:g}{upper}, not {value!r}")


def span(value: Any, least: int, where: str) -> None:
    """ConfigError unless `value` is a pair of integers in order, from `least` on."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"{where} must be two integers, not {value!r}")
    count(value[0], least, where)
    count(value[1], value[0], where)


def check_run(s: Any, where: str) -> None:
    """Refuse numbers of `Settings` outside their bounds."""
    for name, least in COUNTS.items():
        count(getattr(s, name), least, f"{where}: {name}")
    if s.steps is not None:
        count(s.steps, 0, f"{where}: steps")
    for name in ("seconds", "weight_decay", "pointers", "save_seconds"):
        number(getattr(s, name), f"{where}: {name}")
    number(s.lr, f"{where}: lr", 1e-12)
    number(s.decay, f"{where}: decay", 1e-6, 1.0)
    if type(s.state) is not bool:
        raise ConfigError(f"{where}: state is true or false, not {s.state!r}")
    if not isinstance(s.eval_tokens, tuple):
        raise ConfigError(f"{where}: eval_tokens must be a list, not {s.eval_tokens!r}")
    for tokens in s.eval_tokens:
        count(tokens, 1, f"{where}: eval_tokens")
        try:
            documents_for(tokens)
        except DataError as wrong:
            raise ConfigError(f"{where}: eval_tokens: {wrong}") from None


def check_size(size: Size) -> None:
    """Refuse an impossible model, or one too small for the task's words or the supervised layers."""
    for name in ("vocab", "layers", "hidden", "heads", "kv_heads", "head_dim", "ff", "positions"):
        count(getattr(size, name), 1, f"model.{name}")
    number(size.theta, "model.theta", 1.0)
    if size.heads % size.kv_heads or size.head_dim % 2:
        raise ConfigError("model: heads must be a multiple of kv_heads, and head_dim even")
    if size.vocab < (words := ledger_tokenizer()[0].get_vocab_size()):
        raise ConfigError(f"model.vocab: the task has {words} words, not {size.vocab}")
    plan = Plan.of(size.layers)
    if not 0 <= plan.gather < max(plan.watched) < size.layers or plan.ask <= max(plan.look):
        raise ConfigError(f"model.layers: {size.layers} are too few to gather, look and ask")


def check_rows(spec: RowSpec, positions: int, where: str) -> None:
    """Refuse rows that no prompt fills, or that are longer than the model's `positions`."""
    span(spec.documents, 1, f"{where}.documents")
    for name in ("length", "batch", "questions"):
        count(getattr(spec, name), 1, f"{where}.{name}")
    number(spec.weight, f"{where}.weight", 1e-9)
    if spec.length > positions:
        raise ConfigError(f"{where}.length: {spec.length} tokens are more than the model's {positions} positions")
    _check_shape(spec.shape, f"{where}.shape")
    rng = Random("row")
    try:
        rows = (row for _ in range(TRIES) for row in prompt_rows(rng, spec, "train"))
        fits = next(rows, None) is not None
    except (LookupError, ValueError) as wrong:  # more names than there are words, for example
        raise ConfigError(f"{where}: no prompt of this shape can be drawn ({wrong})") from None
    if not fits:
        raise ConfigError(f"{where}.length: none of {TRIES} prompts fits into {spec.length} tokens")


def _check_shape(shape: Shape, where: str) -> None:
    span(shape.entries, 1, f"{where}.entries")
    if shape.chunk_tokens is not None:
        span(shape.chunk_tokens, 1, f"{where}.chunk_tokens")
    for name in WHOLE:
        count(getattr(shape, name), 0, f"{where}.{name}")
    for name in SHARES:
        number(getattr(shape, name), f"{where}.{name}", 0.0, 1.0)
    if shape.forms is not None:
        count(shape.forms, 1, f"{where}.forms")
