"""`cacheslide precompute`: encodes a template's fixed chunks ahead of the first request."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

DESCRIPTION = (
    "Encode a template's fixed chunks ahead of the first request, for `cacheslide run --store` with the same --system, "
    "--chunk-size and model. The default of `run` encodes chunks in the prompt: it reads those encoded ahead under "
    "itself alone, which end with the first updated segment. A server has its own store."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `precompute`."""
    parser.description = DESCRIPTION
    parser.add_argument("model", help="folder of a checkpoint of a known family with its tokenizer")
    parser.add_argument("--template", required=True, type=Path, help="a prompt file; updated segments may be empty")
    parser.add_argument("--store", required=True, type=Path, help="folder that keeps the chunks")
    parser.add_argument(
        "--system",
        default="cacheslide",
        help="a name from `cacheslide systems`, the one that will read the chunks (default: cacheslide, whose encoding "
        "needs no updated text)",
    )
    parser.add_argument("--cope", type=Path, help="folder of a CoPE adapter of the model")
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens a chunk at most (default: 1024)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from cacheslide.core.engine import ReuseEngine
    from cacheslide.core.precompute import precompute, read_template
    from cacheslide.core.prompt_file import load_tokenizer
    from cacheslide.models.reference import ReferenceDecoder
    from cacheslide.policies.registry import load_policy
    from cacheslide.store import DirectoryChunkStore
    from cacheslide.training.load import load_cope

    if args.cope:
        model = load_cope(args.model, args.cope, device=args.device)
    else:
        model = ReferenceDecoder.from_pretrained(args.model, device=args.device)
    tokenizer = load_tokenizer(args.model)
    engine = ReuseEngine(model, load_policy(args.system), DirectoryChunkStore(args.store), chunk_size=args.chunk_size)
    print(json.dumps(asdict(precompute(engine, read_template(args.template, tokenizer)))))
    print(f"cacheslide: read by `cacheslide run --system {args.system} --store {args.store}`", file=sys.stderr)
    return 0
