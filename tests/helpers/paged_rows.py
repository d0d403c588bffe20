"""Inputs of kernels: paged caches, scattered rows; and a run under Triton's interpreter."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.places import ROOT


def paged(lengths: list[int], kv_heads: int, dim: int, block: int, seed: int, dtype=torch.float32, device="cpu"):
    """A poisoned cache with shuffled blocks, its table, and every request's keys and values [rows, kv_heads, dim].

    Blocks and rows that no request owns hold NaN, and so do the table's spare blocks: reading one shows.
    """
    g = torch.Generator().manual_seed(seed)
    width = max(-(-n // block) for n in lengths) + 2
    order = torch.randperm(len(lengths) * width + 3, generator=g)
    kv = torch.full((len(order), kv_heads, block, 2 * dim), float("nan"))
    table = order[: len(lengths) * width].reshape(len(lengths), width).int()
    dense = []
    for blocks, n in zip(table, lengths, strict=True):
        both = torch.randn(n, kv_heads, 2 * dim, generator=g)
        at = torch.arange(n)
        kv[blocks[at // block].long(), :, at % block] = both
        dense.append(tuple(x.to(device, dtype) for x in both.chunk(2, dim=-1)))
    return kv.to(device, dtype), table.to(device), dense


def scattered(lengths: list[int], shares: list[float], seed: int, device="cpu"):
    """Ascending rows of each request, its last row among them, and their bounds."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for n, share in zip(lengths, shares, strict=True):
        count = round(share * n)
        chosen = torch.randperm(n - 1, generator=g)[: max(count - 1, 0)] if count else torch.empty(0, dtype=torch.long)
        rows.append(torch.cat([chosen, torch.tensor([n - 1] if count else [], dtype=torch.long)]).sort().values)
    bounds = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    return torch.cat(rows).int().to(device), bounds.int().to(device)


def other_layout(kv: torch.Tensor) -> torch.Tensor:
    """The same cache in another memory order: heads outside the slots of a block become heads inside, or back."""
    return kv.transpose(1, 2).contiguous().transpose(1, 2)


def passes_interpreted(tests: str, least: int) -> None:
    """Triton decides at import whether it interprets, so the file `tests` needs a process of its own."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-1000:]  # skipping everything would be no test
