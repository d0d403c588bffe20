"""The study's steps on the CoPE model: added to `study/steps.py` by a configuration with a `cope` section.

They write separate files (`accuracy/DATASET/SYSTEM_cope.jsonl`, `cksim_cope.jsonl`, `prompts_cope.json`), so that a
run measured without CoPE is extended, not repeated.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from harness.backends.cope import CopeBackend
from harness.backends.reference import ReferenceBackend, exact_arithmetic
from harness.backends.responders import reference_sessions
from harness.experiments.cope import study as cope_study
from harness.experiments.study.accuracy import evaluate
from harness.experiments.study.steps import Config, header, selected_layer, settings_of
from harness.results.records import RecordWriter, write_json
from harness.systems import cope_systems, resolve
from harness.tasks.data import read_examples


def _backend(config: Config, threads: int, live: bool = False) -> CopeBackend:
    torch.set_num_threads(threads)
    exact_arithmetic()
    return CopeBackend(config["model"], config["cope"]["adapter"], config["dtype"], config["device"], live)


def _variants(config: Config, threads: int) -> dict[str, CopeBackend]:
    """Backends with live gates and, if the adapter is calibrated, with calibrated slot offsets."""
    found = {"cope": _backend(config, threads, live=True), "ccpe": _backend(config, threads)}
    return found if found["ccpe"].model.slot_offsets is not None else {"cope": found["cope"]}


def step_cope_accuracy(config: Config, data: str, layer: int | str, outputs: Sequence[str], threads: int) -> None:
    """Answers on one data set's first `cope.prompts` prompts; `outputs` are the files of `cope_systems`, in order."""
    layer = selected_layer(layer)
    backend, systems = _backend(config, threads), resolve(cope_systems(config), layer=layer)
    about = {"dataset": Path(data).stem, "layer": layer, "recompute_ratio": None, "layer_inputs": []}
    about |= {"model": backend.model.model_id, "calibrated": backend.model.slot_offsets is not None}
    writers = {
        s.name: RecordWriter(out, header(config, data, system=s.name, title=s.title, **about))
        for s, out in zip(systems, outputs, strict=True)
    }
    examples = read_examples(data, questions=config["accuracy"]["questions"])[: config["cope"]["prompts"]]
    sessions = reference_sessions(backend, systems, settings_of(config))
    # Not timed: the reference attention materialises intermediates that the kernel does not.
    evaluate(sessions, examples, writers, progress=f"accuracy on CoPE, {about['dataset']}", timed=False)
    for writer in writers.values():
        writer.finish()


def step_cope_similarity(config: Config, data: str, output: str, threads: int) -> None:
    """CKSim against shift on the CoPE model, and of both models in the chain of fixed chunks."""
    variants, part = _variants(config, threads), config["cksim"]
    native = ReferenceBackend(config["model"], config["dtype"], config["device"])
    model = {name: backend.model.model_id for name, backend in variants.items()}
    writer = RecordWriter(output, header(config, data, model=model, **part))
    count = config["cope"]["cksim_prompts"]
    cope_study.measure_similarity(native, variants, read_examples(data), part["shifts"], writer, count)
    writer.finish()


def step_cope_prompts(config: Config, data: Sequence[str], output: str, threads: int) -> None:
    """Shift of position indices between turns on the CoPE model."""
    examples = {Path(d).stem: read_examples(d) for d in data}
    write_json(output, cope_study.measure_moves(_variants(config, threads), examples, config["cope"]["cksim_prompts"]))
