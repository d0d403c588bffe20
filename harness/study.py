"""The steps of the study as a workflow calls them: paths and a configuration in, record files out.

A configuration is the validated content of config/*.yaml; config/README.md explains its keys.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cacheslide.policy import ReusePolicy
from cacheslide.store.directory import DirectoryChunkStore
from harness.backend import EngineSettings, ReferenceBackend
from harness.experiments.accuracy import evaluate
from harness.experiments.chunks import build_chunks
from harness.experiments.latency import measure_latency
from harness.experiments.prompts import measure_prompts
from harness.experiments.select_layer import select_layer
from harness.experiments.similarity import measure_similarity
from harness.experiments.throughput import measure_throughput
from harness.results.provenance import config_hash, file_hash, machine
from harness.results.records import RecordWriter, write_json
from harness.systems import recipes, resolve, to_scale
from harness.tasks.data import read_examples

Config = Mapping[str, Any]


def backend_of(config: Config, threads: int | None = None) -> ReferenceBackend:
    """The backend a configuration names; `threads` cores for PyTorch."""
    if threads:
        torch.set_num_threads(threads)
    return ReferenceBackend(config["model"], config["dtype"], config["device"])


def settings_of(config: Config) -> EngineSettings:
    """How its engines cut and keep chunks."""
    return EngineSettings(config["chunk_size"], config["suffix_len"], config["store_dtype"])


def policies_of(config: Config, layer: int, share: float | None = None, part: str = "") -> list[ReusePolicy]:
    """The systems of a configuration, or of one `part` of it that names its own, at the common selection layer."""
    names = config.get(part, {}).get("systems") or config["systems"]
    return resolve(names, layer=layer, share=share)


def selected_layer(path: str | Path) -> int:
    """The layer that validation chose."""
    return json.loads(Path(path).read_text())["layer"]


def _header(config: Config, data: str | Path, **more: Any) -> dict[str, Any]:
    identity = {"config_hash": config_hash(dict(config)), "data_hash": file_hash(data), "measured_on": machine()}
    return {"run": config["run"], **identity, **more}


def step_chunks(config: Config, data: str, layer: int, output: str, threads: int) -> None:
    """Chunk KV caches of one data set, for every recipe its systems read."""
    backend = backend_of(config, threads)
    store = DirectoryChunkStore(output)
    report = build_chunks(backend, read_examples(data), policies_of(config, layer), store, settings_of(config))
    write_json(Path(output) / "index.json", {"recipes": report, "model": backend.model.model_id})


def step_accuracy(
    config: Config, data: str, chunks: str, layer: int, outputs: Sequence[str], threads: int, share: float | None = None
) -> None:
    """Every system's answers on one data set; `outputs` are the systems' files, in the configuration's order.

    With `share`, only systems that do not recompute that share by themselves are run.
    """
    backend, policies = backend_of(config, threads), policies_of(config, layer, share)
    if share is not None:
        policies = [p for p in policies if p.name in to_scale(config["systems"], share)]
    by_recipe = recipes(policies)
    dataset = Path(data).stem
    writers = {
        p.name: RecordWriter(
            out,
            _header(config, data, dataset=dataset, system=p.name, title=p.title, layer=layer, share=share)
            | {"layer_inputs": sorted(by_recipe[p.recipe][1]) if p.reuses else []},
        )
        for p, out in zip(policies, outputs, strict=True)
    }
    label = f"accuracy, {dataset}" if share is None else f"equal share, {dataset}"
    store = DirectoryChunkStore(chunks)
    evaluate(
        backend,
        read_examples(data, questions=config["accuracy"]["questions"]),
        policies,
        store,
        settings_of(config),
        writers,
        progress=label,
    )
    for writer in writers.values():
        writer.finish()


def step_select_layer(config: Config, data: Sequence[str], output: str, threads: int) -> None:
    """The selection layer, chosen on validation data."""
    backend = backend_of(config, threads)
    examples = {Path(d).stem: read_examples(d, questions=config["validation"]["questions"]) for d in data}
    result = select_layer(backend, examples, settings_of(config), config["topk"])
    write_json(output, result | {"data_hashes": {Path(d).stem: file_hash(d) for d in data}})


def step_latency(config: Config, data: str, layer: int, output: str, threads: int) -> None:
    """TTFT of all systems at one prompt length."""
    backend, policies, part = backend_of(config, threads), policies_of(config, layer, part="latency"), config["latency"]
    writer = RecordWriter(
        output, _header(config, data, layer=layer, titles={p.name: p.title for p in policies}, **part)
    )
    measure_latency(
        backend,
        read_examples(data),
        policies,
        settings_of(config),
        writer,
        part["warmups"],
        part["repeats"],
        config["seed"],
    )
    writer.finish()


def step_throughput(config: Config, data: str, layer: int, output: str, threads: int) -> None:
    """Requests a second under a closed loop, by system and batch."""
    backend, part = backend_of(config, threads), config["throughput"]
    policies = policies_of(config, layer, part="throughput")
    writer = RecordWriter(
        output, _header(config, data, layer=layer, titles={p.name: p.title for p in policies}, **part)
    )
    measure_throughput(backend, read_examples(data), policies, settings_of(config), writer, part["batches"])
    writer.finish()


def step_similarity(config: Config, data: str, output: str, threads: int) -> None:
    """CKSim against shift."""
    backend, part = backend_of(config, threads), config["cksim"]
    writer = RecordWriter(output, _header(config, data, **part))
    measure_similarity(backend, read_examples(data), part["shifts"], writer)
    writer.finish()


def step_prompts(config: Config, data: Sequence[str], output: str) -> None:
    """Reusable share and moves of the prompts."""
    examples = {Path(d).stem: read_examples(d) for d in data}
    write_json(output, measure_prompts(backend_of(config), examples, resolve(config["systems"])))
