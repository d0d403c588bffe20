"""A frontier's result from made records: what every setting answered on a few prompts of several models."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from harness.experiments.rules.frontier_cells import Setting, settings
from harness.results.frontier import LAYERS, REPORTED, choose_layers, tabulate

ABOUT = {"datasets": ["hotpotqa-ledger"], "tokens": 800, "seed": 1}


@dataclass
class Made:
    """One model's records."""

    model: Path
    settings: list[Setting]
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, int] | None = None


def record(part: str, cell: str, prompt: str, f1: list[float], compute: float = 0.5) -> dict[str, Any]:
    """One record, as far as tables read it."""
    return {"part": part, "cell": cell, "example": prompt, "f1": f1, "compute_fraction": compute}


def make_model(name: str, prompts: int, rng: Random, num_layers: int = 24) -> Made:
    """A model that answered at random, better with more compute; all of its settings on all prompts."""
    made = Made(Path(name), settings(num_layers), [])
    for part in (LAYERS, REPORTED):
        for s in made.settings:
            for layer, cell in s.cells.items():
                if part == LAYERS and layer is None:
                    continue
                compute = 1.0 if s.family == "exact" else rng.uniform(0.2, 0.9)
                for i in range(prompts):
                    f1 = [float(rng.random() < 0.4 + 0.6 * compute) for _ in range(8)]
                    made.records.append(record(part, cell.name, f"{part} {i}", f1, compute))
    made.layers = choose_layers(made.settings, made.records)
    return made


def frontier_result(models: int = 3, prompts: int = 4) -> dict[str, Any]:
    """The tables of made models, with what a result file says about the run."""
    rng = Random(3)
    done = [make_model(f"seed-{i}", prompts, rng) for i in range(models)]
    return tabulate(done, {"prompts": prompts, "layer_prompts": prompts}) | {"settings": ABOUT}
