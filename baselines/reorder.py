"""Reordering, an alternative to chunk reuse: updated text moves after the fixed text, which prefix caching serves."""

from cacheslide.core.keys import PrefixKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role
from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy


def updated_last(prompt: Prompt) -> Prompt:
    """All fixed segments, then all updated ones, each kind in its order, so that a final question stays last.

    PolicyError for a prompt that begins with updated text: its first token may be the one that begins a sequence.
    """
    if prompt.segments[0].role is not Role.REUSE:
        raise PolicyError("reorder moves updated text behind fixed text: a prompt must begin with fixed text")
    return Prompt(tuple(sorted(prompt.segments, key=lambda s: s.role is not Role.REUSE)))


def policy() -> ReusePolicy:
    """Exact for the reordered prompt, in which all fixed tokens form a prefix; it differs from the given prompt."""
    return ReusePolicy(
        "reorder",
        "Reordered, prefix caching",
        keying=PrefixKeying(),
        placement=Placement("stored"),
        transform=updated_last,
    )
