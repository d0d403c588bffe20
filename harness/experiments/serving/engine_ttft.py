"""TTFT in a vLLM engine by system, length, batch, recompute ratio: `python -m harness.experiments.serving.engine_ttft`.

Prompts are random ids: 5 % updated text, eight fixed chunks of together 90 %, 5 % updated text. The updated text
differs from request to request in content and length, so that every chunk slides and no prefix is shared. Systems
take turns; an annotated request whose receipt misses a chunk stops its cell: nothing is timed that did not happen.
One JSON line a cell goes to --out as soon as it is measured; `harness.results.serving` makes the tables.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheslide.plain_values import json_object
from harness.experiments.serving.arms import Arm, add_arguments, arms
from harness.quiet import Watch
from harness.results.provenance import provenance
from harness.step import command

CHUNKS, REUSED = 8, 0.9
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


def shaped(name: str, folder: Path) -> Path:
    """A folder with the configuration of a shape and no weights: vLLM fills in random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | COMMON))
    return folder


class Prompts:
    """Prompts of `tokens` ids around the same eight chunks."""

    def __init__(self, tokens: int, vocabulary: int, seed: int = 0) -> None:
        self.tokens, self.vocabulary, self.random = tokens, vocabulary, random.Random(seed)
        self.chunks = [self._ids(int(tokens * REUSED / CHUNKS)) for _ in range(CHUNKS)]

    def _ids(self, count: int) -> list[int]:
        return [self.random.randrange(10, self.vocabulary) for _ in range(count)]

    def turn(self) -> tuple[list[int], list[list[int]]]:
        """A prompt and its fixed spans; the updated text in front is 4 to 6 % of it."""
        ids, spans = self._ids(int(self.tokens * self.random.uniform(0.04, 0.06))), []
        for chunk in self.chunks:
            spans.append([len(ids), len(ids) + len(chunk)])
            ids = ids + chunk
        return ids + self._ids(self.tokens - len(ids)), spans

    def shared_prefix(self) -> list[int]:
        """A prompt that begins with the eight chunks: what a prefix cache is good at."""
        ids = [t for chunk in self.chunks for t in chunk]
        return ids + self._ids(self.tokens - len(ids))


def once(engine, prompts: Prompts, system: str, batch: int, tokens: int = 1) -> dict[str, Any]:
    """One batch under one system: TTFT in seconds of each request, and what the receipts say.

    Under tensor parallelism ask for two `tokens`: the receipt of a request that ends with its first is a forecast.
    """
    from cacheslide.vllm.offline import ask, replays

    if system == "prefix_cache_ideal":
        ask(engine, [prompts.shared_prefix()])  # other systems' prompts may have pushed it out
        answers = ask(engine, [prompts.shared_prefix() for _ in range(batch)], tokens=tokens)
        if min(a.cached_tokens for a in answers) < 0.8 * REUSED * prompts.tokens:
            raise RuntimeError("the prefix cache did not hold the shared prefix")
        return {"ttft": [a.ttft for a in answers]}
    turns = [prompts.turn() for _ in range(batch)]
    if system == "recompute":
        answers = ask(engine, [ids for ids, _ in turns], tokens=tokens)
        if max(a.cached_tokens for a in answers) > 64:
            raise RuntimeError("a recomputed prompt was found in the prefix cache")
        return {"ttft": [a.ttft for a in answers]}
    arm = Arm.parse(system)
    asked = {"policy": arm.system, "recompute_ratio": arm.ratio, "encode": "off"}
    annotations = [{"cacheslide": asked | {"segments": spans}} for _, spans in turns]
    before = replays(engine, arm.graphs)
    answers = ask(engine, [ids for ids, _ in turns], annotations, tokens=tokens)
    for a in answers:
        if not a.receipt["measured"] or a.receipt["chunks_hit"] != a.receipt["chunks"] or a.receipt["fallback"]:
            raise RuntimeError(f"reuse did not happen: {a.receipt}")
    return {
        "ttft": [a.ttft for a in answers],
        "compute_fraction": [a.receipt["compute_fraction"] for a in answers],
        "tokens_reused": [a.receipt["tokens_reused"] for a in answers],
        "tokens_recomputed": [a.receipt["tokens_recomputed"] for a in answers],
        "bytes_loaded": [a.receipt["bytes_loaded"] for a in answers],
        "runs_replayed": replays(engine, arm.graphs) - before,
    }


