"""The benchmark of CoPE's kernels: its headline, and a machine without a GPU."""

import json

import pytest
import torch

from harness.experiments.kernels import cope as cope_kernels


def test_the_headline_takes_the_slower_case_and_says_nothing_where_one_is_missing():
    ratios = {"16384_mean_0.5": 1.2, "16384_mean_0.01": 2.0, "16384_never": 3.0}
    prefill = {name: {"ratio_to_sdpa": x} for name, x in ratios.items()}
    decode = {
        f"8x16384_{g}": {"ratio_to_row_attention": x} for g, x in zip(cope_kernels.SHIFTS, (1.1, 1.0, 1.3), strict=True)
    }
    found = cope_kernels.headline({"prefill": prefill, "decode": decode})
    assert list(found.values()) == [1.2, 3.0, 1.3]
    del prefill["16384_never"]["ratio_to_sdpa"], decode["8x16384_never"]
    assert list(cope_kernels.headline({"prefill": prefill, "decode": decode}).values()) == [1.2, None, None]


def test_a_machine_without_a_gpu_records_errors_and_goes_on(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    cope_kernels.run_part("prefill", tmp_path / "p.json", 1)
    done = json.loads((tmp_path / "p.json").read_text())
    assert len(done) == 9 and all("error" in case for case in done.values())
