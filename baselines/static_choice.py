"""Controls that choose tokens by their position in a sentence or a chunk, independent of deviation.

If one of them beats random tokens, the task has a shortcut: the form of a sentence reveals where its meaning lies. All
of them recompute from layer 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.random_tokens import RandomTokens
from cacheslide.core.reused import ReusedTokens
from cacheslide.core.tensors import tensor_of
from cacheslide.policies.deviation import tokens_of_ratio


def first_ranked(rank: Tensor, count: int, seed: int) -> Tensor:
    """Bool [n]: the `count` tokens of the lowest `rank` [n]; ties in an order drawn from `seed`."""
    drawn = torch.randperm(len(rank), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(rank), dtype=torch.bool)
    chosen[drawn[rank[drawn].argsort(stable=True)[:count]]] = True
    return chosen


def distances_to_end(ends: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Int64 [R]: each token's distance to the last token of its sentence; `ends` bool [R].

    A run's last token also ends a sentence, since the text after it is not known.
    """
    out, at = torch.zeros(len(ends), dtype=torch.int64), 0
    for length in lengths:
        own = ends[at : at + length].clone()
        own[-1:] = True
        places = torch.arange(length)
        nearest = torch.where(own, places, length).flip(0).cummin(0).values.flip(0)
        out[at : at + length] = nearest - places
        at += length
    return out


@dataclass(frozen=True)
class RankedTokens(RandomTokens):
    """The `recompute_ratio` of the reused tokens of the lowest rank, ties at random; a subclass adds `rank`."""

    def rank(self, reused: ReusedTokens) -> Tensor:
        """Int64 [R]."""
        raise NotImplementedError

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        return first_ranked(self.rank(reused), tokens_of_ratio(self.recompute_ratio, reused.count), self.seed)


@dataclass(frozen=True)
class ListedTokens(RankedTokens):
    """Tokens whose id is among `ids`, for example delimiters; the rest of the ratio goes to random other tokens."""

    ids: frozenset[int] = frozenset()

    def rank(self, reused: ReusedTokens) -> Tensor:
        """0 for a listed token, 1 for any other, int64 [R]."""
        return (~_among(_ids(reused), self.ids)).long()


@dataclass(frozen=True)
class SentenceTails(RankedTokens):
    """The last tokens of every sentence: the last of each sentence first, then the second to last, ...

    Attributes
    ----------
    ends : frozenset of int
        Ids that end a sentence and are part of it.
    skip : int
        Number of final tokens of each sentence that rank last: with 1, the closing mark.
    about : frozenset of int
        If given, sentences that contain one of these ids come before all others.
    """

    ends: frozenset[int] = frozenset()
    skip: int = 0
    about: frozenset[int] = frozenset()

    def rank(self, reused: ReusedTokens) -> Tensor:
        """Distance to the sentence's end, int64 [R]; sentences without an id of `about` rank after all others."""
        ids, far = _ids(reused), reused.count
        ends = _among(ids, self.ends)
        ahead = distances_to_end(ends, reused.lengths)
        rank = torch.where(ahead < self.skip, far, ahead - self.skip)
        if not self.about:
            return rank
        last = ahead == 0
        sentence = last.long().cumsum(0) - last.long()
        told = torch.zeros(int(last.sum()), dtype=torch.int64).index_add(0, sentence, _among(ids, self.about).long())
        return rank + far * (told[sentence] == 0)


@dataclass(frozen=True)
class ChunkEdges(RankedTokens):
    """The first tokens of every chunk, or with `tail` the last ones, equally many of each chunk within the ratio."""

    tail: bool = False

    def rank(self, reused: ReusedTokens) -> Tensor:
        """Distance to the chunk's edge, int64 [R]."""
        places = [torch.arange(n).flip(0) if self.tail else torch.arange(n) for n in reused.lengths]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *places])


def _ids(reused: ReusedTokens) -> Tensor:
    """Ids of the reused tokens, int64 [R]."""
    return tensor_of(reused.token_ids)[reused.rows]


def _among(ids: Tensor, listed: frozenset[int]) -> Tensor:
    """Which of `ids` [n] are listed, bool [n]."""
    return torch.isin(ids, torch.tensor(sorted(listed), dtype=torch.int64))
