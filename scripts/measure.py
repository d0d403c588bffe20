"""Make a configuration's records without Snakemake, for a machine that has PyTorch but no package index.

`python scripts/measure.py config/h200.yaml` writes results/<run>/ as the workflow would (data, selection layer,
accuracy, equal share, prompts, CKSim, latency, throughput, agents; with a section `cope`, the CoPE model's). `--only
accuracy,latency` picks steps, `--jobs 4` measures data sets side by side (never the timed steps). `python
scripts/measure.py config/h200.yaml --finish` turns the records into summary, figures and report, on any machine.
"""

import argparse
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from cacheslide.errors import CacheSlideError, ConfigError
from cacheslide.plain_values import at_least
from harness.configuration import check, native
from harness.experiments.agents import steps as study_agents
from harness.experiments.cope import steps as study_cope
from harness.experiments.study import steps as study
from harness.inventory import (
    NO_CKSIM,
    agent_sections,
    data_spec,
    figures_of,
    has_agents,
    has_chunk_files,
    has_cksim,
    prompt_files,
    read_config,
    source_of,
)
from harness.plots.render import render
from harness.report.builder import build_report
from harness.results.summary import summarize
from harness.systems import cope_systems, to_scale
from harness.tasks.data import write_dataset

SCHEMA = Path(__file__).resolve().parents[1] / "workflows/schemas/config.schema.yaml"
STEPS = ("data", "layer", "traces", "prompts", "accuracy", "cksim", "latency", "throughput", "agents", "cope")


def data(config: dict, root: Path) -> None:
    """Every prompt file of the run."""
    for part, dataset in prompt_files(config):
        spec = data_spec(config, part)
        path = root / "data" / part / f"{dataset}.jsonl"
        write_dataset(path, dataset, spec["split"], config["seed"], spec["prompts"], spec["tokens"])


def one_dataset(config: dict, root: Path, dataset: str, threads: int) -> None:
    """Chunk caches and both accuracy stages of one data set; the caches go when they are done."""
    path, layer = str(root / f"data/accuracy/{dataset}.jsonl"), study.selected_layer(root / "selection_layer.json")
    chunks = root / "chunks" / dataset
    if has_chunk_files(config):
        study.step_chunks(config, path, layer, str(chunks), threads)
    for stage, share, systems in (
        ("accuracy", None, config["systems"]),
        ("equal_share", config["recompute_ratio"], to_scale(config["systems"], config["recompute_ratio"])),
    ):
        outputs = [str(root / stage / dataset / f"{s}.jsonl") for s in systems]
        study.step_accuracy(config, path, str(chunks), layer, outputs, threads, share)
    shutil.rmtree(chunks, ignore_errors=True)


def cope_dataset(config: dict, root: Path, dataset: str, threads: int) -> None:
    """The accuracy of one data set on the CoPE model."""
    path, layer = str(root / f"data/accuracy/{dataset}.jsonl"), study.selected_layer(root / "selection_layer.json")
    outputs = [str(root / "accuracy" / dataset / f"{s}.jsonl") for s in cope_systems(config)]
    study_cope.step_cope_accuracy(config, path, layer, outputs, threads)


def measure(config: dict, root: Path, steps: list[str], jobs: int, threads: int) -> None:
    """Run the chosen steps in order."""
    full, config = config, native(config)

    def drawn_from(part: str, folder: str = "") -> str:
        return str(root / "data" / (folder or part) / f"{config[part]['dataset']}.jsonl")

    def all_data(part: str) -> list[str]:
        return [str(root / "data" / part / f"{d}.jsonl") for d in config["datasets"]]

    if "data" in steps:
        data(config, root)
    if "layer" in steps:
        study.step_select_layer(config, all_data("validation"), str(root / "selection_layer.json"), threads * jobs)
    layer = study.selected_layer(root / "selection_layer.json")
    traces = str(root / "agents/traces.jsonl") if has_agents(full) else None
    if "traces" in steps and traces:
        study_agents.step_traces(full, traces)
    if "prompts" in steps:
        study.step_prompts(full, all_data("accuracy"), str(root / "prompts.json"), traces)
    if "accuracy" in steps:
        side_by_side(one_dataset, config, root, jobs, threads)
    if "cksim" in steps and not has_cksim(config):
        print(f"measure: cksim is left out: {NO_CKSIM}", file=sys.stderr)
    elif "cksim" in steps:
        study.step_similarity(config, drawn_from("cksim"), str(root / "cksim.jsonl"), threads)
    if "latency" in steps:
        for tokens in config["latency"]["tokens"]:
            prompts = drawn_from("latency", f"latency-{tokens}")
            study.step_latency(config, prompts, layer, str(root / f"latency/{tokens}.jsonl"), threads)
    if "throughput" in steps:
        study.step_throughput(config, drawn_from("throughput"), layer, str(root / "throughput.jsonl"), threads)
    for section in agent_sections(full) if "agents" in steps else ():
        study_agents.step_agents(full, section, str(root / f"agents/{section}.jsonl"), threads, traces)
    if "cope" in steps and "cope" in full:
        study_cope.step_cope_similarity(full, drawn_from("cksim"), str(root / "cksim_cope.jsonl"), threads)
        study_cope.step_cope_prompts(full, all_data("accuracy"), str(root / "prompts_cope.json"), threads)
        side_by_side(cope_dataset, full, root, jobs, threads)


def side_by_side(work, config: dict, root: Path, jobs: int, threads: int) -> None:
    """`work` on every data set, in `jobs` processes."""
    n = len(config["datasets"])
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(work, [config] * n, [root] * n, config["datasets"], [threads] * n))


def finish(config: dict, root: Path, figures: Path) -> None:
    """Summary, figures and report of the records that are there."""
    summarize(
        config,
        root / "summary.json",
        **{stage: sorted(root.glob(f"{stage}/*/*.jsonl")) for stage in ("accuracy", "equal_share")},
        latency=sorted(root.glob("latency/*.jsonl")),
        throughput=root / "throughput.jsonl",
        agents=[root / f"agents/{section}.jsonl" for section in agent_sections(config)],
        cksim=root / "cksim.jsonl",
        cksim_cope=root / "cksim_cope.jsonl",
        prompts=root / "prompts.json",
        prompts_cope=root / "prompts_cope.json",
        layer=root / "selection_layer.json",
    )
    drawn = []
    for name in figures_of(config):
        source = source_of(name)
        if (root / source).is_file():
            outputs = [figures / f"{name}.{kind}" for kind in ("svg", "pdf", "png")]
            render(name, root / source, outputs)
            drawn += outputs
    build_report(root / "summary.json", drawn, root / "report.html")


def main() -> int:
    """Command line; an error a user can act on is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="data sets measured side by side")
    parser.add_argument("--threads", type=at_least(1), default=2, help="PyTorch threads a job")
    parser.add_argument("--device", help="instead of the configuration's: where the step cope computes")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--finish", action="store_true", help="summary, figures and report instead of measuring")
    args = parser.parse_args()
    try:
        config, steps = read_config(args.config), args.only.split(",")
        check(config, SCHEMA)
        if unknown := sorted(set(steps) - set(STEPS)):
            raise ConfigError(f"unknown step {', '.join(unknown)} (known: {', '.join(STEPS)})")
        if args.device and set(steps) - {"data", "cope"}:
            raise ConfigError("--device: with --only data,cope alone, which times nothing")
        config |= {"device": args.device} if args.device else {}
        if args.finish:
            finish(config, args.results / config["run"], Path("figures") / config["run"])
        else:
            measure(config, args.results / config["run"], steps, args.jobs, args.threads)
    except (CacheSlideError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
