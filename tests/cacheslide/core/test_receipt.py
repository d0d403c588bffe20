"""The one receipt: what a run's output makes of it, alone and where somebody else computes the rest."""

import torch

from cacheslide.core.prefill_request import PrefillOutput
from cacheslide.core.receipt import Receipt
from cacheslide.store.base import ChunkKV


def output(tokens_computed: list[int], selected: int) -> PrefillOutput:
    rows = torch.arange(selected)
    return PrefillOutput(10, tokens_computed, rows, {2: 0.25}, {}, rows)


def chunk(generation: int) -> ChunkKV:
    kv = torch.zeros(1, 3, 1, 2)
    return ChunkKV(kv, kv, torch.arange(3), generation=generation)


def test_a_run_completes_a_receipt():
    receipt = Receipt("x", 10).complete(output([10, 4, 4], selected=2), reused=7)
    assert (receipt.tokens_reused, receipt.tokens_recomputed, receipt.tokens_per_layer) == (5, 2, [10, 4, 4])
    assert receipt.compute_fraction == 18 / 30 and receipt.alpha == {2: 0.25}


def test_rows_that_a_host_computes_behind_a_run_count_in_every_layer():
    receipt = Receipt("x", 10).complete(output([6, 2, 2], selected=1), reused=5, rest=4)
    assert receipt.tokens_per_layer == [10, 6, 6] and receipt.compute_fraction == 22 / 30


def test_without_reuse_every_layer_computes_the_same_rows():
    receipt = Receipt("x", 9, tokens_reused=6).computed([3] * 8)
    assert receipt.compute_fraction == 3 / 9 and Receipt("x", 9).computed([9, 9]).compute_fraction == 1.0


def test_chunks_that_are_read_are_counted_and_the_oldest_generation_stands():
    receipt = Receipt("x", 9)
    for generation in (0, 2, 1):
        receipt.hit(chunk(generation))
    assert receipt.chunks_hit == 3 and receipt.bytes_loaded == 3 * chunk(0).nbytes and receipt.generation == 2
