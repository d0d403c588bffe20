"""The study's workflow steps: from paths and a configuration to record files.

A configuration is the validated content of config/*.yaml (config/README.md explains its keys), or the part of it that
`harness.workflow.steps` declares for the step.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cacheslide.errors import ConfigError
from cacheslide.store.directory import DirectoryChunkStore
from harness.agents.trace import read_episodes
from harness.backends.in_process import EngineOptions
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.responders import Responder, reference_sessions
from harness.backends.tokens import Tokens
from harness.backends.vllm import VllmBackend, vllm_sessions
from harness.experiments.study.accuracy import evaluate
from harness.experiments.study.chunks import build_chunks
from harness.experiments.study.latency import measure_latency
from harness.experiments.study.prompts import agent_shares, measure_prompts
from harness.experiments.study.select_layer import select_layer
from harness.experiments.study.similarity import measure_similarity
from harness.experiments.study.throughput import measure_throughput
from harness.inventory import NO_CKSIM, data_spec, has_chunk_files, has_cksim
from harness.results.provenance import config_hash, file_hash, machine
from harness.results.records import RecordWriter, write_json
from harness.systems import System, recipes, resolve, to_scale
from harness.tasks.data import read_examples, write_dataset

Config = Mapping[str, Any]


Backend = ReferenceBackend | VllmBackend


def backend_of(config: Config, threads: int | None = None) -> Backend:
    """The backend a configuration names; `threads` cores for PyTorch."""
    if threads:
        torch.set_num_threads(threads)
    model, dtype, device = config["model"], config["dtype"], config["device"]
    if config.get("backend", "reference") == "vllm":
        return VllmBackend(model, dtype, device, EngineOptions(**config.get("vllm", {})))
    return ReferenceBackend(model, dtype, device)


def sessions_of(
    config: Config, backend: Backend, systems: Sequence[System], chunks: str | None = None, similarity: bool = False
) -> Iterator[tuple[Responder, Sequence[System]]]:
    """The responders that `systems` need, one at a time, each with the systems it serves.

    `chunks` is a folder of caches and `similarity` adds CKSim to answers; both are the reference backend's.
    """
    if isinstance(backend, VllmBackend):
        return vllm_sessions(backend, systems, settings_of(config))
    return reference_sessions(backend, systems, settings_of(config), chunks, similarity)


def settings_of(config: Config) -> EngineSettings:
    """How the configuration's engines cut and store chunks."""
    return EngineSettings(config["chunk_size"], config["suffix_len"], config["store_dtype"])


def policies_of(config: Config, layer: int, recompute_ratio: float | None = None, part: str = "") -> list[System]:
    """The systems of a configuration, or of one `part` of it that names its own, at the common selection layer."""
    names = (config.get(part, {}).get("systems") if part else None) or config["systems"]
    return resolve(names, layer=layer, recompute_ratio=recompute_ratio)


def selected_layer(path: int | str | Path) -> int:
    """The layer that validation chose, from its file; an int is returned as is."""
    return path if isinstance(path, int) else json.loads(Path(path).read_text())["layer"]


def header(config: Config, data: str | Path, **more: Any) -> dict[str, Any]:
    """Header of a record file: its inputs, settings and machine."""
    identity = {"config_hash": config_hash(dict(config)), "data_hash": file_hash(data), "measured_on": machine()}
    return {"run": config["run"], **identity, **more}


def step_data(config: Config, output: str) -> None:
    """The prompts of one part of the study; `output` is `PART/DATASET.jsonl`."""
    path = Path(output)
    spec = data_spec(config, path.parent.name)
    digest = write_dataset(path, path.stem, spec["split"], config["seed"], spec["prompts"], spec["tokens"])
    print(f"{digest}  {output}", file=sys.stderr)


def step_chunks(config: Config, data: str, layer: int | str, output: str, threads: int) -> None:
    """Chunk KV caches of one data set, for every recipe its systems read; for the reference backend only."""
    if not has_chunk_files(config):
        raise ConfigError("chunk caches are built inside the engine with backend: vllm; skip this step")
    backend = backend_of(config, threads)
    store, policies = DirectoryChunkStore(output), policies_of(config, selected_layer(layer))
    report = build_chunks(backend, read_examples(data), policies, store, settings_of(config))
    write_json(Path(output) / "index.json", {"recipes": report, "model": backend.model.model_id})


