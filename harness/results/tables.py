"""Accuracy tables by data set and dependency mix, with intervals clustered by prompt, paired with recompute."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.results import intervals
from harness.results.runs import OURS, REFERENCE, BySystem, RecordFile, Run, mix_of

SHARE_TOLERANCE = 0.01  # shares are rounded to whole rows of each prompt
SCORES = ("f1", "em", "rouge_l", "success")


@dataclass(frozen=True)
class Answers:
    """One system's answers over one or more data sets, by (data set, prompt, question)."""

    files: dict[str, RecordFile]
    questions: dict[tuple[str, str, str], dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def clusters(self) -> list[Hashable]:
        """The prompt of every answer."""
        return [key[:2] for key in self.questions]

    def scores(self, name: str) -> list[float]:
        """One score of every answer."""
        return [q[name] for q in self.questions.values()]


def collect(files: Mapping[str, RecordFile]) -> Answers:
    """The answers in `files`, which maps data sets to one system's records."""
    questions = {
        (dataset, record["id"], q["id"]): q
        for dataset, f in files.items()
        for record in f.records
        for q in record["questions"]
    }
    return Answers(dict(files), questions, [r for f in files.values() for r in f.records])


def accuracy_table(run: Run, stage: str, progress: str | None = None) -> list[dict[str, Any]]:
    """One row per data set and system, then one per mix and system.

    `stage` is "accuracy" or "equal_share". Losses are paired with recompute of the same stage, or of the accuracy
    stage if the stage has none (the prompts are the same).
    """
    data = _with_fitting(run) if stage == "equal_share" else getattr(run, stage)
    scopes = [("dataset", d, [d]) for d in data]
    scopes += [("mix", m, [d for d in data if mix_of(d) == m]) for m in dict.fromkeys(map(mix_of, data))]
    todo = [
        (kind, name, members, system)
        for kind, name, members in scopes
        for system in run.order(s for d in members for s in data[d])
    ]
    rows = []
    for kind, name, members, system in tqdm(todo, desc=progress, disable=progress is None, mininterval=1):
        own = {d: data[d][system] for d in members if system in data[d]}
        reference = {d: _reference(run, stage, d) for d in own}
        answers = collect(own)
        row = {"scope": kind, "name": name, "datasets": sorted(own), "system": system}
        row |= {"title": run.titles.get(system, system)} | _settings(own) | _counts(answers)
        if answers.questions:
            row |= _scores(answers) | _receipts(answers)
            row["loss_points"] = _loss(collect({d: f for d, f in reference.items() if f}), answers)
            if kind == "mix":
                row |= _strata(answers)
        rows.append(row)
    return rows


def _with_fitting(run: Run) -> dict[str, BySystem]:
    """Equal-share records, and accuracy records of recompute and of systems that recompute that share by default.

    A run need not repeat the latter, whose answers would be the same.
    """
    out: dict[str, BySystem] = {}
    for dataset, files in run.equal_share.items():
        recompute_ratio = next(
            (f.settings["recompute_ratio"] for f in files.values() if f.settings.get("recompute_ratio") is not None),
            None,
        )
        others = {s: f for s, f in run.accuracy.get(dataset, {}).items() if s not in files}
        out[dataset] = files | {s: f for s, f in others.items() if s == REFERENCE or _recomputes(f, recompute_ratio)}
    return out


def _recomputes(file: RecordFile, recompute_ratio: float | None) -> bool:
    if recompute_ratio is None or not file.records:
        return False
    share = receipt_totals([r["receipt"] for r in file.records])["recomputed_share"]
    return share is not None and abs(share - recompute_ratio) <= SHARE_TOLERANCE


def accuracy_ratios(run: Run) -> list[dict[str, Any]]:
    """CacheSlide's mean F1 over each other system's, by mix, on questions that both answered."""
    out = []
    for mix in dict.fromkeys(map(mix_of, run.accuracy)):
        members = {d: files for d, files in run.accuracy.items() if mix_of(d) == mix and OURS in files}
        cacheslide = collect({d: files[OURS] for d, files in members.items()})
        for system in run.order(s for files in members.values() for s in files if s != OURS):
            other = collect({d: files[system] for d, files in members.items() if system in files})
            both = [key for key in cacheslide.questions if key in other.questions]
            if both:
                a, b = ([x.questions[key]["f1"] for key in both] for x in (cacheslide, other))
                f1_ratio = intervals.ratio_of_sums(a, b, [key[:2] for key in both])
                out.append({"mix": mix, "system": system, "f1_ratio": f1_ratio})
    return out


def _reference(run: Run, stage: str, dataset: str) -> RecordFile | None:
    for files in (getattr(run, stage).get(dataset, {}), run.accuracy.get(dataset, {})):
        if REFERENCE in files:
            return files[REFERENCE]
    return None


def _settings(files: Mapping[str, RecordFile]) -> dict[str, Any]:
    settings = [f.settings for f in files.values()]
    return {
        key: next((s[key] for s in settings if s.get(key) is not None), None) for key in ("layer", "recompute_ratio")
    }


def _counts(answers: Answers) -> dict[str, Any]:
    return {
        "prompts": len(answers.records),
        "questions": len(answers.questions),
        "failures": sum(len(f.failures) for f in answers.files.values()),
    }


def _scores(answers: Answers) -> dict[str, Any]:
    clusters = answers.clusters
    return {name: intervals.mean(answers.scores(name), clusters) for name in SCORES}


def _loss(reference: Answers, answers: Answers) -> dict[str, Any] | None:
    both = [key for key in answers.questions if key in reference.questions]
    if not both:
        return None
    a, b = ([x.questions[key]["f1"] for key in both] for x in (reference, answers))
    return intervals.points_lost(a, b, [key[:2] for key in both])


def _strata(answers: Answers) -> dict[str, Any]:
    """Mean F1 by hops, and separately for answers that depend on updated text and others."""
    out: dict[str, list] = {"by_depth": [], "by_volatility": []}
    for field, target in (("depth", "by_depth"), ("volatile", "by_volatility")):
        for value in sorted({q[field] for q in answers.questions.values() if q.get(field) is not None}):
            keys = [key for key, q in answers.questions.items() if q.get(field) == value]
            f1 = intervals.mean([answers.questions[key]["f1"] for key in keys], [key[:2] for key in keys])
            out[target].append({field: value, "f1": f1})
    return out


def receipt_totals(receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of a system's receipts: means per request, and how often nothing was reused, by reason."""
    reused, recomputed = (sum(r[key] for r in receipts) for key in ("tokens_reused", "tokens_recomputed"))
    reasons = Counter(r["fallback"] for r in receipts if r.get("fallback"))
    return {
        "compute_fraction": _mean(r["compute_fraction"] for r in receipts),
        "tokens_reused": reused / len(receipts),
        "tokens_recomputed": recomputed / len(receipts),
        "recomputed_share": recomputed / (reused + recomputed) if reused + recomputed else None,
        "bytes_loaded": _mean(r["bytes_loaded"] for r in receipts),
        "chunks": _mean(r["chunks"] for r in receipts),
        "chunks_hit": _mean(r["chunks_hit"] for r in receipts),
        "requests_without_reuse": sum(r["tokens_reused"] <= 0 for r in receipts),
        "fallbacks": dict(sorted(reasons.items())),
    }


def _receipts(answers: Answers) -> dict[str, Any]:
    out = receipt_totals([r["receipt"] for r in answers.records])
    out["tokens"] = _mean(r["tokens"] for r in answers.records)
    seconds = [r["prefill_seconds"] for r in answers.records if r.get("prefill_seconds") is not None]
    if seconds:
        out["prefill_seconds"] = {"median": intervals.median(seconds), "p95": intervals.p95(seconds)}
    layers = [r["cksim"] for r in answers.records if r.get("cksim")]
    out["cksim_by_layer"] = np.mean(layers, axis=0).tolist() if layers else None
    return out


def _mean(values) -> float:
    return float(np.mean(list(values)))
