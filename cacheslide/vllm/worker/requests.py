"""Prefill requests in vLLM's paged cache, and the device memory for fetching their chunks."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from cacheslide.core.placement import Piece, Placement
from cacheslide.core.prefill_request import KVSource
from cacheslide.core.request_builder import RequestBuilder
from cacheslide.policies.base import Correction
from cacheslide.vllm.worker.model_adapter import VllmModel
from cacheslide.vllm.worker.paged_source import PagedChunks
from cacheslide.vllm.worker.prefetch import LayerFetch, Rings, ring_bytes


class PagedRequests(RequestBuilder):
    """Builds requests whose cached rows are placed by a kernel if the cache's layout is open.

    Parameters
    ----------
    model : VllmModel
    rings : Rings, optional
        Device memory for chunks fetched from pinned host memory; None if chunks are on the device.
    """

    def __init__(self, model: VllmModel, rings: Rings | None = None) -> None:
        super().__init__(model)
        self.rings = rings

    def reserve(self, parts: Iterable[tuple[Sequence[Piece], Correction]]) -> None:
        """Reserve device memory for all fetches of a run, from each request's pieces and rule."""
        if self.rings is not None:
            layers = self.model.num_layers
            self.rings.reserve(sum(ring_bytes(pieces, layers - rule.first_layer) for pieces, rule in parts))

    def source(
        self, pieces: Sequence[Piece], target: Tensor, placement: Placement, shift: int, correction: Correction
    ) -> KVSource:
        """See `RequestBuilder.source`."""
        model = self.model
        if not model.open:
            return super().source(pieces, target, placement, shift, correction)
        fetch = None
        if self.rings is not None:
            fetch = LayerFetch(pieces, correction.first_layer, model.num_layers, self.rings)
        settings = pieces, target, placement, model.rotaries, model.dtype, shift, model.device
        return PagedChunks(*settings, model.caches, fetch)
