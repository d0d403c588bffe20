"""Loads a CoPE adapter with its calibration, and the reference model built from a checkpoint and both."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cacheslide.models.cope import CopeLlama
from cacheslide.models.families import read_config
from cacheslide.models.weights import check_device, load_weights
from cacheslide.training.adapter import CopeAdapter, load_adapter
from cacheslide.training.calibration import Calibration, find_calibration


@dataclass(frozen=True)
class CopeSetup:
    """An adapter and its calibration, None where all gates are live."""

    adapter: CopeAdapter
    calibration: Calibration | None = None
    cap: bool = False

    @property
    def digest(self) -> str:
        """Digest of adapter, calibration and cap: their part of every chunk key."""
        measured = self.calibration.digest if self.calibration else "live"
        return " ".join([self.adapter.digest, measured, *(["cap"] if self.cap else [])])

    @property
    def slot_offsets(self) -> torch.Tensor | None:
        """Γ [layers, slots, heads], float32."""
        return None if self.calibration is None else self.calibration.slot_offsets

    @property
    def slots(self) -> int:
        """Number of updated slots that Γ was calibrated for."""
        return 0 if self.calibration is None else self.calibration.slot_offsets.shape[1]


def find_cope(adapter: str | Path, model: str | Path | None = None, live: bool = False, cap: bool = False) -> CopeSetup:
    """The adapter in a folder, and the calibration beside it unless `live`; `cap` is `SlotOffsets.cap`.

    With `model`, that checkpoint is hashed; ModelError if the adapter was made for another.
    """
    adapter = Path(adapter)
    loaded = load_adapter(adapter, None if model is None else Path(model))
    return CopeSetup(loaded, None if live else find_calibration(adapter, loaded.digest), cap)


def load_cope(
    path: str | Path,
    adapter: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    live: bool = False,
    cap: bool = False,
) -> CopeLlama:
    """The checkpoint `path` with the CoPE adapter in the folder `adapter` and its calibration, if it has one.

    LoRA is merged in float32. `live` ignores the calibration, `cap` is `SlotOffsets.cap`. The model's id, a part of
    every chunk key, covers base, adapter, calibration and cap. Raises ModelError if adapter and base do not match.
    """
    path = Path(path)
    check_device(device)
    setup = find_cope(adapter, path, live, cap)
    config = read_config(path)
    weights = setup.adapter.merged(load_weights(path, torch.float32, "cpu"))
    weights = {name: x.to(device=device, dtype=dtype) for name, x in weights.items()}
    tables = [setup.adapter.positions(i) for i in range(config.num_layers)]
    model_id = f"{setup.adapter.base} {setup.digest}"  # the base's fingerprint was checked above
    return CopeLlama(config, weights, model_id, tables, setup.slot_offsets, cap)
