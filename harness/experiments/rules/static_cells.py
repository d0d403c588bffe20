"""Cells of the audit of static choices: tokens chosen by form alone, at several ratios, against random ones.

A static choice that beats random tokens reveals a shortcut of the task. Reuse without correction is measured too: in
place, at stale positions, and with every document encoded alone; each must lose as much as on real text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from baselines.key_norm import KeyNorm
from baselines.random_tokens import RandomTokens
from baselines.static_choice import ChunkEdges, ListedTokens, SentenceTails
from cacheslide.core.placement import Placement
from cacheslide.policies.base import Correction, ReusePolicy
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.registry import load_policy
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.top_deviation import TopDeviation
from harness.experiments.wca.cells import Cell
from harness.tasks.synthetic import words

RATIOS = (0.03, 0.1, 0.26)
RANDOM, NAIVE, STALE, ISOLATED = "random tokens", "naive", "stale positions", "isolated"
NO_CORRECTION = (NAIVE, STALE, ISOLATED)


@dataclass(frozen=True)
class Forms:
    """A tokenizer's ids by form: ends of sentences, all delimiters, words of names."""

    ends: frozenset[int]
    delimiters: frozenset[int]
    names: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Forms":
        """Read from the vocabulary: an end is a full stop or a line break, a delimiter any token without a letter."""
        told = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
        bare = {i: t.strip(" ") for i, t in told.items()}
        ends = frozenset(i for i, t in bare.items() if t in (".", "\n"))
        delimiters = frozenset(i for i, t in bare.items() if t and not any(c.isalnum() for c in t))
        named = {*words.FIRST, *words.SECOND}
        return cls(ends, delimiters, frozenset(i for i, t in bare.items() if t in named))

    def rules(self) -> Mapping[str, Correction]:
        """Every static choice by name, at its own ratio."""
        return {
            "last of a sentence": SentenceTails(ends=self.ends),
            "last of a sentence, without its mark": SentenceTails(ends=self.ends, skip=1),
            "last of a sentence with a name": SentenceTails(ends=self.ends, about=self.names),
            "delimiters": ListedTokens(ids=self.delimiters),
            "words of names": ListedTokens(ids=self.names),
            "longest keys": KeyNorm(),
            "shortest keys": KeyNorm(smallest=True),
            "first tokens": FirstTokens(),
            "first of a chunk": ChunkEdges(),
            "last of a chunk": ChunkEdges(tail=True),
        }


def static_cells(num_layers: int, forms: Forms) -> list[Cell]:
    """Every cell that a model of `num_layers` layers can run; static choices have random tokens as base."""
    return [Cell("recompute", "reference", "recompute", load_policy("recompute")), *_cells(num_layers, forms)]


def _cells(layers: int, forms: Forms) -> Iterator[Cell]:
    chain, alone = load_policy("cacheslide_first_turn"), load_policy("cacheblend")

    def cell(kind: str, rule: str, option: str, policy: ReusePolicy, base: str | None = None) -> Cell:
        name = f"{rule}, {option}" if option else rule
        return Cell(name, kind, option or rule, replace(policy, name=name), base)

    nothing = replace(chain, correction=NoCorrection())
    yield cell("no correction", NAIVE, "", nothing)
    yield cell("no correction", STALE, "", replace(nothing, placement=Placement("stored")), NAIVE)
    yield cell("no correction", ISOLATED, "", replace(alone, correction=NoCorrection()), NAIVE)
    for ratio in RATIOS:
        at, random = f"{ratio:.0%}", f"{RANDOM}, {ratio:.0%}"
        yield cell("control", RANDOM, at, replace(chain, correction=RandomTokens(ratio)))
        for rule, made in forms.rules().items():
            yield cell("static", rule, at, replace(chain, correction=made.at_ratio(ratio)), random)
        remembered, told = replace(chain, correction=RememberedDeviation(ratio)), f"remembered, {ratio:.0%}"
        yield cell("deviation", "remembered", at, remembered, random)
        stale = replace(remembered, placement=Placement("stored"))
        yield cell("deviation", f"remembered, {STALE}", at, stale, told)
    for layer in sorted({layers // 4, layers // 2}):
        option = f"26%, layer {layer}"
        yield cell("deviation", "by K", option, replace(chain, correction=TopDeviation(0.26, layer)), f"{RANDOM}, 26%")
