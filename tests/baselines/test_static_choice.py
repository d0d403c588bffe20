"""Controls that choose tokens by form alone."""

from dataclasses import replace

import pytest
import torch

from baselines.key_norm import KeyNorm
from baselines.static_choice import ChunkEdges, ListedTokens, SentenceTails, distances_to_end, first_ranked
from cacheslide.core.reused import ReusedTokens

END, NAME = 9, 7


def reused(*ids: int, lengths: tuple[int, ...] = ()) -> ReusedTokens:
    return replace(ReusedTokens.of(*(lengths or (len(ids),))), token_ids=ids)


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_distances_count_back_from_a_sentences_end_and_a_runs():
    ends = torch.tensor([False, True, False, False, True, False, False])
    assert distances_to_end(ends, (7,)).tolist() == [1, 0, 2, 1, 0, 1, 0]
    assert distances_to_end(ends, (3, 4)).tolist() == [1, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        (SentenceTails(3 / 8, ends=frozenset({END})), [2, 5, 7]),
        (SentenceTails(6 / 8, ends=frozenset({END})), [1, 2, 4, 5, 6, 7]),
        (SentenceTails(3 / 8, ends=frozenset({END}), skip=1), [1, 4, 6]),
        (SentenceTails(2 / 8, ends=frozenset({END}), about=frozenset({NAME})), [4, 5]),
        (ListedTokens(1 / 8, ids=frozenset({NAME})), [4]),
        (ChunkEdges(1 / 8), [0]),
        (ChunkEdges(3 / 8, tail=True), [5, 6, 7]),
    ],
)
def test_what_each_rule_chooses(rule, chosen):
    assert places(rule.known_before_start(reused(1, 2, END, 3, NAME, END, 5, END))) == chosen


def test_edges_are_those_of_every_chunk_and_ids_those_of_reused_rows():
    assert places(ChunkEdges(0.5).known_before_start(ReusedTokens.of(4, 4))) == [0, 1, 4, 5]
    behind = ReusedTokens((2,), (3,), None, (NAME, NAME, 1, NAME, 2, NAME))
    assert places(ListedTokens(1 / 3, ids=frozenset({NAME})).known_before_start(behind)) == [1]


def test_equal_ranks_are_drawn_from_the_seed_and_what_is_left_over_is_random():
    rank = torch.zeros(100, dtype=torch.int64)
    one, other = first_ranked(rank, 20, 0), first_ranked(rank, 20, 1)
    assert int(one.sum()) == int(other.sum()) == 20 and not torch.equal(one, other)
    more = ListedTokens(0.5, ids=frozenset({NAME})).known_before_start(reused(*[NAME] * 4, *range(96, 192)))
    assert int(more.sum()) == 50 and more[:4].all() and places(more)[-1] > 80


class Keys:
    """Cached keys of three tokens in two layers: token 1's are the longest, token 2's the shortest."""

    def layer(self, layer: int):
        lengths = torch.tensor([2.0, 5.0 - layer, 1.0])
        return lengths[:, None, None] * torch.tensor([0.6, 0.8]), None


def test_key_norm_reads_the_cache():
    request = type("Request", (), {"reused": torch.arange(3), "source": Keys()})
    model = type("Model", (), {"num_layers": 2})
    assert KeyNorm(1 / 3).choose(request, model).tolist() == [1]
    assert KeyNorm(1 / 3, smallest=True).choose(request, model).tolist() == [2]
    assert KeyNorm(2 / 3).known_before_start(reused(1)) is None


def test_keys_of_one_length_but_for_rounding_are_chosen_at_random():
    count, noise = 200, torch.rand(200, generator=torch.Generator().manual_seed(0)).sort().values * 1e-5

    class Equal:
        def layer(self, layer: int):
            return (1 + noise)[:, None, None] * torch.tensor([0.6, 0.8]), None

    request = type("Request", (), {"reused": torch.arange(count), "source": Equal()})
    chosen = KeyNorm(0.2).choose(request, type("Model", (), {"num_layers": 2}))
    assert len(chosen) == 40 and 60 < chosen.float().mean() < 140 and (chosen.diff() > 0).all()
