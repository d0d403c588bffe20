"""Tables of the frontier: F1, points lost to recompute and compute fraction of every setting, over several models.

Intervals are 95 % and resample models (training seeds) and prompts, both (`bootstrap.crossed_mean`). Comparisons are
paired: the same model, prompt and question. A setting of one model has the layer chosen for that model.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.experiments.rules.frontier_cells import (
    DEFAULT,
    DEFAULT_RATIO,
    ISOLATED,
    NOTHING,
    RANDOM,
    RECOMPUTE,
    STALE,
    Setting,
)
from harness.metrics import bootstrap
from harness.results import intervals

SCHEMA = "cacheslide.frontier/1"
LAYERS, REPORTED = "layers", "reported"  # parts of a run
Record = Mapping[str, Any]
Answers = dict[str, dict[str, Record]]  # model -> prompt -> record


class Measured(Protocol):
    """One model's part of a run."""

    model: Path
    settings: list[Setting]
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    layers: dict[str, int] | None


def layer_scores(setting: Setting, records: Iterable[Record]) -> dict[int, tuple[float, float]]:
    """By candidate layer: mean F1 and compute fraction over the prompts that every candidate answered."""
    by_cell: dict[str, dict[str, Record]] = {c.name: {} for c in setting.cells.values()}
    for r in records:
        if r["part"] == LAYERS and r["cell"] in by_cell:
            by_cell[r["cell"]][r["example"]] = r
    by_layer = {layer: own for layer, cell in setting.cells.items() if (own := by_cell[cell.name])}
    shared = set.intersection(*(set(own) for own in by_layer.values())) if by_layer else set()
    out = {}
    for layer, own in by_layer.items() if shared else ():
        f1 = [x for e in sorted(shared) for x in own[e]["f1"]]
        out[layer] = sum(f1) / len(f1), sum(own[e]["compute_fraction"] for e in shared) / len(shared)
    return out


def choose_layers(settings: Iterable[Setting], records: Sequence[Record]) -> dict[str, int]:
    """By setting: the layer of the highest mean F1, of equal ones the cheapest. Settings without records have none."""
    out = {}
    for setting in settings:
        scores = layer_scores(setting, records) if setting.layered else {}
        if scores:
            out[setting.name] = min(scores, key=lambda layer: (-scores[layer][0], scores[layer][1], layer))
    return out


def tabulate(done: Sequence[Measured], planned: Mapping[str, int]) -> dict[str, Any]:
    """The content of the result file; `planned` holds the prompts that a complete model has."""
    settings = done[0].settings
    answers = {s.name: _answers(s, done) for s in settings}
    rows = [_row(s, answers, done) for s in settings if answers[s.name]]
    return {
        "schema": SCHEMA,
        "level": intervals.LEVEL,
        "models": [_about(m, answers, planned) for m in done],
        "headline": headline(answers, rows),
        "front": front(rows),
        "rows": rows,
        "not_measured": [s.name for s in settings if not answers[s.name]],
        "layer_scores": {m.model.name: _scores(m) for m in done},
    }


def _answers(setting: Setting, done: Sequence[Measured]) -> Answers:
    """A setting's reported records, by model and prompt."""
    out: Answers = {}
    for m in done:
        layer = (m.layers or {}).get(setting.name) if setting.layered else None
        if layer is None and setting.layered:
            continue
        name = setting.cells[layer].name
        own = {r["example"]: r for r in m.records if r["part"] == REPORTED and r["cell"] == name}
        if own:
            out[m.model.name] = own
    return out


def _about(m: Measured, answers: Mapping[str, Answers], planned: Mapping[str, int]) -> dict[str, Any]:
    """How much of a model was measured: the prompts on which every setting was, and whether these are all."""
    own = [set(answers[s.name].get(m.model.name, {})) for s in m.settings]
    refused: dict[str, str] = {f["cell"]: f["failure"] for f in m.failures}
    complete = [o for s, o in zip(m.settings, own, strict=True) if not any(c.name in refused for c in s.cells.values())]
    prompts = len(set.intersection(*complete)) if complete else 0
    chosen = len({r["example"] for r in m.records if r["part"] == LAYERS})
    enough = prompts >= planned["prompts"] and chosen >= planned["layer_prompts"]
    out = {"model": m.model.name, "prompts": prompts, "layer_prompts": chosen, "complete": enough}
    return out | {"failures": refused}


def _scores(m: Measured) -> dict[str, dict[str, list[float]]]:
    by_setting = {s.name: layer_scores(s, m.records) for s in m.settings if s.layered}
    return {
        name: {str(layer): list(pair) for layer, pair in scores.items()}
        for name, scores in by_setting.items()
        if scores
    }


