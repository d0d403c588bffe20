"""The engine of the scripts: one prompt at a time, with or without the connector, from command-line flags."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from cacheslide.core.tokenizing import encode, opening
from cacheslide.plain_values import at_least
from cacheslide.vllm.options import CPU_BLOCK, CPU_CACHE_GIB, FIELD, ServerOptions
from harness.backends.client import Request, Result
from harness.backends.vllm_client import VllmClient


class Engine:
    """A loaded model.

    Parameters
    ----------
    model : str
        Folder or name of a checkpoint.
    options : ServerOptions or None
        The connector's options; None runs vanilla vLLM.
    **engine
        Arguments of vLLM's `LLM`, and `cope` as in `open_engine`.
    """

    def __init__(self, model: str, options: ServerOptions | None, **engine: Any) -> None:
        if options is not None:
            options.system  # noqa: B018 (fails here, not minutes later)
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
        from vllm.platforms import current_platform

        from cacheslide.vllm.offline import open_engine

        engine = {name: value for name, value in engine.items() if value is not None}
        if current_platform.is_cpu():
            engine = {"block_size": CPU_BLOCK, "enforce_eager": True} | engine
            if "gpu_memory_utilization" not in engine:
                os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        self.options = options
        llm = open_engine(model, None if options is None else vars(options), **engine)
        self.tokenizer = llm.get_tokenizer()
        self.client = VllmClient(llm)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        return list(encode(self.tokenizer, text))

    def begin(self) -> list[int]:
        """The first ids of a prompt: BOS, if the tokenizer has one."""
        return list(opening(self.tokenizer))

    def ask(
        self,
        token_ids: Sequence[int],
        annotations: dict[str, Any] | None,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> Result:
        """Complete a prompt greedily. `annotations` is the object inside `cacheslide`; ignored without connector.

        The text is that of all generated ids including the last, as it enters the history. PromptError if vLLM refuses
        the prompt.
        """
        params = None if annotations is None or self.options is None else {FIELD: annotations}
        request = Request("", token_ids, max_new_tokens, params, stop_ids=frozenset(stop_ids), ignore_eos=False)
        [result] = self.client.run([request])
        self._settle()
        result.text = self.tokenizer.decode(result.checked().generated, skip_special_tokens=True)
        return result

    def _settle(self) -> None:
        """Step until waiting chunks are encoded: an engine in this process does not step by itself."""
        core = getattr(self.client.llm.llm_engine.engine_core, "engine_core", None)
        while core is not None and core.scheduler.has_requests():
            core.step_fn()

    def close(self) -> None:
        """Stop the engine."""
        self.client.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both scripts share."""
    parser.add_argument("--model", required=True, help="folder or name of a Llama, Mistral, Qwen2 or Qwen3 checkpoint")
    parser.add_argument("--split", help="split of the data set (default: its usual one)")
    parser.add_argument("--data", help="a file with the data set's rows, instead of the hub or datasets/local/")
    parser.add_argument("--max_examples", type=at_least(1), default=20)
    parser.add_argument("--max_new_tokens", type=at_least(1), default=64)
    parser.add_argument("--enable_cacheslide", action="store_true", help="without it: vLLM as it is, prefix cache on")
    parser.add_argument("--system", default="cacheslide", help="reuse system, a name from `cacheslide systems`")
    parser.add_argument("--cope", help="folder of a CoPE adapter; the model is its base")
    parser.add_argument("--chunk_size", type=at_least(1), default=1024)
    parser.add_argument(
        "--suffix_len", type=at_least(1), default=1, help="tokens at the end that are always recomputed"
    )
    parser.add_argument("--store", default="", help="JSON file: tiers below memory, where chunks outlive the engine")
    parser.add_argument("--tensor_parallel_size", type=at_least(1), default=1)
    parser.add_argument("--gpu_memory_utilization", type=float, help="default: vLLM's; on a CPU 2 GiB of KV cache")
    parser.add_argument("--max_model_len", type=at_least(1))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", help="JSON file for the results; without it they go to standard output")


def from_arguments(args: argparse.Namespace) -> Engine:
    """The engine for the shared flags."""
    options = None
    if args.enable_cacheslide:
        options = ServerOptions(
            policy=args.system, chunk_size=args.chunk_size, suffix_len=args.suffix_len, encode="now", store=args.store
        )
    return Engine(
        args.model,
        options,
        cope=args.cope,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
    )
