"""Success of the agents under every system, in their own loops: `python -m harness.experiments.agents.success`.

Each system answers by itself (free running) on the reference backend; an episode starts with an empty chunk store. All
systems see the same tasks, and a stopped run resumes. `--minutes` limits its time: the
summary covers the tasks that every system has finished. The selection layer is chosen on validation episodes.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cacheslide.policies.registry import load_policy
from harness.agents.in_process import InProcess
from harness.agents.loop import Episode, Stops, run_episode
from harness.agents.oracle import NoContext
from harness.agents.registry import AGENTS, run_tasks
from harness.agents.trace import replay
from harness.backends.reference import ReferenceBackend
from harness.experiments.study.select_layer import MARGIN, choose, layers_to_try
from harness.limit import Limit, add_minutes
from harness.results import intervals
from harness.results.provenance import config_hash, provenance
from harness.results.records import RecordWriter, guarded, read_records, read_settings, write_json
from harness.results.runs import OURS, REFERENCE, read_json
from harness.step import command
from harness.systems import first_look

NO_CONTEXT = "no_context"
BASELINES = (
    *("naive_reuse", "cacheblend", "cacheblend_gradual", "epic", "prompt_cache", "prompt_cache_joint"),
    *("context_cache", "reorder", "window_padding"),
)
SYSTEMS = (REFERENCE, NO_CONTEXT, OURS, "cacheslide_promote", *BASELINES)
EXACT = ("context_cache",)  # a prefix cache: nothing is approximated, and only an unchanged prefix is reused
MOST = 0.99  # recomputed share at and above which a system counts as reusing nothing
STOPS = Stops(turns=60)


@dataclass(frozen=True)
class Plan:
    """The run's settings. `options` are the tasks' parameters by agent (turns, questions, tokens, depth, ...)."""

    model: str
    tasks: int
    systems: tuple[str, ...] = SYSTEMS
    agents: tuple[str, ...] = tuple(AGENTS)
    split: str = "test"
    seed: int = 0
    layer: int | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drawn(self, agent: str, split: str | None = None, count: int | None = None) -> Iterable[Any]:
        """The tasks of one agent."""
        options = self.options.get(agent, {})
        return AGENTS[agent].tasks(split or self.split, self.seed, count or self.tasks, **options)


def select_agents_layer(backend: ReferenceBackend, plan: Plan, count: int = 6) -> dict[str, Any]:
    """The smallest layer at which CacheSlide's outputs equal recompute's, within `MARGIN`, on validation episodes.

    Recompute's episodes of Reflexion and MemGPT are served again with each layer, prompts forced: the share of equal
    outputs is compared. If no layer is within the margin, the best one.
    """
    layers, table, steps = layers_to_try(backend.num_layers), {}, {}
    for agent in ("reflexion", "memgpt"):
        base = run_tasks(agent, plan.drawn(agent, "validation", count), serve(backend, REFERENCE, None), STOPS)
        row, steps[agent] = {REFERENCE: 1.0}, sum(len(e.steps) for e in base)
        for layer in layers:
            same = [r.agrees for e in base for r in replay(e, serve(backend, OURS, layer), STOPS.max_tokens)]
            row[f"{OURS}@{layer}"] = sum(same) / len(same)
        table[agent] = row
    return {"layer": choose(table, OURS, layers), "margin": MARGIN, "same_outputs": table, "steps": steps}


def serve(backend: ReferenceBackend, system: str, layer: int | None) -> InProcess | NoContext:
    """A completer for one episode, with an empty store."""
    if system == NO_CONTEXT:
        return NoContext(InProcess(backend, load_policy(REFERENCE)))
    policy = load_policy(system)
    return InProcess(backend, policy if layer is None else policy.at_layer(first_look(policy, layer)))


def measure(backend: ReferenceBackend, plan: Plan, output: Path, limit: Limit | None = None) -> bool:
    """Run all systems on each task that `output` lacks, task by task; False if `limit` ended the run early."""
    writer = RecordWriter(output, asdict(plan))
    tasks = {agent: list(plan.drawn(agent)) for agent in plan.agents}
    for i in range(plan.tasks):
        for agent in plan.agents:
            for system in plan.systems:
                if limit is not None and limit.over:
                    writer.close()
                    return False

                work = partial(_episode, backend, plan.layer, agent, system, i, tasks[agent][i])
                guarded(writer, f"{agent}/{system}/{i}", work)
    writer.finish()
    return True


def _episode(backend, layer, agent: str, system: str, number: int, task) -> dict[str, Any]:
    with closing(AGENTS[agent].agent(task)) as one:
        done = run_episode(one, serve(backend, system, layer), STOPS)
    return record(done) | {"agent": agent, "system": system, "task": number}


def record(episode: Episode) -> dict[str, Any]:
    """The record of an episode."""
    receipts = [s.completion.receipt for s in episode.steps if s.completion.receipt]
    return {
        "success": episode.success,
        "score": episode.score,
        "stop": episode.stop,
        "steps": len(episode.steps),
        "failed_steps": len(episode.failures),
        "tokens": [r["tokens"] for r in receipts],
        "recomputed": [r["compute_fraction"] for r in receipts],
        "seconds": round(episode.seconds, 3),
    }


def summarise(plan: Plan, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tables by agent and system over the tasks that every system has finished, and the headline."""
    found: dict[str, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        found[r["agent"]][r["system"]][r["task"]] = r
    agents, head = {}, {}
    for agent in plan.agents:
        common = sorted(set.intersection(*(set(found[agent][s]) for s in plan.systems)))
        if common:
            agents[agent] = {s: _row([found[agent][s][i] for i in common], common) for s in plan.systems}
            reference = agents[agent][REFERENCE]["successes"]
            for row in agents[agent].values():
                row["loss_points"] = intervals.points_lost(reference, row["successes"], common)
            head |= _headline(agent, agents[agent])
    return {"headline": head, "agents": agents}


def _row(rows: list[dict[str, Any]], tasks: list[int]) -> dict[str, Any]:
    wins, stops = [int(r["success"]) for r in rows], [r["stop"] for r in rows]
    tokens, shares = ([x for r in rows for x in r[k]] for k in ("tokens", "recomputed"))
    return {
        "n": len(rows),
        "success": intervals.mean(wins, tasks),
        "score": intervals.mean([r["score"] for r in rows], tasks),
        "steps": sum(r["steps"] for r in rows),
        "failed_steps": sum(r["failed_steps"] for r in rows),
        "stops": {s: stops.count(s) for s in sorted(set(stops))},
        "prompt_tokens": round(sum(tokens) / len(tokens)) if tokens else None,
        "recomputed_share": round(sum(shares) / len(shares), 4) if shares else None,
        "successes": wins,
    }


def _headline(agent: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {f"{agent}_success": rows[REFERENCE]["success"]["value"]}
    if NO_CONTEXT in rows:
        out[f"{agent}_no_context_success"] = rows[NO_CONTEXT]["success"]["value"]
    if OURS in rows:
        out[f"{agent}_cacheslide_loss_points"] = rows[OURS]["loss_points"]["value"]
        out[f"{agent}_cacheslide_recomputed_share"] = rows[OURS]["recomputed_share"]
    # EPIC's 32 + 32 rows can cover whole chunks; a system that reuses nothing equals recompute
    others = [s for s in BASELINES if s in rows and (rows[s]["recomputed_share"] or 1) < MOST]
    for kind, some in (("best_baseline", others), ("best_approximate_baseline", [s for s in others if s not in EXACT])):
        if some:
            best = max(some, key=lambda s: (rows[s]["success"]["value"], -rows[s]["recomputed_share"]))
            out[f"{agent}_{kind}"] = best
            out[f"{agent}_{kind}_loss_points"] = rows[best]["loss_points"]["value"]
            out[f"{agent}_{kind}_recomputed_share"] = rows[best]["recomputed_share"]
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/tiny-agents-3m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=40, help="test tasks an agent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layer", type=int, help="selection layer; without it, chosen on validation episodes")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    add_minutes(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--records", type=Path, help="finished episodes: the tables of these, without the model")
    args = parser.parse_args()
    if args.records:
        tabulate(args.records, args.out)
        return
    limit = Limit(args.minutes)
    torch.set_num_threads(args.threads)
    backend = ReferenceBackend(args.model)
    plan = Plan(args.model, args.tasks, tuple(args.systems), tuple(args.agents), seed=args.seed, layer=args.layer)
    chosen, kept = {"layer": args.layer}, args.out / "selection_layer.json"
    if args.layer is None:
        chosen = _chosen(backend, plan, kept)
        plan = Plan(**(vars(plan) | {"layer": chosen["layer"]}))
    output = args.out / "episodes.jsonl"
    if not output.exists():
        done = measure(backend, plan, output, limit)
        output = output if done else output.with_name(f".{output.name}.part")
    origin = provenance(asdict(plan), {"tasks": config_hash(asdict(plan))}, backend.model.model_id)
    _write(args.out, plan, output, chosen, origin)


def tabulate(episodes: Path, out: Path) -> None:
    """`summary.json` in `out` from finished episodes, beside `selection_layer.json`.

    Keeps an existing provenance: the machine that measured the episodes, not the one that tabulates.
    """
    settings = read_settings(episodes)
    plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    chosen, summary = read_json(out / "selection_layer.json"), out / "summary.json"
    if summary.is_file():
        origin = read_json(summary)["provenance"]
    else:
        origin = provenance(settings, {"tasks": config_hash(settings)}, chosen["model"])
    _write(out, plan, episodes, chosen, origin)


def _write(out: Path, plan: Plan, episodes: Path, chosen: dict[str, Any], origin: dict[str, Any]) -> None:
    summary = summarise(plan, list(read_records(episodes)))
    conditions = asdict(plan) | {"stops": asdict(STOPS), "backend": "reference, float32, CPU", "selection": chosen}
    write_json(out / "summary.json", summary | {"conditions": conditions, "provenance": origin})
    for key, value in summary["headline"].items():
        print(key, value)


def _chosen(backend: ReferenceBackend, plan: Plan, kept: Path) -> dict[str, Any]:
    if kept.exists() and (found := json.loads(kept.read_text())).get("model") == backend.model.model_id:
        return found
    found = select_agents_layer(backend, plan) | {"model": backend.model.model_id}
    write_json(kept, found)
    return found


if __name__ == "__main__":
    command(main)
