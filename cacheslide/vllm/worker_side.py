"""The worker's half: completes prompts from cached chunks, copies chunks out of the paged cache, encodes others."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheslide.correction import TopDeviation
from cacheslide.encode import ChunkEncoder, rows_none
from cacheslide.engine import Receipt
from cacheslide.keys import ChunkKey
from cacheslide.placement import Piece, PlacedChunks, Placement, send, tensor_of
from cacheslide.prefill import SelectivePrefill
from cacheslide.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.prompt import Chunk
from cacheslide.store.base import ChunkKV
from cacheslide.store.shape import ChunkShape, name_of
from cacheslide.vllm.below import Below
from cacheslide.vllm.fetch import LayerFetch, Rings, ring_bytes
from cacheslide.vllm.mailbox import post
from cacheslide.vllm.model_adapter import VllmModel, find_model
from cacheslide.vllm.paged_source import PagedChunks
from cacheslide.vllm.params import ServerOptions
from cacheslide.vllm.pinned import PinnedMemory, pin
from cacheslide.vllm.plans import Landed, LoadPlan, SavePlan, StepPlan, WorkerReport
from cacheslide.vllm.reasons import LOST
from cacheslide.vllm.saving import HostCopies
from cacheslide.vllm.store import WorkerStore


class WorkerSide:
    """One rank's chunks and the runs over its share of the model."""

    def __init__(self, vllm_config, options: ServerOptions) -> None:
        self.vllm_config, self.options = vllm_config, options
        self.block_size = vllm_config.cache_config.block_size
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.model: VllmModel | None = None
        self.report = WorkerReport()

    def attach(self) -> None:
        """Find the loaded model; the paged cache exists by now."""
        config = self.vllm_config
        found = find_model(config.compilation_config.static_forward_context)
        self.model = VllmModel(found, config.model_config.hf_text_config)
        self.memory = self._pinned_memory()
        self.below = self._open_below()
        self.store = self._open_store(self.options.store_device)
        self.executor = SelectivePrefill(self.model)
        if self.model.device.type == "cuda":
            from cacheslide.vllm.warmup import warm_up  # Triton is there only with a GPU

            warm_up(self.model, config.model_config.max_model_len)

    def _pinned_memory(self) -> PinnedMemory | None:
        """Beside a GPU: the host memory that chunks may take, pinned now rather than while requests wait."""
        if self.model.device.type != "cuda":
            return None
        keeps = self.options.store_device == "cpu"
        return PinnedMemory(pin(int(self.options.store_gib * 2**30)) if keeps else None, self._stamp)

    def _stamp(self) -> "list[torch.cuda.Event]":
        """Events behind all work that may use chunks in host memory."""
        copies = self.store.copies
        streams = [torch.cuda.current_stream(self.model.device), self.stream, None if copies is None else copies.stream]
        return [stream.record_event() for stream in streams if stream is not None]

    def _open_below(self) -> Below | None:
        """This rank's share of the tiers below memory."""
        if (tiers := self.options.tiers) is None:
            return None
        from vllm.distributed import get_tensor_model_parallel_rank

        shape = self.model.shape
        row_bytes = 2 * shape.num_kv_heads * shape.head_dim * self.model.dtype.itemsize
        rank = get_tensor_model_parallel_rank()
        return Below(tiers, row_bytes, self.options.namespace, rank, self.model.ranks, self.memory, self._chunk_shape())

    def _chunk_shape(self) -> ChunkShape:
        shape, config = self.model.shape, self.vllm_config.model_config
        return ChunkShape(
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            name_of(self.model.dtype),
            config.hf_text_config.hidden_size,
            max(config.max_model_len, config.hf_text_config.max_position_embeddings),
        )

    def _open_store(self, where: str) -> WorkerStore:
        """An empty store; one in host memory beside a GPU is pinned, and read and written on streams of its own."""
        device = torch.device("cpu") if where == "cpu" else self.model.device
        pinned = where == "cpu" and self.model.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.model.device) if pinned else None
        self.rings = Rings(self.model.device, self.stream)
        copies = HostCopies(self.model.device, memory=self.memory) if pinned else None
        return WorkerStore(device, copies, self.below)

    def move_store(self, where: str) -> None:
        """Move all chunks to the host ("cpu") or to the model's device ("model")."""
        before, self.store = self.store, self._open_store(where)
        before.hand_over(self.store)
        if self.memory is not None:  # what comes back from now on is stamped on the new streams alone
            torch.cuda.synchronize(self.model.device)

    @torch.inference_mode()
    def begin(self, step: StepPlan) -> None:
        """Before anything writes to the cache in this step: keep what finished requests leave in their old blocks."""
        self.store.settle()
        if self.memory is not None:
            self.memory.settle()
        if step.forget:
            self.store.clear()
        if self.below is not None:
            if step.forget:
                self.below.forget()
            self.below.drop(step.drops)
            self.store.drop(step.drops)
            for fetch in step.fetches:
                self.below.fetch(fetch.key, fetch.ticket, fetch.tokens)
        if self.model.crossing is not None:
            self.model.crossing.expect(step.slots, self.block_size)
        for plan in step.keeps:
            self.store.drop(plan.evict)
            self._save(plan)

    @torch.inference_mode()
    def load(self, step: StepPlan) -> None:
        """Complete the rows of all requests that reuse chunks in this step, in one packed run."""
        if not step.loads:
            return
        streams = () if self.stream is None else (self.stream, torch.cuda.current_stream(self.model.device))
        found = [self._find(plan, streams) for plan in step.loads]
        self._reserve(step.loads, [pieces for _, pieces, _ in found])
        prepared = [self._prepare(plan, *parts) for plan, parts in zip(step.loads, found, strict=True)]
        with self.model.running(any(plan.positions is not None for plan in step.loads)):
            outputs = self.executor.run([request for request, _ in prepared])
        self.rings.run_over()
        for plan, (request, receipt), output in zip(step.loads, prepared, outputs, strict=True):
            self._note(plan, request, receipt, output)

    def _find(self, plan: LoadPlan, streams: "Sequence[torch.cuda.Stream]") -> tuple[Receipt, list[Piece], Tensor]:
        """The cached pieces of a request, for work on `streams`, and the local rows [R] that they are for."""
        receipt = Receipt(plan.system, len(plan.token_ids), chunks=plan.chunks)
        pieces, spans = [], [rows_none(torch.empty(0))]
        for key, chunk in plan.reuse:
            first, end = max(chunk.start, plan.start), min(chunk.end, plan.limit)
            held = self.store.lend(key, streams) if first < end else None
            if held is None:
                self._missing(key, receipt, wanted=first < end)
                continue
            receipt.chunks_hit += 1
            receipt.bytes_loaded += held.nbytes
            pieces.append(Piece(held, end - first, first - chunk.start))
            spans.append(torch.arange(first - plan.start, end - plan.start))
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
        kv = self.model.paged_kv(plan.block_ids, self.block_size)
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

    def _first(self, plan: LoadPlan) -> int:
        """The first layer whose cached rows are needed."""
        return plan.correction.layer if isinstance(plan.correction, TopDeviation) else 0

    def _reserve(self, plans: list[LoadPlan], pieces: list[list[Piece]]) -> None:
        """Device memory for all prefetches of a run."""
        if self.stream is not None:
            layers = [self.model.num_layers - self._first(plan) for plan in plans]
            self.rings.reserve(sum(ring_bytes(p, n) for p, n in zip(pieces, layers, strict=True)))

    def _source(self, pieces: list[Piece], target: Tensor, plan: LoadPlan, shift: int) -> PlacedChunks:
        """Cached rows on their way to positions `target` [R], on the host; a kernel places them where it can."""
        model = self.model
        placement = plan.placement
        if not model.rotates:  # unrotated keys serve wherever they are
            placement, shift = Placement("stored"), 0
        settings = pieces, target, placement, model.rotary, model.dtype, shift
        if not model.open:
            return PlacedChunks(*settings, device=model.device)
        fetch = None
        if self.stream is not None:
            fetch = LayerFetch(pieces, self._first(plan), model.num_layers, self.rings)
        return PagedChunks(*settings, device=model.device, caches=model.caches, fetch=fetch)

    def _missing(self, key: ChunkKey, receipt: Receipt, wanted: bool) -> None:
        if wanted:
            receipt.fallback = LOST
            self.report.missing.add(key)

    def _note(self, plan: LoadPlan, request: PrefillRequest, receipt: Receipt, output: PrefillOutput) -> None:
        receipt.rows_recomputed = len(output.selected)
        receipt.rows_reused = len(request.reused) - len(output.selected)
        rest = len(plan.token_ids) - plan.end  # rows that vLLM itself computes after this
        receipt.rows_per_layer = [n + rest for n in output.rows_computed]
        receipt.row_layer_share = sum(receipt.rows_per_layer) / (receipt.rows * len(receipt.rows_per_layer))
        receipt.alpha = output.alpha
        said = receipt.as_dict() | {"rows_prefix_cached": plan.start, "measured": True}
        self.report.receipts[plan.req_id] = said
        post(self.engine_id, plan.req_id, said)

    @torch.inference_mode()
    def save(self, step: StepPlan) -> None:
        """Copy chunks of exactly prefilled requests out of the paged cache, before its blocks can be reused.

        Nothing here waits for the device: rows are gathered behind the forward, and leave it on a stream of their own.
        """
        for plan in step.saves:
            self.store.drop(plan.evict)
            self._save(plan)

    def _save(self, plan: SavePlan) -> None:
        kv = self.model.paged_kv(plan.block_ids, self.block_size)
        for key, chunk in plan.chunks:
            self.store.put(key, replace(self._chunk(kv, chunk), generation=plan.generation))

    def _chunk(self, kv, chunk: Chunk) -> ChunkKV:
        rows = torch.arange(chunk.start, chunk.end, device=self.model.device)
        pairs = [kv.read(layer, rows) for layer in range(self.model.num_layers)]
        positions = torch.arange(chunk.start, chunk.end)
        return ChunkKV(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]), positions)

    @torch.inference_mode()
    def encode(self, step: StepPlan) -> None:
        """The forward is over: prefill chunks that no request's own prefill provides."""
        if self.model.crossing is not None:
            self.model.crossing.expect((), self.block_size)
        for job in step.encodes:
            self.store.drop(job.evict)
            encoder = ChunkEncoder(self.model, self.store, self.model.dtype, job.capture)
            with self.model.running():
                encoder.encode(job.encoding, job.prompt, job.positions, job.chunks, job.keys)

    def land(self, step: StepPlan) -> None:
        """Take in chunks that were read from below."""
        if self.below is None:
            return
        for fetch in step.fetches:
            self.store.drop(fetch.evict)
        for key, ticket, found in self.below.arrivals(step.idle):
            if found.chunk is None:
                self.report.failed[key] = ticket, found.why
                continue
            self.store.land(key, found.chunk)
            self.report.landed[key] = [Landed(ticket, found.tier, found.chunk.nbytes, found.chunk.generation)]

    def take_report(self) -> WorkerReport | None:
        """What happened since the last call."""
        report, self.report = self.report, WorkerReport()
        return report or None

    def close(self) -> None:
        """The engine stops: nothing of ours is on its way any more, and nothing holds its model or its memory.

        What is queued for the tiers below is written first.
        """
        if self.model is not None:
            if self.below is not None:
                self.below.close()
            self.store.close()
            self.model = self.executor = self.rings = self.stream = self.below = self.memory = None
