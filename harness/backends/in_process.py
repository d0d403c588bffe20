"""An in-process vLLM engine driven request by request: token ids in, token ids, times and receipts out.

With the connector its prefix cache is off, so that a receipt counts every row that was reused; without it the engine
is vLLM as it comes, prefix cache on, and a request may decline to read it.
"""

import gc
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, PromptError
from cacheslide.units import GIB
from cacheslide.vllm.options import receipt_in


@dataclass(frozen=True)
class EngineOptions:
    """vLLM's own options, and where its chunks live; None leaves the choice to vLLM.

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


@dataclass(frozen=True)
class Ask:
    """One greedy request; `marks` is its `kv_transfer_params`. It ends before the first id in `stop`."""

    token_ids: Sequence[int]
    max_tokens: int = 1
    marks: Mapping[str, Any] | None = None
    stop: frozenset[int] = frozenset()
    read_prefix_cache: bool = True


@dataclass
class Answer:
    """What came back. `sent` and `times` (one a generated token, stop token included) are `time.perf_counter`."""

    sent: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefix_cached: int = 0
    receipt: dict[str, Any] | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent


def environment(device: str, eager: bool) -> dict[str, str]:
    """What vLLM should find in its environment; anything already set stays."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if device == "cpu":
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if eager:  # the CPU runner compiles in its warm-up all the same
            wanted["TORCH_COMPILE_DISABLE"] = "1"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def prepare(device: str, eager: bool) -> None:
    """Set up this process for an engine; call before anything of vLLM is imported."""
    os.environ.update(environment(device, eager))
    if device == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a second process would import everything again
        if eager and "torch._dynamo.config" in sys.modules:
            sys.modules["torch._dynamo.config"].disable = True


class InProcessEngine:
    """One vLLM engine; a context manager that frees it.

    Parameters
    ----------
    model : str or Path
        A checkpoint folder.
    dtype : str
    device : str
        "cpu" or "cuda": ConfigError unless the installed vLLM is built for it.
    options : EngineOptions
    connector : dict or None
        Options of the connector besides the store's (`ServerOptions`); None is vLLM by itself.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str,
        device: str,
        options: EngineOptions,
        connector: Mapping[str, Any] | None = None,
    ) -> None:
        prepare(device, options.enforce_eager)
        from vllm.platforms import current_platform

        from cacheslide.vllm.offline import open_engine

        if current_platform.is_cpu() is not (device == "cpu"):
            raise ConfigError(f"device {device}: the installed vLLM is built for {current_platform.device_type}")
        store = {"store_gib": options.store_gib, "store_device": options.store_device}
        try:
            self.llm = open_engine(
                str(model),
                None if connector is None else store | dict(connector),
                dtype=dtype,
                skip_tokenizer_init=True,
                enable_prefix_caching=connector is None,
                **options.arguments(),
            )
        except ValueError as refused:
            raise ConfigError(f"vLLM does not start with these options: {refused}") from None
        self._sent = 0

    def __enter__(self) -> "InProcessEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, asks: Sequence[Ask], clients: int | None = None) -> list[Answer]:
        """Answers in the order of `asks`, with at most `clients` of them in flight: the next starts as one ends.

        PromptError when vLLM refuses one; the others are aborted then.
        """
        engine, waiting = self.llm.llm_engine, deque(enumerate(asks))
        answers: list[Answer | None] = [None] * len(asks)
        running: dict[str, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (clients or len(asks)):
                    at, ask = waiting.popleft()
                    name = f"{self._sent}"
                    self._sent += 1
                    answers[at] = Answer(time.perf_counter())
                    running[name] = at
                    self._add(name, ask)
                for output in engine.step():
                    at = running[output.request_id]
                    self._note(answers[at], output, asks[at])
                    if output.finished:
                        del running[output.request_id]
        except BaseException:
            engine.abort_request(list(running))
            raise
        return answers

    def _add(self, name: str, ask: Ask) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        params = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            stop_token_ids=sorted(ask.stop),
            detokenize=False,
            skip_reading_prefix_cache=not ask.read_prefix_cache,
            extra_args=None if ask.marks is None else {"kv_transfer_params": dict(ask.marks)},
        )
        try:
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(ask.token_ids)}, params)
        except (VLLMValidationError, ValueError) as refused:
            raise PromptError(f"vLLM refuses the request: {refused}") from None

    def _note(self, answer: Answer, output: Any, ask: Ask) -> None:
        done = output.outputs[0]
        answer.times += [time.perf_counter()] * (len(done.token_ids) - len(answer.times))
        if not output.finished:
            return
        if done.finish_reason not in ("stop", "length"):
            raise PromptError(f"vLLM ended a request with {done.finish_reason!r}")
        answer.token_ids = list(done.token_ids)
        if answer.token_ids and answer.token_ids[-1] in ask.stop:
            answer.token_ids.pop()
        answer.prefix_cached = output.num_cached_tokens or 0
        answer.receipt = receipt_in(output.kv_transfer_params)

    def reset(self) -> None:
        """Forget all cached KV: shared blocks and chunks."""
        if not self.llm.reset_prefix_cache(reset_connector=True):
            raise ConfigError("vLLM did not reset its caches: requests are still running")

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if self.llm is None:
            return
        from cacheslide.vllm.offline import close_engine

        close_engine(self.llm)
        self.llm = None
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
