"""Chooses the one selection layer that every system of a run uses, on validation data."""

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from cacheslide.store.memory import MemoryChunkStore
from harness.backend import EngineSettings, ReferenceBackend
from harness.experiments.chunks import build_chunks
from harness.scoring import question_records
from harness.systems import resolve
from harness.tasks.example import TaskExample

MARGIN = 0.015  # F1 below recompute that still counts as recovered


def select_layer(
    backend: ReferenceBackend,
    data: Mapping[str, Sequence[TaskExample]],
    settings: EngineSettings,
    share: float,
    systems: Sequence[str] = ("cacheslide", "cacheblend"),
    max_new_tokens: int = 8,
) -> dict:
    """Sweep the selection layer over layers 1 .. L/2; beyond, the layers computed in full leave little to save.

    The choice is the smallest layer at which the first of `systems`, at `share` of the reused rows, is within
    `MARGIN` F1 of recompute on every data set; where none is, the layer with the highest worst-case F1.
    Layer 0 is left out: its keys do not depend on context, so their deviation says nothing.
    """
    table: dict[str, dict[str, float]] = {}
    layers = range(1, max(2, backend.model.num_layers // 2 + 1))
    for dataset, examples in data.items():
        arms = {"recompute": resolve(["recompute"])[0]}
        for name in systems:
            arms |= {f"{name}@{i}": resolve([name], layer=i)[0] for i in layers}
        if systems:
            arms[f"{systems[0]}@{layers[0]}"] = arms[f"{systems[0]}@{layers[0]}"].at_share(share)
            arms |= {f"{systems[0]}@{i}": arms[f"{systems[0]}@{i}"].at_share(share) for i in layers}
        totals = dict.fromkeys(arms, 0.0)
        count = 0
        for example in tqdm(examples, desc=f"selection layer, {dataset}", mininterval=1):
            store = MemoryChunkStore()
            build_chunks(backend, [example], list(arms.values()), store, settings, progress=None)
            prompt, room = backend.prompt(example.segments), backend.room(example, max_new_tokens)
            for name, policy in arms.items():
                engine = backend.engine(policy, store, settings)
                state = engine.prefill(prompt, following=1, room=room)
                found = question_records(example, backend.answers(state, example, max_new_tokens))
                totals[name] += sum(q["f1"] for q in found)
            count += len(example.questions)
        table[dataset] = {name: total / count for name, total in totals.items()}
    return {"layer": _choose(table, systems[0], layers), "share": share, "margin": MARGIN, "f1": table}


def _choose(table: Mapping[str, Mapping[str, float]], system: str, layers: range) -> int:
    worst = {i: min(row[f"{system}@{i}"] - row["recompute"] for row in table.values()) for i in layers}
    good = [i for i in layers if worst[i] >= -MARGIN]
    return good[0] if good else max(layers, key=lambda i: worst[i])
