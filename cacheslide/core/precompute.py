"""Encodes a template's fixed chunks ahead of its first request, and an agent's new history between two turns.

The policy's encoding decides what can be encoded ahead. A chain of fixed chunks, or chunks alone, need no updated
text; KV encoded in the prompt is available only up to the first updated segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.prompt_file import read_segments
from cacheslide.errors import PolicyError, PromptError

_UNKNOWN = (0,)  # stands for updated text; never encoded


@dataclass(frozen=True)
class Precomputed:
    """Result of a call: the template's chunks, their tokens, and how many chunks were computed and stored."""

    chunks: int
    tokens: int
    computed: int


def template(segments: Sequence[Segment | tuple[Role, Sequence[int]]]) -> Prompt:
    """A prompt template: segments in order; updated ones may be empty, since their text comes with each request."""
    out = []
    for segment in segments:
        s = segment if isinstance(segment, Segment) else Segment(tuple(segment[1]), segment[0])
        unknown = s.role is Role.RECOMPUTE and not s.token_ids
        out.append(Segment(_UNKNOWN, s.role, s.name) if unknown else s)
    return Prompt(tuple(out))


def precompute(engine: ReuseEngine, prompt: Prompt) -> Precomputed:
    """Compute and store the chunks of `prompt` that do not depend on its updated segments.

    All fixed chunks under a canonical or isolated encoding; under an encoding in the prompt, those before its first
    updated segment. The first request of the template then hits them.

    Raises
    ------
    PolicyError
        If the engine's system reuses nothing, or nothing of this template can be encoded ahead.
    """
    if not engine.policy.reuses:
        raise PolicyError(f"{engine.policy.name} reuses nothing: there is nothing to encode ahead")
    if engine.policy.encoding.in_prompt:
        prompt = _leading(prompt, engine.policy.name)
    plan = engine.plan(prompt)
    if not plan.chunks:
        raise PolicyError("the template has no fixed segment")
    computed = engine.build(prompt)
    return Precomputed(len(plan.chunks), sum(len(c) for c in plan.chunks), computed)


def pregenerate(engine: ReuseEngine, previous: Prompt, appended: Sequence[Segment]) -> Precomputed:
    """Encode the text that an agent appended to its history, before its next turn.

    `previous` is the last turn's prompt, `appended` the new fixed segments behind its last fixed one. The KV of the
    chunks before them is read from the store; only the new tail is computed. An agent calls this while its tool runs.
    """
    return precompute(engine, ahead(previous, appended))


def ahead(previous: Prompt, appended: Sequence[Segment]) -> Prompt:
    """The prompt whose chunks `pregenerate` encodes; a server encodes them when it generates one token behind it."""
    if any(s.role is not Role.REUSE for s in appended):
        raise PromptError("only fixed segments can be encoded ahead of the turn that shows them")
    last = max((i for i, s in enumerate(previous.segments) if s.role is Role.REUSE), default=-1)
    return Prompt((*previous.segments[: last + 1], *appended))


def _leading(prompt: Prompt, system: str) -> Prompt:
    kept = []
    for segment in prompt.segments:
        if segment.role is not Role.REUSE:
            break
        kept.append(segment)
    if not kept:
        raise PolicyError(
            f"{system} encodes chunks in the prompt, and the template starts with updated text: choose a system with a "
            "canonical encoding"
        )
    return Prompt(tuple(kept))


def read_template(path, tokenizer) -> Prompt:
    """A template from a prompt file (as of `cacheslide run`); updated segments may have empty text or none."""
    return template(read_segments(path, tokenizer, need_text=False))
