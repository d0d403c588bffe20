"""An untrained model with the task's tokenizer and a CoPE adapter of it, for tests of what runs on both."""

from pathlib import Path

import torch

from cacheslide.models.weights import fingerprint
from cacheslide.training.adapter import AdapterSettings, CopeAdapter, save_adapter
from harness.training.model import llama
from harness.training.tokenizer import build_tokenizer, save_tokenizer


def make_pair(base: Path, adapter: Path, layers: int, heads: int, p_max: int = 16) -> tuple[Path, Path]:
    """Write the model to `base` and an adapter without LoRA, position tables alone, to `adapter`."""
    torch.manual_seed(3)
    dim = 16
    llama(1280, 1, 2, 0, layers=layers, hidden=heads * dim, heads=heads, ff=24 * heads).save_pretrained(base)
    save_tokenizer(build_tokenizer(), base)
    tensors = {f"layers.{i}.positions": torch.randn(p_max, dim) * 0.3 for i in range(layers)}
    save_adapter(CopeAdapter(AdapterSettings(1, 1.0, p_max, ()), fingerprint(base), tensors), adapter)
    return base, adapter
