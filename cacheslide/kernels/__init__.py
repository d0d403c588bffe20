"""Kernels over a paged KV cache: Triton on CUDA, plain PyTorch elsewhere."""
