"""CCPE calibration: Γ of every layer, head and updated slot, the mode over a task's prompts (paper, Alg. 1).

A sample is the live gate sum of a slot for one query: the sum of its gates over the slot's keys. Queries of the fixed
chunks behind the slot are pooled over all prompts; a query that saturates before it reaches the slot is left out, since
Γ changes nothing for it. The mode is that of a histogram with bins of `bin_width` positions; Γ is the mean of the
samples in the fullest bin (the lowest of equals).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cacheslide import renamed
from cacheslide.core.prompt import Prompt
from cacheslide.errors import ModelError, PromptError
from cacheslide.models.adapter import RowGroup
from cacheslide.plain_values import read_json
from cacheslide.positions.ccpe import PromptSlots, slots_in
from cacheslide.positions.cope import query_blocks, scores_and_gates

FORMAT = 1
FILES = ("ccpe.safetensors", "ccpe.json")


@dataclass(frozen=True)
class Calibration:
    """Γ [layers, slots, heads], float32, for one adapter and one template; `notes` describe the measurement."""

    slot_offsets: Tensor
    adapter: str
    template: str
    bin_width: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that changes KV: the adapter, the template and Γ."""
        h = hashlib.sha256(json.dumps([self.adapter, self.template, list(self.slot_offsets.shape)]).encode())
        h.update(self.slot_offsets.float().contiguous().numpy().tobytes())
        return h.hexdigest()


class Samples:
    """Gate sums of slots, collected layer by layer: lists of [queries] per (layer, slot, head)."""

    def __init__(self, layers: int, slots: int, heads: int, p_max: int) -> None:
        self.shape, self.p_max = (layers, slots, heads), p_max
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(slots)] for _ in range(layers)]
        self.open = torch.zeros(self.shape)  # queries not yet saturated at the slot
        self.seen = torch.zeros(self.shape)

    def add(self, layer: int, q: Tensor, k: Tensor, rows: Tensor, slots: PromptSlots) -> None:
        """Add queries [n, heads, head_dim] at `rows` of one prompt, with its keys [keys, kv_heads, head_dim]."""
        if len(slots.bounds) > self.shape[1]:
            raise PromptError(f"a prompt has {len(slots.bounds)} updated slots, the template {self.shape[1]}")
        fixed = slots.canonical.to(rows.device)
        for part, end in query_blocks(rows, q.shape[1]):
            part_rows = rows[part]
            _, gates = scores_and_gates(q[part], k[:end], part_rows, None)
            for slot, (first, last) in enumerate(slots.bounds):
                behind = (fixed[part_rows.clamp(max=len(fixed) - 1)] & (part_rows >= last)).nonzero()[:, 0]
                if not len(behind):
                    continue
                before = gates[:, behind, last:].sum(-1)
                gate_sum = gates[:, behind, first:last].sum(-1)
                unsaturated = before < self.p_max - 1
                self.seen[layer, slot] += len(behind)
                self.open[layer, slot] += unsaturated.sum(1).cpu()
                self.values[layer][slot].append(torch.where(unsaturated, gate_sum, float("nan")).cpu())

    def modes(self, bin_width: float) -> Tensor:
        """Γ [layers, slots, heads] by histogram; 0 where no query reaches the slot unsaturated."""
        out = torch.zeros(self.shape)
        for layer, slots in enumerate(self.values):
            for slot, parts in enumerate(slots):
                for head, values in enumerate(torch.cat(parts, 1) if parts else []):
                    out[layer, slot, head] = mode(values[~values.isnan()], bin_width)
        return out

    def unsaturated_share(self) -> Tensor:
        """Share of (query, slot) pairs whose sum has not reached p_max - 1 at the slot, [layers, slots, heads]."""
        return self.open / self.seen.clamp_min(1)


def mode(values: Tensor, bin_width: float) -> float:
    """The mean of the samples in the fullest bin of width `bin_width`; 0 without samples."""
    if not len(values):
        return 0.0
    bins = (values / bin_width).floor().long()
    fullest = int(torch.bincount(bins).argmax())
    return float(values[bins == fullest].mean())


def calibrate(model, prompts: Iterable[Prompt], slots: int, bin_width: float = 0.5) -> tuple[Tensor, Samples]:
    """Γ of `model` (a `CopeLlama` without offsets) over a task's prompts, and the samples."""
    if model.slot_offsets is not None:
        raise ModelError("calibrate on live gates: load the adapter with live=True")
    samples = Samples(model.num_layers, slots, model.config.num_heads, model.tables[0].shape[0])
    for prompt in prompts:
        _observe(model, prompt, samples)
    return samples.modes(bin_width), samples


@torch.inference_mode()
def _observe(model, prompt: Prompt, samples: Samples) -> None:
    ids = torch.tensor(prompt.token_ids, device=model.device)
    rows, kv = torch.arange(len(ids), device=ids.device), model.new_kv(len(ids))
    where, hidden = slots_in(prompt), model.embed(ids)
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, rows)
        kv.write(layer, rows, k, v)
        samples.add(layer, q, kv.k[layer], rows, where)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))


def template_id(names: Sequence[str]) -> str:
    """Identifies a prompt template by its segments' roles and names, in order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write `ccpe.safetensors` and `ccpe.json` beside the adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"slot_offsets": calibration.slot_offsets.float().contiguous()}, folder / FILES[0], metadata={"format": "pt"}
    )
    (folder / FILES[0]).chmod(0o644)
    record = {"format": FORMAT, "adapter": calibration.adapter, "template": calibration.template}
    record |= {"bin_width": calibration.bin_width, "digest": calibration.digest, "notes": calibration.notes}
    (folder / FILES[1]).write_text(json.dumps(record, indent=1) + "\n")


def find_calibration(folder: Path, adapter: str) -> Calibration | None:
    """The calibration in an adapter's folder; None if there is none.

    Raises
    ------
    ModelError
        If it is altered, or was measured with an adapter other than that of digest `adapter`.
    """
    folder = Path(folder)
    if not (folder / FILES[1]).is_file():
        return None
    try:
        raw = read_json(folder / FILES[1], ModelError)
        if raw["format"] != FORMAT:
            raise ModelError(f"{folder / FILES[1]} is of format {raw['format']}; this version reads {FORMAT}")
        offsets = renamed.options(load_file(folder / FILES[0]), renamed.TENSOR)["slot_offsets"]
        calibration = Calibration(offsets, raw["adapter"], raw["template"], raw["bin_width"], raw["notes"])
        stated = raw["digest"]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as broken:
        raise ModelError(f"{folder / FILES[1]} is not a calibration ({broken!r})") from None
    if calibration.digest != stated:
        raise ModelError(f"the calibration in {folder} is altered or incomplete")
    if calibration.adapter != adapter:
        raise ModelError(f"the calibration in {folder} was measured with another adapter: calibrate again")
    return calibration
