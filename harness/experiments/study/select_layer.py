"""Chooses the one selection layer that every system of a run uses, on validation data."""

from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from harness.backends.responders import Responder
from harness.scoring import question_records
from harness.systems import System, resolve
from harness.tasks.example import TaskExample

MARGIN = 0.015  # F1 below recompute that still counts as recovered


def select_layer(
    sessions: Iterable[tuple[Responder, Sequence[System]]],
    num_layers: int,
    data: Mapping[str, Sequence[TaskExample]],
    recompute_ratio: float,
    systems: Sequence[str] = ("cacheslide", "cacheblend"),
    max_new_tokens: int = 8,
) -> dict:
    """Sweep the selection layer over `layers_to_try`.

    The choice is the smallest layer at which the first of `systems`, at `recompute_ratio` of the reused rows, is within
    `MARGIN` F1 of recompute on every data set; if none is, the layer with the highest worst-case F1.
    `sessions` holds one responder that serves them all.
    """
    layers = layers_to_try(num_layers)
    arms = {"recompute": resolve(["recompute"])[0]}
    for name in systems:
        arms |= {f"{name}@{i}": resolve([name], layer=i)[0] for i in layers}
    arms |= {f"{systems[0]}@{i}": arms[f"{systems[0]}@{i}"].at_ratio(recompute_ratio) for i in layers}
    table: dict[str, dict[str, float]] = {}
    for responder, _ in sessions:
        for dataset, examples in data.items():
            totals = dict.fromkeys(arms, 0.0)
            for example in tqdm(examples, desc=f"selection layer, {dataset}", mininterval=1):
                responder.fill([example], list(arms.values()))
                for name, system in arms.items():
                    found = question_records(example, responder.respond(system, example, max_new_tokens).texts)
                    totals[name] += sum(q["f1"] for q in found)
            count = sum(len(e.questions) for e in examples)
            table[dataset] = {name: total / count for name, total in totals.items()}
    return {
        "layer": choose(table, systems[0], layers),
        "recompute_ratio": recompute_ratio,
        "margin": MARGIN,
        "f1": table,
    }


def layers_to_try(num_layers: int) -> range:
    """Layers 1 .. L/2.

    Keys of layer 0 do not depend on context, so they have no deviation; beyond L/2 the layers computed in full
    leave little to save.
    """
    return range(1, max(2, num_layers // 2 + 1))


def choose(table: Mapping[str, Mapping[str, float]], system: str, layers: range) -> int:
    """The smallest of `layers` at which `system` is within `MARGIN` of recompute in every row, or the best one."""
    worst = {i: min(row[f"{system}@{i}"] - row["recompute"] for row in table.values()) for i in layers}
    good = [i for i in layers if worst[i] >= -MARGIN]
    return good[0] if good else max(layers, key=lambda i: worst[i])
