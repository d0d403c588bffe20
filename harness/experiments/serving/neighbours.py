"""Effect of arriving requests on decoding ones: `python -m harness.experiments.serving.neighbours --out FILE`.

Short plain requests decode together. Once all of them do, long ones arrive one by one: plain (`recompute`),
annotated (an arm of reuse), or none (`nothing`). A run records the time of every neighbour's token, and of each
arrival's due time, send time and first-token time. The arms take turns, in one engine; an arrival
without reuse stops its arm. One JSON line per arm, as soon as all are measured; `harness.results.serving`
makes the tables.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from harness.backends.client import Request, Result
from harness.backends.vllm_client import Progress, VllmClient
from harness.experiments.serving.arms import Arm, add_arguments, arms
from harness.experiments.serving.engine_ttft import Prompts, asked_of, check_recomputed, check_reused, fill
from harness.experiments.serving.engines import (
    Record,
    add_engine_arguments,
    connector_options,
    described,
    engine_options,
    model_of,
    recording,
)
from harness.experiments.serving.interleaved import in_turns
from harness.results.neighbours import row
from harness.step import command

NOTHING, RECOMPUTE = "nothing", "recompute"


class Arrivals:
    """Schedule of requests: `neighbours` at once, the others every `every` seconds once all of these decode.

    They decode when each has generated `lead` tokens.
    """

    def __init__(self, neighbours: int, others: int, every: float, lead: int) -> None:
        self.neighbours, self.every, self.lead = neighbours, every, lead
        self.waiting = list(range(neighbours + others))
        self.begun: float | None = None  # when the first of the others was due, by `perf_counter`

    def at(self, number: int) -> float:
        """When request `number`, one of the others, was due."""
        return self.begun + (number - self.neighbours) * self.every

    def due(self, results: Progress) -> Iterable[int]:
        """The numbers to be sent now; see `VllmClient.run_open`."""
        now = time.perf_counter()
        if self.begun is None and results[0] is not None:
            behind = min(len(r.token_times) for r in results[: self.neighbours])
            self.begun = now if behind >= self.lead else None
        while self.waiting and (self.waiting[0] < self.neighbours or (self.begun and now >= self.at(self.waiting[0]))):
            yield self.waiting.pop(0)


def once(engine, prompts: Prompts, system: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run of an arm: times in seconds since the neighbours were sent, and the receipts' figures."""
    from cacheslide.vllm.offline import replays

    requests = [
        Request(f"neighbour {n}", prompts.turn()[0][: args.neighbour_tokens], args.decode_tokens)
        for n in range(args.neighbours)
    ]
    arm = None if system in (NOTHING, RECOMPUTE) else Arm.parse(system)
    for number in range(0 if system == NOTHING else args.arrivals):
        ids, spans = prompts.turn()
        requests.append(
            Request(f"arrival {number}", ids, args.answer_tokens, None if arm is None else asked_of(arm, spans))
        )
    arrivals = Arrivals(args.neighbours, len(requests) - args.neighbours, args.every, args.lead)
    before = replays(engine, arm is None or arm.graphs)
    results = VllmClient(engine).run_open(requests, arrivals.due)
    if failed := [r.failure for r in results if r.failure]:
        raise RuntimeError(failed[0])
    late = results[args.neighbours :]
    run = {"tokens": _times(results[: args.neighbours]), "arrivals": [], "seconds": max(r.finished for r in results)}
    started = results[0].sent
    run["seconds"] -= started
    for number, result in enumerate(late, args.neighbours):
        first = result.token_times[0]
        times = {"due": arrivals.at(number), "sent": result.sent, "first": first, "finished": result.finished}
        run["arrivals"].append({name: round(at - started, 6) for name, at in times.items()})
    if arm is not None:
        receipts = [check_reused(r.receipt) for r in late]
        run["compute_fraction"] = [r["compute_fraction"] for r in receipts]
        run["tokens_reused"] = [r["tokens_reused"] for r in receipts]
        run["tokens_recomputed"] = [r["tokens_recomputed"] for r in receipts]
        run["runs_replayed"] = replays(engine, arm.graphs) - before
    elif late:
        check_recomputed(max(r.cached_tokens for r in late))
    return run


def _times(neighbours: Sequence[Result]) -> list[list[float]]:
    """Each neighbour's tokens in seconds since the first one was sent."""
    started = neighbours[0].sent
    return [[round(t - started, 6) for t in r.token_times] for r in neighbours]


def measure(args: argparse.Namespace, write) -> None:
    """Open the engine and measure; a failure is recorded."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `replays`, between this run's processes
    from cacheslide.vllm.offline import close_engine, open_engine

    engine = None
    try:
        connector = connector_options(args, args.store, args.tokens)
        engine = open_engine(model_of(args), connector, **engine_options(args, args.tokens))
        write({"kind": "engine"} | described(engine))
        prompts = Prompts(args.tokens, args.vocabulary, seed=args.tokens)
        fill(engine, prompts, args.systems)
        systems = [NOTHING, RECOMPUTE, *arms(args)]
        cell = in_turns(systems, lambda system: once(engine, prompts, system, args), args.repeats, args.warmups)
        about = {"kind": "neighbours", "store": args.store, "tokens": args.tokens, "neighbours": args.neighbours}
        about |= {"decode_tokens": args.decode_tokens, "lead": args.lead}
        about |= {"arrivals": args.arrivals, "every_s": args.every}
        for system, (runs, failed) in cell.items():
            write(about | {"system": system, "runs": runs, "failed": failed})
    except Exception:  # earlier measurements are kept
        write({"kind": "error", "error": traceback.format_exc()[-4000:]})
    finally:
        if engine is not None:
            close_engine(engine)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(p)
    add_arguments(p, [0.05])
    p.set_defaults(systems=["cacheslide_first"])
    p.add_argument("--tokens", type=int, default=8192, help="of an arrival's prompt")
    p.add_argument("--store", choices=["model", "cpu"], default="model", help="where chunks lie")
    p.add_argument("--arrivals", type=int, default=8)
    p.add_argument("--every", type=float, default=0.1, help="seconds from one arrival to the next")
    p.add_argument("--answer-tokens", type=int, default=2, help="of an arrival")
    p.add_argument("--neighbours", type=int, default=8)
    p.add_argument("--neighbour-tokens", type=int, default=64, help="of a neighbour's prompt")
    p.add_argument("--decode-tokens", type=int, default=128, help="that a neighbour generates")
    p.add_argument("--lead", type=int, default=8, help="tokens of every neighbour before the first arrival")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--warmups", type=int, default=2)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and append to the file."""
    args = parser().parse_args(argv)
    with recording(args, summary) as write:
        measure(args, write)


def summary(record: Record) -> str:
    """A one-line summary."""
    if record["kind"] != "neighbours" or not record["runs"]:
        return json.dumps(record)[:1500]
    made = row(record)
    gaps = ", ".join(f"{name} {made[f'{name}_ms']['value']:.1f}" for name in ("median", "p99", "max"))
    ttft = made.get("arrivals_mean_ttft_ms")
    return f"{record['system']}: ms between tokens: {gaps}" + (f"; TTFT {ttft['value']:.1f} ms" if ttft else "")


if __name__ == "__main__":
    command(main)
