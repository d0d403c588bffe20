"""Integer tensors on the host, and their transfer to a device."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def tensor_of(numbers: Sequence[int] | Tensor) -> Tensor:
    """Integers as an int64 tensor; for a sequence numpy is ten times faster than `torch.tensor`."""
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, range):
        return torch.arange(numbers.start, numbers.stop, numbers.step)
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def rows_of(runs: Iterable[tuple[int, int]]) -> Tensor:
    """All numbers of the half-open runs, in order: int64, on the host."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(start, end) for start, end in runs)])


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; a copy from the host to a GPU does not wait for queued work."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def send_together(parts: Sequence[Tensor], device: torch.device | str) -> tuple[Tensor, ...]:
    """Tensors of one dimension and dtype, each on `device`, sent in one copy."""
    return send(torch.cat(list(parts)), device).split([len(part) for part in parts])
