"""Tables of the study on a real model: `python -m harness.results.real summary RECORDS --out FILE`.

Every mean has a percentile bootstrap interval over prompts (over sessions if turns belong to one); comparisons are
paired. KL is relative to recompute's next-token distribution, in nats per token.

`python -m harness.results.real layers RECORDS --out layers.json` chooses each rule's selection layer on the validation
part: the one with the lowest mean KL on the answer.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.experiments.real.arms import ASKED, MIXED, NOISE, QUESTION
from harness.results.intervals import mean, ratio_of_sums
from harness.results.provenance import machine
from harness.results.real_records import LAYER, check_record, rule_and_layer
from harness.results.records import read_file, write_json
from harness.results.rounding import rounded
from harness.step import command

SCHEMA = "cacheslide.real/1"
POOLED = "both"
NOTHING, ISOLATED, OURS, RIVAL = "Nothing recomputed", "Isolated, nothing recomputed", "First tokens", "CacheBlend"
RIVALS = (f"{RIVAL}, by V", f"{RIVAL}, by K")
# Rules compared one by one, over the KV left by the turn before: prefixes of their arms' names, up to the layer.
RULES = (
    *(f"{rule} {n} %" for rule in ("First tokens", "Remembered", "Overlap", "Canonical, remembered") for n in (5, 10)),
    *(f"{rule} 10 %" for rule in ("Remembered + boundary 32", "Overlap, half first", "Boundary", QUESTION)),
    *(f"Mixed, {split} 10 %" for split in MIXED),
    "Shrinking 20 %",
    "Random tokens 10 %",
)
STUDY = ("model", "dtype", "seed", "lengths")  # settings common to all records of a stage
CONDITIONS = (*STUDY, "prompts", "swept", "validation", "sessions", "turns", "longest", "data", "best")
Row = dict[str, Any]


def read_stage(folder: Path, stage: str) -> tuple[list[Row], list[Row], list[Mapping[str, Any]]]:
    """Records, failures and settings of all shards of a stage, finished or not.

    An id counts once, and as failed only if no shard measured it. Files set aside by a run are not read. DataError if
    two shards are of different studies, or for a record of another stage.
    """
    name = re.compile(rf"\.?({re.escape(stage)}-\d+of\d+\.jsonl)(\.part)?")
    named = {path: name.fullmatch(path.name) for path in sorted(folder.glob("*"))}
    files = {match[1]: path for path, match in named.items() if match}  # a finished file replaces its part
    records, failures, settings = {}, {}, []
    for path in files.values():
        file = read_file(path)
        settings.append(file.settings)
        for key in STUDY:
            one, other = settings[0].get(key), file.settings.get(key)
            if one != other:
                raise DataError(f"{path}: {key} is {other!r}, and {one!r} in other shards: a folder holds one study")
        for record in file.records:
            check_record(record, stage, path)
        failures |= {r["id"]: r for r in file.failures}
        records |= {r["id"]: r for r in file.records}
    return list(records.values()), [f for i, f in failures.items() if i not in records], settings


def setting_of(record: Row) -> str:
    """The setting at the beginning of a trial's id."""
    return record["trial"].split(" ", 1)[0]


def tabulate(records: Iterable[Row], keys: Callable[[Row], Iterable[tuple]]) -> list[Row]:
    """One row per group of records; `keys` returns a record's groups, the arm last."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for record in records:
        for key in keys(record):
            groups[key].append(record)
    return [_figures(members) | {"key": list(key)} for key, members in sorted(groups.items())]


def _figures(members: Sequence[Row]) -> Row:
    """Means over the members, resampling their trials."""
    clusters = [r["trial"] for r in members]
    out: Row = {
        "n": len(set(clusters)),
        "measured": len(members),
        "compute_fraction": sum(r["compute_fraction"] for r in members) / len(members),
        "tokens": sum(r["tokens"] for r in members) / len(members),
        "tokens_reused": sum(r["tokens_reused"] for r in members) / len(members),
    }
    for name in ("answer", "greedy"):
        if all(name in r for r in members):
            out[name] = {
                "kl": _estimate([r[name]["kl"] for r in members], clusters),
                "agreement": _estimate([r[name]["agreement"] for r in members], clusters),
                "nll_change": _estimate([r[name]["nll_change"] for r in members], clusters),
            }
    # Greedy decoding diverges at the first different most likely token. Both runs are scored by the same kind of pass,
    # so
    # rounding of token-by-token decoding does not count.
    out["flips"] = _estimate([float(r["greedy"]["agreement"] < 1) for r in members], clusters)
    return {k: short(v) for k, v in out.items()}


def _estimate(values: Sequence[float], clusters: Sequence[str]) -> Row:
    """A mean with its interval; the row holds the number of trials."""
    estimate = mean(values, clusters)
    return {k: short(estimate[k]) for k in ("value", "low", "high")}


def short(value: Any) -> Any:
    """A number to four significant digits, which is finer than any interval of these tables."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def by_setting(record: Row) -> Iterable[tuple]:
    """Groups of the frontier: setting, data set (and both together), arm."""
    yield setting_of(record), record["dataset"], record["arm"]
    yield setting_of(record), POOLED, record["arm"]


