"""The `cacheslide` command: lists systems, answers a prompt with cached chunks, analyses traffic, serves."""

import argparse
import json
import os
import sys
from pathlib import Path

from cacheslide.cli.analyse import add_parser as add_analyse_parser
from cacheslide.cli.store import add_parser as add_store_parser
from cacheslide.core.precompute import add_command
from cacheslide.errors import CacheSlideError
from cacheslide.plain_values import at_least
from cacheslide.policies.default import DEFAULT_SYSTEM


def main(argv: list[str] | None = None) -> int:
    """Entry point. A user's error is printed in one line on stderr, with exit status 2."""
    parser = argparse.ArgumentParser(prog="cacheslide", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    systems = commands.add_parser("systems", help="list the registered reuse systems")
    systems.set_defaults(run=_systems)
    run = commands.add_parser("run", help="prefill a prompt under a system and answer it")
    run.add_argument("model", help="folder of a checkpoint of a known family with its tokenizer")
    run.add_argument("--prompt", required=True, type=Path, help="JSON file with the prompt's segments (see README)")
    run.add_argument("--previous", type=Path, help="the turn before: its fixed segments are cached first")
    run.add_argument(
        "--system", default=DEFAULT_SYSTEM, help=f"a name from `cacheslide systems` (default: {DEFAULT_SYSTEM})"
    )
    run.add_argument("--store", type=Path, help="folder to keep chunk caches in; without it they live in memory")
    run.add_argument("--layer", type=int, help="selection layer of systems that have one (default: the system's own)")
    run.add_argument(
        "--recompute-ratio",
        "--share",  # its name in the previous version
        type=float,
        help="share of the reused tokens to recompute (default: the system's own)",
    )
    run.add_argument("--chunk-size", type=int, default=1024, help="tokens a chunk at most")
    run.add_argument("--suffix-len", type=int, default=1, help="tokens at the end that are always recomputed")
    run.add_argument("--max-new-tokens", type=at_least(0), default=32, help="tokens to answer at most (default: 32)")
    run.add_argument("--device", default="cpu", help="cpu, or cuda (default: cpu)")
    run.set_defaults(run=_run)
    add_command(commands)
    add_store_parser(commands)
    add_analyse_parser(commands)
    # It shares options with vLLM, so its own parser handles them; it is the only command that needs vLLM.
    commands.add_parser("serve", help="an OpenAI server: vLLM with the connector (`cacheslide serve --help`)")
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["serve"]:
            from cacheslide.cli import serve

            return serve.main(argv[1:])
        args = parser.parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except CacheSlideError as error:
        print(f"cacheslide: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output closed the pipe (`| head`); the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _systems(args: argparse.Namespace) -> int:
    from cacheslide.policies.registry import load_policy, policy_names

    for name in policy_names():
        policy = load_policy(name)
        parts = (policy.keying, policy.kind, policy.placement, policy.correction)
        print(f"{name:24} {policy.title}\n{'':24} {' · '.join(map(str, parts))}")
    return 0


def _run(args: argparse.Namespace) -> int:
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
    state = engine.prefill(prompt, room=args.max_new_tokens)
    stop = frozenset(i for i in [tokenizer.eos_token_id] if i is not None)
    ids = engine.generate(state, state.logits, args.max_new_tokens, stop)
    print(json.dumps({"text": tokenizer.decode(ids, skip_special_tokens=True), "receipt": state.receipt.as_dict()}))
    return 0
