"""A CoPE adapter with its calibration, and the reference model from a checkpoint and both."""

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
    """What turns a base model into its CoPE model: an adapter, and the calibration unless gates are all live."""

    adapter: CopeAdapter
    calibration: Calibration | None = None
    cap: bool = False

    @property
    def digest(self) -> str:
        """Names adapter, calibration and cap: their part of every chunk key."""
        measured = self.calibration.digest if self.calibration else "live"
        return " ".join([self.adapter.digest, measured, *(["cap"] if self.cap else [])])

    @property
    def slot_offsets(self) -> torch.Tensor | None:
        """Γ [layers, slots, heads], float32."""
        return None if self.calibration is None else self.calibration.slot_offsets

    @property
    def slots(self) -> int:
        """How many updated slots Γ was calibrated for."""
        return 0 if self.calibration is None else self.calibration.slot_offsets.shape[1]


def find_cope(adapter: str | Path, model: str | Path | None = None, live: bool = False, cap: bool = False) -> CopeSetup:
    """The adapter in a folder, and the calibration that lies beside it unless `live`; `cap` is `SlotOffsets.cap`.

    With `model`, that checkpoint is hashed; ModelError when the adapter was made for another.
    """
    adapter = Path(adapter)
    found = load_adapter(adapter, None if model is None else Path(model))
    return CopeSetup(found, None if live else find_calibration(adapter, found.digest), cap)


def load_cope(
    path: str | Path,
    adapter: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    live: bool = False,
    cap: bool = False,
) -> CopeLlama:
    """The checkpoint `path` with the CoPE adapter in the folder `adapter`, and its calibration where it has one.

    LoRA is merged in float32. `live` leaves the calibration aside, `cap` is `SlotOffsets.cap`. The model's id, a part
    of every chunk key, covers base, adapter, calibration and cap. Raises ModelError when adapter and base do not fit.
    """
    path = Path(path)
    check_device(device)
    setup = find_cope(adapter, path, live, cap)
    config = read_config(path)
    weights = setup.adapter.merged(load_weights(path, torch.float32, "cpu"))
    weights = {name: x.to(device=device, dtype=dtype) for name, x in weights.items()}
    tables = [setup.adapter.positions(i) for i in range(config.num_layers)]
    model_id = f"{setup.adapter.base} {setup.digest}"  # the base's fingerprint has just been compared
    return CopeLlama(config, weights, model_id, tables, setup.slot_offsets, cap)