def by_turn(record: Row) -> Iterable[tuple]:
    """Groups of histories: turn, arm."""
    yield record["turn"], record["arm"]


def by_agent(record: Row) -> Iterable[tuple]:
    """Groups of recorded sessions: agent, arm."""
    yield record["dataset"], record["arm"]


def paired(records: Sequence[Row], one: str, other: str, setting: str, dataset: str = POOLED) -> Row | None:
    """KL of `one` over KL of `other` on the answers of prompts with both; None without any."""
    kl: dict[str, dict[str, float]] = defaultdict(dict)
    for r in records:
        if setting_of(r) == setting and dataset in (POOLED, r["dataset"]) and r["arm"] in (one, other):
            kl[r["trial"]][r["arm"]] = r["answer"]["kl"]
    both = {t: f for t, f in kl.items() if len(f) == len({one, other})}
    if not both:
        return None
    a, b = ([f[name] for f in both.values()] for name in (one, other))
    return ratio_of_sums(a, b, list(both)) | {"of": one, "over": other, "setting": setting, "dataset": dataset}


def choose_layers(records: Sequence[Row]) -> dict[str, int]:
    """By rule: the layer with the lowest mean KL on the answers of the validation part."""
    kl: dict[tuple[str, int], list[float]] = defaultdict(list)
    for r in records:
        line, layer = rule_and_layer(r["arm"])
        if layer is not None:
            kl[line, layer].append(r["answer"]["kl"])
    out: dict[str, int] = {}
    for line in {name for name, _ in kl}:
        scores = {layer: sum(v) / len(v) for (name, layer), v in kl.items() if name == line}
        out[line] = min(scores, key=lambda layer: (scores[layer], layer))
    return out


def _within(rows: Sequence[Row], begins: str, most: float, setting: str, dataset: str) -> list[Row]:
    """The rows of a setting whose arms' names begin with `begins`, with a mean compute fraction of at most `most`.

    Arms that ran on fewer than half of the setting's prompts are sweeps for a figure and are left out.
    """
    members = [r for r in rows if r["key"][:2] == [setting, dataset]]
    prompts = max((r["n"] for r in members), default=0)
    named = [r for r in members if r["key"][2].startswith(begins) and 2 * r["n"] >= prompts]
    return [r for r in named if r["compute_fraction"] <= most]


def best_within(rows: Sequence[Row], begins: str, most: float, setting: str, dataset: str) -> Row | None:
    """The row with the lowest KL among those of `_within`."""
    fitting = [r for r in _within(rows, begins, most, setting, dataset) if "stale" not in r["key"][2]]
    return min(fitting, key=lambda r: r["answer"]["kl"]["value"], default=None)


def largest_within(rows: Sequence[Row], begins: str, most: float, setting: str, dataset: str) -> Row | None:
    """The row with the highest compute fraction among those of `_within`: not chosen by outcome."""
    return max(_within(rows, begins, most, setting, dataset), key=lambda r: r["compute_fraction"], default=None)


def comparisons(records: Sequence[Row], rows: Sequence[Row], best: Mapping[str, int] | None = None) -> list[Row]:
    """Paired ratios: ours over CacheBlend's best within 33 % of compute and over nothing, RPDC over PIC, each rule.

    `best` holds the layers chosen on the validation part, by rule.
    """
    out = []
    for setting, dataset in sorted({(r["key"][0], r["key"][1]) for r in rows}):
        cacheslide = largest_within(rows, OURS, 0.33, setting, dataset)
        rival = best_within(rows, RIVAL, 0.33, setting, dataset)
        pairs = [("rpdc over pic", NOTHING, ISOLATED)]
        if cacheslide:
            pairs.append(("ours over nothing recomputed", cacheslide["key"][2], NOTHING))
        if cacheslide and rival:
            pairs.append(("ours over the best CacheBlend", cacheslide["key"][2], rival["key"][2]))
        for name, one, other in pairs:
            ratio = paired(records, one, other, setting, dataset)
            if ratio is not None:
                out.append({"comparison": name} | ratio)
        out += _rules(records, rows, best or {}, setting, dataset)
    return out


