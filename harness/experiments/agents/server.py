"""Figure 11's parallel agents against a real server: vLLM with the connector, teacher-forced agents over HTTP.

    python -m harness.experiments.agents.server --model models/NAME --agent memgpt --parallel 2,4,8,16 --out FILE.jsonl

One server serves all systems, which requests select by name; each cell of the run has its own cache salt, and its
first prompts are served once before timing starts. The record file is that of the in-process load: `fig11` draws it.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.agents.completer import Request
from harness.agents.openai_server import OpenAIServer
from harness.agents.registry import AGENTS
from harness.backends.http.server import Server, connector_command, engine_flags
from harness.backends.in_process import EngineOptions
from harness.backends.tokens import Tokens
from harness.comma_lists import ints
from harness.experiments.agents.load import loop_on
from harness.experiments.agents.replay import record
from harness.limit import Limit, add_minutes
from harness.load import Done
from harness.quiet import watched
from harness.results.provenance import machine
from harness.results.records import RecordWriter, guarded
from harness.systems import resolve

SYSTEMS = "recompute,context_cache,cacheblend,epic,cacheslide"


def measure(
    server: Server, args: argparse.Namespace, systems: Sequence[str], writer: RecordWriter, limit: Limit
) -> bool:
    """Records as those of `harness.experiments.agents.load.measure_load`, mode parallel; False when time ran out."""
    tokens = Tokens(args.model)
    tasks, episodes = record(args.agent, args.episodes, seed=args.seed, tokens=args.tokens)
    for repeat in range(args.repeats):
        for n in args.parallel:
            if limit.over:
                return False
            chosen = [(repeat * n + i) % len(episodes) for i in range(n)]
            own = [tasks[i] for i in chosen], [episodes[i] for i in chosen]
            work = partial(_cell, server, args, systems, tokens, *own, n, repeat)
            guarded(writer, f"parallel-{n}-{repeat}", work)
    return True


def _cell(server, args, systems, tokens, tasks, episodes, n, repeat) -> dict:
    out, quiet = {}, {}
    for system in random.Random(f"{args.seed}-{n}-{repeat}").sample(systems, len(systems)):
        salt = f"{system}-{n}-{repeat}"
        url = f"{server.endpoint.url}/v1"
        completer = OpenAIServer(url, args.model, tokens.tokenizer, system, system, salt=salt, layer=args.layer)
        for episode in episodes:  # stores the chunks of the first turns, as in a server that has been running
            completer.complete(Request(episode.task_id, 0, episode.steps[0].segments, 1))
        with watched() as quiet[system]:
            done = sorted(loop_on(completer, tokens, tasks, episodes, n), key=lambda d: d.end)
        out[system] = [_row(d) for d in done]
        print(f"agents on a server: {salt}", file=sys.stderr, flush=True)
    return {"mode": "parallel", "n": n, "repeat": repeat, "systems": out, "quiet": quiet}


def _row(done: Done) -> list[float]:
    return [done.start, done.ttft_s, done.end, float(done.correct)]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; an error a user can act on is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--agent", choices=sorted(set(AGENTS) & {"reflexion", "memgpt"}), default="memgpt")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--parallel", type=ints, default=[2, 4, 6, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512, help="of the fixed documents or sessions")
    parser.add_argument("--layer", type=int, help="selection layer (default: each system's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max_model_len", type=int)
    parser.add_argument("--kv_cache_gib", type=float)
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    parser.add_argument("--out", required=True, type=Path)
    add_minutes(parser)
    args = parser.parse_args(argv)
    limit = Limit(args.minutes)
    try:
        systems = args.systems.split(",")
        titles = {p.name: p.title for p in resolve(systems)}
        options = EngineOptions(
            enforce_eager=args.eager, max_model_len=args.max_model_len, kv_cache_gib=args.kv_cache_gib
        )
        store = {"store_gib": options.store_gib, "store_device": options.store_device, "encode": "now"}
        command = connector_command(args.model, store, engine_flags(options, args.dtype))
        about = {k: v if isinstance(v, int | float | str | list | None) else str(v) for k, v in vars(args).items()}
        del about["minutes"]
        writer = RecordWriter(args.out, about | {"order": systems, "titles": titles, "measured_on": machine()})
        with Server(command, args.model, args.out.with_suffix(".log"), args.device, args.eager) as server:
            whole = measure(server, args, systems, writer, limit)
        if whole:
            writer.finish()
        else:
            writer.close()
            print(f"agent_server: no more time; {writer.part} goes on when it is run again", file=sys.stderr)
    except (CacheSlideError, OSError) as error:
        print(f"agent_server: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
