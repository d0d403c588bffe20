"""Rank the passages of every sample: `python -m harness.rag.run_retrieval --data FILE --results DIR`.

Writes DIR/retrieval/<stem>_rag_both_k<k>.json; docs/rag.md has the fields.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cacheslide.plain_values import at_least
from harness.rag.retrieval import retrieval_path, retrieve
from harness.rag.retrievers.registry import DEFAULT, availability, open_retriever
from harness.rag.samples import read_samples
from harness.step import command


def add_options(parser: argparse.ArgumentParser) -> None:
    """The step's options; the pipeline has them too."""
    parser.add_argument("--data", type=Path, required=True, help="MuSiQue, 2WikiMQA, HotpotQA, LongBench or SAMSum")
    parser.add_argument("--k", type=at_least(1), default=5, help="passages a question gets (default: 5)")
    parser.add_argument("--retriever", default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--retriever-model", type=Path, help="folder of a dense retriever's weights")
    parser.add_argument("--samples", type=at_least(1), help="the first ones (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results (default: results)")


def run(args: argparse.Namespace) -> Path:
    """The step; returns the result's path."""
    print(availability(), file=sys.stderr)
    retriever = open_retriever(args.retriever, args.retriever_model)
    samples = read_samples(args.data, args.samples)
    out = retrieval_path(args.results, samples.name, args.k)
    summary = retrieve(samples, retriever, args.k, out)["summary"]
    at_k = summary["at_k"]
    if at_k["hits"] is None:
        print(f"{summary['samples']} samples; hits@{args.k} is not defined: no passage is known to be needed")
    else:
        by = " and ".join(summary["needed_by"])
        print(
            f"{summary['samples']} samples; hits@{args.k} {at_k['hits']:.3f}, recall@{args.k} {at_k['recall']:.3f}, "
            f"all@{args.k} {at_k['all']:.3f} over {summary['with_needed']} (needed passages by {by})"
        )
    print(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
