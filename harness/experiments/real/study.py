"""The study on a real model: `python -m harness.experiments.real.study STAGE --config config/real.yaml --out DIR`.

Stages: layers (choice of each system's selection layer, on the validation part), frontier (settings), histories,
replay (recorded sessions), slice (a few arms on a few prompts) and confirm (the rules chosen on the frontier and their
baselines, on other prompts: `--without FILE` excludes a file's questions). `--shard I/N` measures every N-th prompt
from I on into a separate file, so that several processes can share a device. Finished records are not measured again.
`harness.results.real` makes tables.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cacheslide.errors import ConfigError, DataError
from cacheslide.plain_values import at_least, read_json, shown
from harness.backends.checkpoints import find_checkpoint
from harness.backends.reference import ReferenceBackend, device_of
from harness.experiments.real import arms as systems
from harness.experiments.real.histories import history, measure_history
from harness.experiments.real.measure import measure
from harness.experiments.real.plan import RealPlan, read_plan
from harness.experiments.real.replay import measure_session, recorded
from harness.experiments.real.trials import Builder, Trial
from harness.results.provenance import file_hash, provenance
from harness.results.records import reopened
from harness.results.rounding import rounded
from harness.step import command
from harness.tasks.passages import others_than, read_passages

STAGES = ("layers", "frontier", "histories", "replay", "slice", "confirm")


def builders(plan: RealPlan, backend: ReferenceBackend) -> dict[str, Builder]:
    """One builder per data file of the plan, by the data set's name."""
    known = [row for path in plan.without for row in read_passages(path)]
    sets = [others_than(read_passages(path), known) for path in plan.data]
    if empty := [path for path, rows in zip(plan.data, sets, strict=True) if not rows]:
        raise DataError(f"{Path(empty[0]).name}: every question stands in {', '.join(plan.without)} as well")
    out = {rows[0].dataset: Builder(backend, rows, plan.seed, plan.lengths) for rows in sets}
    if len(out) != len(plan.data):
        raise DataError("two data files are of one set: name each set once")
    return out


def split(builder: Builder, validation: int) -> tuple[range, range]:
    """Indices of the rows for results, and of the last `validation` rows, for validation."""
    count = len(builder.rows)
    if not 0 < validation < count:
        raise ConfigError(f"validation takes {validation} of {count} rows: at least one must be left for results")
    return range(count - validation), range(count - validation, count)


def trials(builder: Builder, setting: str, indices: Iterable[int], limit: int) -> Iterator[Trial]:
    """The first `limit` trials of a setting over the rows `indices`."""
    made = 0
    for index in indices:
        trial = builder.trial(setting, index) if made < limit else None
        if trial is not None:
            yield replace(trial, about=trial.about | {"number": made})
            made += 1


def run(
    stage: str,
    plan: RealPlan,
    out: Path,
    shard: tuple[int, int],
    device: str,
    best: dict | None,
    minutes: float,
    only: Sequence[str] = (),
) -> None:
    """Measure one stage; the time limit ends it between two prompts.

    `only` names lines of arms, or arms, to measure; records in other files of the folder count as done.
    """
    if stage == "replay" and not plan.recordings:
        raise ConfigError("replay reads recorded sessions: recordings names no folder")
    backend = ReferenceBackend(plan.model, plan.dtype, device_of(device))
    known = {name for a in _arms(stage, backend.num_layers, best) for name in (a.line, a.name)}
    if unknown := sorted(set(only) - known):
        raise ConfigError(f"{stage} has neither a line nor an arm {shown(unknown[0])}")
    made = builders(plan, backend)
    settings = asdict(plan) | {"stage": stage, "best": best, "only": list(only)}
    settings |= {"model": Path(plan.model).name}
    settings |= {name: [Path(p).name for p in getattr(plan, name)] for name in ("data", "without")}
    if not plan.without:
        del settings["without"]  # as in records older than this key
    settings["recordings"] = Path(plan.recordings).name
    data = {name: file_hash(path) for name, path in zip(made, plan.data, strict=True)}
    data |= {f"without {Path(path).name}": file_hash(path) for path in plan.without}
    header = settings | {"shard": list(shard), "provenance": provenance(settings, data, backend.model.model_id)}
    work = list(_work(stage, plan, made))
    if not work:
        raise DataError(f"{stage}: no row of {', '.join(settings['data'])} and no session suits any of its settings")
    ends = time.monotonic() + minutes * 60
    with closing(reopened(out / f"{stage}-{shard[0]}of{shard[1]}.jsonl", header)) as writer:
        for one in tqdm(work[shard[0] :: shard[1]], desc=stage, mininterval=2):
            if time.monotonic() > ends:
                raise ConfigError(f"{stage}: out of time; start again to go on")
            for record in _measured(stage, plan, backend, one, best, writer.done, only):
                writer.add(rounded(record))
        writer.finish()


