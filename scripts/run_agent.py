"""An agent of `harness.agents` in vLLM, turn by turn, with reuse or without; episodes, scores and receipts as JSON.

    python scripts/run_agent.py --agent swe_style --model mistralai/Mistral-7B-Instruct-v0.2 --dataset swe_bench \
        --enable_cacheslide

swe_style retrieves one document a turn, runs the model's commands over the example's own documents (`open NAME`,
`search WORDS`; no code is run) and answers on the last turn. `reflexion` on hotpot_qa answers, gets feedback on a
wrong answer and reflects. With --dataset synthetic every agent works on this repository's own tasks: reflexion, memgpt,
swe_agent (code runs in the sandbox), function_calling. SWE-bench patches are compared with the gold patch
(`solved_by: patch`); --grade, which needs docker, applies them and runs the tests (`solved_by: tests`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from run_cacheslide import NAMES, load_examples, summary, write

from cacheslide.errors import CacheSlideError, ConfigError
from cacheslide.plain_values import at_least
from harness.agents.agent import Agent
from harness.agents.documents import DocumentReader, TextReflexion
from harness.agents.loop import Episode, Step, Stops, run_episode
from harness.agents.offline_engine import OfflineEngine
from harness.agents.registry import AGENTS, entry
from harness.agents.swebench_docker import check_docker, grade_instances
from harness.agents.trace import write_episodes
from harness.backends.scripted import Engine, add_arguments, from_arguments
from harness.scoring import score
from harness.tasks.example import TaskExample

SYNTHETIC = "synthetic"
KNOWN = ("swe_style", *AGENTS)


def agents(args: argparse.Namespace) -> Iterator[tuple[Agent, TaskExample | None]]:
    """The agents to run, each with its example where there is one."""
    if args.dataset == SYNTHETIC:
        made = entry(args.agent)
        for task in made.tasks(args.split or "test", args.seed, args.max_examples):
            yield made.agent(task), None
        return
    examples = load_examples(args.dataset, args.split, args.data, args.max_examples)
    for example in examples:
        yield (
            (TextReflexion(example) if args.agent == "reflexion" else DocumentReader(example, args.max_turns)),
            example,
        )


def check(args: argparse.Namespace) -> None:
    """ConfigError for options that cannot be run, before anything is loaded."""
    on_rows = args.dataset != SYNTHETIC
    if args.agent == "swe_style" and not on_rows:
        raise ConfigError("swe_style works on a data set's documents; on synthetic tasks run swe_agent")
    if args.agent == "swe_agent" and on_rows:
        check_docker()
        raise ConfigError(
            "SWE-bench repositories are only in docker images: write patches with swe_style and --grade them"
        )
    if args.agent not in ("swe_style", "reflexion") and on_rows:
        raise ConfigError(f"{args.agent} has no loader for {args.dataset}; use --dataset {SYNTHETIC}")
    if args.grade:
        if not NAMES.get(args.dataset, args.dataset).startswith("swebench"):
            raise ConfigError("--grade is for SWE-bench's data sets")
        check_docker()


def records_of(agent: Agent, example: TaskExample | None, episode: Episode) -> list[dict]:
    """A record a step; the last one holds the answer's scores, or the share of the task that is solved."""
    out = [_record(agent, step, episode) for step in episode.steps]
    if not out:
        return out
    last = {"solved": episode.score, "solved_by": episode.solved_by}
    last |= {"stop": episode.stop, "failure": episode.failure}
    if example is not None:
        answers = example.questions[0].answers
        text = agent.answered[-1] if isinstance(agent, TextReflexion) and agent.answered else out[-1]["said"]
        last |= {"answers": list(answers), **score(text, answers)}
    out[-1] |= last
    return out


