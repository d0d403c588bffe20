"""What a rule knows of reused tokens: runs, what stands in front of them, remembered deviation."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.placement import Piece
from cacheslide.core.request_builder import Found
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV


def chunk(n: int, scores=None) -> ChunkKV:
    kv = torch.zeros(2, n, 1, 4)
    return ChunkKV(kv, kv.clone(), torch.arange(n), scores=scores)


def test_runs_know_whether_an_update_stands_in_front_of_them():
    runs = ReusedTokens((0, 4, 9, 12), (4, 3, 3, 2))
    assert runs.count == 12 and runs.behind_updates == (False, False, True, False)
    assert ReusedTokens((2,), (4,)).behind_updates == (True,)
    assert ReusedTokens.of(2, 3).starts == (0, 2) and ReusedTokens().count == 0 and ReusedTokens().behind_updates == ()


def test_scores_go_with_the_rows_of_a_piece():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    pieces = [Piece(chunk(3), 2, 1), Piece(chunk(4, scores), 2, 1)]
    found = Found(pieces, [range(5, 7), range(9, 11)])
    runs = found.runs
    assert (runs.starts, runs.lengths, runs.behind_updates) == ((5, 9), (2, 2), (True, True))
    assert runs.scores[:2].isnan().all() and runs.scores[2:].tolist() == [2.0, 3.0]
    assert Found(pieces[:1], [range(5, 7)]).runs.scores is None


def test_scores_are_kept_counted_and_checked():
    scores = torch.arange(3.0)
    one = chunk(3, scores)
    assert one.nbytes == chunk(3).nbytes + 12
    assert torch.equal(one.to(torch.bfloat16).scores, scores) and one.to(torch.bfloat16).scores.dtype == torch.float32
    for wrong in (torch.arange(4.0), torch.arange(3), torch.zeros(3, 1)):
        with pytest.raises(StoreError, match="scores must be float32"):
            replace(one, scores=wrong)


def test_rows_are_those_of_all_runs():
    assert ReusedTokens((2, 9), (3, 2)).rows.tolist() == [2, 3, 4, 9, 10]
    assert ReusedTokens().rows.shape == (0,) and ReusedTokens().rows.dtype == torch.int64
