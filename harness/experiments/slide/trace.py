"""Rows that WCA corrects: traces of SWE-style turns through the shipped model, for the store's workloads.

A template is a system prompt and fixed files; every turn brings new notes. Each turn is prefilled under CacheSlide and
the rows it selected are kept as bits, chunk by chunk. The store's experiments replay them at other page sizes: the
corrected rows are the model's, not chosen by hand.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cacheslide.policies.registry import load_policy
from cacheslide.store.memory import MemoryChunkStore
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.tasks.synthetic import prompts, render
from harness.tasks.synthetic.world import draw_root_values


@dataclass(frozen=True)
class Template:
    """One agent's fixed text: its chunks' lengths in tokens, and per turn the corrected rows of each chunk.

    `layer` is the selection layer and `layers` the model's: rows are corrected in layers [layer, layers). In layers
    (0, layer) every row is computed afresh; layer 0 does not depend on context and stays as it was cached.
    """

    lengths: tuple[int, ...]
    turns: tuple[tuple[np.ndarray, ...], ...]
    layer: int
    layers: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: rows as hexadecimal bit strings."""
        turns = [[np.packbits(m).tobytes().hex() for m in turn] for turn in self.turns]
        return {"lengths": list(self.lengths), "turns": turns, "layer": self.layer, "layers": self.layers}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Template":
        """The inverse of `as_dict`."""
        turns = tuple(
            tuple(
                np.unpackbits(np.frombuffer(bytes.fromhex(m), np.uint8))[:n].astype(bool)
                for m, n in zip(turn, raw["lengths"], strict=True)
            )
            for turn in raw["turns"]
        )
        return cls(tuple(raw["lengths"]), turns, raw["layer"], raw["layers"])

    def dirty_share(self, page_tokens: int) -> float:
        """Share of the K/V pages of layers [layer, layers) that hold a corrected row, over all turns."""
        dirty = total = 0
        for turn in self.turns:
            for mask in turn:
                pages = np.add.reduceat(mask, np.arange(0, len(mask), page_tokens))
                dirty, total = dirty + int((pages > 0).sum()), total + len(pages)
        return dirty / total


def record(
    backend: ReferenceBackend,
    mix: str,
    templates: int,
    turns: int,
    tokens: int,
    layer: int,
    recompute_ratio: float,
    seed: int,
) -> list[Template]:
    """Run the turns of `templates` SWE-style templates under CacheSlide with this layer and recompute ratio."""
    policy = load_policy("cacheslide").at_layer(layer).at_ratio(recompute_ratio)
    out = []
    for prompt in prompts.prompts("swebench", mix, "test", seed, templates, tokens):
        rng = Random(f"{prompt.id}-{seed}-turns")
        engine = backend.engine(policy, MemoryChunkStore(), EngineSettings(chunk_size=256))
        documents = [(d.title, prompts.text(d.pieces())) for d in prompt.documents]
        values, taken, lengths = prompt.values[0], [], ()
        for _ in range(turns):
            values = draw_root_values(rng, "test", prompt.world.roots, values)
            notes = prompts.text(render.notes_document(rng, "swebench", prompt.world, values).pieces())
            now = backend.prompt(prompts.segments("swebench", notes, documents), "Question:")
            engine.build(now)
            done, plan = engine.prefill(now), engine.plan(now)
            selected = np.zeros(len(plan.prompt), dtype=bool)
            selected[done.output.selected.numpy()] = True
            taken.append(tuple(selected[c.start : c.end] for c in plan.chunks))
            lengths = tuple(len(c) for c in plan.chunks)
        out.append(Template(lengths, tuple(taken), layer, backend.model.num_layers))
    return out


def main(
    model: str | Path, mixes=("sparse", "deep"), layers=(1, 4), templates=8, turns=6, tokens=1024
) -> dict[str, Any]:
    """All traces of a study, keyed by mix and selection layer, as JSON."""
    backend = ReferenceBackend(model)
    return {
        f"{mix}@{layer}": [t.as_dict() for t in record(backend, mix, templates, turns, tokens, layer, 0.26, seed=11)]
        for mix in mixes
        for layer in layers
    }
