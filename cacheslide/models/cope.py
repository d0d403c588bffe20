"""The reference Llama with CoPE: LoRA merged, attention by contextual positions.

Keys are not rotated (rotation tables are those of angle 0), so cached keys hold at any row and every policy runs
unchanged. With calibrated slot offsets (CCPE) queries of fixed chunks cross updated slots by Γ; `describe` gives a KV
buffer its slots. `cacheslide.training.load` builds the model from an adapter.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheslide.errors import ModelError
from cacheslide.models.adapter import RowGroup, refuse_narrow
from cacheslide.models.config import DecoderConfig
from cacheslide.models.dense_kv import DenseKV
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.positions.ccpe import PromptSlots, SlotOffsets, check_slots, pack_slots
from cacheslide.positions.cope import cope_attention
from cacheslide.positions.rope import Rotary


class CopeLlama(ReferenceDecoder):
    """A `ModelAdapter` with CoPE attention.

    Parameters
    ----------
    config, weights, model_id
        As in `ReferenceDecoder`; LoRA merged, `model_id` covering the adapter and the calibration.
    tables : sequence of Tensor [p_max, head_dim]
        Position embeddings, one table per layer.
    slot_offsets : Tensor [layers, slots, heads], optional
        Calibrated Γ; without it every query crosses slots by live gates.
    cap : bool
        See `SlotOffsets`.
    """

    rotates = False

    def __init__(
        self,
        config: DecoderConfig,
        weights: dict[str, Tensor],
        model_id: str,
        tables: Sequence[Tensor],
        slot_offsets: Tensor | None = None,
        cap: bool = False,
    ) -> None:
        limit = min((w for w in config.windows if w is not None), default=config.max_positions)
        # Up to the window's length, sliding-window attention is plain causal attention: the window limits the
        # positions.
        no_windows = (None,) * config.num_layers
        config = replace(config, windows=no_windows, max_positions=min(config.max_positions, limit))
        if not config.is_plain:
            raise ModelError("CoPE serves models with the layers of Llama and Mistral only")
        super().__init__(config, weights, model_id)
        wanted = (config.num_layers, config.head_dim)
        if (len(tables), *{t.shape[1] for t in tables}) != wanted:
            raise ModelError(f"position tables do not fit {wanted[0]} layers of head_dim {wanted[1]}")
        if slot_offsets is not None and (slot_offsets.shape[0], slot_offsets.shape[2]) != (
            config.num_layers,
            config.num_heads,
        ):
            raise ModelError(f"slot offsets {tuple(slot_offsets.shape)} do not fit the model's layers and heads")
        self.tables = [t.to(self.device, self.dtype) for t in tables]
        self.slot_offsets, self.cap = slot_offsets, cap
        # Angle 0 everywhere: delta rotations leave keys unchanged.
        unrotated = Rotary(torch.zeros(config.head_dim // 2), config.max_positions, self.device)
        self.rotaries = [unrotated] * config.num_layers

    def describe(self, kv: DenseKV, slots: PromptSlots) -> None:
        """Set the prompt's updated slots in `kv`; needed before attention with canonical offsets."""
        if self.slot_offsets is not None:
            check_slots(slots, self.slot_offsets.shape[1])
        kv.slots = slots

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """See `ModelAdapter.attend`."""
        refuse_narrow(groups)
        parts = q.split([len(g.rows) for g in groups])
        out = [
            cope_attention(part, g.kv.k[layer], g.kv.v[layer], self.tables[layer], g.rows, None, self.crossed(layer, g))
            for part, g in zip(parts, groups, strict=True)
            if len(g.rows)
        ]
        return torch.cat(out) if len(out) > 1 else out[0]

    def crossed(self, layer: int, group: RowGroup) -> SlotOffsets | None:
        """The slot offsets for a group's rows in `layer`; None where every gate is live."""
        packed = None if self.slot_offsets is None else pack_slots([(group.kv.slots, group.rows)])
        return None if packed is None else packed.with_offsets(self.slot_offsets[layer].to(group.rows.device), self.cap)
