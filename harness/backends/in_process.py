"""Opens a vLLM engine in this process for measurements, with the connector or without.

With the connector the prefix cache is off, so that receipts count every reused row. Without it the engine is vanilla
vLLM with prefix cache, which single requests may skip.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.units import GIB
from harness.backends.vllm_client import VllmClient


@dataclass(frozen=True)
class EngineOptions:
    """vLLM's options, and the chunk store's; None keeps vLLM's default.

    `kv_cache_gib` is the size of the paged KV cache, `store_gib` that of the chunk store (see `ServerOptions`).
    """

    block_size: int = 32
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    load_format: str = "auto"
    store_gib: float = 4.0
    store_device: str = "cpu"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `vllm.LLM`."""
        out = {
            name: getattr(self, name)
            for name in (
                "block_size",
                "gpu_memory_utilization",
                "max_model_len",
                "max_num_batched_tokens",
                "tensor_parallel_size",
                "enforce_eager",
                "load_format",
            )
        }
        if self.kv_cache_gib is not None:
            out["kv_cache_memory_bytes"] = int(self.kv_cache_gib * GIB)
        return {name: value for name, value in out.items() if value is not None}


def environment(device: str, eager: bool) -> dict[str, str]:
    """Environment variables for vLLM; existing ones are kept."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if device == "cpu":
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if eager:  # the CPU runner compiles in its warm-up anyway
            wanted["TORCH_COMPILE_DISABLE"] = "1"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def prepare(device: str, eager: bool) -> None:
    """Set up this process for an engine; call before importing anything of vLLM."""
    os.environ.update(environment(device, eager))
    if device == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process would import everything again
        if eager and "torch._dynamo.config" in sys.modules:
            sys.modules["torch._dynamo.config"].disable = True


class InProcessEngine(VllmClient):
    """A `VllmClient` that opens its vLLM engine.

    Parameters
    ----------
    model : str or Path
        A checkpoint folder.
    dtype : str
    device : str
        "cpu" or "cuda": ConfigError unless the installed vLLM is built for it.
    options : EngineOptions
    connector : dict or None
        Options of the connector besides the store's (`ServerOptions`); None is vanilla vLLM.
    texts : bool
        Load the checkpoint's tokenizer. Without it prompts, stops and answers are token ids.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str,
        device: str,
        options: EngineOptions,
        connector: Mapping[str, Any] | None = None,
        texts: bool = False,
    ) -> None:
        prepare(device, options.enforce_eager)
        from vllm.platforms import current_platform

        from cacheslide.vllm.offline import open_engine

        if current_platform.is_cpu() is not (device == "cpu"):
            raise ConfigError(f"device {device}: the installed vLLM is built for {current_platform.device_type}")
        store = {"store_gib": options.store_gib, "store_device": options.store_device}
        try:
            llm = open_engine(
                str(model),
                None if connector is None else store | dict(connector),
                dtype=dtype,
                skip_tokenizer_init=not texts,
                enable_prefix_caching=connector is None,
                **options.arguments(),
            )
        except ValueError as refused:
            raise ConfigError(f"vLLM does not start with these options: {refused}") from None
        super().__init__(llm, llm.get_tokenizer() if texts else None)
