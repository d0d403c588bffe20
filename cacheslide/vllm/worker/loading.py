"""A worker's loads: completes rows of requests from cached chunks, all of a step in one packed run.

If that run fails, each request is run alone, and then without cached rows, which is exact; what still fails is left to
vLLM. The ranks of tensor parallelism take each of these steps together.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import xxhash

from cacheslide.core.keys import ChunkKey
from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.prompt import Chunk
from cacheslide.core.receipt import Receipt
from cacheslide.core.request_builder import Found, find_pieces
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.guard import reason
from cacheslide.vllm.protocol import LoadPlan
from cacheslide.vllm.receipt_channel import post
from cacheslide.vllm.scheduler.reasons import LOST
from cacheslide.vllm.worker.requests import PagedRequests

ENTRY = "start_load_kv"
Held = dict[tuple[str, int], ChunkKV]  # chunks by (request id, number in its plan)


class Loading:
    """The loads of one step.

    Parameters
    ----------
    worker : WorkerSide
    loads : sequence of LoadPlan
    """

    def __init__(self, worker, loads: Sequence[LoadPlan]) -> None:
        self.worker, self.loads, self.model = worker, loads, worker.model
        streams = () if worker.stream is None else (worker.stream, torch.cuda.current_stream(self.model.device))
        self.streams: Sequence[torch.cuda.Stream] = streams
        self.requests = PagedRequests(worker.model, None if worker.stream is None else worker.rings)
        self.faulty: set[str] = set()  # requests that lost cached rows to a fault

    def run(self) -> None:
        """Complete the rows; incomplete ones stay pending in the worker's `loads`."""
        held = self._lend()
        if held is None or self._complete(self.loads, held):
            return
        for load in self.loads:
            if len(self.loads) > 1 and self._complete([load], held):
                continue
            self._complete([load], None)

    def _lend(self) -> Held | None:
        """The chunks that all ranks have; None if a rank takes no part."""
        held = {(load.req_id, i): self._one(load, i) for load in self.loads for i in range(len(load.reuse))}
        digests = {at: _mark(chunk) for at, chunk in held.items()} if self._scored else {}
        self.worker.joined = True
        together, *everywhere = self.worker.team.agree([True, *(chunk is not None for chunk in held.values())])
        if not together:
            return None
        held = {at: chunk for (at, chunk), present in zip(held.items(), everywhere, strict=True) if present}
        return self._agreed(held, digests) if self._scored else held

    @property
    def _scored(self) -> bool:
        """Whether scores decide which rows are recomputed; ranks may have different scores."""
        return self.worker.team.group is not None and any(load.correction.needs_scores for load in self.loads)

    def _agreed(self, held: Held, digests: dict[tuple[str, int], int]) -> Held:
        """The same chunks, without scores where ranks have different ones.

        With different scores every rank would choose other rows, and sums over ranks would mix tokens. Scores differ
        after a fault on one rank, or when only one rank has rewritten a record in storage.
        """
        alike = self.worker.team.alike([digests[at] for at in held])
        pairs = zip(held.items(), alike, strict=True)
        return {at: chunk if equal else replace(chunk, scores=None) for (at, chunk), equal in pairs}

    def _one(self, load: LoadPlan, number: int) -> ChunkKV | None:
        key, chunk = load.reuse[number]
        if max(chunk.start, load.start) >= min(chunk.end, load.limit) or key in self.worker.unsure:
            return None
        try:
            return self.worker.store.lend(key, self.streams)
        except Exception as error:
            self.worker.faults.note(ENTRY, error)
            self.faulty.add(load.req_id)
            return None

    def _complete(self, loads: Sequence[LoadPlan], held: Held | None) -> bool:
        """One run over the rows of `loads` with the chunks of `held`, exact without; False if it failed.

        It fails on all ranks or on none.
        """
        worker, model = self.worker, self.model
        try:
            with worker.team.unit():
                receipts, reused = zip(*(self._find(load, held) for load in loads), strict=True)
                pairs = list(zip(loads, reused, strict=True))
                self.requests.reserve((cached.pieces, load.correction) for load, cached in pairs)
                requests = [self._prepare(load, cached) for load, cached in pairs]
                with model.running(any(load.plan.schema for load in loads)):
                    outputs = worker.executor.run(requests)
        except Exception as error:
            worker.faults.note(ENTRY, error)
            return False
        finally:
            worker.rings.run_over()
        for load, *results in zip(loads, requests, receipts, outputs, strict=True):
            worker.loads.done(load.req_id)
            try:
                self._note(load, *results)
            except Exception as error:  # the rows are complete; only the report is missing
                worker.faults.note(ENTRY, error)
        return True

    def _find(self, load: LoadPlan, held: Held | None) -> tuple[Receipt, Found]:
        """A receipt, and the cached pieces of a request whose chunks are in `held`."""
        receipt = Receipt(load.system, load.rows, chunks=len(load.plan.chunks))

        def fetch(number: int, key: ChunkKey, chunk: Chunk) -> ChunkKV | None:
            if (kv := held.get((load.req_id, number))) is None:
                receipt.fallback = LOST
                self.worker.report.missing.add(key)
            return kv

        cached = find_pieces(() if held is None else load.reuse, load.start, load.limit, fetch, receipt)
        if held is None or load.req_id in self.faulty:
            receipt.fallback = reason(ENTRY)
        return receipt, cached

    def _prepare(self, load: LoadPlan, cached: Found) -> PrefillRequest:
        plan, rows = load.plan, slice(load.start, load.end)
        return self.requests.build(
            plan.prompt.token_ids[rows],
            plan.positions[rows],
            self.model.paged_kv(load.block_ids, self.worker.block_size),
            found=cached,
            placement=load.placement,
            correction=load.correction,
            start=load.start,
            # vLLM numbers the last row and generated ones by row index: a schema's positions are shifted to match.
            shift=load.rows - 1 - plan.positions[-1],
            slots=load.slots,
            behind=plan.prompt.token_ids[load.end :],
        )

    def _note(self, load: LoadPlan, request: PrefillRequest, receipt: Receipt, output: PrefillOutput) -> None:
        receipt.complete(output, len(request.reused), load.rows - load.end)  # vLLM computes the rows behind it
        record = receipt.as_dict() | {"tokens_prefix_cached": load.start, "measured": True}
        self.worker.report.receipts[load.req_id] = record
        post(self.worker.engine_id, load.req_id, record)


def _mark(chunk: ChunkKV | None) -> int:
    """A 63-bit hash of a chunk's scores; -1 without scores."""
    if chunk is None or chunk.scores is None:
        return -1
    return xxhash.xxh3_64_intdigest(chunk.scores.contiguous().numpy()) >> 1
