"""vLLM's fused operators, also when its compiler has disabled them.

Under `torch.compile` vLLM disables its norm, rotation and activation kernels, since the compiler fuses the plain
operations. Layers called one by one are not compiled and need the kernels: a plain norm is six launches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from vllm import ir
from vllm.platforms import current_platform


def operators(device: torch.device) -> Callable[[torch.nn.Module], Callable]:
    """Returns a function from a vLLM custom op to its forward on `device`: its CUDA kernel, or the module's own."""
    if torch.device(device).type == "cuda":
        return lambda module: getattr(module, "forward_cuda", module)
    return lambda module: module


def fused_norms(device: torch.device) -> AbstractContextManager:
    """Context in which RMS norms (with and without a residual) run vLLM's CUDA kernels."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    current_platform.import_ir_kernels()
    stack = ExitStack()
    stack.enter_context(ir.enable_torch_wrap(False))  # directly to the kernel
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        stack.enter_context(op.set_priority(["vllm_c", "native"]))
    return stack
