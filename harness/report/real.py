"""The report's first section: a pretrained model on real text, from results/real/summary.json."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from cacheslide.errors import DataError
from harness.experiments.real.arms import NOISE
from harness.experiments.real.trials import SETTINGS
from harness.real_model.__main__ import FOLDER
from harness.report.words import interval, percent, significant
from harness.results.real import ISOLATED, NOTHING, OURS, POOLED, RIVAL, SCHEMA, best_within, largest_within

Real = Mapping[str, Any]
Row = dict[str, Any]
PRINTED, BY_K, BY_V = "CacheSlide as printed", "CacheSlide, by K", "CacheBlend, by V"
NARROW = f"{PRINTED}, updated keys only"
MOST, FEW = 0.33, 0.20  # compute fractions, as in the file's headline
FIGURES = ("real", "fig03_real")
MAIN = "matter"

ABOUT = {
    "unrelated": "the updated text is about nothing that is asked",
    "matter": "it holds a passage that the question needs",
    "shift": "it has grown by 100 to 2,000 tokens",
    "contradict": "it says that the passages have the answer wrong",
}
NOTES = {
    NOISE: "exact arithmetic in another batching: the noise floor",
    NOTHING: "caches as the turn before left them, keys moved (RPDC)",
    PRINTED: "alpha fusion, swap, 26 %; all keys are attended to, where the paper attends to updated ones only",
    NARROW: "recomputed tokens attend to updated text and themselves, as the paper has it",
    f"{BY_K} 26 %": "this project's form: fresh KV instead of fusion, no swap",
    ISOLATED: "every passage encoded alone, keys moved (PIC)",
}
COMPARED = {
    "rpdc over pic": "order-preserving reuse over passages encoded alone, nothing recomputed in either",
    "ours over nothing recomputed": "the first tokens of the fixed text recomputed, over nothing recomputed",
    "ours over the best CacheBlend": f"the same over CacheBlend's best arm within {100 * MOST:.0f} % of compute",
}


def check(real: Real, path: Any) -> None:
    """DataError unless the summary has the schema that this section reads."""
    if real.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {real.get('schema')!r}, expected {SCHEMA!r}")


def row(real: Real, arm: str, setting: str = MAIN) -> Row | None:
    """The row of the arm `arm`, else of an arm with that prefix (its layer was chosen), both data sets pooled."""
    rows = [r for r in real["frontier"] if r["key"][:2] == [setting, POOLED]]
    same = [r for r in rows if r["key"][2] == arm]
    return next(iter(same or [r for r in rows if r["key"][2].startswith(f"{arm} ")]), None)


def blend(real: Real, setting: str = MAIN) -> Row | None:
    """CacheBlend's arm of the lowest KL within 33 % of compute."""
    return best_within(real["frontier"], RIVAL, MOST, setting, POOLED)


def chosen(rule: str, ratio: str) -> Callable[[Real, str], Row | None]:
    """A function that returns the row of a rule at `ratio` and its layer chosen on the validation part."""

    def find(real: Real, setting: str) -> Row | None:
        layer = (_first(real).get("best") or {}).get(rule, 1)
        return row(real, f"{rule} {ratio} at layer {layer}", setting)

    return find


def _named(arm: str) -> Callable[[Real, str], Row | None]:
    return lambda real, setting: row(real, arm, setting)


ROWS: tuple[tuple[str, Callable[[Real, str], Row | None]], ...] = (
    *((name, _named(name)) for name in (NOISE, NOTHING, f"{OURS} 10 %", f"{OURS} 20 %", PRINTED, NARROW)),
    (f"{BY_K} 26 %", chosen(BY_K, "26 %")),
    *((name, _named(name)) for name in ("Canonical, nothing recomputed", "Canonical, first tokens 10 %")),
    *((name, _named(name)) for name in (ISOLATED, "EPIC 32 + 32")),
    (f"CacheBlend, best within {100 * MOST:.0f} %", blend),
    (f"{BY_V} 15 %, layer chosen for it", chosen(BY_V, "15 %")),
    ("Chain, stale positions", _named("Chain, stale positions")),
    ("CacheBlend, stale positions", _named("CacheBlend, stale positions")),
)  # fmt: skip


