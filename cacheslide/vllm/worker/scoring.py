"""A worker's score jobs: remembered deviation of chunks that it holds, against their other context in scratch KV.

Nothing is stored but scores. All ranks have the same ones: what a rank's heads add up to is summed over all of them. A
chunk whose scores cannot be made stays without, and is written through to the storage tier as it is.
"""

import torch

from cacheslide.core.encoder import ChunkEncoder
from cacheslide.core.keys import ChunkKey
from cacheslide.core.remembering import Contrast, TokenKV
from cacheslide.vllm.protocol import ScoreJob


class Scorer:
    """Does the score jobs of one worker.

    Parameters
    ----------
    worker : WorkerSide
    """

    def __init__(self, worker) -> None:
        self.worker, self.model, self.team, self.store = worker, worker.model, worker.team, worker.store

    def run(self, job: ScoreJob) -> None:
        """Score the chunks of a job that all ranks hold.

        Not those that one rank has from a prompt with updated text before them and another from one without: only the
        first of these ranks would have something to sum.
        """
        worker, keys = self.worker, job.plan.keys
        same, other = self._held(job)
        worker.scored += 1  # from here on this rank meets the others by itself
        _, *everywhere = self.team.agree([True, *same, *other])  # a rank that takes no part has none of them
        halves = everywhere[: len(keys)], everywhere[len(keys) :]
        same, other = ({key for key, there in zip(keys, half, strict=True) if there} for half in halves)
        for key, chunk in job.of(same).plan.keyed:  # nothing is summed: whoever fails here has nobody to tell
            worker.survive("score", self.store.rescore, key, torch.zeros(len(chunk)))
        if other:
            worker.survive("score", self._score, job.of(other))
        self.store.await_no_more(keys)

    def skip(self, job: ScoreJob) -> None:
        """In place of `run`: other ranks do not wait for this one."""
        self.worker.scored += 1
        self.team.agree([False] * (1 + 2 * len(job.plan.keys)))
        self.store.await_no_more(job.plan.keys)

    def _held(self, job: ScoreJob) -> tuple[list[bool], list[bool]]:
        """Which of a job's chunks are here: those whose contexts are one (`Contrast.same`), and those others."""
        contrast = self._contrast(job)
        pairs = list(enumerate(job.plan.keys))
        held = [self.worker.holds(key) for _, key in pairs]
        same = [h and contrast.same(i, self.store.first_position(k)) for h, (i, k) in zip(held, pairs, strict=True)]
        return same, [h and not s for h, s in zip(held, same, strict=True)]

    def _contrast(self, job: ScoreJob) -> Contrast:
        encoder = ChunkEncoder(self.model, self.store, self.model.dtype)
        encoder.executor = self.worker.new_executor()
        return encoder.contrast(job.encoding, job.plan, reduce=self.team.summing(self.model.reduce_scores))

    def _score(self, job: ScoreJob) -> None:
        with self.team.unit(), self.model.running():
            contrast = self._contrast(job)
            contrast.prepare()
        for number, key in enumerate(job.plan.keys):  # whatever happens to one, the ranks meet at the next
            self.worker.survive("score", self._one, contrast, number, key)

    def _one(self, contrast: Contrast, number: int, key: ChunkKey) -> None:
        with self.team.unit():
            own = TokenKV.of_chunk(self.store.get(key), self.model.device)
            scores = contrast.scores(number, own)
        if scores is not None:
            self.store.rescore(key, scores)
