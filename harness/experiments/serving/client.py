"""TTFT and TPOT of real servers, measured by a client: `python -m harness.experiments.serving.client --config C`.

Every system runs on a real server started for it. Conversations of synthetic prompts, most of whose tokens lie in
fixed chunks that move every turn, are warmed with one earlier turn; later turns are timed. Conditions are separated by
cache salts. Prompts are random ids, so answers are not scored here.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError, ModelError
from cacheslide.models.weights import fingerprint
from cacheslide.vllm.options import annotations_of
from harness.backends.client import Request
from harness.backends.http.client import HttpClient
from harness.backends.http.load import Load, closed_loop, open_loop
from harness.backends.http.server import Server, connector_command, engine_flags, vanilla_command
from harness.backends.http.summary import no_speed, summarize_load
from harness.backends.http.workload import Conversation, Shape
from harness.experiments.serving.plan import ServingPlan, read_plan
from harness.metrics import bootstrap
from harness.quiet import Reading, watched
from harness.results.intervals import as_json
from harness.results.provenance import file_hash, provenance
from harness.results.records import write_json
from harness.results.undisturbed import too_few
from harness.systems import VANILLA, resolve

SCHEMA = "cacheslide.serving/1"
BASELINE = "vllm"
_ALONE = nullcontext()
QUALITY = "not scored: the prompts are random ids; accuracy runs score the same systems"


@dataclass(frozen=True)
class Condition:
    """One row of the table."""

    system: str
    tokens: int
    clients: int
    rate: float | None = None
    recompute_ratio: float | None = None
    store_device: str | None = None

    @property
    def label(self) -> str:
        """Its cache salt, and the prefix of its requests' ids."""
        return "/".join(str(v) for v in asdict(self).values() if v is not None)


@dataclass
class Measured:
    """Measurements so far."""

    servers: list[dict[str, Any]] = field(default_factory=list)
    loads: dict[Condition, Load] = field(default_factory=dict)
    quiet: dict[Condition, Reading] = field(default_factory=dict)
    warmups: dict[Condition, list[str]] = field(default_factory=dict)  # failures of uncounted requests


def measure(plan: ServingPlan, measured: Measured, logs: Path) -> None:
    """Start the servers one after the other and run every condition on them; results are added to `measured`."""
    for device, systems in plan.servers():
        with open_server(
            plan, device, systems[0], logs / f"{'-'.join(filter(None, (systems[0], device)))}.log"
        ) as server:
            measured.servers.append({"systems": systems, "command": server.command[1:], "vllm": server.version()})
            for tokens in plan.tokens:
                for clients, rate in plan.loads():
                    for system, recompute_ratio in plan.settings(systems):
                        condition = Condition(system, tokens, clients, rate, recompute_ratio, device)
                        print(f"serving: {condition.label}", file=sys.stderr, flush=True)
                        run_condition(plan, condition, server, measured)


@contextmanager
def open_server(plan: ServingPlan, device: str | None, system: str, log: Path) -> Iterator[Server]:
    """A server for `system`; with a store on `device`, for every system with the connector."""
    options = plan.options
    flags = [*engine_flags(options, plan.dtype), "--enable-prompt-tokens-details"]
    if not list(Path(plan.model).glob("tokenizer*")):
        flags.append("--skip-tokenizer-init")
    if device is None:
        command = vanilla_command(plan.model, VANILLA[system].prefix_caching, flags)
    else:
        store = {"store_gib": options.store_gib, "store_device": device, "encode": "now"}
        cut = {"chunk_size": plan.chunk_size, "suffix_len": plan.suffix_len}
        command = connector_command(plan.model, store | cut, flags)
    with Server(command, plan.model, log, plan.device, options.enforce_eager) as server:
        yield server


def run_condition(
    plan: ServingPlan, condition: Condition, server: Server, measured: Measured, beside: AbstractContextManager = _ALONE
) -> None:
    """Fill the caches, warm up and measure; `beside` is entered around the timed turns."""
    shape = Shape(condition.tokens, plan.vocab, plan.reused, plan.chunks, plan.system_tokens)
    conversations = [Conversation(shape, plan.seed, c) for c in range(condition.clients)]

    client, first = HttpClient(server.endpoint), 1 + plan.warmups

    def turns(first: int, last: int, output: int) -> list[Request]:
        """Requests turn by turn, one per client in each turn."""
        return [
            _request(plan, condition, conversation, c, turn, output)
            for turn in range(first, last)
            for c, conversation in enumerate(conversations)
        ]

    cold = closed_loop(client, turns(0, 1, 1), condition.clients)
    warm = closed_loop(client, turns(1, first, plan.output_tokens), condition.clients)
    measured.warmups[condition] = [r.failure for load in (cold, warm) for r in load.results if r.failure]
    requests = turns(first, first + plan.turns, plan.output_tokens)
    with watched() as measured.quiet[condition], beside:
        if condition.rate is None:
            load = closed_loop(client, requests, condition.clients)
        else:
            load = open_loop(client, requests, condition.rate, plan.seed)
    measured.loads[condition] = load