def section(real: Real) -> dict[str, Any]:
    """The template's values: sentences, headline, comparisons, tables, limits."""
    settings = [s for s in SETTINGS if any(r["key"][0] == s for r in real["frontier"])]
    return {
        "opening": opening(real),
        "headline": headline(real),
        "settings": [{"name": s, "about": ABOUT[s], "n": _most(real, s)} for s in settings],
        "rows": _rows(real, settings),
        "comparisons": _comparisons(real, settings),
        "histories": _histories(real),
        "replay": [_replayed(r) for r in real["replay"]],
        "limits": limits(real),
        "conditions": _conditions(real),
    }


def kl(found: Row | None) -> str:
    """KL on the answer with its interval."""
    return "–" if found is None else estimate(found["answer"]["kl"])


def estimate(value: Mapping[str, Any]) -> str:
    """Value and interval, to three digits."""
    return f"{significant(value['value'])} {interval(dict(value), significant)}"


def opening(real: Real) -> list[str]:
    """The opening sentences, on the setting *matter*."""
    conditions, floor, plain = _first(real), row(real, NOISE), row(real, NOTHING)
    if floor is None or plain is None:
        return []
    out = [
        f"{conditions.get('model')} on real questions with passages ({', '.join(conditions.get('data') or [])}), when "
        f"the updated text holds a passage that the question needs (n = {plain['n']} prompts): reusing the turn before "
        f"with moved keys and nothing recomputed is {kl(plain)} nats a token from recompute's next-token distribution "
        f"(KL, 95 % interval) at {percent(plain['compute_fraction'])} of the compute; recompute in another batching, "
        f"the noise floor, is {kl(floor)} from it."
    ]
    if (alone := row(real, ISOLATED)) is not None:
        out.append(f"Passages encoded alone are {kl(alone)} away.")
    if (best := blend(real)) is not None:
        out.append(f"CacheBlend's best arm within {percent(MOST, 0)} of the compute is {kl(best)} away.")
    if (ours := largest_within(real["frontier"], OURS, FEW, MAIN, POOLED)) is not None:
        out.append(
            f"With the first tokens of the fixed text recomputed ({percent(ours['compute_fraction'])} of the compute) "
            f"it is {kl(ours)}."
        )
    if (printed := row(real, PRINTED)) is not None:
        out.append(f"{PRINTED} is {kl(printed)} away at {percent(printed['compute_fraction'])}.")
    return out


def headline(real: Real) -> list[dict[str, str]]:
    """The file's headline numbers, each with the interval of its row."""
    ours = largest_within(real["frontier"], OURS, FEW, MAIN, POOLED)
    ratio = _ratio(real, "rpdc over pic", MAIN)
    behind: dict[str, tuple[str, Mapping[str, Any] | None]] = {
        "kl_nothing_recomputed": _of(row(real, NOTHING)),
        "kl_isolated": _of(row(real, ISOLATED)),
        "kl_cacheblend_best_at_33pct": _of(blend(real)),
        "kl_cacheslide_at_20pct_compute": _of(ours),
        "kl_noise_floor": _of(row(real, NOISE)),
        "greedy_flip_share_cacheslide": (
            "prompts whose greedy continuation of 32 tokens changes; the noise floor: "
            + ("–" if (floor := row(real, NOISE)) is None else percent(floor["flips"]["value"])),
            ours and ours["flips"] | {"n": ours["n"]},
        ),
        "rpdc_over_pic_kl_ratio": (COMPARED["rpdc over pic"], ratio),
        "real_sessions_replayed": ("recorded sessions of agents", None),
    }
    out = []
    for key, value in real["headline"].items():
        about, measured = behind.get(key, ("", None))
        shown = "–" if value is None else str(value) if isinstance(value, int) else significant(value)
        spread = interval(dict(measured), significant) if measured else "–"
        out.append({"key": key, "value": shown, "interval": spread, "about": about, "n": _n(measured)})
    return out


def limits(real: Real) -> list[str]:
    """Limits of these numbers."""
    conditions = _first(real)
    sizes = sorted({r["n"] for r in real["frontier"] if r["key"][1] == POOLED})
    floor = row(real, NOISE)
    model = f"One model, {conditions.get('model')}"
    if conditions.get("model") == FOLDER:
        model += ": a base model of 270 million parameters, its weights dequantised from 4-bit ones (Q4_K_M)"
    n = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    data = ", ".join(conditions.get("data") or ["unnamed data"])
    out = [
        f"{model}. Larger models, and those tuned for instructions, may differ.",
        f"Prompts a setting: {n}, of {data}; intervals are over prompts.",
        "KL is over the answer's tokens, teacher-forced: it says how far predictions move, not how many answers go "
        "wrong, and no time was measured.",
    ]
    if floor is not None:
        out.append(
            f"In {conditions.get('dtype')} recompute in another batching already differs by {kl(floor)} and changes "
            f"{percent(floor['flips']['value'])} of greedy continuations: differences below that are noise."
        )
    if real.get("failures"):
        out.append(f"{real['failures']} measurements failed and are in no table.")
    return out