def _record(agent: Agent, step: Step, episode: Episode) -> dict:
    done = step.completion
    record = {"example": episode.task_id, "turn": step.index, "prompt_tokens": sum(map(len, done.prompt_ids))}
    if isinstance(agent, DocumentReader):
        record["retrieved"] = agent.retrieved[step.index]
    call = "" if step.call is None else " ".join((step.call.tool, *step.call.args))
    record |= {"ttft_s": done.ttft_s, "seconds": done.total_s, "said": done.text, "receipt": done.receipt}
    return record | {"command": call, "observation": step.result, "error": step.error}


def run(engine: Engine, args: argparse.Namespace) -> tuple[list[dict], list[Episode]]:
    """Every agent's records, and the episodes."""
    newline = engine.encode("\n")
    ends = newline if args.agent != "swe_style" and len(newline) == 1 else []  # a call is a line, a patch is not
    completer = OfflineEngine(engine, args.system if args.enable_cacheslide else "vllm_prefix_cache", ends)
    stops = Stops(turns=max(24, args.max_turns), seconds=float("inf"), max_tokens=args.max_new_tokens)
    if args.agent == "swe_style":  # ends by the number of turns alone
        stops = replace(stops, turns=args.max_turns, repeats=args.max_turns)
    records, episodes = [], []
    for agent, example in agents(args):
        with closing(agent):
            episodes.append(run_episode(agent, completer, stops))
            records += records_of(agent, example, episodes[-1])
    return records, episodes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a wrong argument or missing data is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--agent", choices=KNOWN, default=KNOWN[0])
    parser.add_argument(
        "--dataset", default="swe_bench", help="swe_bench, hotpot_qa, a name from harness/tasks, synthetic"
    )
    parser.add_argument("--max_turns", type=at_least(1), default=4)
    parser.add_argument("--seed", type=int, default=0, help="of synthetic tasks")
    parser.add_argument("--traces", help="JSONL file for the episodes, to replay them")
    parser.add_argument("--grade", action="store_true", help="grade SWE-bench patches in docker")
    args = parser.parse_args(argv)
    try:
        check(args)
        if args.dataset != SYNTHETIC:
            load_examples(args.dataset, args.split, args.data, 1)  # missing data stops here, before the engine loads
        engine = from_arguments(args)
        try:
            records, episodes = run(engine, args)
        finally:
            engine.close()
        if args.traces:
            write_episodes(Path(args.traces), episodes, {"arguments": vars(args)})
        graded = _grade(args, records) if args.grade else {}
    except CacheSlideError as error:
        print(f"run_agent: {error}", file=sys.stderr)
        return 2
    longest = max((r["turn"] for r in records), default=-1) + 1
    found = summary([r for r in records if "f1" in r]) if args.dataset != SYNTHETIC else {}
    found |= {"episodes": len(episodes), **_solved(episodes, graded)}
    turns = {"turns": len(records), "ttft_s_by_turn": [_mean(records, t) for t in range(longest)]}
    write({"arguments": vars(args), "summary": found | turns | graded, "records": records}, args.output)
    return 0


def _solved(episodes: Sequence[Episode], graded: dict) -> dict:
    """Number of solved episodes, and the criterion: tests that ran, a gold patch or answer, the task's own rules."""
    if graded:
        return {"solved": sum(graded["resolved"].values()), "solved_by": "tests"}
    by = sorted({e.solved_by for e in episodes})
    return {"solved": sum(e.success for e in episodes), "solved_by": by[0] if len(by) == 1 else by}


def _grade(args: argparse.Namespace, records: Sequence[dict]) -> dict:
    patches = {r["example"]: r["said"] for r in records if "f1" in r}
    from harness.tasks.swebench import SOURCES

    source = args.data or SOURCES[NAMES.get(args.dataset, args.dataset)].repo
    return {"resolved": grade_instances(source, args.split or "test", patches, "cacheslide-run-agent")}


def _mean(records: Sequence[dict], turn: int) -> float:
    of_turn = [r["ttft_s"] for r in records if r["turn"] == turn]
    return sum(of_turn) / len(of_turn)


if __name__ == "__main__":
    sys.exit(main())