def _request(
    plan: ServingPlan, condition: Condition, conversation: Conversation, client: int, turn: int, output: int
) -> Request:
    prompt, params = conversation.turn(turn), None
    if condition.system not in VANILLA:
        asked = {"policy": condition.system, "recompute_ratio": condition.recompute_ratio, "layer": plan.layer}
        prompt = resolve([condition.system])[0].transform(prompt)
        params = annotations_of(prompt, **{name: value for name, value in asked.items() if value is not None})
    labels = asdict(condition) | {"client": client, "turn": turn}
    return Request(f"{client}-{turn}", prompt.token_ids, output, params, condition.label, labels=labels)


def table(loads: dict[Condition, Load], quiet: Mapping[Condition, Reading] | None = None) -> list[dict[str, Any]]:
    """One row a condition. `ttft_ratio` is the ratio of median TTFTs to vLLM without a prefix cache, over the same
    prompts under the same load; None, with the reason, unless every request was answered and reused rows, and no other
    work ran beside either load."""
    rows, quiet = [], quiet or {}
    for condition, load in loads.items():
        base = next((b for b in loads if _compares(b, condition)), None)
        reason = "the reference of the comparison" if condition.system == BASELINE else no_speed(load)
        if not reason and base is None:
            reason = f"{BASELINE} was not measured under this load"
        if not reason and any(r.failure for r in loads[base].results):
            reason = f"requests of {BASELINE} failed"
        few = next((why for c in (condition, base) if c and (why := too_few([quiet.get(c)]))), "")
        reason = reason or few
        ratio = None if reason else _ratio(load, loads[base])
        row = asdict(condition) | summarize_load(load) | {"ttft_ratio": ratio, "ratio_reason": reason}
        row |= {"quiet": quiet.get(condition), "disturbed": few}
        row["efficiency"] = row["compute_fraction"] / ratio["value"] if ratio else None
        rows.append(row)
    return rows


def _compares(base: Condition, other: Condition) -> bool:
    same = (base.tokens, base.clients, base.rate) == (other.tokens, other.clients, other.rate)
    return base.system == BASELINE and same


def _ratio(load: Load, base: Load) -> dict[str, Any]:
    ttft = {r.id: r.ttft for r in base.results}
    pairs = [(r.ttft, ttft[r.id]) for r in load.results]
    return as_json(bootstrap.ratio_of_medians([a for a, _ in pairs], [b for _, b in pairs]))


def result(plan: ServingPlan, measured: Measured, complete: bool) -> dict[str, Any]:
    """The file's content."""
    records = [r.as_record(load.started) for load in measured.loads.values() for r in load.results]
    config = json.loads(json.dumps(asdict(plan)))
    return {
        "schema_version": SCHEMA,
        "complete": complete,
        "conditions": {"plan": config, "servers": measured.servers, "quality": QUALITY},
        "provenance": provenance(config, {}, _model_id(plan)),
        "table": table(measured.loads, measured.quiet),
        "requests": [r for r in records if not r["failure"]],
        "failures": [r for r in records if r["failure"]],
        "failed_warmups": {c.label: why for c, why in measured.warmups.items() if why},
    }


def _model_id(plan: ServingPlan) -> str:
    if plan.options.load_format == "dummy":
        return f"dummy weights of the shape {file_hash(Path(plan.model) / 'config.json')}"
    try:
        return fingerprint(Path(plan.model))
    except (OSError, ModelError) as missing:
        return f"not available: {type(missing).__name__}"


def main(argv: list[str] | None = None) -> int:
    """Command line; an error a user can act on is one line and exit status 2, and finished measurements are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="such as config/serving-smoke.yaml")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    measured, complete = Measured(), False
    try:
        plan = read_plan(args.config)
        Shape(
            min(plan.tokens), plan.vocab, plan.reused, plan.chunks, plan.system_tokens
        )  # a prompt too short fails before any server
        try:
            measure(plan, measured, args.out.parent / f"{args.out.stem}-logs")
            complete = True
        finally:
            if measured.loads:
                write_json(args.out, result(plan, measured, complete))
    except (CacheSlideError, OSError) as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