def _work(stage: str, plan: RealPlan, made: dict[str, Builder]) -> Iterator[Any]:
    """The prompts of a stage, interleaving data sets and settings, so that an early end covers each."""
    if stage == "replay":
        model = find_checkpoint(plan.model)
        yield from recorded(Path(plan.recordings), model, plan.longest, plan.sessions, plan.turns)
        return
    columns = []
    for builder in made.values():
        results, choices = split(builder, plan.validation)
        if stage == "histories":
            sessions = (history(builder, builder.rows[i]) for i in results)
            columns.append(list(islice((s for s in sessions if s is not None), plan.sessions)))
        elif stage == "layers":
            columns += [list(trials(builder, setting, choices, len(choices))) for setting in plan.layers_on]
        else:
            columns += [list(trials(builder, setting, results, plan.prompts)) for setting in plan.settings]
    for at in range(max(map(len, columns), default=0)):
        yield from (c[at] for c in columns if at < len(c))


def _arms(stage: str, num_layers: int, best: dict | None) -> list[systems.Arm]:
    """All arms of a stage."""
    if stage == "layers":
        return systems.candidates(num_layers)
    if stage == "slice":
        return systems.slice_arms()
    arms = {"histories": systems.history_arms, "replay": systems.replay_arms, "frontier": systems.frontier}
    return (arms | {"confirm": systems.confirm_arms})[stage](best)


def _measured(
    stage: str,
    plan: RealPlan,
    backend: ReferenceBackend,
    one: Any,
    best: dict | None,
    done: set[str],
    only: Sequence[str],
) -> Iterator[dict[str, Any]]:
    arms = _arms(stage, backend.num_layers, best)
    if stage == "frontier" and one.about["number"] >= plan.swept:
        arms = systems.core(best)
    arms = [a for a in systems.unique(arms) if not only or a.line in only or a.name in only]
    if stage == "histories":
        records = measure_history(backend, one, arms, done, plan.every_turn)
    elif stage == "replay":
        records = measure_session(backend, one, arms, done)
    else:
        records = measure(backend, one, arms, done)
    for record in records:
        yield {"dataset": one.dataset, "about": one.about} | record


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--config", type=Path, default=Path("config/real.yaml"))
    p.add_argument("--out", type=Path, default=Path("results/real/records"))
    p.add_argument("--model", help="a checkpoint instead of the configuration's")
    p.add_argument("--data", action="append", help="a data file instead of the configuration's; may be repeated")
    p.add_argument("--without", action="append", help="a data file whose questions are left out; may be repeated")
    p.add_argument("--recordings", help="a folder of recorded sessions instead of the configuration's")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", help="what the model computes in, instead of the configuration's")
    p.add_argument("--seed", type=int, help="of the prompts, instead of the configuration's")
    p.add_argument("--prompts", type=int, help="prompts a data set and setting, instead of the configuration's")
    p.add_argument("--sessions", type=int, help="histories a data set, instead of the configuration's")
    p.add_argument("--lengths", type=int, action="append", help="tokens of fixed text; may be repeated")
    p.add_argument("--settings", action="append", help="one setting; may be repeated")
    p.add_argument("--minutes", type=float, default=1e6, help="stop after this many; what is finished stays")
    p.add_argument("--shard", default="0/1", help="I/N: every N-th prompt from I on")
    p.add_argument("--best", type=Path, help="layers by system, as `harness.results.real layers` writes them")
    p.add_argument("--only", action="append", default=[], help="a line of arms, or one arm, by name; may be repeated")
    p.add_argument("--threads", type=at_least(1), help="of the CPU")
    return p


def shard_of(text: str) -> tuple[int, int]:
    """Parse `I/N` into two integers."""
    try:
        at, count = (int(x) for x in text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard is I/N with numbers, not {text!r}") from None
    if not 0 <= at < count:
        raise ConfigError(f"--shard {text}: I counts from 0 to N - 1")
    return at, count


def read_layers(path: Path) -> dict[str, int]:
    """Selection layers by system."""
    found = read_json(path, DataError)
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict) or any(type(n) is not int or n < 0 for n in layers.values()):
        raise DataError(
            f"{path} holds no layers by system, as `harness.results.real layers` writes them: {shown(found)}"
        )
    return layers


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage."""
    args = parser().parse_args(argv)
    names = ("model", "data", "without", "recordings", "dtype", "seed", "prompts", "sessions", "lengths", "settings")
    plan = read_plan(args.config, **{name: getattr(args, name) for name in names})
    if args.threads:
        torch.set_num_threads(args.threads)
    best = read_layers(args.best) if args.best else None
    run(args.stage, plan, args.out, shard_of(args.shard), args.device, best, args.minutes, args.only)


if __name__ == "__main__":
    command(main)
