"""Logs in the formats of real agents, with invented content."""

import json
from pathlib import Path
from typing import Any

WORDS = (
    "amber falcon copper otter bone mill river lantern gate orchard stone willow harbour candle meadow anvil".split()
)


def words(n: int, seed: int) -> str:
    """Text of `n` words that differs with `seed` at every place."""
    return " ".join(f"{WORDS[(i * i + seed * 7 + i // 3) % len(WORDS)]}{seed}x{i}" for i in range(n))


def trajectory(turns: int = 9, calls: bool = False, demo: bool = False, **more: Any) -> dict[str, Any]:
    """A SWE-agent run: system prompt, issue, then an action and a long observation a turn."""
    history: list[dict[str, Any]] = [{"role": "system", "content": words(60, 0), "agent": "main"}]
    if demo:
        history.append({"role": "user", "content": words(90, 1), "agent": "main", "is_demo": True})
    history.append({"role": "user", "content": words(80, 2), "agent": "main"})
    for t in range(turns):
        answer = {"role": "assistant", "content": words(8, 10 + t), "thought": "t", "action": "ls", "agent": "main"}
        if calls:
            answer["tool_calls"] = [{"id": f"c{t}", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]
        seen = words(50, 100 + t) + "\nline two\nline three"
        history += [answer, {"role": "tool" if calls else "user", "content": seen, "agent": "main"}]
    steps = [{"action": "ls", "observation": "", "response": "", "thought": "", "state": ""} for _ in range(turns)]
    return {"environment": "swe_main", "trajectory": steps, "history": history, "info": {}} | more


def processors(n: int = 5, plural: bool = True) -> dict[str, Any]:
    """The part of a run's configuration that names the history processor."""
    rule = {"type": "last_n_observations", "n": n}
    return {"replay_config": {"agent": {"history_processors": [rule]} if plural else {"history_processor": rule}}}


def write_trajectory(path: Path, run: dict[str, Any]) -> Path:
    """Write a trajectory as SWE-agent does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=2))
    return path


def react(question: str, steps: list[tuple[str, str, str]], reflections: tuple[str, ...] = ()) -> str:
    """One block of a Reflexion log: the question, its reflections, and (thought, action, observation) steps."""
    out = [f"Question: {question}"]
    if reflections:
        out[0] += (
            "You have attempted to answer following question before and failed. Use the reflection(s).\nReflections:"
        )
        out += [f"- {r}" for r in reflections]
    for i, (thought, action, seen) in enumerate(steps, 1):
        out += [f"Thought {i}: {thought}", f"Action {i}: {action}", f"Observation {i}: {seen}"]
    return "\n".join(out)


def reflexion_log(*trials: dict[str, list[str]]) -> str:
    """A log of trials: blocks by outcome (CORRECT, INCORRECT, HALTED)."""
    out = []
    for number, outcomes in enumerate(trials, 1):
        counts = ", ".join(f"{name.title()}: {len(blocks)}" for name, blocks in outcomes.items())
        out.append(f"\n{'#' * 40}\nBEGIN TRIAL {number}\nTrial summary: {counts}\n{'#' * 39}\n")
        for name, blocks in outcomes.items():
            out.append(f"------------- BEGIN {name} AGENTS -------------\n\n")
            out += [f"{block}\nCorrect answer: bone\n\n" for block in blocks]
    return "".join(out)