def _of(found: Row | None) -> tuple[str, Mapping[str, Any] | None]:
    if found is None:
        return "", None
    return f"{found['key'][2]}, setting {MAIN}", found["answer"]["kl"] | {"n": found["n"]}


def _n(measured: Mapping[str, Any] | None) -> str:
    return f"n = {measured['n']}" if measured else ""


def _first(real: Real) -> Mapping[str, Any]:
    return real["conditions"].get("frontier", {})


def _most(real: Real, setting: str) -> int:
    return max(r["n"] for r in real["frontier"] if r["key"][:2] == [setting, POOLED])


def _rows(real: Real, settings: Sequence[str]) -> list[dict[str, Any]]:
    out = []
    for name, find in ROWS:
        cells = []
        for setting in settings:
            found = find(real, setting)
            arm = "" if found is None or found["key"][2] == name else found["key"][2]
            if found is not None and found["n"] < _most(real, setting):
                arm = f"{arm} (n = {found['n']})".strip()
            cells.append({
                "kl": kl(found), "arm": arm,
                "compute": "–" if found is None else percent(found["compute_fraction"], 0),
                "flips": "–" if found is None else percent(found["flips"]["value"], 0),
            })  # fmt: skip
        out.append({"name": name, "note": NOTES.get(name, ""), "cells": cells})
    return out


def _ratio(real: Real, comparison: str, setting: str, dataset: str = POOLED) -> Row | None:
    same = (r for r in real["comparisons"] if (r["comparison"], r["setting"]) == (comparison, setting))
    return next((r for r in same if r["dataset"] == dataset), None)


def _comparisons(real: Real, settings: Sequence[str]) -> list[dict[str, Any]]:
    out = []
    names = sorted({r["dataset"] for r in real["comparisons"]} - {POOLED})
    for name, dataset in product(COMPARED, [POOLED, *names]):
        about = COMPARED[name] if dataset == POOLED else f"{dataset} alone"
        ratios = [_ratio(real, name, s, dataset) for s in settings]
        cells = [
            {"ratio": "–", "arms": ""} if r is None
            else {"ratio": f"{estimate(r)}, n = {r['n']}", "arms": f"{r['of']} / {r['over']}"}
            for r in ratios
        ]  # fmt: skip
        out.append({"about": about, "cells": cells})
    return out


def _histories(real: Real) -> dict[str, Any]:
    """KL by turn (counted from 1), arms down; empty where histories were not measured."""
    turns = sorted({r["key"][0] for r in real["histories"]})
    at = {(r["key"][0], r["key"][1]): r for r in real["histories"]}
    arms = list(dict.fromkeys(r["key"][1] for r in real["histories"]))
    rows = [
        {
            "name": arm,
            "cells": [estimate(at[t, arm]["greedy"]["kl"]) if (t, arm) in at else "–" for t in turns],
            "compute": percent(at[turns[-1], arm]["compute_fraction"], 0) if (turns[-1], arm) in at else "–",
        }
        for arm in arms
    ]
    return {"turns": [t + 1 for t in turns], "n": max((r["n"] for r in real["histories"]), default=0), "rows": rows}


def _replayed(found: Row) -> dict[str, Any]:
    group, arm = found["key"]
    kept = found["greedy"]["kl"]
    return {
        "group": group,
        "name": arm,
        "kl": estimate(kept),
        "flips": percent(found["flips"]["value"], 0),
        "compute": percent(found["compute_fraction"], 0),
        "n": found["n"],
        "turns": found["measured"],
    }


def _conditions(real: Real) -> str:
    first, made = _first(real), real["provenance"].get("frontier", {})
    gpus = ", ".join(g["name"] for g in made.get("gpus", [])) or made.get("cpu", "unknown")
    best = ", ".join(f"{name}: {layer}" for name, layer in (first.get("best") or {}).items())
    return (
        f"{first.get('model')}, {first.get('dtype')}, seed {first.get('seed')}; {gpus}; code "
        f"{(made.get('git_commit') or 'unknown')[:12]}; selection layers chosen on prompts that give no results: {best}"
    )