def step_accuracy(
    config: Config,
    data: str,
    chunks: str | None,
    layer: int | str,
    outputs: Sequence[str],
    threads: int,
    recompute_ratio: float | None = None,
) -> None:
    """Every system's answers on one data set; `outputs` are the systems' files, in the configuration's order.

    With `recompute_ratio`, only systems that do not recompute that share by themselves are run. `chunks` is the folder
    that `step_chunks` filled; the vLLM backend needs none.
    """
    layer = selected_layer(layer)
    backend, policies = backend_of(config, threads), policies_of(config, layer, recompute_ratio)
    if recompute_ratio is not None:
        policies = [p for p in policies if p.name in to_scale(config["systems"], recompute_ratio)]
    by_recipe = recipes(policies)
    dataset = Path(data).stem
    writers = {
        p.name: RecordWriter(
            out,
            header(
                config,
                data,
                dataset=dataset,
                system=p.name,
                title=p.title,
                layer=layer,
                recompute_ratio=recompute_ratio,
            )
            | {"layer_inputs": sorted(by_recipe[p.recipe][1]) if p.reuses else []},
        )
        for p, out in zip(policies, outputs, strict=True)
    }
    label = f"accuracy, {dataset}" if recompute_ratio is None else f"equal share, {dataset}"
    examples = read_examples(data, questions=config["accuracy"]["questions"])
    sessions = sessions_of(config, backend, policies, chunks, similarity=True)
    evaluate(sessions, examples, writers, progress=label, timed=False)
    for writer in writers.values():
        writer.finish()


def step_equal_share(
    config: Config, data: str, chunks: str | None, layer: int | str, outputs: Sequence[str], threads: int
) -> None:
    """`step_accuracy` with every system made to recompute an equal share of the reused tokens."""
    step_accuracy(config, data, chunks, layer, outputs, threads, config["recompute_ratio"])


def step_select_layer(config: Config, data: Sequence[str], output: str, threads: int) -> None:
    """The selection layer, chosen on validation data."""
    backend = backend_of(config, threads)
    examples = {Path(d).stem: read_examples(d, questions=config["validation"]["questions"]) for d in data}
    sessions = sessions_of(config, backend, resolve(["recompute", "cacheslide", "cacheblend"]))
    result = select_layer(sessions, backend.num_layers, examples, config["recompute_ratio"])
    write_json(output, result | {"data_hashes": {Path(d).stem: file_hash(d) for d in data}})


def step_latency(config: Config, data: str, layer: int | str, output: str, threads: int) -> None:
    """TTFT of all systems at one prompt length."""
    backend, layer, part = backend_of(config, threads), selected_layer(layer), config["latency"]
    policies = policies_of(config, layer, part="latency")
    writer = RecordWriter(output, header(config, data, layer=layer, titles={p.name: p.title for p in policies}, **part))
    sessions, examples = sessions_of(config, backend, policies), read_examples(data)
    measure_latency(sessions, policies, examples, writer, part["warmups"], part["repeats"], config["seed"])
    writer.finish()


def step_throughput(config: Config, data: str, layer: int | str, output: str, threads: int) -> None:
    """Requests a second under a closed loop, by system and batch."""
    backend, layer, part = backend_of(config, threads), selected_layer(layer), config["throughput"]
    policies = policies_of(config, layer, part="throughput")
    writer = RecordWriter(output, header(config, data, layer=layer, titles={p.name: p.title for p in policies}, **part))
    measure_throughput(
        sessions_of(config, backend, policies), read_examples(data), writer, part["batches"], seed=config["seed"]
    )
    writer.finish()


def step_similarity(config: Config, data: str, output: str, threads: int) -> None:
    """CKSim against shift; ConfigError on a backend that does not show the KV of every layer."""
    if not has_cksim(config):
        raise ConfigError(NO_CKSIM)
    backend, part = backend_of(config, threads), config["cksim"]
    writer = RecordWriter(output, header(config, data, **part))
    measure_similarity(backend, read_examples(data), part["shifts"], writer)
    writer.finish()


def step_prompts(config: Config, data: Sequence[str], output: str, traces: str | None = None) -> None:
    """Reusable share and moves of the prompts; with `traces`, of the recorded agents' prompts too."""
    examples = {Path(d).stem: read_examples(d) for d in data}
    found = measure_prompts(Tokens(config["model"]), examples, resolve(config["systems"]))
    if traces:
        found["agents"] = agent_shares(Tokens(config["agents"]["model"]), read_episodes(Path(traces)))
    write_json(output, found)
