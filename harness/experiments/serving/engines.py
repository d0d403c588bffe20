"""Common parts of experiments on one vLLM engine: its shape, options and settings, and the file of records."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cacheslide.plain_values import json_object
from harness.results.provenance import provenance

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 32000, "rope_theta": 1e6, "sliding_window": None,
    },
    "llama-70b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 32000, "rope_theta": 5e5,
    },
}  # fmt: skip
COMMON = {"hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
COMMON |= {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
Record = dict[str, Any]


def shaped(name: str, folder: Path) -> Path:
    """A folder with the configuration of a shape and no weights: vLLM fills in random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | COMMON))
    return folder


def add_engine_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options that select the engine and the output file."""
    p.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b", help="dummy weights of this shape")
    p.add_argument("--model", help="a checkpoint instead of a shape")
    p.add_argument("--vocabulary", type=int, default=31000, help="ids are drawn below this")
    p.add_argument("--store-gib", type=float, default=8.0)
    p.add_argument("--connector", type=json_object, default={}, help="more options of the connector, as JSON")
    p.add_argument("--tensor-parallel", type=int, default=1)
    p.add_argument("--batched-tokens", type=int, default=16384)
    p.add_argument("--memory", type=float, default=0.4, help="gpu_memory_utilization of each engine")
    p.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    p.add_argument("--engine", type=json_object, default={}, help="more options of vllm.LLM, as JSON")
    p.add_argument("--commit", help="git commit of these sources, where the folder is a copy of a checkout")


def model_of(args: argparse.Namespace) -> str:
    """The requested checkpoint, or a folder with the shape."""
    return args.model or str(shaped(args.shape, Path(tempfile.mkdtemp()) / args.shape))


def engine_options(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """`vllm.LLM`'s options for prompts of at most `tokens` tokens."""
    options = {
        "tensor_parallel_size": args.tensor_parallel,
        "max_model_len": tokens + 64,
        "gpu_memory_utilization": args.memory,
        "skip_tokenizer_init": True,
        "enforce_eager": args.eager,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": args.batched_tokens,
    } | ({"load_format": "dummy"} if not args.model else {})
    return options | args.engine


def connector_options(args: argparse.Namespace, store: str, tokens: int) -> dict[str, Any]:
    """The connector's options for chunks of at most `tokens` tokens, held at `store`."""
    return {"store_device": store, "store_gib": args.store_gib, "chunk_size": tokens} | args.connector


def described(engine) -> Record:
    """The engine's settings that affect its times."""
    config = engine.llm_engine.vllm_config
    return {
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "compilation_mode": str(config.compilation_config.mode),
        "v2_model_runner": bool(config.use_v2_model_runner),
        "block_size": config.cache_config.block_size,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "dtype": str(config.model_config.dtype),
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
    }


@contextmanager
def recording(args: argparse.Namespace, summary: Callable[[Record], str]) -> Iterator[Callable[[Record], None]]:
    """A function that appends a record to --out and shows its `summary`; a first and a last record frame the run."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(summary(record), file=sys.stderr, flush=True)

        settings = {k: v for k, v in vars(args).items() if k not in ("out", "commit")}
        made = provenance(settings, {}, args.model or f"{args.shape}, random weights")
        if args.commit:
            made |= {"git_commit": args.commit, "git_dirty": None}
        write({"kind": "start", "settings": settings, "provenance": made})
        yield write
        write({"kind": "end"})
