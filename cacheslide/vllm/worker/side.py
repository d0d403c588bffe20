"""The worker side: completes prompts from cached chunks, copies chunks from the paged cache, encodes others."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group

from cacheslide.core.encoder import ChunkEncoder, read_chunk
from cacheslide.core.keys import ChunkKey
from cacheslide.core.prompt import Chunk
from cacheslide.store.persistent.shape import shape_of
from cacheslide.units import GIB
from cacheslide.vllm.claims import Loads
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.guard import Faults, reason
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import ChunkLoaded, EncodeJob, SavePlan, StepPlan, WorkerReport
from cacheslide.vllm.worker.chunk_store import WorkerStore
from cacheslide.vllm.worker.graphs import GraphedPrefill
from cacheslide.vllm.worker.host_copies import HostCopies
from cacheslide.vllm.worker.loading import Loading
from cacheslide.vllm.worker.model_adapter import MLP_ROWS, VllmModel, find_model
from cacheslide.vllm.worker.pinned import PinnedMemory, pin
from cacheslide.vllm.worker.prefetch import Rings
from cacheslide.vllm.worker.ranks import Team, TeamPrefill
from cacheslide.vllm.worker.scoring import Scorer
from cacheslide.vllm.worker.storage import StorageTier


class WorkerSide:
    """One rank's chunks, and the runs over its part of the model."""

    def __init__(self, vllm_config, options: ServerOptions) -> None:
        self.vllm_config, self.options = vllm_config, options
        self.block_size = vllm_config.cache_config.block_size
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.model: VllmModel | None = None
        self.graphs: GraphedPrefill | None = None
        self.report, self.faults = WorkerReport(), Faults()
        self.loads = Loads(self.block_size)
        self.unsure: set[ChunkKey] = set()  # chunks that could not be dropped
        self.joined, self.encoded, self.scored = False, 0, 0  # this rank's progress in the step, relative to the others

    def attach(self) -> None:
        """Find the loaded model; the paged cache exists by now."""
        config = self.vllm_config
        model = find_model(config.compilation_config.static_forward_context)
        self.model = VllmModel(model, config.model_config.hf_text_config, Geometry.of(config))
        self.memory = self._pinned_memory()
        self.storage_tier = self._open_storage_tier()
        self.store = self._open_store(self.options.store_device)
        self.team = Team(get_tp_group() if self.model.ranks > 1 else None)
        self.graphs = self._graphs()
        self.executor = self.new_executor(self.graphs)
        self.faults.device = self.model.device
        if self.model.device.type == "cuda":
            from cacheslide.vllm.worker.warmup import warm_up  # Triton exists only with a GPU

            warm_up(self.model, config.model_config.max_model_len)

    def new_executor(self, graphs: GraphedPrefill | None = None) -> TeamPrefill:
        """An executor that runs requests on all ranks together."""
        return TeamPrefill(self.model, self.team, MLP_ROWS, graphs)

    def _graphs(self) -> GraphedPrefill | None:
        """Replay of loads' layers; None without a GPU or the open cache layout."""
        wanted = self.options.executor_graphs and self.model.device.type == "cuda" and self.model.open
        tokens = self.vllm_config.model_config.max_model_len
        return GraphedPrefill(self.model, tokens, faults=self.faults) if wanted else None

    def _pinned_memory(self) -> PinnedMemory | None:
        """On a GPU: pinned host memory for chunks, allocated now rather than while requests wait."""
        if self.model.device.type != "cuda":
            return None
        on_host = self.options.store_device == "cpu"
        return PinnedMemory(pin(int(self.options.store_gib * GIB)) if on_host else None, self._stamp)

    def _stamp(self) -> "list[torch.cuda.Event]":
        """Events behind all work that may use chunks in host memory."""
        copies = self.store.copies
        streams = [torch.cuda.current_stream(self.model.device), self.stream, None if copies is None else copies.stream]
        return [stream.record_event() for stream in streams if stream is not None]

    def _open_storage_tier(self) -> StorageTier | None:
        """This rank's part of the storage tiers."""
        if (tiers := self.options.tiers) is None:
            return None
        model, rank = self.model, get_tensor_model_parallel_rank()
        row_bytes = 2 * model.num_kv_heads * model.head_dim * model.dtype.itemsize
        shape = shape_of(model, model.dtype)
        return StorageTier(tiers, row_bytes, self.options.namespace, rank, model.ranks, self.memory, shape)

    def _open_store(self, where: str) -> WorkerStore:
        """An empty store; in host memory beside a GPU it is pinned and uses its own streams."""
        device = torch.device("cpu") if where == "cpu" else self.model.device
        pinned = where == "cpu" and self.model.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.model.device) if pinned else None
        self.rings = Rings(self.model.device, self.stream)
        copies = HostCopies(self.model.device, memory=self.memory) if pinned else None
        return WorkerStore(device, copies, self.storage_tier)

    def move_store(self, where: str) -> None:
        """Move all chunks to the host ("cpu") or to the model's device ("model")."""
        before, self.store = self.store, self._open_store(where)
        before.hand_over(self.store)
        if self.memory is not None:  # regions returned from now on are stamped on the new streams only
            torch.cuda.synchronize(self.model.device)

    @torch.inference_mode()
    def begin(self, step: StepPlan) -> None:
        """Before anything writes to the cache in this step: save chunks from blocks of finished requests."""
        self.joined, self.encoded, self.scored = False, 0, 0
        offsets = self.model.slot_offsets
        if offsets is not None:
            offsets.expect(step.slots, self.block_size)
        if step.forget:
            self._forget()
        for settle in (self.store.settle, *(() if self.memory is None else (self.memory.settle,))):
            self.survive("bind_connector_metadata", settle)
        self.drop([*self.unsure, *step.drops])
        self._let_go(step.released, self.store.release)
        if self.storage_tier is not None:
            self.survive("on_loaded", self.storage_tier.drop, step.drops)
            for fetch in step.fetches:
                if not self.survive("on_loaded", self.storage_tier.fetch, fetch.key, fetch.ticket, fetch.tokens):
                    self.report.failed[fetch.key] = fetch.ticket, reason("on_loaded")
        for plan in step.history_saves:
            self._save(plan)

    def begin_nothing(self, step: StepPlan) -> None:
        """Fallback of `begin`: reports chunks that were to be saved or read as missing."""
        self.joined, self.encoded, self.scored, self.report.unsettled = False, 0, 0, True
        if step.forget:
            self._forget()
        if self.model.slot_offsets is not None:
            self.model.slot_offsets.expect(step.slots, self.block_size)
        self._not_saved(step.history_saves)
        self.report.failed |= {fetch.key: (fetch.ticket, reason("on_loaded")) for fetch in step.fetches}

    def survive(self, entry: str, does: Callable[..., Any], *args: Any) -> bool:
        """Call `does`; a failure is only counted as a fault at `entry`. Returns whether it succeeded."""
        try:
            does(*args)
        except Exception as error:
            self.faults.note(entry, error)
            return False
        return True

    def _forget(self) -> None:
        """Drop all chunks, since the weights have changed. A chunk that cannot be dropped is never used again."""
        keys = list(self.store._chunks)
        self.survive("reset_cache", self.store.clear)
        if self.graphs is not None:
            self.survive("reset_cache", self.graphs.forget)
        self.drop(keys)
        if self.storage_tier is not None:
            self.survive("reset_cache", self.storage_tier.forget)

    def drop(self, keys: Iterable[ChunkKey]) -> None:
        """Drop chunks; those that cannot be dropped count as missing and are dropped later."""
        self._let_go(keys, self.store.drop)

    def evict(self, keys: Iterable[ChunkKey]) -> None:
        """Drop chunks to make room; corrected ones are spilled."""
        self._let_go(keys, self.store.evict)

    def _let_go(self, keys: Iterable[ChunkKey], does: Callable[[list[ChunkKey]], None]) -> None:
        for key in keys:
            gone = self.survive("bind_connector_metadata", does, [key])
            (self.unsure.discard if gone else self.unsure.add)(key)

    @torch.inference_mode()
    def load(self, step: StepPlan) -> None:
        """Complete the rows of all requests that reuse chunks in this step, in one packed run."""
        if step.loads:
            Loading(self, step.loads).run()

    def load_nothing(self, step: StepPlan) -> None:
        """Fallback of `load`: lets the other ranks continue. The rows stay incomplete."""
        if step.loads and not self.joined:
            self.joined = True
            self.team.agree([False] * (1 + sum(len(plan.reuse) for plan in step.loads)))

    @torch.inference_mode()
    def save(self, step: StepPlan) -> None:
        """Copy chunks of exactly prefilled requests from the paged cache, before its blocks can be reused.

        Does not wait for the device: rows are gathered behind the forward and copied on a stream of their own.
        """
        offsets = self.model.slot_offsets
        if offsets is not None and offsets.fault is not None:  # its rows are not what their keys name
            self.faults.note("slots", offsets.fault)
            offsets.fault = None
            for rows in step.slots:
                first = rows.slots.bounds[0][1] // self.block_size
                self.loads.spoil("", rows.block_ids[first:])
            self.save_nothing(step)
            return
        for plan in step.saves:
            self._save(plan)

    def save_nothing(self, step: StepPlan) -> None:
        """Fallback of `save`: reports chunks that the index names since this step as missing."""
        self._not_saved(step.saves)

    def _not_saved(self, plans: Iterable[SavePlan]) -> None:
        for plan in plans:
            self.evict(plan.evict)
            self.report.missing.update(key for key, _ in plan.chunks)

    def _save(self, plan: SavePlan) -> None:
        """Copy a plan's chunks one by one; those that cannot be stored are reported as missing."""
        self.evict(plan.evict)
        self.store.awaiting.update(key for key, _ in plan.chunks if plan.scored)
        for key, chunk in plan.chunks:
            if key in self.unsure or not self.survive("wait_for_save", self._copy, plan, key, chunk):
                self.drop([key])
                self.report.missing.add(key)

    def _copy(self, plan: SavePlan, key: ChunkKey, chunk: Chunk) -> None:
        kv, own = self.model.paged_kv(plan.block_ids, self.block_size), range(chunk.end)
        self.store.put(key, read_chunk(self.model, kv, own, chunk.start, chunk.end, plan.generation))

    @torch.inference_mode()
    def encode(self, step: StepPlan) -> None:
        """After the forward: prefill chunks that no request's own prefill provides."""
        if self.model.slot_offsets is not None:
            self.model.slot_offsets.expect((), self.block_size)
        for job in step.encodes:
            self._make_room(job)
            self.encoded += 1
            together, *everywhere = self.team.agree([True, *map(self.holds, job.plan.keys)])
            if not together:
                self._not_encoded(job)
                continue
            missing = {key for key, present in zip(job.plan.keys, everywhere, strict=True) if not present}
            self.drop(missing)
            self.store.awaiting.update(missing if job.scored else ())
            for part in job.parts():
                if not missing.isdisjoint(part.plan.keys) and not self.survive("encode", self._encode, part):
                    self._not_encoded(part)
        for job in step.scores:
            Scorer(self).run(job)
        if self.graphs is not None:
            self.report.wants_idle = self.graphs.record_waiting(step.idle)

    def encode_nothing(self, step: StepPlan) -> None:
        """Fallback of `encode`: lets the other ranks continue, and reports the jobs' chunks as missing."""
        for job in step.encodes[self.encoded :]:
            self.encoded += 1
            self._make_room(job)
            self.team.agree([False] * (1 + len(job.plan.keys)))
            self._not_encoded(job)
        for job in step.scores[self.scored :]:
            Scorer(self).skip(job)

    def _make_room(self, job: EncodeJob) -> None:
        """Drop chunks evicted for a job, and corrected copies that it replaces by exact ones."""
        self.evict(job.evict)
        self._let_go(job.renewed, self.store.release)

    def holds(self, key: ChunkKey) -> bool:
        """Whether a chunk is stored and usable."""
        return key not in self.unsure and self.store.contains(key)

    def _encode(self, job: EncodeJob) -> None:
        encoder = ChunkEncoder(self.model, self.store, self.model.dtype, job.capture)
        encoder.executor = self.new_executor()
        with self.team.unit(), self.model.running():
            encoder.encode(job.encoding, job.plan)

    def _not_encoded(self, job: EncodeJob) -> None:
        self.report.missing.update(k for k in job.plan.keys if not self.holds(k))

    def on_loaded(self, step: StepPlan) -> None:
        """Store chunks that were read from the storage tier."""
        if self.storage_tier is None:
            return
        for fetch in step.fetches:
            self.evict(fetch.evict)
        for key, ticket, fetched in self.storage_tier.arrivals(step.idle):
            if fetched.chunk is None:
                self.report.failed[key] = ticket, fetched.why
            elif key in self.unsure or not self.survive("on_loaded", self.store.put_loaded, key, fetched.chunk):
                self.drop([key])
                self.report.failed[key] = ticket, reason("on_loaded")
            else:
                chunk, scored = fetched.chunk, fetched.chunk.scores is not None
                self.report.loaded[key] = [ChunkLoaded(ticket, fetched.tier, chunk.nbytes, chunk.generation, scored)]

    def on_none_loaded(self, step: StepPlan) -> None:
        """Fallback of `on_loaded`: chunks that were read wait for the next step."""
        self.report.unsettled = True
        for fetch in step.fetches:
            self.evict(fetch.evict)

    def compare(self, step: StepPlan) -> None:
        """At the end of a step, if the index is attached: drop chunks it does not name, report missing ones."""
        if step.index is None:
            return
        self.drop([key for key in self.store._chunks if key not in step.index])
        self.report.missing.update(key for key, due in step.index.items() if due and not self.holds(key))

    def take_report(self) -> WorkerReport | None:
        """Events since the last call; None without any."""
        report, self.report = self.report, WorkerReport()
        return report or None

    def close(self) -> None:
        """Stop: no copies or reads are left in flight, and nothing holds the model or its memory.

        Chunks queued for the storage tier are written first.
        """
        if self.model is not None:
            if self.storage_tier is not None:
                self.store.await_no_more(set(self.store.awaiting))
                self.storage_tier.close()
            self.store.close()
            self.model = self.executor = self.graphs = None
            self.rings = self.stream = self.storage_tier = self.memory = None
