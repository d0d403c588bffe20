"""The frontier of the ledger task: `python -m harness.experiments.rules.frontier --models DIR DIR DIR --out FILE`.

Every system (`frontier_cells.py`) answers the same questions on several models, usually training seeds of one. A system
that selects at a layer has that layer chosen per model and setting, by F1 on prompts of the validation split; all
reported figures are of the test split. Records go to `--records`, one file a model, and are not measured again: a run
can be stopped, resumed or extended. FILE has F1, points lost to recompute and compute fraction with intervals over
seeds and prompts (`harness.results.frontier`); models that an early end left incomplete are named there.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm import tqdm

from cacheslide.errors import ConfigError, DataError
from cacheslide.models.weights import fingerprint
from cacheslide.plain_values import at_least
from harness.backends.reference import ReferenceBackend
from harness.experiments.rules.frontier_cells import Setting, batches, settings
from harness.experiments.rules.frontier_work import Task, Waiting, results
from harness.experiments.rules.static_choices import taking_turns
from harness.experiments.wca.cells import Cell
from harness.experiments.wca.sweep import record_id
from harness.results.frontier import LAYERS, REPORTED, choose_layers, show, tabulate
from harness.results.provenance import provenance
from harness.results.records import RecordWriter, read_file, reopened, write_json
from harness.results.rounding import rounded
from harness.results.wca import DIGITS
from harness.step import command
from harness.tasks.data import draw_examples, synthetic_names
from harness.tasks.example import TaskExample

SPLITS = {LAYERS: "validation", REPORTED: "test"}


@dataclass
class Study:
    """One model's part of the run: what is measured, and the layers chosen so far."""

    model: Path
    settings: list[Setting]
    writer: RecordWriter
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    layers: dict[str, int] | None = None
    pending: int = 0  # tasks before the layers can be chosen
    wanted: dict[str, list[TaskExample]] = field(default_factory=dict)

    def tasks(self, part: str, groups: Sequence[Sequence[Cell]], number: int) -> Iterator[Task]:
        """What is not measured yet of `groups` on prompt `number` of a part."""
        example = self.wanted[part][number]
        for group in groups:
            names = tuple(c.name for c in group if record_id(c.name, example) not in self.writer.done)
            if names:
                yield Task(str(self.model), part, example, names)

    def candidates(self) -> list[list[Cell]]:
        """The cells of all candidate layers."""
        return batches([c for s in self.settings if s.layered for c in s.cells.values()])

    def fixed(self) -> list[list[Cell]]:
        """The cells without a choice of layer."""
        return batches([s.cells[None] for s in self.settings if not s.layered])

    def choose(self) -> list[list[Cell]]:
        """Choose the layers; returns the cells at them."""
        self.layers = choose_layers(self.settings, self.records)
        return batches([s.cells[self.layers[s.name]] for s in self.settings if s.name in self.layers])

    def add(self, record: dict[str, Any]) -> None:
        """Keep one record."""
        self.writer.add(record)
        (self.failures if "failure" in record else self.records).append(record)


def run(studies: dict[str, Study], device: str, jobs: int, until: float) -> None:
    """Measure what the records of all models lack: layers first, then prompt after prompt for every model."""
    waiting = Waiting()

    def report(study: Study, groups: Sequence[Sequence[Cell]]) -> None:
        for number in range(len(study.wanted[REPORTED])):
            for task in study.tasks(REPORTED, groups, number):
                waiting.add(number, task)

    for study in studies.values():
        for number in range(len(study.wanted[LAYERS])):
            for task in study.tasks(LAYERS, study.candidates(), number):
                waiting.add(-1, task)
                study.pending += 1
        report(study, study.fixed())
        if not study.pending:
            report(study, study.choose())
    with tqdm(total=len(waiting), mininterval=5) as bar:
        for task, records in results(waiting, device, jobs, until):
            study = studies[task.model]
            for record in records:
                study.add(record)
            if task.part == LAYERS:
                study.pending -= 1
                if not study.pending:
                    before = len(waiting)
                    report(study, study.choose())
                    bar.total += len(waiting) - before
            bar.update()


def open_studies(args: argparse.Namespace, stack: ExitStack) -> dict[str, Study]:
    """The models' studies by folder, with the records they have; `stack` finishes their files."""
    wanted = {LAYERS: args.layer_prompts, REPORTED: args.prompts}
    prompts = {
        part: taking_turns(draw_examples(d, SPLITS[part], args.seed, count, args.tokens) for d in args.datasets)
        for part, count in wanted.items()
    }
    folder = args.records or args.out.with_suffix("")
    out: dict[str, Study] = {}
    for model in args.models:
        header = about(args) | {"model": fingerprint(model)}
        writer = reopened(folder / f"{model.name}.jsonl", header)
        stack.callback(writer.finish)
        old = read_file(writer.part)
        layers = ReferenceBackend(model).num_layers
        out[str(model)] = Study(model, settings(layers), writer, old.records, old.failures, wanted=prompts)
    return out


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the records of every model depend on, beside the model."""
    return {"datasets": args.datasets, "tokens": args.tokens, "seed": args.seed, "splits": SPLITS}


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for models that cannot be told apart."""
    names = [m.name for m in args.models]
    if len(set(names)) < len(names):
        raise ConfigError(f"--models needs folders of different names, not {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders, one a training seed")
    parser.add_argument(
        "--datasets", nargs="+", default=["hotpotqa-ledger", "swebench-ledger"], choices=synthetic_names()
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--records", type=Path, help="folder of the records; by default beside --out, with its name")
    parser.add_argument("--prompts", type=at_least(1), default=10, help="reported prompts of every data set")
    parser.add_argument(
        "--layer-prompts", type=at_least(1), default=2, help="prompts of every data set to choose layers"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs", type=at_least(0), default=2, help="processes, of one thread each; 0: none but this one"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after this many")
    args = parser.parse_args(argv)
    _check(args)
    with ExitStack() as stack:
        studies = open_studies(args, stack)
        run(studies, args.device, args.jobs, monotonic() + 60 * args.minutes)
    planned = {"prompts": args.prompts * len(args.datasets), "layer_prompts": args.layer_prompts * len(args.datasets)}
    done = list(studies.values())
    if not any(r["part"] == REPORTED for s in done for r in s.records):
        raise DataError("nothing was measured on the reported prompts; start again with more --minutes to go on")
    ids = {s.model.name: fingerprint(s.model) for s in done}
    result = tabulate(done, planned) | {"settings": about(args) | planned, "fingerprints": ids}
    origin = provenance(about(args) | planned, {}, " ".join(ids.values()))
    write_json(args.out, rounded(result, DIGITS) | {"provenance": origin})
    print(show(result), flush=True)


if __name__ == "__main__":
    command(main)
