"""Statistics of the prompts: reusable share (Fig. 3) and displacement of fixed segments (Fig. 5)."""

from collections.abc import Mapping, Sequence

from cacheslide.core.prompt import Prompt, Role
from cacheslide.policies.base import ReusePolicy
from harness.agents.loop import Episode
from harness.backends.tokens import Tokens
from harness.systems import System
from harness.tasks.example import TaskExample


def measure_prompts(tokens: Tokens, data: Mapping[str, Sequence[TaskExample]], policies: Sequence[System]) -> dict:
    """Per data set: the reusable share of every prompt, and its moves between the two turns.

    `displacement` is how many tokens the fixed segments behind the first updated one moved (mean);
    `shift[system]` is the distance left between the position a cached key is rotated at and the position of its
    row, after that system's placement (mean over the same segments). Prefix caching has no entry: behind an
    updated segment it never matches.
    """
    out = {}
    for dataset, examples in data.items():
        shares, moves = [], []
        for example in examples:
            now, before = tokens.prompt(example.segments), tokens.prompt(example.previous)
            shares.append(now.reusable_share())
            moves.append(
                {
                    "example": example.id,
                    "displacement": displacement(before, now),
                    "shift": {p.name: _shift(p, before, now) for p in policies if _moves(p)},
                }
            )
        out[dataset] = {"reusable_share": shares, "moves": moves}
    return {"datasets": out, "titles": {p.name: p.title for p in policies}}


def displacement(before: Prompt, now: Prompt) -> float:
    """How many tokens the fixed segments behind the first updated one moved (mean)."""
    return _mean(b - a for a, b in zip(_starts(before), _starts(now), strict=True))


def agent_shares(tokens: Tokens, episodes: Sequence[Episode]) -> dict[str, dict]:
    """Per agent: the reusable share of every prompt of its recorded episodes, and their lengths in tokens."""
    out: dict[str, dict] = {}
    for episode in episodes:
        own = out.setdefault(episode.agent, {"reusable_share": [], "tokens": [], "episodes": 0})
        prompts = [tokens.prompt(step.segments) for step in episode.steps]
        own["reusable_share"] += [p.reusable_share() for p in prompts]
        own["tokens"] += [len(p) for p in prompts]
        own["episodes"] += 1
    return out


def _moves(policy: System) -> bool:
    return policy.reuses and not policy.keying.exact


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _starts(prompt: Prompt, positions: Sequence[int] | None = None) -> list[int]:
    """First rows (or positions) of the fixed segments behind the first updated one."""
    updated = next((i for i, s in enumerate(prompt.segments) if s.role is Role.RECOMPUTE), 0)
    starts = [s for i, s in enumerate(prompt.starts) if i > updated and prompt.segments[i].role is Role.REUSE]
    return starts if positions is None else [positions[s] for s in starts]


def _shift(policy: ReusePolicy, before: Prompt, now: Prompt) -> float:
    place, encoding = policy.placement, policy.encoding
    before, now = policy.transform(before), policy.transform(now)
    here = _starts(now, place.positions(now))
    if place.rotation == "delta":
        return 0.0
    if encoding.at_slot or encoding.position_free:
        cached = here if encoding.at_slot else [0] * len(here)  # a copy exists for every position, or only for 0
    else:
        cached = _starts(before, place.positions(before))
    return _mean(abs(a - b) for a, b in zip(cached, here, strict=True))
