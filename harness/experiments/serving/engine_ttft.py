"""TTFT in a vLLM engine by system, length, batch, recompute ratio: `python -m harness.experiments.serving.engine_ttft`.

Prompts are random ids: 5 % updated text, eight fixed chunks of together 90 %, 5 % updated text. The updated text
differs from request to request in content and length, so that every chunk slides and no prefix is shared. Systems
take turns; an annotated request whose receipt misses a chunk stops its cell, so that no failed reuse is timed.
One JSON line a cell goes to --out as soon as it is measured; `harness.results.serving` makes the tables.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

from cacheslide.core.prompt import Prompt
from cacheslide.policies.base import ReusePolicy, unchanged
from cacheslide.vllm.options import FIELD, annotations_of
from harness.comma_lists import ints, names
from harness.experiments.serving.arms import Arm, add_arguments, arms
from harness.experiments.serving.engines import (
    add_engine_arguments,
    connector_options,
    described,
    engine_options,
    model_of,
    recording,
)
from harness.experiments.serving.interleaved import in_turns
from harness.experiments.serving.prompts import Prompts
from harness.quiet import Watch
from harness.step import command
from harness.systems import policy_of

PREFIX_CACHE = "prefix_cache"  # the arm whose plain requests read vLLM's prefix cache


def once(engine, prompts: Prompts, system: str, batch: int, tokens: int = 1) -> dict[str, Any]:
    """One batch under one system: TTFT of each request, time of the batch in seconds, and the receipts' figures.

    Under tensor parallelism ask for two `tokens`: the receipt of a request that ends with its first is a forecast.
    """
    from cacheslide.vllm.offline import ask, replays

    if system == "prefix_cache_ideal":
        ask(engine, [prompts.shared_prefix()])  # other systems' prompts may have evicted it
        answers, seconds = _timed(engine, [prompts.shared_prefix() for _ in range(batch)], None, tokens)
        if min(a.cached_tokens for a in answers) < 0.8 * prompts.reused * prompts.tokens:
            raise RuntimeError("the prefix cache did not hold the shared prefix")
        return {"ttft": [a.ttft for a in answers], "seconds": seconds}
    turns = [prompts.turn() for _ in range(batch)]
    if system in ("recompute", PREFIX_CACHE):
        fresh = system == "recompute"
        skip = {"skip_reading_prefix_cache": True} if fresh and prompts.system else {}
        answers, seconds = _timed(engine, [ids for ids, _ in turns], None, tokens, **skip)
        if fresh:
            check_recomputed(max(a.cached_tokens for a in answers))
        return {"ttft": [a.ttft for a in answers], "seconds": seconds, "cached": [a.cached_tokens for a in answers]}
    arm = Arm.parse(system)
    before = replays(engine, arm.graphs)
    turns = [as_served(arm.system, *turn) for turn in turns]
    answers, seconds = _timed(engine, [ids for ids, _ in turns], [asked_of(arm, spans) for _, spans in turns], tokens)
    exact = policy_of(arm.system).keying.exact
    receipts = [check_reused(a.receipt, spans, exact) for a, (_, spans) in zip(answers, turns, strict=True)]
    return {
        "ttft": [a.ttft for a in answers],
        "seconds": seconds,
        "compute_fraction": [r["compute_fraction"] for r in receipts],
        "tokens_reused": [r["tokens_reused"] for r in receipts],
        "tokens_recomputed": [r["tokens_recomputed"] for r in receipts],
        "bytes_loaded": [r["bytes_loaded"] for r in receipts],
        "runs_replayed": replays(engine, arm.graphs) - before,
    }


def _timed(
    engine, prompts: list[list[int]], annotations: list[dict] | None, tokens: int, **sampling: Any
) -> tuple[list[Any], float]:
    """The answers, and seconds until the last one was complete."""
    from cacheslide.vllm.offline import ask

    started = time.perf_counter()
    answers = ask(engine, prompts, annotations, tokens=tokens, **sampling)
    return answers, time.perf_counter() - started


def asked_of(arm: Arm, spans: list[list[int]]) -> dict[str, Any]:
    """`kv_transfer_params` of a prompt with these fixed spans served by an arm, retaining nothing."""
    asked = {"policy": arm.system, "encode": "off"}
    if arm.ratio is not None:
        asked["recompute_ratio"] = arm.ratio
    return {"cacheslide": asked | {"segments": spans}}


def as_served(system: str, ids: Sequence[int], spans: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """A prompt and its fixed spans as `system` sends them: window padding and reordering change the prompt."""
    policy = policy_of(system)
    if policy.transform is unchanged:
        return list(ids), [list(span) for span in spans]
    prompt = policy.transform(Prompt.from_spans(ids, spans))
    return list(prompt.token_ids), annotations_of(prompt)[FIELD]["segments"]


def check_recomputed(cached_tokens: int) -> None:
    """Raise RuntimeError if `cached_tokens` of a prompt to be recomputed came from the prefix cache."""
    if cached_tokens > 64:
        raise RuntimeError("a recomputed prompt was found in the prefix cache")


def check_reused(receipt: dict[str, Any], spans: Sequence[Sequence[int]] = (), exact: bool = False) -> dict[str, Any]:
    """The receipt itself; RuntimeError unless every chunk was reused.

    Chunks of `spans` that lie in vLLM's prefix cache count. With `exact` keying any reuse is enough: such keys fit up
    to the first updated token only.
    """
    cached = receipt["tokens_prefix_cached"]
    if exact and (receipt["chunks_hit"] or cached):
        return receipt
    hit = receipt["chunks_hit"] + sum(end <= cached for _, end in spans)
    if not receipt["measured"] or hit != receipt["chunks"] or receipt["fallback"]:
        raise RuntimeError(f"reuse did not happen: {receipt}")
    return receipt


def fill(engine, prompts: Prompts, systems: Sequence[str] = ("cacheslide",)) -> None:
    """Encode the eight chunks for each of `systems`, and fill the prefix cache with them.

    Systems that need more beside a chunk's KV come first: others share their chunks, but not the other way round.
    """
    from cacheslide.vllm.offline import ask

    for system in sorted(systems, key=lambda name: _needs(policy_of(name)), reverse=True):
        ids, spans = as_served(system, *prompts.turn())
        ask(engine, [ids], [{"cacheslide": {"segments": spans, "policy": system, "encode": "now"}}], tokens=2)
    ask(engine, [prompts.shared_prefix()])


def _needs(policy: ReusePolicy) -> tuple[bool, bool]:
    """Whether chunks must hold layer inputs, and scores."""
    return bool(policy.probe_layers), policy.needs_scores


def cells(engine, args: argparse.Namespace, write) -> None:
    """Every batch, store and length; the systems of a cell take turns.

    Systems that do not read the store are measured once, with the first store.
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
    """Runs of every system, with the reason of a failure."""
    repeats = args.repeats if batch == 1 else max(2, args.repeats // 2)
    warmups = args.warmups if batch * prompts.tokens <= args.warm_tokens else 0  # long cells are warmed by shorter ones
    return in_turns(systems, lambda system: once(engine, prompts, system, batch, args.answer_tokens), repeats, warmups)


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
        # The first in a turn may meet a cooler or slower device, so the order rotates.
        for name in sorted(engines, reverse=bool(turn % 2)):
            engine = engines[name]
            ttft = ask(engine, [ids])[0].ttft
            started = time.perf_counter()
            ask(engine, short, tokens=args.plain_decode)
            if turn >= args.warmups:
                runs[name]["ttft"].append(ttft)
                runs[name]["decode"].append(time.perf_counter() - started)
        if watch is not None:
            quiet.append(watch.lap())
    about = {"kind": "overhead", "tokens": args.plain_tokens, "decode_tokens": args.plain_decode}
    write(about | {"runs": runs, "quiet": quiet})


def measure(args: argparse.Namespace, write) -> None:
    """Open the engines one after the other and measure; a failure is recorded and the rest continues."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `move_store`, between this run's processes
    from cacheslide.vllm.offline import close_engine, open_engine

    opened = []
    try:
        longest = max(args.lengths)
        model, options = model_of(args), engine_options(args, longest)
        connector = connector_options(args, args.stores[0], longest)
        plugged = open_engine(model, connector, **options)
        opened.append(plugged)
        write({"kind": "engine"} | described(plugged))
        if args.vanilla:
            opened.append(open_engine(model, None, **options))
            overhead(opened[1], plugged, args, write)
            close_engine(opened.pop())
        cells(plugged, args, write)
    except Exception:  # earlier measurements are kept
        write({"kind": "error", "error": traceback.format_exc()[-4000:]})
    finally:
        for engine in opened:
            close_engine(engine)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(p)
    p.add_argument("--lengths", type=ints, default=[4096, 8192, 16384, 32768])
    p.add_argument("--batches", type=ints, default=[1, 8])
    add_arguments(p, [0.05, 0.10, 0.26, 1.0])
    p.add_argument("--stores", type=names, default=["model", "cpu"])
    p.add_argument("--repeats", type=int, default=6, help="of a cell with one request; half of it with several")
    p.add_argument("--warmups", type=int, default=1)
    p.add_argument("--warm-tokens", type=int, default=150_000, help="no warm-ups in cells of more prompt tokens")
    p.add_argument("--answer-tokens", type=int, default=1, help="2 under tensor parallelism")
    p.add_argument("--vanilla", "--stock", action="store_true", help="time plain requests without the connector too")
    p.add_argument("--plain-tokens", type=int, default=8192)
    p.add_argument("--plain-decode", type=int, default=64)
    p.add_argument("--plain-repeats", type=int, default=10)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and append to the file."""
    args = parser().parse_args(argv)
    with recording(args, summary) as write:
        measure(args, write)


def summary(record: dict[str, Any]) -> str:
    """A one-line summary."""
    if record["kind"] != "cell" or record["failed"] or not record["runs"]:
        return json.dumps(record)[:1500]
    last = sorted(max(r["ttft"]) for r in record["runs"])
    fraction = record["runs"][0].get("compute_fraction", [1.0])[0]
    where = f"{record['store']} {record['tokens']} x{record['batch']} {record['system']}"
    return f"{where}: {1e3 * last[len(last) // 2]:.1f} ms, compute fraction {fraction:.3f}"


if __name__ == "__main__":
    command(main)
