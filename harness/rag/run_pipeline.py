"""Retrieval, KV caches and speculative decoding in one go: `python -m harness.rag.run_pipeline --data FILE`.

Takes the steps' options. Chunks are saved under DIR/kv_caches unless --save-cache-dir names another folder, and read
from there for decoding.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.rag import build_kv_cache, run_retrieval, run_speculative_decode
from harness.rag.options import add_model_options
from harness.step import command


def run(args: argparse.Namespace) -> list[Path]:
    """All three steps; returns their results' paths."""
    retrieval = run_retrieval.run(args)
    folders = args.save_cache_dir or args.results / "kv_caches"
    later = {"retrieval_json": retrieval, "save_cache_dir": folders, "load_cache_dir": folders}
    args = argparse.Namespace(**vars(args) | later)
    return [retrieval, build_kv_cache.run(args), run_speculative_decode.run(args)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_retrieval.add_options(parser)
    add_model_options(parser)
    build_kv_cache.add_options(parser)
    run_speculative_decode.add_options(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
