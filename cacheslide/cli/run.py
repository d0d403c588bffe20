"""`cacheslide run`: answers a prompt under a system, with its time and compute beside plain recomputation."""

import argparse
import json
from pathlib import Path

from cacheslide.plain_values import at_least
from cacheslide.policies.default import DEFAULT_SYSTEM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("model", help="folder of a checkpoint of a known family with its tokenizer")
    parser.add_argument("--prompt", required=True, type=Path, help="JSON file with the prompt's segments (see README)")
    parser.add_argument("--previous", type=Path, help="the turn before: its fixed segments are cached first")
    parser.add_argument(
        "--system", default=DEFAULT_SYSTEM, help=f"a name from `cacheslide systems` (default: {DEFAULT_SYSTEM})"
    )
    parser.add_argument("--store", type=Path, help="folder to keep chunk caches in; without it they live in memory")
    parser.add_argument("--layer", type=int, help="selection layer, of systems that have one (default: the system's)")
    parser.add_argument(
        "--recompute-ratio",
        "--share",  # its name in the previous version
        type=float,
        help="share of the reused tokens to recompute (default: the system's)",
    )
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens a chunk at most (default: 1024)")
    parser.add_argument(
        "--suffix-len", type=int, default=1, help="tokens at the end that are always recomputed (default: 1)"
    )
    parser.add_argument("--max-new-tokens", type=at_least(0), default=32, help="tokens to answer at most (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    parser.add_argument("--no-compare", action="store_true", help="leave the recomputation beside it out")
    parser.add_argument("--json", action="store_true", help="answers, times and receipts as one JSON object")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from cacheslide.cli.answering import answer, lines, recomputing, reuse_line, warm_up
    from cacheslide.core.engine import ReuseEngine
    from cacheslide.core.prompt import Prompt
    from cacheslide.core.prompt_file import load_tokenizer, read_segments
    from cacheslide.models.reference import ReferenceDecoder
    from cacheslide.policies.registry import load_policy
    from cacheslide.store import DirectoryChunkStore, MemoryChunkStore

    policy = load_policy(args.system)
    policy = policy if args.layer is None else policy.at_layer(args.layer)
    policy = policy if args.recompute_ratio is None else policy.at_ratio(args.recompute_ratio)
    model = ReferenceDecoder.from_pretrained(args.model, device=args.device)
    policy.check(model.num_layers)
    tokenizer = load_tokenizer(args.model)
    store = MemoryChunkStore() if args.store is None else DirectoryChunkStore(args.store)
    engine = ReuseEngine(model, policy, store, chunk_size=args.chunk_size, suffix_len=args.suffix_len)
    prompt = Prompt(tuple(read_segments(args.prompt, tokenizer)))
    if args.previous is not None:
        engine.build(Prompt(tuple(read_segments(args.previous, tokenizer))))
    warm_up(engine, prompt)
    compared = policy.reuses and not args.no_compare
    beside = answer(recomputing(engine), prompt, tokenizer, args.max_new_tokens) if compared else None
    own = answer(engine, prompt, tokenizer, args.max_new_tokens)
    shown = own.as_dict() | {"recompute": beside and beside.as_dict()}
    if args.json:
        print(json.dumps(shown))
        return 0
    print(own.text.strip(), "", *lines([a.as_dict() for a in (own, beside) if a is not None]), sep="\n")
    if policy.reuses:
        print(reuse_line(shown["receipt"]))
    if beside and beside.text != own.text:
        print(f"recompute answers differently: {beside.text.strip()}")
    return 0