def fill(engine, prompts: Prompts, systems: Sequence[str] = ("cacheslide",)) -> None:
    """Have the eight chunks encoded as each of `systems` wants them, and the prefix cache hold them."""
    from cacheslide.vllm.offline import ask

    for system in systems:
        ids, spans = prompts.turn()
        ask(engine, [ids], [{"cacheslide": {"segments": spans, "policy": system, "encode": "now"}}], tokens=2)
    ask(engine, [prompts.shared_prefix()])


def cells(engine, args: argparse.Namespace, write) -> None:
    """Every batch, store and length; the systems of a cell take turns.

    What does not read the store is measured once, beside the first store.
    """
    from cacheslide.vllm.offline import move_store

    plain = ["recompute", "prefix_cache_ideal"]
    drawn = {length: Prompts(length, args.vocabulary, seed=length) for length in args.lengths}
    for prompts in drawn.values():
        fill(engine, prompts, args.systems)
    for batch in args.batches:
        for store in args.stores:
            move_store(engine, store)
            systems = [*(plain if store == args.stores[0] else []), *arms(args)]
            for length, prompts in drawn.items():
                for system, (runs, failed) in _cell(engine, prompts, systems, batch, args).items():
                    write({"kind": "cell", "store": store, "tokens": length, "batch": batch, "system": system,
                           "runs": runs, "failed": failed})  # fmt: skip


