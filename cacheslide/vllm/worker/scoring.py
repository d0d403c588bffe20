"""A worker's score jobs: remembered deviations of its chunks, against their other context in scratch KV.

Only scores are stored. They are summed over all ranks' heads, so all ranks have the same. A chunk that cannot be scored
stays without scores and is written through to the storage tier as it is.
"""

import torch

from cacheslide.core.encoder import ChunkEncoder
from cacheslide.core.keys import ChunkKey
from cacheslide.core.remembering import Contrast, TokenKV
from cacheslide.vllm.protocol import ScoreJob


class Scorer:
    """Runs the score jobs of one worker.

    Parameters
    ----------
    worker : WorkerSide
    """

    def __init__(self, worker) -> None:
        self.worker, self.model, self.team, self.store = worker, worker.model, worker.team, worker.store

    def run(self, job: ScoreJob) -> None:
        """Score the chunks of a job that all ranks hold.

        Skips chunks that one rank has encoded behind updated text and another without: only the first would have a sum
        to contribute.
        """
        worker, keys = self.worker, job.plan.keys
        equal, different = self._held(job)
        worker.scored += 1  # the sums below keep the ranks together
        _, *everywhere = self.team.agree([True, *equal, *different])  # all False for a rank that takes no part
        halves = everywhere[: len(keys)], everywhere[len(keys) :]
        equal, different = ({key for key, present in zip(keys, half, strict=True) if present} for half in halves)
        for key, chunk in job.of(equal).plan.keyed:  # nothing is summed: a failure here concerns no other rank
            worker.survive("score", self.store.rescore, key, torch.zeros(len(chunk)))
        if different:
            worker.survive("score", self._score, job.of(different))
        self.store.await_no_more(keys)

    def skip(self, job: ScoreJob) -> None:
        """Fallback of `run`: lets the other ranks continue."""
        self.worker.scored += 1
        self.team.agree([False] * (1 + 2 * len(job.plan.keys)))
        self.store.await_no_more(job.plan.keys)

    def _held(self, job: ScoreJob) -> tuple[list[bool], list[bool]]:
        """Which of a job's chunks are held: those whose contexts are equal (`Contrast.same`), and the others."""
        contrast = self._contrast(job)
        pairs = list(enumerate(job.plan.keys))
        held = [self.worker.holds(key) for _, key in pairs]
        equal = [h and contrast.same(i, self.store.first_position(k)) for h, (i, k) in zip(held, pairs, strict=True)]
        return equal, [h and not s for h, s in zip(held, equal, strict=True)]

    def _contrast(self, job: ScoreJob) -> Contrast:
        encoder = ChunkEncoder(self.model, self.store, self.model.dtype)
        encoder.executor = self.worker.new_executor()
        return encoder.contrast(job.encoding, job.plan, reduce=self.team.summing(self.model.reduce_scores))

    def _score(self, job: ScoreJob) -> None:
        with self.team.unit(), self.model.running():
            contrast = self._contrast(job)
            contrast.prepare()
        for number, key in enumerate(job.plan.keys):  # ranks stay together whatever happens to one chunk
            self.worker.survive("score", self._one, contrast, number, key)

    def _one(self, contrast: Contrast, number: int, key: ChunkKey) -> None:
        with self.team.unit():
            own = TokenKV.of_chunk(self.store.get(key), self.model.device)
            scores = contrast.scores(number, own)
        if scores is not None:
            self.store.rescore(key, scores)
