"""The loop: prompt, completion, call, result, until the agent is done or a stop condition ends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cacheslide.errors import CacheSlideError, DataError
from harness.agents.agent import Agent
from harness.agents.calls import Call, MalformedCall, ToolError
from harness.agents.completer import Completer, Completion, Request
from harness.agents.sandbox import SandboxError
from harness.tasks.example import TextSegment


@dataclass(frozen=True)
class Stops:
    """When an episode ends without the agent being done.

    `turns`: accepted calls. `retries`: malformed outputs in a row beyond the first. `repeats`: the same call with the
    same result in a row, on the same part of the task. `seconds`: wall time. `max_tokens` bounds one output,
    `result_chars` one result.
    """

    turns: int = 24
    retries: int = 2
    repeats: int = 3
    seconds: float = 600.0
    max_tokens: int = 48
    result_chars: int = 4000


@dataclass(frozen=True)
class Step:
    """One request and its outcome. `error` is "" for an accepted call whose tool succeeded."""

    index: int
    turn: int
    segments: tuple[TextSegment, ...]
    completion: Completion
    call: Call | None = None
    result: str = ""
    error: str = ""
    tool_s: float = 0.0


@dataclass
class Episode:
    """A finished episode. `stop` is "done", "turns", "malformed", "repeated", "time" or "completer".

    `solved_by` names the criterion of the score (`Agent.solved_by`); "" in traces of earlier versions.
    """

    agent: str
    task_id: str
    system: str
    steps: list[Step] = field(default_factory=list)
    stop: str = ""
    failure: str = ""
    score: float = 0.0
    seconds: float = 0.0
    solved_by: str = ""

    @property
    def success(self) -> bool:
        """Solved in full."""
        return self.score == 1.0

    @property
    def failures(self) -> list[Step]:
        """The steps whose output was malformed or whose tool failed."""
        return [s for s in self.steps if s.error]


def run_episode(
    agent: Agent,
    completer: Completer,
    stops: Stops | None = None,
    clock: Callable[[], float] = time.perf_counter,
    session: str = "",
) -> Episode:
    """Run `agent` to its end. Any model output becomes a recorded step, never an exception.

    Raises
    ------
    SandboxError
        When code has to run and the machine has no sandbox: a fault of the machine, not of the model.
    DataError
        When a replayed trace does not match the prompts.
    """
    stops = stops or Stops()
    episode = Episode(agent.name, agent.task_id, completer.system, solved_by=agent.solved_by)
    begin, turn, rejected, same = clock(), 0, 0, 0
    last: tuple[Call, str, int] | None = None
    session = session or agent.task_id
    while not episode.stop:
        segments = agent.prompt()
        request = Request(session, len(episode.steps), segments, stops.max_tokens)
        try:
            completion = completer.complete(request)
        except DataError:
            raise  # a replayed trace that does not match
        except CacheSlideError as refused:
            episode.stop, episode.failure = "completer", str(refused)
            break
        step = _step(agent, len(episode.steps), turn, segments, completion, stops, clock)
        episode.steps.append(step)
        if step.call is None:
            rejected += 1
            agent.complaint = step.error
        else:
            rejected, turn, agent.complaint = 0, turn + 1, ""
            same = same + 1 if last == (step.call, step.result, agent.at) else 0
            last = (step.call, step.result, agent.at)
            agent.observe(step.call, step.result, bool(step.error))
        episode.stop = _stop(agent, stops, rejected, same, turn, clock() - begin)
        if episode.stop not in ("", "done"):
            episode.failure = step.error or f"ended by the stop condition {episode.stop!r}"
    episode.score = agent.score()
    episode.seconds = clock() - begin
    return episode


def _step(agent, index, turn, segments, completion, stops, clock) -> Step:
    try:
        call = agent.parse(completion.text)
    except MalformedCall as wrong:
        return Step(index, turn, segments, completion, error=str(wrong))
    begin, error = clock(), ""
    try:
        result = agent.tools[call.tool].run(*call.args)
    except SandboxError:
        raise
    except ToolError as failed:
        result = error = str(failed)
    if len(result) > stops.result_chars:
        result = result[: stops.result_chars] + "\n(cut)"
    return Step(index, turn, segments, completion, call, result, error, clock() - begin)


def _stop(agent, stops, rejected, same, turn, seconds) -> str:
    if agent.finished:
        return "done"
    if rejected > stops.retries:
        return "malformed"
    if same >= stops.repeats:
        return "repeated"
    if turn >= stops.turns:
        return "turns"
    return "time" if seconds > stops.seconds else ""
