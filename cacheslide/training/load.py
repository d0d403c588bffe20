"""The reference model from a checkpoint, a CoPE adapter, and its calibration."""

from pathlib import Path

import torch

from cacheslide.model.config import LlamaConfig
from cacheslide.model.cope import CopeLlama
from cacheslide.model.weights import fingerprint, load_weights
from cacheslide.training.adapter import load_adapter
from cacheslide.training.calibration import find_calibration


def load_cope(
    path: str | Path,
    adapter: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    live: bool = False,
    cap: bool = False,
) -> CopeLlama:
    """The checkpoint `path` with the CoPE adapter in the folder `adapter`, and its calibration where it has one.

    LoRA is merged in float32. `live` leaves the calibration aside, `cap` is `SlotMasses.cap`. The model's id, a part of
    every chunk key, covers base, adapter, calibration and cap. Raises ModelError when adapter and base do not fit.
    """
    path, adapter = Path(path), Path(adapter)
    found = load_adapter(adapter, path)
    calibration = None if live else find_calibration(adapter, found.digest)
    config = LlamaConfig.from_pretrained(path)
    weights = found.merged(load_weights(path, torch.float32, "cpu"))
    weights = {name: x.to(device=device, dtype=dtype) for name, x in weights.items()}
    tables = [found.positions(i) for i in range(config.num_layers)]
    masses = None if calibration is None else calibration.masses
    parts = [fingerprint(path), found.digest, calibration.digest if calibration else "live", *(["cap"] if cap else [])]
    return CopeLlama(config, weights, " ".join(parts), tables, masses, cap)