def _rules(
    records: Sequence[Row], rows: Sequence[Row], best: Mapping[str, int], setting: str, dataset: str
) -> Iterator[Row]:
    """Each rule over nothing recomputed, and over CacheBlend's 15 % at its best layer in hindsight."""
    arms = {r["key"][2] for r in _within(rows, "", 1.0, setting, dataset)}
    fifteen = [r for r in rows if rule_and_layer(r["key"][2])[0] in RIVALS and " 15 % " in r["key"][2]]
    rival = best_within(fifteen, RIVAL, 1.0, setting, dataset)
    others = {"rule over nothing recomputed": NOTHING}
    if rival:
        others["rule over CacheBlend 15 %"] = rival["key"][2]
    for rule in RULES:
        line, _ = rule_and_layer(rule)
        arm = f"{rule}{LAYER}{best.get(line, ASKED[0])}" if line == QUESTION else rule
        for name, other in others.items():
            ratio = paired(records, arm, other, setting, dataset) if arm in arms else None
            if ratio is not None:
                yield {"comparison": name, "rule": rule} | ratio


def headline(rows: Sequence[Row], ratios: Sequence[Row], replayed: int) -> dict[str, Any]:
    """The headline numbers of the setting *matter*, both data sets together."""
    at = {r["key"][2]: r for r in rows if r["key"][:2] == ["matter", POOLED]}
    cacheslide = largest_within(rows, OURS, 0.20, "matter", POOLED)
    rival = best_within(rows, RIVAL, 0.33, "matter", POOLED)
    pic = [r for r in ratios if r["comparison"] == "rpdc over pic" and r["setting"] == "matter"]
    pic = [r for r in pic if r["dataset"] == POOLED]

    def kl(row: Row | None) -> float | None:
        return None if row is None else row["answer"]["kl"]["value"]

    return {
        "kl_nothing_recomputed": kl(at.get(NOTHING)),
        "kl_isolated": kl(at.get(ISOLATED)),
        "kl_cacheblend_best_at_33pct": kl(rival),
        "kl_cacheslide_at_20pct_compute": kl(cacheslide),
        "kl_noise_floor": kl(at.get(NOISE)),
        "greedy_flip_share_cacheslide": cacheslide["flips"]["value"] if cacheslide else None,
        "rpdc_over_pic_kl_ratio": pic[0]["value"] if pic else None,
        "real_sessions_replayed": replayed,
    }


def summarise(folder: Path) -> dict[str, Any]:
    """All tables from the records in `folder`; DataError without records of the frontier."""
    records, failures, settings = read_stage(folder, "frontier")
    if not records:
        raise DataError(f"{folder} holds no records of the stage frontier")
    rows = tabulate(records, by_setting)
    turns, turn_failures, turn_settings = read_stage(folder, "histories")
    replay, replay_failures, replay_settings = read_stage(folder, "replay")
    stages = {"frontier": settings, "histories": turn_settings, "replay": replay_settings}
    about = {name: _about(s) for name, s in stages.items() if s}
    ratios = comparisons(records, rows, about["frontier"].get("best"))
    return {
        "schema": SCHEMA,
        "headline": headline(rows, ratios, len({r["trial"] for r in replay})),
        "conditions": {name: {k: s.get(k) for k in CONDITIONS} for name, s in about.items()},
        "provenance": {name: s.get("provenance") for name, s in about.items()} | {"tables": machine()},
        "frontier": list(_kept(rows)),
        "comparisons": ratios,
        "histories": tabulate(turns, by_turn) if turns else [],
        "replay": tabulate(replay, by_agent) if replay else [],
        "failures": len(failures) + len(turn_failures) + len(replay_failures),
    }


def _about(settings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The settings of a stage: those of the shards with most layers, with the commits of all."""
    one = max(settings, key=lambda s: len(s.get("best") or {}))
    commits = sorted({str((s.get("provenance") or {}).get("git_commit")) for s in settings})
    return dict(one) | {"provenance": dict(one.get("provenance") or {}) | {"git_commits": commits}}


def _kept(rows: Sequence[Row]) -> Iterator[Row]:
    """The stored rows: full for both sets together, reduced for single sets and for arms with few prompts."""
    most: dict[str, int] = defaultdict(int)
    for row in rows:
        most[row["key"][1]] = max(most[row["key"][1]], row["n"])
    for row in rows:
        few, pooled = 2 * row["n"] < most[row["key"][1]], row["key"][1] == POOLED
        short = {k: row[k] for k in ("key", "n", "compute_fraction")} | {"answer": {"kl": row["answer"]["kl"]}}
        if pooled or not few:
            yield short | {"flips": row["flips"]} if few else row if pooled else short


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("layers", "summary"))
    p.add_argument("records", type=Path)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    if args.what == "summary":
        write_json(args.out, rounded(summarise(args.records)))
        return
    records, _, _ = read_stage(args.records, "layers")
    if not records:
        raise DataError(f"{args.records} holds no records of the stage layers")
    write_json(args.out, {"layers": choose_layers(records), "prompts": len({r["trial"] for r in records})})


if __name__ == "__main__":
    command(main)
