"""Training tasks of the agents at a curriculum stage's difficulty, and oracle episodes over them.

They are drawn by the same functions as the measured tasks, from the training split by default.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from harness.agents.agent import Agent
from harness.agents.calls import MalformedCall, ToolError
from harness.agents.completer import Request
from harness.agents.dry import DrySWEAgent
from harness.agents.function_calling import FunctionCalling
from harness.agents.memgpt import MemGPT
from harness.agents.oracle import ORACLES
from harness.agents.reflexion import Reflexion
from harness.agents.tasks.chat import draw_chat
from harness.agents.tasks.fixes import draw_fix
from harness.agents.tasks.functions import draw_functions
from harness.agents.tasks.qa import draw_qa
from harness.tasks.synthetic.render import CHUNK_TOKENS, NOTES_FILLER
from harness.tasks.synthetic.world import MIXES, build_world

Range = tuple[int, int]


@dataclass(frozen=True)
class Difficulty:
    """Difficulty of training tasks. Ranges are inclusive.

    `chunks`, `statements`, `chunk_tokens` (None: no filler), `notes_filler`, `depth` and `deep` (the share of the mix
    "deep") shape documents and sessions, `turns` the questions or messages; `jobs` and `operations` function calling;
    `modules` and `lines` repositories.
    """

    chunks: Range = (1, 2)
    statements: Range = (9, 9)
    chunk_tokens: Range | None = CHUNK_TOKENS
    notes_filler: int = NOTES_FILLER
    depth: int = 4
    deep: float = 0.7
    turns: Range = (2, 14)
    jobs: Range = (1, 3)
    operations: Range = (1, 2)
    modules: Range = (1, 3)
    lines: Range = (4, 6)


@dataclass(frozen=True)
class Shown:
    """One step of an episode: the agent's state before it, from which its prompt is rendered, and the right output."""

    agent: Agent = field(repr=False)
    output: str


def between(rng: Random, bounds: Range) -> int:
    """A number within inclusive bounds."""
    return bounds[0] + int(rng.random() * (bounds[1] - bounds[0] + 1))


def draw_agent(rng: Random, name: str, split: str, how: Difficulty) -> Agent:
    """A new agent of the kind `name` on a new task."""
    if name == "function_calling":
        jobs, steps = between(rng, how.jobs), between(rng, how.operations)
        return FunctionCalling(draw_functions(rng, "training", split, jobs, steps))
    if name == "swe_agent":
        return DrySWEAgent(draw_fix(rng, "training", split, between(rng, how.modules), between(rng, how.lines)))
    mix = MIXES["deep" if rng.random() < how.deep else "sparse"]
    sizes = [between(rng, how.statements) for _ in range(between(rng, how.chunks))]
    world = build_world(rng, mix, split, sizes, max_depth=how.depth)
    turns = between(rng, how.turns)
    if name == "reflexion":
        return Reflexion(draw_qa(rng, "training", split, world, turns, how.chunk_tokens, how.notes_filler))
    return MemGPT(draw_chat(rng, "training", split, world, turns, how.chunk_tokens))


def episode(rng: Random, name: str, split: str, how: Difficulty | None = None, slips: float = 0.0) -> Iterator[Shown]:
    """The oracle's episode, step by step. `slips`: chance that a step's prompt shows a malformed call's error."""
    agent, step = draw_agent(rng, name, split, how or Difficulty()), 0
    while not agent.finished:
        output = ORACLES[name](Request("training", step, agent.prompt(), 48))
        if rng.random() < slips:
            slip = malformed(rng, output)
            try:
                agent.parse(slip)
            except MalformedCall as wrong:
                agent.complaint = str(wrong)
        yield Shown(agent, output)
        agent.complaint, step = "", step + 1
        call = agent.parse(output)
        try:
            result, failed = agent.tools[call.tool].run(*call.args), False
        except ToolError as wrong:
            result, failed = str(wrong), True
        agent.observe(call, result, failed)


def malformed(rng: Random, output: str) -> str:
    """The right call with its last word missing or doubled, or without its tool."""
    words, kind = output.split(), rng.random()
    if kind < 0.4:
        return " ".join(words[:-1])
    if kind < 0.8:
        return " ".join([*words, words[-1]])
    return " ".join(words[1:])