def _cell(engine, prompts: Prompts, systems: list[str], batch: int, args: argparse.Namespace) -> dict[str, tuple]:
    """Runs of every system, each with its turn's reading of `harness.quiet`, and why one failed."""
    repeats = args.repeats if batch == 1 else max(2, args.repeats // 2)
    warmups = args.warmups if batch * prompts.tokens <= args.warm_tokens else 0  # long cells warm up in shorter ones
    found: dict[str, list] = {s: [] for s in systems}
    failed: dict[str, str] = {}
    watch = None
    for turn in range(warmups + repeats):
        said_now = []
        if turn == warmups:
            watch = Watch()
        for system in systems:
            if system in failed:
                continue
            try:
                said = once(engine, prompts, system, batch, args.answer_tokens)
            except RuntimeError as wrong:
                failed[system] = str(wrong)
                continue
            said_now.append(said)
            if turn >= warmups:
                found[system].append(said)
        if watch is not None:
            reading = watch.lap()
            for said in said_now:
                said["quiet"] = reading
    return {s: (found[s], failed.get(s)) for s in systems}


def overhead(vanilla, plugged, args: argparse.Namespace, write) -> None:
    """Plain requests on an engine without and one with the connector, in turns: TTFT, and time of a decode batch."""
    from cacheslide.vllm.offline import ask

    prompts = Prompts(args.plain_tokens, args.vocabulary, seed=7)
    engines = {"vanilla": vanilla, "plugin": plugged}
    runs: dict[str, dict[str, list[float]]] = {name: {"ttft": [], "decode": []} for name in engines}
    quiet, watch = [], None
    for turn in range(args.warmups + args.plain_repeats):
        ids = prompts.turn()[0]
        short = [prompts.turn()[0][: args.plain_tokens // 16] for _ in range(16)]
        if turn == args.warmups:
            watch = Watch()
        # Whoever goes first in a turn may find a cooler or a slower device: take turns at that as well.
        for name in sorted(engines, reverse=bool(turn % 2)):
            engine = engines[name]
            ttft = ask(engine, [ids])[0].ttft
            started = _now()
            ask(engine, short, tokens=args.plain_decode)
            if turn >= args.warmups:
                runs[name]["ttft"].append(ttft)
                runs[name]["decode"].append(_now() - started)
        if watch is not None:
            quiet.append(watch.lap())
    about = {"kind": "overhead", "tokens": args.plain_tokens, "decode_tokens": args.plain_decode}
    write(about | {"runs": runs, "quiet": quiet})


def _now() -> float:
    import time

    return time.perf_counter()


def measure(args: argparse.Namespace, write) -> None:
    """Open the engines one after the other and measure. What fails is written down, and the rest goes on."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `move_store`, between own processes
    from cacheslide.vllm.offline import close_engine, open_engine

    model = args.model or str(shaped(args.shape, Path(tempfile.mkdtemp()) / args.shape))
    options = {
        "tensor_parallel_size": args.tensor_parallel,
        "max_model_len": max(args.lengths) + 64,
        "gpu_memory_utilization": args.memory,
        "skip_tokenizer_init": True,
        "enforce_eager": args.eager,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": args.batched_tokens,
    } | ({"load_format": "dummy"} if not args.model else {})
    options |= args.engine
    opened = []
    try:
        connector = {"store_device": args.stores[0], "store_gib": args.store_gib, "chunk_size": max(args.lengths)}
        plugged = open_engine(model, connector, **options)
        opened.append(plugged)
        write({"kind": "engine"} | described(plugged))
        if args.vanilla:
            opened.append(open_engine(model, None, **options))
            overhead(opened[1], plugged, args, write)
            close_engine(opened.pop())
        cells(plugged, args, write)
    except Exception:  # what was measured before stays
        write({"kind": "error", "error": traceback.format_exc()[-4000:]})
    finally:
        for engine in opened:
            close_engine(engine)


def described(engine) -> dict[str, Any]:
    """How the engine runs: the settings that its times depend on."""
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b", help="dummy weights of this shape")
    p.add_argument("--model", help="a checkpoint instead of a shape")
    p.add_argument("--vocabulary", type=int, default=31000, help="ids are drawn below this")
    p.add_argument("--lengths", type=_ints, default=[4096, 8192, 16384, 32768])
    p.add_argument("--batches", type=_ints, default=[1, 8])
    add_arguments(p, [0.05, 0.10, 0.26, 1.0])
    p.add_argument("--stores", type=lambda x: x.split(","), default=["model", "cpu"])
    p.add_argument("--store-gib", type=float, default=8.0)
    p.add_argument("--repeats", type=int, default=6, help="of a cell with one request; half of it with several")
    p.add_argument("--warmups", type=int, default=1)
    p.add_argument("--warm-tokens", type=int, default=150_000, help="no warm-ups in cells of more prompt tokens")
    p.add_argument("--answer-tokens", type=int, default=1, help="2 under tensor parallelism")
    p.add_argument("--vanilla", "--stock", action="store_true", help="time plain requests without the connector too")
    p.add_argument("--plain-tokens", type=int, default=8192)
    p.add_argument("--plain-decode", type=int, default=64)
    p.add_argument("--plain-repeats", type=int, default=10)
    p.add_argument("--tensor-parallel", type=int, default=1)
    p.add_argument("--batched-tokens", type=int, default=16384)
    p.add_argument("--memory", type=float, default=0.4, help="gpu_memory_utilization of each engine")
    p.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    p.add_argument("--engine", type=json_object, default={}, help="more options of vllm.LLM, as JSON")
    p.add_argument("--commit", help="git commit of these sources, where the folder is a copy of a checkout")
    return p


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and append to the file."""
    args = parser().parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(summary(record), file=sys.stderr, flush=True)

        settings = {k: v for k, v in vars(args).items() if k not in ("out", "commit")}
        made = provenance(settings, {}, args.model or f"{args.shape}, random weights")
        if args.commit:
            made |= {"git_commit": args.commit, "git_dirty": None}
        write({"kind": "start", "settings": settings, "provenance": made})
        measure(args, write)
        write({"kind": "end"})


def summary(record: dict[str, Any]) -> str:
    """A line for whoever watches."""
    if record["kind"] != "cell" or record["failed"] or not record["runs"]:
        return json.dumps(record)[:1500]
    last = sorted(max(r["ttft"]) for r in record["runs"])
    fraction = record["runs"][0].get("compute_fraction", [1.0])[0]
    where = f"{record['store']} {record['tokens']} x{record['batch']} {record['system']}"
    return f"{where}: {1e3 * last[len(last) // 2]:.1f} ms, compute fraction {fraction:.3f}"


if __name__ == "__main__":
    command(main)
