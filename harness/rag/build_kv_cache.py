"""KV caches of the retrieved passages: `python -m harness.rag.build_kv_cache --retrieval-json FILE --results DIR`.

The first k passages of a sample are encoded on the device; the rest are placeholders on the CPU, or with --encode-rest
staged there with their KV. Writes DIR/kv_caches/<dataset>_kv_top<k>.json, and with --save-cache-dir a folder a chunk
(safetensors, in place of the original's .pt files, which run code when they are read).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheslide.plain_values import at_least
from harness.rag.chunk_folder import chunk_folder, save_chunk
from harness.rag.kv_cache_manager import KVCacheManager, Place
from harness.rag.options import add_model_options, add_retrieval_options, model_settings, open_manager
from harness.rag.per_sample import Record, measured
from harness.rag.placing import place_sample
from harness.rag.prompts import SamplePrompts
from harness.rag.retrieval import Retrieved, read_retrieval
from harness.step import command
from harness.tasks.passages import PassageRow

SCHEMA = "cacheslide.rag.kv_cache/1"


def kv_path(results: Path, name: str, k: int) -> Path:
    """Where the summary for data set `name` is written."""
    return results / "kv_caches" / f"{name}_kv_top{k}.json"


def build(
    manager: KVCacheManager,
    retrieved: Retrieved,
    k: int,
    out: Path,
    settings: dict[str, Any],
    rest: Place = "placeholder",
    folders: Path | None = None,
) -> dict[str, Any]:
    """Place, and with `folders` save, the passages of every sample; writes the summary to `out` and returns it."""
    samples = retrieved.samples
    settings = settings | {
        "schema": SCHEMA,
        "data": samples.about(),
        "retriever": retrieved.retriever,
        "k": k,
        "rest": rest,
        "samples": len(samples.rows),
        "save_cache_dir": None if folders is None else str(folders),
    }

    def work(row: PassageRow) -> Record:
        manager.clear()
        prompts = SamplePrompts(manager.backend, row, samples.metric)
        top = retrieved.ranked[row.id][:k]
        placed = place_sample(manager, prompts, row, top, rest)
        chunks = []
        for i, (key, passage) in enumerate(zip(placed.keys, prompts.passages, strict=True)):
            place, chunk = manager.where(key), manager.chunk(key)
            about = {"passage": i, "key": key, "tokens": len(passage.token_ids), "place": place}
            about["bytes"] = 0 if chunk is None else chunk.nbytes
            if folders is not None:
                folder, sample = chunk_folder(folders, row, i), {"sample": row.id, "sample_sha256": row.sha256}
                extra = {"passage": i, "place": place, "system": manager.policy.name, **sample}
                save_chunk(folder, key, len(passage.token_ids), chunk, extra)
                about["folder"] = folder.name
            chunks.append(about)
        return {
            "sha256": row.sha256,
            "top_k": top,
            "chunks": chunks,
            "device_bytes": manager.device.nbytes,
            "cpu_bytes": manager.host.nbytes,
            "encode_s": placed.encode_s,
        }

    return measured(out, settings, samples, work, "KV caches", summary)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Chunks and tokens by place, and bytes and seconds in all; `device_bytes` include the head's KV."""
    chunks = [chunk for record in records for chunk in record["chunks"]]
    by_place = {
        place: {"chunks": len(own), "tokens": sum(c["tokens"] for c in own)}
        for place in ("device", "cpu", "placeholder")
        if (own := [c for c in chunks if c["place"] == place]) or place != "cpu"
    }
    totals = {name: sum(r[name] for r in records) for name in ("device_bytes", "cpu_bytes", "encode_s")}
    return {"samples": len(records), "by_place": by_place, **totals}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The step's own options; the pipeline has them too."""
    parser.add_argument("--encode-rest", action="store_true", help="encode the other passages too, staged on the CPU")
    parser.add_argument("--save-cache-dir", type=Path, help="folder for a folder a chunk, as DIR/kv_caches")


def run(args: argparse.Namespace) -> Path:
    """The step; returns the summary's path."""
    manager = open_manager(args)
    retrieved = read_retrieval(args.retrieval_json, args.data, args.samples)
    k = args.k or retrieved.k
    out = kv_path(args.results, retrieved.samples.name, k)
    rest = "cpu" if args.encode_rest else "placeholder"
    totals = build(manager, retrieved, k, out, model_settings(args, manager), rest, args.save_cache_dir)["summary"]
    places = ", ".join(f"{p['chunks']} {name}" for name, p in totals["by_place"].items())
    print(f"{totals['samples']} samples; chunks: {places}; {totals['encode_s']:.1f} s of encoding")
    print(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_retrieval_options(parser)
    parser.add_argument("--k", type=at_least(1), help="passages on the device (default: the retrieval's k)")
    add_model_options(parser)
    add_options(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
