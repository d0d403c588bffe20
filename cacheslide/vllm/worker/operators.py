"""vLLM's fused operators, also where its compiler has taken them over.

Under `torch.compile` vLLM switches its own norm, rotation and activation kernels off, since the compiler fuses the
plain operations. Layers called one by one are not compiled: there the kernels are needed, or a norm is six launches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from vllm import ir
from vllm.platforms import current_platform


def operators(device: torch.device) -> Callable[[torch.nn.Module], Callable]:
    """Gives a vLLM custom op's forward on `device`: its CUDA kernel, or whatever the module itself would call."""
    if torch.device(device).type == "cuda":
        return lambda module: getattr(module, "forward_cuda", module)
    return lambda module: module


def fused_norms(device: torch.device) -> AbstractContextManager:
    """Within it, RMS norms (with and without a residual) run vLLM's CUDA kernels."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    current_platform.import_ir_kernels()
    stack = ExitStack()
    stack.enter_context(ir.enable_torch_wrap(False))  # straight to the kernel
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        stack.enter_context(op.set_priority(["vllm_c", "native"]))
    return stack
