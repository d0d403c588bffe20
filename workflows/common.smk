# Names and helper functions of the workflow; the rules are in the other files.
import sys
from importlib.metadata import entry_points
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from snakemake.utils import validate

from harness.systems import to_scale

SCHEMA = Path(workflow.basedir, "workflows", "schemas", "config.schema.yaml")
FIGURES = ["fig03", "fig04a", "fig05", "fig10", "throughput"]


def stop(reason):
    """End with one line and status 2, before anything is run."""
    print(f"config: {reason}", file=sys.stderr)
    sys.exit(2)


def check_config(config):
    """Fill in the schema's defaults; stop on an unknown key, a wrong value or a system that is not installed."""
    schema = yaml.safe_load(SCHEMA.read_text())
    error = best_match(Draft202012Validator(schema).iter_errors(config))
    if error is not None:
        where = ".".join(str(step) for step in error.absolute_path) or "the file"
        reason = error.message
        if error.validator == "additionalProperties":
            unknown = sorted(set(error.instance) - set(error.schema["properties"]))
            reason = f"unknown key {', '.join(unknown)}"
        stop(f"{where}: {reason}; config/README.md lists every key")
    validate(config, str(SCHEMA))

    known = sorted(entry_points(group="cacheslide.policies").names)
    for system in config["systems"]:
        if system not in known:
            stop(
                f"systems: unknown system {system!r}; installed are {', '.join(known)}"
            )
    for part in ("latency", "throughput"):
        for system in config[part]["systems"]:
            if system not in config["systems"]:
                stop(f"{part}.systems: {system!r} is not one of this run's systems")
    for part in ("latency", "throughput", "cksim"):
        if config[part]["dataset"] not in config["datasets"]:
            stop(
                f"{part}.dataset: {config[part]['dataset']!r} is not one of this run's datasets"
            )


def result(path):
    """Where a result of this configuration lives."""
    return f"results/{config['run']}/{path}"


def figure(name):
    """The three files of a figure: vector for the web and for print, PNG to look at."""
    return multiext(f"figures/{config['run']}/{name}", ".svg", ".pdf", ".png")


def log_file(path):
    return result(f"logs/{path}.log")


def all_cores(wildcards):
    """Rules that run the model take every core, so that nothing runs beside a timing."""
    return workflow.cores or 1


def model_files(wildcards):
    """The checkpoint's files: a retrained model makes its results out of date."""
    folder = Path(config["model"])
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        stop(f"model: {folder} needs a config.json and *.safetensors weights")
    return [str(path) for path in [folder / "config.json", *weights]]


def tokenizer_files(wildcards):
    """Prompt lengths are in tokens: another tokenizer makes other prompts."""
    return sorted(str(path) for path in Path(config["model"]).glob("tokenizer*"))


def data_spec(wildcards):
    """What to generate for one part of the study: split, prompts, tokens a prompt, questions a prompt.

    `part` is accuracy, validation, throughput, cksim or latency-TOKENS.
    """
    part, _, tokens = wildcards.part.partition("-")
    settings = config[part]
    return {
        "split": "validation" if part == "validation" else "test",
        "prompts": (
            settings["requests"] if part == "throughput" else settings["prompts"]
        ),
        "tokens": int(tokens) if tokens else settings["tokens"],
        "questions": settings.get("questions", 1),
    }


def data(part, dataset="{dataset}"):
    return result(f"data/{part}/{dataset}.jsonl")


def data_of(part):
    """This part's prompts from every data set."""
    return [data(part, dataset) for dataset in config["datasets"]]


def per_system(stage):
    """One file of records a system; {dataset} stays a wildcard. At an equal share, those that have to be run again."""
    systems = config["systems"]
    if stage == "equal_share":
        systems = to_scale(systems, config["topk"])
    return [result(f"{stage}/{{dataset}}/{system}.jsonl") for system in systems]


def records(stage):
    """The records of every data set and system."""
    return expand(per_system(stage), dataset=config["datasets"])


def latency_records():
    return [result(f"latency/{tokens}.jsonl") for tokens in config["latency"]["tokens"]]


def study():
    """Everything that a configuration makes."""
    figures = [path for name in FIGURES for path in figure(name)]
    return [result("summary.json"), result("report.html"), *figures]


def smoke_study(wildcards):
    if config["run"] != "smoke":
        stop(
            f"target smoke belongs to config/smoke.yaml; for run {config['run']!r} ask for reproduce-all"
        )
    return study()
