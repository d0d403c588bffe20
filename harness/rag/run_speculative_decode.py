"""Speculative decoding of every sample: `python -m harness.rag.run_speculative_decode --retrieval-json FILE`.

With --load-cache-dir KV is read from the folders that `build_kv_cache --save-cache-dir` wrote. Writes
DIR/decoding/speculative_trace.json: promotions, hits, wasted promotions, tokens, latency and answers.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from cacheslide.errors import StoreError
from cacheslide.plain_values import at_least
from harness.rag.kv_cache_manager import KVCacheManager, Place
from harness.rag.options import add_model_options, add_retrieval_options, model_settings, open_manager
from harness.rag.per_sample import Record, measured
from harness.rag.prompts import SamplePrompts
from harness.rag.retrieval import Indices, Retrieved, read_retrieval
from harness.rag.retrievers.base import Retriever
from harness.rag.retrievers.registry import open_retriever
from harness.rag.speculative_decode import DecodeSettings, decode_sample
from harness.scoring import score
from harness.step import command
from harness.tasks.passages import PassageRow

SCHEMA = "cacheslide.rag.speculative/1"
COUNTS = ("promotions", "hits", "misses", "resident", "wasted_promotions", "retrievals", "tokens")
SECONDS = ("ttft_s", "total_s", "promotion_s", "demand_s", "encode_s", "load_s")


def trace_path(results: Path) -> Path:
    """Where the trace is written."""
    return results / "decoding" / "speculative_trace.json"


def decode(
    manager: KVCacheManager,
    retrieved: Retrieved,
    retriever: Retriever,
    decoding: DecodeSettings,
    out: Path,
    settings: dict[str, Any],
    rest: Place = "placeholder",
    folders: Path | None = None,
) -> dict[str, Any]:
    """Decode every sample; writes the trace to `out` and returns it."""
    samples = retrieved.samples
    settings = settings | {
        "schema": SCHEMA,
        "data": samples.about(),
        "retriever": retriever.about,
        "decoding": asdict(decoding),
        "rest": rest,
        "samples": len(samples.rows),
        "load_cache_dir": None if folders is None else str(folders),
    }
    indices = Indices(retriever)

    def work(row: PassageRow) -> Record:
        prompts, ranked = SamplePrompts(manager.backend, row, samples.metric), retrieved.ranked[row.id]
        decoder, figures = decode_sample(manager, prompts, row, indices.of(row), ranked, decoding, rest, folders)
        answer = manager.backend.decode(decoder.ids)
        return {"sha256": row.sha256, "answer": answer, "scores": score(answer, row.answers), **figures}

    return measured(out, settings, samples, work, "speculative decoding", lambda own: summary(own, samples.metric))


def summary(records: Sequence[Record], metric: str) -> dict[str, Any]:
    """Sums of counts, means of seconds and of the score.

    hit_rate is hits over hits and misses: the share of demands for chunks off the prompt that a promotion served.
    """
    sums = {name: sum(r[name] for r in records) for name in COUNTS}
    demanded = sums["hits"] + sums["misses"]
    return {
        "samples": len(records),
        **sums,
        "hit_rate": sums["hits"] / demanded if demanded else None,
        "metric": metric,
        "score": fmean(r["scores"][metric] for r in records),
        "compute_fraction": fmean(r["prefills"][0]["compute_fraction"] for r in records),
        **{name: fmean(r[name] for r in records) for name in SECONDS},
        "loaded": sum(r["loaded"] for r in records),
        "unusable": sum(len(r["unusable"]) for r in records),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The step's own options; the pipeline has them too."""
    plain = DecodeSettings(k=1)
    parser.add_argument("--max-new-tokens", type=at_least(1), default=plain.max_new_tokens)
    parser.add_argument("--stride", type=at_least(1), default=plain.stride, help="tokens between two retrievals")
    parser.add_argument("--ahead", type=at_least(0), default=plain.ahead, help="tokens before a stride's forecast")
    parser.add_argument(
        "--promotions", type=at_least(0), default=plain.promotions, help="chunks promoted a forecast (0: none)"
    )


def run(args: argparse.Namespace) -> Path:
    """The step; returns the trace's path."""
    if args.load_cache_dir is not None and not args.load_cache_dir.is_dir():
        raise StoreError(f"{args.load_cache_dir}: no folder (build_kv_cache --save-cache-dir makes one)")
    retrieved = read_retrieval(args.retrieval_json, args.data, args.samples)
    retriever = open_retriever(retrieved.retriever, args.retriever_model)
    decoding = DecodeSettings(args.k or retrieved.k, args.max_new_tokens, args.stride, args.ahead, args.promotions)
    manager, out = open_manager(args), trace_path(args.results)
    settings, rest = model_settings(args, manager), "cpu" if args.encode_rest else "placeholder"
    made = decode(manager, retrieved, retriever, decoding, out, settings, rest, args.load_cache_dir)["summary"]
    rate = "no demand" if made["hit_rate"] is None else f"hit rate {made['hit_rate']:.2f}"
    print(
        f"{made['samples']} samples; {made['tokens']} tokens, {made['retrievals']} retrievals; {made['promotions']} "
        f"promotions, {made['hits']} hits, {made['misses']} misses, {made['wasted_promotions']} wasted ({rate}); "
        f"{made['metric']} {made['score']:.3f}; TTFT {made['ttft_s']:.3f} s, in all {made['total_s']:.3f} s a sample"
    )
    print(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_retrieval_options(parser)
    parser.add_argument("--retriever-model", type=Path, help="folder of a dense retriever's weights")
    parser.add_argument("--k", type=at_least(1), help="passages in the prompt (default: the retrieval's k)")
    add_model_options(parser)
    parser.add_argument("--load-cache-dir", type=Path, help="folder of saved chunks (default: KV is computed)")
    parser.add_argument("--encode-rest", action="store_true", help="stage the other passages' KV on the CPU first")
    add_options(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
