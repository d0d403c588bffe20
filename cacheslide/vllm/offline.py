"""vLLM's offline engine with or without the connector, asked one prompt at a time: what the scripts run on."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.params import FIELD, ServerOptions

_CPU_BLOCK = 32  # vLLM's CPU attention wants blocks of a multiple of this


@dataclass(frozen=True)
class Answer:
    """What one request gave; `ttft` in seconds by the engine's clock, `seconds` by the caller's."""

    text: str
    token_ids: list[int]
    ttft: float
    seconds: float
    receipt: dict[str, Any] | None


class OfflineEngine:
    """A loaded model.

    Parameters
    ----------
    model : str
        Folder or name of a checkpoint.
    options : ServerOptions or None
        The connector's options; None runs vLLM without it.
    **engine
        What vLLM's `LLM` takes.
    """

    def __init__(self, model: str, options: ServerOptions | None, **engine: Any) -> None:
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            engine = {"block_size": _CPU_BLOCK, "enforce_eager": True} | engine
        if options is not None:
            options.system  # noqa: B018 (an unknown system stops here, not after minutes of loading)
            transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": vars(options)}
            engine |= {"kv_transfer_config": transfer}
        self.options = options
        self.llm = LLM(model, disable_log_stats=False, **engine)  # the statistics hold the time to first token
        self.tokenizer = self.llm.get_tokenizer()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def begin(self) -> list[int]:
        """What a prompt begins with: BOS, where the tokenizer has one."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def ask(
        self, token_ids: Sequence[int], marks: dict[str, Any] | None, max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> Answer:
        """Complete a prompt greedily. `marks` is the object inside `cacheslide`; dropped without connector."""
        from vllm import SamplingParams

        extra = None if marks is None or self.options is None else {"kv_transfer_params": {FIELD: marks}}
        settings = SamplingParams(
            max_tokens=max_new_tokens, temperature=0, stop_token_ids=list(stop_ids), extra_args=extra
        )
        began = time.perf_counter()
        [output] = self.llm.generate([{"prompt_token_ids": list(token_ids)}], settings, use_tqdm=False)
        seconds = time.perf_counter() - began
        first = output.outputs[0]
        receipt = (output.kv_transfer_params or {}).get(FIELD)
        return Answer(first.text, list(first.token_ids), output.metrics.first_token_latency, seconds, receipt)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.llm_engine.engine_core.shutdown()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both scripts share."""
    parser.add_argument("--model", required=True, help="folder or name of a Llama, Mistral, Qwen2 or Qwen3 checkpoint")
    parser.add_argument("--split", help="split of the data set (default: its usual one)")
    parser.add_argument("--data", help="a file with the data set's rows, instead of the hub or datasets/local/")
    parser.add_argument("--max_examples", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--enable_cacheslide", action="store_true", help="without it: vLLM as it is, prefix cache on")
    parser.add_argument("--system", default="cacheslide", help="reuse system, a name from `cacheslide systems`")
    parser.add_argument("--chunk_size", type=int, default=1024)
    parser.add_argument("--suffix_len", type=int, default=1, help="tokens at the end that are always recomputed")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9)
    parser.add_argument("--max_model_len", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", help="JSON file for the results; without it they go to standard output")


def from_arguments(args: argparse.Namespace) -> OfflineEngine:
    """The engine that the shared flags describe."""
    options = None
    if args.enable_cacheslide:
        options = ServerOptions(
            policy=args.system, chunk_size=args.chunk_size, suffix_len=args.suffix_len, encode="now"
        )
    return OfflineEngine(
        args.model,
        options,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
    )
