"""A worker's loads: rows of requests completed from cached chunks, all of a step in one packed run.

When that run fails each request is run alone, then without cached rows, which is exact; what fails even then is left to
vLLM. The ranks of tensor parallelism take every step of this together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.encoder import rows_none
from cacheslide.core.engine import Receipt
from cacheslide.core.placement import Piece, PlacedChunks, Placement, send, tensor_of
from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.guard import reason
from cacheslide.vllm.protocol import LoadPlan
from cacheslide.vllm.receipt_channel import post
from cacheslide.vllm.scheduler.reasons import LOST
from cacheslide.vllm.worker.paged_source import PagedChunks
from cacheslide.vllm.worker.prefetch import LayerFetch, ring_bytes

ENTRY = "start_load_kv"
Held = dict[tuple[str, int], ChunkKV]  # chunks by request and number in its plan


class Loading:
    """The loads of one step.

    Parameters
    ----------
    worker : WorkerSide
    plans : sequence of LoadPlan
    """

    def __init__(self, worker, plans: Sequence[LoadPlan]) -> None:
        self.worker, self.plans, self.model = worker, plans, worker.model
        streams = () if worker.stream is None else (worker.stream, torch.cuda.current_stream(self.model.device))
        self.streams: Sequence[torch.cuda.Stream] = streams
        self.faulty: set[str] = set()  # requests that a fault has cost cached rows

    def run(self) -> None:
        """Complete the rows; what cannot be completed stays open in the worker's `loads`."""
        held = self._lend()
        if held is None or self._complete(self.plans, held):
            return
        for plan in self.plans:
            if len(self.plans) > 1 and self._complete([plan], held):
                continue
            self._complete([plan], None)

    def _lend(self) -> Held | None:
        """Chunks by request and number in its plan, those that all ranks have; None where a rank takes no part."""
        held = {(plan.req_id, i): self._one(plan, i) for plan in self.plans for i in range(len(plan.reuse))}
        self.worker.joined = True
        together, *found = self.worker.team.agree([True, *(chunk is not None for chunk in held.values())])
        if not together:
            return None
        return {at: chunk for (at, chunk), there in zip(held.items(), found, strict=True) if there}

    def _one(self, plan: LoadPlan, number: int) -> ChunkKV | None:
        key, chunk = plan.reuse[number]
        if max(chunk.start, plan.start) >= min(chunk.end, plan.limit) or key in self.worker.unsure:
            return None
        try:
            return self.worker.store.lend(key, self.streams)
        except Exception as error:
            self.worker.faults.note(ENTRY, error)
            self.faulty.add(plan.req_id)
            return None

    def _complete(self, plans: Sequence[LoadPlan], held: Held | None) -> bool:
        """One run over the rows of `plans` with the chunks of `held`, exact without; False where it failed.

        It fails on all ranks or on none.
        """
        worker, model = self.worker, self.model
        try:
            with worker.team.unit():
                found = [self._find(plan, held) for plan in plans]
                self._reserve(plans, [pieces for _, pieces, _ in found])
                prepared = [self._prepare(plan, *parts) for plan, parts in zip(plans, found, strict=True)]
                with model.running(any(plan.positions is not None for plan in plans)):
                    outputs = worker.executor.run([request for request, _ in prepared])
        except Exception as error:
            worker.faults.note(ENTRY, error)
            return False
        finally:
            worker.rings.run_over()
        for plan, (request, receipt), output in zip(plans, prepared, outputs, strict=True):
            worker.loads.done(plan.req_id)
            try:
                self._note(plan, request, receipt, output)
            except Exception as error:  # the rows are there, only nobody says so
                worker.faults.note(ENTRY, error)
        return True

    def _find(self, plan: LoadPlan, held: Held | None) -> tuple[Receipt, list[Piece], Tensor]:
        """The cached pieces of a request, and the local rows [R] that they are for."""
        receipt = Receipt(plan.system, len(plan.token_ids), chunks=plan.chunks)
        pieces, spans = [], [rows_none(torch.empty(0))]
        for number, (key, chunk) in enumerate(plan.reuse if held is not None else ()):
            first, end = max(chunk.start, plan.start), min(chunk.end, plan.limit)
            if first >= end:
                continue
            kv = held.get((plan.req_id, number))
            if kv is None:
                receipt.fallback = LOST
                self.worker.report.missing.add(key)
                continue
            receipt.chunks_hit += 1
            receipt.bytes_loaded += kv.nbytes
            pieces.append(Piece(kv, end - first, first - chunk.start))
            spans.append(torch.arange(first - plan.start, end - plan.start))
        if held is None or plan.req_id in self.faulty:
            receipt.fallback = reason(ENTRY)
        return receipt, pieces, torch.cat(spans)

    def _prepare(self, plan: LoadPlan, receipt: Receipt, pieces: list[Piece], reused: Tensor):
        device = self.model.device
        ids = send(tensor_of(plan.token_ids[plan.start : plan.end]), device)
        own = torch.arange(plan.start, plan.end)
        positions = own if plan.positions is None else tensor_of(plan.positions[plan.start : plan.end])
        # vLLM numbers the last row, and what it generates, by row: the schema moves as a whole to meet it.
        shift = 0 if plan.positions is None else len(plan.token_ids) - 1 - plan.positions[-1]
        positions += shift
        source = self._source(pieces, positions[reused], plan, shift) if pieces else None
        kv = self.model.paged_kv(plan.block_ids, self.worker.block_size)
        if plan.slots is not None:
            self.model.describe(kv, plan.slots)
        request = PrefillRequest(
            ids,
            send(positions, device),
            kv,
            send(reused, device),
            source,
            plan.correction,
            tuple(p.length for p in pieces),
            plan.start,
        )
        return request, receipt

    def _reserve(self, plans: Sequence[LoadPlan], pieces: list[list[Piece]]) -> None:
        """Device memory for all prefetches of a run."""
        if self.worker.stream is not None:
            layers = [self.model.num_layers - plan.correction.first_layer for plan in plans]
            self.worker.rings.reserve(sum(ring_bytes(p, n) for p, n in zip(pieces, layers, strict=True)))

    def _source(self, pieces: list[Piece], target: Tensor, plan: LoadPlan, shift: int) -> PlacedChunks:
        """Cached rows on their way to positions `target` [R], on the host; a kernel places them where it can."""
        model, worker = self.model, self.worker
        placement = plan.placement
        if not model.rotates:  # unrotated keys serve wherever they are
            placement, shift = Placement("stored"), 0
        settings = pieces, target, placement, model.rotary, model.dtype, shift
        if not model.open:
            return PlacedChunks(*settings, device=model.device)
        fetch = None
        if worker.stream is not None:
            fetch = LayerFetch(pieces, plan.correction.first_layer, model.num_layers, worker.rings)
        return PagedChunks(*settings, device=model.device, caches=model.caches, fetch=fetch)

    def _note(self, plan: LoadPlan, request: PrefillRequest, receipt: Receipt, output: PrefillOutput) -> None:
        receipt.tokens_recomputed = len(output.selected)
        receipt.tokens_reused = len(request.reused) - len(output.selected)
        rest = len(plan.token_ids) - plan.end  # rows that vLLM itself computes after this
        receipt.tokens_per_layer = [n + rest for n in output.tokens_computed]
        receipt.compute_fraction = sum(receipt.tokens_per_layer) / (receipt.tokens * len(receipt.tokens_per_layer))
        receipt.alpha = output.alpha
        said = receipt.as_dict() | {"tokens_prefix_cached": plan.start, "measured": True}
        self.worker.report.receipts[plan.req_id] = said
        post(self.worker.engine_id, plan.req_id, said)
