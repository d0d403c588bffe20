"""Turns in which generated text becomes history."""

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.core.encoder import prefill_exact
from cacheslide.core.prompt import Prompt
from tests.helpers.served import CHUNK, assert_same, receipt
from tests.helpers.token_ids import random_ids

BLOCKS = 12  # of 32 tokens: what a request leaves is taken by the next ones at once


class Talk:
    """An agent's turns: system | notes, new every turn | one piece of history a turn | question."""

    def __init__(self, served, **annotations) -> None:
        self.served, self.annotations = served, annotations
        self.pieces: list[tuple[int, ...]] = []
        self.turn, self.open = 0, ()  # what was generated but has no KV yet opens the next question

    def prompt(self) -> tuple[Prompt, int]:
        """This turn's prompt and the row at which its question starts."""
        head, notes = random_ids(6, 1), random_ids(15 + 7 * self.turn, 100 + self.turn)
        ids, spans = head + notes, [(0, 6)]
        for piece in self.pieces:
            spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        start = len(ids)
        return Prompt.from_spans(ids + self.open + random_ids(11, 200 + self.turn), spans), start

    def say(self, beside=(), **annotations) -> tuple[dict, tuple[int, ...]]:
        """One turn over poisoned blocks; its receipt and all token ids."""
        prompt, start = self.prompt()
        spans = [
            [s, s + len(x.token_ids)] for x, s in zip(prompt.segments, prompt.starts, strict=True) if x.role == "reuse"
        ]
        asked = {"cacheslide": {"segments": spans, "history": start, **self.annotations, **annotations}}
        self.served.poison()
        output, *_ = self.served.ask([prompt, *beside], [asked, *(None for _ in beside)], tokens=9)
        while self.served.core.scheduler.has_requests():
            self.served.core.step_fn()
        got = receipt(output)
        ids = prompt.token_ids + tuple(output.outputs[0].token_ids)
        retained = got["history"]
        assert (retained["start"], retained["end"]) == (start, len(ids) - 1)
        self.pieces.append(ids[start : len(ids) - 1])
        self.open = ids[-1:]
        self.turn += 1
        return got, ids


def last_chunks(served, n: int) -> list:
    """The chunks stored last."""
    return [served.worker.store.get(key) for key in list(served.scheduler.index._sizes)[-n:]]


def assert_exact(served, reference, ids, start: int, end: int) -> None:
    """The last chunks hold rows [start, end) as an exact prefill of `ids` leaves them."""
    chunks = last_chunks(served, -(-(end - start) // CHUNK))
    kv = prefill_exact(reference, ids[:end])
    assert torch.cat([c.positions for c in chunks]).tolist() == list(range(start, end))
    assert_same(torch.cat([c.k for c in chunks], dim=1), kv.k[:, start:end], 2e-5)
    assert_same(torch.cat([c.v for c in chunks], dim=1), kv.v[:, start:end], 2e-5)