def _row(setting: Setting, answers: Mapping[str, Answers], done: Sequence[Measured]) -> dict[str, Any]:
    own, layers = answers[setting.name], {m.model.name: m.layers or {} for m in done}
    random = f"{RANDOM} {100 * setting.ratio:g} %" if setting.ratio is not None and setting.family == "chain" else ""
    row: dict[str, Any] = {
        "setting": setting.name,
        "line": setting.line,
        "family": setting.family,
        "ratio": setting.ratio,
        "asks": any(c.asks for c in setting.cells.values()),
        "f1": estimate(own),
        "loss_points": points(answers[RECOMPUTE], own),
        "gain_over_random_points": points(own, answers.get(random, {})) if random != setting.name else None,
        "compute_fraction": _mean(r["compute_fraction"] for of in own.values() for r in of.values()),
        "by_model": {},
    }
    for name, records in own.items():
        row["by_model"][name] = {
            "f1": _mean(x for r in records.values() for x in r["f1"]),
            "compute_fraction": _mean(r["compute_fraction"] for r in records.values()),
            "prompts": len(records),
            "layer": layers[name].get(setting.name),
        }
    return row


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _crossed(own: Answers, value: Callable[[str, str], Sequence[float]], scale: float) -> dict[str, Any] | None:
    """Mean of the values of every model and prompt, with its interval; `prompts` counts those of all models."""
    values, models, prompts = [], [], []
    for model, records in own.items():
        for prompt in records:
            own_values = value(model, prompt)
            values += own_values
            models += [model] * len(own_values)
            prompts += [prompt] * len(own_values)
    if not values:
        return None
    mean = intervals.as_json(bootstrap.crossed_mean(values, models, prompts, level=intervals.LEVEL), scale)
    return mean | {"models": len(set(models))}


def estimate(own: Answers) -> dict[str, Any]:
    """Mean F1 over the questions of all models and prompts."""
    return _crossed(own, lambda model, prompt: own[model][prompt]["f1"], 1.0)


def points(one: Answers, other: Answers) -> dict[str, Any] | None:
    """F1 points of `one` above `other` on what both answered; None without any."""
    both: Answers = defaultdict(dict)
    for model, records in one.items():
        for prompt, record in records.items():
            if prompt in other.get(model, {}):
                both[model][prompt] = record

    def gain(model: str, prompt: str) -> list[float]:
        pairs = zip(one[model][prompt]["f1"], other[model][prompt]["f1"], strict=True)
        return [a - b for a, b in pairs]

    return _crossed(both, gain, 100.0)


def headline(answers: Mapping[str, Answers], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Points that reuse loses in the main cases; stale positions against the same in place."""
    loss = {r["setting"]: r["loss_points"] for r in rows}
    out = {"naive_loss_points": loss.get(NOTHING), "isolated_loss_points": loss.get(ISOLATED)}
    out["stale_loss_points"] = points(answers.get(NOTHING, {}), answers.get(STALE, {}))
    out["random_loss_points"] = {r["setting"]: r["loss_points"] for r in rows if r["line"] == RANDOM}
    default = f"{DEFAULT} {100 * DEFAULT_RATIO:g} %"
    out["default_loss_points"] = loss.get(default)
    out["default_compute_fraction"] = next((r["compute_fraction"] for r in rows if r["setting"] == default), None)
    return out


def front(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that no other beats in F1 at the same compute or less, from little compute to much."""
    out, best = [], -1.0
    for row in sorted(rows, key=lambda r: (r["compute_fraction"], -r["f1"]["value"])):
        if row["f1"]["value"] > best:
            out.append(row["setting"])
            best = row["f1"]["value"]
    return out


def show(result: Mapping[str, Any]) -> str:
    """The table as lines of text."""
    lines = [f"{m['model']}: {m['prompts']} prompts{'' if m['complete'] else ', INCOMPLETE'}" for m in result["models"]]
    for row in sorted(result["rows"], key=lambda r: r["compute_fraction"]):
        loss = row["loss_points"]
        ends = "" if not loss or loss["low"] is None else f" [{loss['low']:+.1f}, {loss['high']:+.1f}]"
        lost = "" if not loss else f"lost {loss['value']:+6.1f}{ends}"
        layers = [str(m["layer"]) for m in row["by_model"].values() if m["layer"] is not None]
        at = f"  at layer {', '.join(layers)}" if layers else ""
        lines.append(
            f"{row['setting']:46s} compute {row['compute_fraction']:.2f}  F1 {row['f1']['value']:.3f}  {lost}{at}"
        )
    return "\n".join(lines)
