"""Window padding: updated segments are padded or cut to a fixed window, so that fixed ones keep positions (Fig. 4b)."""

from dataclasses import replace
from functools import partial

from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy


def pad(prompt: Prompt, window: int, pad_id: int = 0) -> Prompt:
    """Cut updated segments between fixed ones to their last `window` tokens, or fill them up with `pad_id` in front.

    The trailing updated segment (the question) shifts no fixed text and is not changed.
    """
    if window < 1:
        raise PolicyError(f"window must be at least 1 token, not {window}")
    last_fixed = max((i for i, s in enumerate(prompt.segments) if s.role is Role.REUSE), default=-1)

    def fit(index: int, segment: Segment) -> Segment:
        if segment.role is Role.REUSE or index > last_fixed:
            return segment
        kept = segment.token_ids[-window:]
        return replace(segment, token_ids=(pad_id,) * (window - len(kept)) + kept)

    return Prompt(tuple(fit(i, s) for i, s in enumerate(prompt.segments)))


def policy(window: int = 96) -> ReusePolicy:
    """In-prompt KV reused in place: with a fixed window no position shifts, and no token is corrected."""
    return ReusePolicy(
        "window_padding",
        "Window padding",
        keying=FixedChainKeying(),
        placement=Placement("stored"),
        transform=partial(pad, window=window),
    )
