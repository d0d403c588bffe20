"""The CoPE adapter on disk: safetensors and JSON, bound by hash to the base model and to its own settings.

A folder holds `cope.safetensors` (LoRA factors and position tables, named by layer and projection) and `cope.json`
(settings, the base model's fingerprint, the tensors' digest). Loading refuses another base or altered tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cacheslide.errors import ConfigError, ModelError
from cacheslide.models.weights import fingerprint
from cacheslide.plain_values import read_json

FORMAT = 1
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of an adapter: LoRA of `rank` with factor `alpha` / `rank` on `projections`, tables of `p_max`."""

    rank: int = 16
    alpha: float = 32.0
    p_max: int = 64
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "projections", tuple(self.projections))
        unknown = set(self.projections) - set(PROJECTIONS)
        if self.rank < 1 or self.p_max < 2 or self.alpha <= 0 or unknown:
            raise ConfigError(f"adapter settings are out of range: {self} (projections: {', '.join(PROJECTIONS)})")

    @property
    def factor(self) -> float:
        """Factor on the product of a LoRA pair."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class CopeAdapter:
    """A loaded adapter.

    `tensors` maps "layers.I.PROJECTION.a" [rank, in], "layers.I.PROJECTION.b" [out, rank] and "layers.I.positions"
    [p_max, head_dim]; `base` is the base model's fingerprint, `notes` are recorded by the trainer.
    """

    settings: AdapterSettings
    base: str
    tensors: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over base, settings and tensors: the adapter's part of every chunk key."""
        return adapter_digest(self.base, self.settings, self.tensors)

    def positions(self, layer: int) -> Tensor:
        """The position table [p_max, head_dim] of a layer."""
        name = f"layers.{layer}.positions"
        if name not in self.tensors:
            raise ModelError(f"the adapter has no {name}: the model has more layers than its base")
        return self.tensors[name]

    def check_base(self, fingerprint: str, model: str | Path) -> None:
        """Raise ModelError unless `fingerprint`, that of the checkpoint `model`, is the base model's."""
        if fingerprint != self.base:
            raise ModelError(
                f"the CoPE adapter belongs to the base model {self.base[:12]}, but {model} is {fingerprint[:12]}"
            )

    @property
    def changes(self) -> dict[str, str]:
        """Checkpoint weights changed by LoRA, each with the stem of its LoRA pair's names."""
        stems = [name.removesuffix(".a") for name in self.tensors if name.endswith(".a")]
        parts = (stem.removeprefix("layers.").split(".", 1) for stem in stems)
        keys = [f"model.layers.{layer}.self_attn.{projection}.weight" for layer, projection in parts]
        return dict(zip(keys, stems, strict=True))

    def merge(self, stem: str, weight: Tensor) -> Tensor:
        """A projection's `weight` [out, in] plus the product of the LoRA pair `stem`, float32."""
        a, b = self.tensors[f"{stem}.a"], self.tensors[f"{stem}.b"]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ModelError(f"the adapter's {stem} is for {(b.shape[0], a.shape[1])}, not {tuple(weight.shape)}")
        change = (b.float() @ a.float()) * self.settings.factor
        return weight.float() + change.to(weight.device)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's `weights` plus the LoRA products, computed in float32; other weights unchanged."""
        out = dict(weights)
        for key, stem in self.changes.items():
            if key not in out:
                raise ModelError(f"the adapter changes {key}, which the checkpoint lacks")
            out[key] = self.merge(stem, out[key]).to(out[key].dtype)
        return out


def adapter_digest(base: str, settings: AdapterSettings, tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256, independent of the order of `tensors`."""
    h = hashlib.sha256(json.dumps([base, asdict(settings)], sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        h.update(x.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def save_adapter(adapter: CopeAdapter, folder: Path) -> None:
    """Write `cope.safetensors`, then `cope.json`, so that an interrupted write is refused on loading."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter.tensors.items()}
    save_file(tensors, folder / "cope.safetensors", metadata={"format": "pt"})
    (folder / "cope.safetensors").chmod(0o644)
    record = {"format": FORMAT, "base": adapter.base, "digest": adapter.digest, "settings": asdict(adapter.settings)}
    (folder / "cope.json").write_text(json.dumps(record | {"notes": adapter.notes}, indent=1) + "\n")


def load_adapter(folder: Path, model: Path | None = None) -> CopeAdapter:
    """Read an adapter and check its tensors; with `model`, also that it belongs to that checkpoint.

    Raises
    ------
    ModelError
        If files are missing or altered, or the adapter was trained on another base.
    """
    folder = Path(folder)
    if not (folder / "cope.json").is_file() or not (folder / "cope.safetensors").is_file():
        raise ModelError(f"no CoPE adapter in {folder}: cope.json and cope.safetensors are needed")
    try:
        raw = read_json(folder / "cope.json", ModelError)
        if raw["format"] != FORMAT:
            raise ModelError(f"{folder / 'cope.json'} is of format {raw['format']}; this version reads {FORMAT}")
        adapter = CopeAdapter(
            AdapterSettings(**raw["settings"]), raw["base"], load_file(folder / "cope.safetensors"), raw["notes"]
        )
        stated = raw["digest"]
    except (KeyError, TypeError, ValueError, AttributeError) as broken:
        raise ModelError(f"{folder / 'cope.json'} is not a CoPE adapter's description ({broken!r})") from None
    if adapter.digest != stated:
        raise ModelError(f"the adapter in {folder} is altered or incomplete: its tensors do not match cope.json")
    if model is not None:
        adapter.check_base(fingerprint(Path(model)), model)
    return adapter
