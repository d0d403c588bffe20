"""A CoPE model over paged caches that all requests share: what vLLM's is to the executor on a GPU."""

import torch

from cacheslide.models.cope import CopeLlama
from cacheslide.positions.ccpe import PromptSlots, check_slots
from cacheslide.training.load import load_cope
from cacheslide.vllm.cope.slots import LayerOffsets
from cacheslide.vllm.worker.cope_rows import CopeRows
from tests.helpers.graphed import Served


class CopeServed(Served, CopeLlama):
    """`Served` with CoPE attention; `known` random calibrated slots, none for live gates."""

    @classmethod
    def made(cls, checkpoint, adapter, known: int, cap: bool = False, device: str = "cpu") -> "CopeServed":
        plain = load_cope(checkpoint, adapter, device=device, live=True)
        shape, g = (plain.num_layers, known, plain.config.num_heads), torch.Generator().manual_seed(8)
        offsets = (torch.rand(shape, generator=g) * 4).to(device) if known else None
        out = object.__new__(cls)
        out.__dict__ |= vars(plain) | {"slot_offsets": offsets, "cap": cap, "model_id": f"{plain.model_id} {known}"}
        out.serve(CopeRows(plain.tables, LayerOffsets(offsets, cap)))
        return out

    def describe(self, kv, slots: PromptSlots) -> None:
        """See `ModelAdapter.describe`."""
        if self.slot_offsets is not None:
            check_slots(slots, self.slot_offsets.shape[1])
            kv.updated = PromptSlots(slots.bounds, slots.canonical.to(self.device))
