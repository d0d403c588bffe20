"""Prompt templates of agents (the paper's section 2): ordered slots, each fixed or updated.

A slot's text starts with a line break, so that the segments tokenised one by one are the ids of the whole prompt. A
growing slot renders each entry as its own segment: earlier entries keep their segments, and thus their chunk keys,
while the history grows behind them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacheslide.errors import PromptError
from harness.tasks.example import SegmentRole, TextSegment

Slots = Mapping[str, "str | Sequence[str]"]


@dataclass(frozen=True)
class Slot:
    """A place in the template. `grows` marks a list of entries; a fixed one can only be appended to."""

    name: str
    role: SegmentRole
    grows: bool = False


@dataclass(frozen=True)
class Template:
    """Ordered slots with different names."""

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        names = [s.name for s in self.slots]
        if len(set(names)) != len(names):
            raise PromptError(f"a template's slots need different names, not {', '.join(names)}")

    def render(self, values: Slots) -> tuple[TextSegment, ...]:
        """The segments in order, empty ones left out; `values` names exactly the template's slots."""
        names = {s.name for s in self.slots}
        if names != set(values):
            raise PromptError(f"slots not matched by values: {', '.join(sorted(names ^ set(values)))}")
        out = []
        for slot in self.slots:
            value = values[slot.name]
            if slot.grows == isinstance(value, str):
                raise PromptError(f"slot {slot.name!r} takes {'a list of texts' if slot.grows else 'one text'}")
            if slot.grows:
                out += [TextSegment(f"{slot.name}[{i}]", text, slot.role) for i, text in enumerate(value)]
            else:
                out.append(TextSegment(slot.name, value, slot.role))
        return tuple(s for s in out if s.text)
