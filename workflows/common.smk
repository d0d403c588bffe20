# Names and helper functions of the workflow; the rules are in the other files.
import sys
from dataclasses import asdict
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.configuration import check, native
from harness.experiments.real.plan import read_plan
from harness.inventory import (
    AGENT_FIGURES,
    FIGURES,
    NO_AGENTS,
    NO_CKSIM,
    agent_sections,
    data_spec,
    figures_of,
    has_agents,
    has_cksim,
    has_chunk_files,
    read_config,
)
from harness.real_model.inputs import required
from harness.systems import cope_systems, to_scale

SCHEMA = Path(workflow.basedir, "workflows", "schemas", "config.schema.yaml")


def stop(reason):
    """End with one line and status 2, before anything is run."""
    print(f"config: {reason}", file=sys.stderr)
    sys.exit(2)


def check_config(config):
    """Fill in the schema's defaults; stop where harness.configuration finds something wrong."""
    with_cope = "cope" in config
    try:
        check(config, SCHEMA)
    except CacheSlideError as wrong:
        stop(wrong)
    if not has_cksim(config):
        print(f"config: cksim is left out: {NO_CKSIM}", file=sys.stderr)
    if with_cope and "cope" not in config:
        print("config: cope is left out with backend: vllm", file=sys.stderr)
    if "agents" in config and not has_agents(config):
        print(f"config: agents are left out: {NO_AGENTS}", file=sys.stderr)


def real_options(config):
    """File and shards of the study on a real model, taken out of `config`: no run of another study depends on them."""
    file, shards = config.pop("real", "config/real.yaml"), config.pop("real_shards", 1)
    if "data" in config and "run" not in config:
        # --configfile config/real.yaml: the other rules keep the default's keys.
        file = workflow.overwrite_configfiles[-1]
        if config != read_config(file):
            stop("--config changes no key of a study on a real model: write a file")
        config.clear()
        config.update(read_config("config/smoke.yaml"))
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        stop(f"real_shards: {shards!r} is no count of at least 1")
    return str(file), shards


def real_plan(wildcards):
    """The plan of the study on a real model, as plain values."""
    try:
        return asdict(read_plan(REAL_CONFIG))
    except CacheSlideError as wrong:
        stop(wrong)


def real_inputs(stage, table):
    """What a stage reads, for its rule. What is missing stops here, unless `table` is there and drawing needs no more.

    Records name model and data by their hashes, so a newer time of a file alone makes nothing out of date.
    """

    def files(wildcards):
        plan = real_plan(wildcards)
        recordings = plan["recordings"] if stage == "replay" else ""
        try:
            found = required(plan["model"], [*plan["data"], *plan["without"]], recordings)
        except CacheSlideError as missing:
            if not Path(table).is_file():
                stop(missing)
            return []
        return [ancient(str(path)) for path in found]

    return files


def real_given(stage):
    """A stage's options, whole words with "=" so that a name that begins with "-" is no option."""

    def given(wildcards):
        shard = wildcards.get("shard", "0of1").replace("of", "/")
        chosen = stage in ("frontier", "histories", "replay", "confirm")
        best = ["--best=results/real/best.json"] if chosen else []
        return [f"--config={REAL_CONFIG}", f"--shard={shard}", *best]

    return given


def real_sessions_given(wildcards):
    """Where recorded sessions and the tokenizer are."""
    plan = real_plan(wildcards)
    return [f"--data={plan['recordings']}", f"--model={plan['model']}"]


def real_records(stage):
    """The shards of a stage."""
    shards = range(REAL_SHARDS)
    return [f"results/real/records/{stage}-{i}of{REAL_SHARDS}.jsonl" for i in shards]


def real_threads(wildcards):
    """Shards share the cores."""
    return max(1, (workflow.cores or 1) // REAL_SHARDS)


def result(path):
    """Where a result of this configuration lives."""
    return f"results/{config['run']}/{path}"


def figure(name):
    """The three files of a figure: vector for the web and for print, PNG to look at."""
    return multiext(f"figures/{config['run']}/{name}", ".svg", ".pdf", ".png")


def chunk_files(wildcards):
    """The caches an evaluation reads; a vLLM engine fills its own."""
    return result(f"chunks/{wildcards.dataset}") if has_chunk_files(config) else []


def log_file(path):
    return result(f"logs/{path}.log")


def all_cores(wildcards):
    """Rules that run the model take every core, so that nothing runs beside a timing."""
    return workflow.cores or 1


def model_files(wildcards):
    """The checkpoint's files: a retrained model makes its results out of date."""
    return checkpoint_files(config["model"], "model")


def checkpoint_files(name, key):
    """The files of the folder that the configuration's `key` names."""
    folder = Path(name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        stop(f"{key}: {folder} needs a config.json and *.safetensors weights")
    return [str(path) for path in [folder / "config.json", *weights]]


def tokenizer_files(wildcards):
    """Prompt lengths are in tokens: another tokenizer makes other prompts."""
    return sorted(str(path) for path in Path(config["model"]).glob("tokenizer*"))


def spec_of(wildcards):
    """What to generate for one part of the study."""
    return data_spec(config, wildcards.part)


def data(part, dataset="{dataset}"):
    return result(f"data/{part}/{dataset}.jsonl")


def data_of(part):
    """This part's prompts from every data set."""
    return [data(part, dataset) for dataset in config["datasets"]]


def per_system(stage):
    """One file of records a system; {dataset} stays a wildcard. At an equal share, those that have to be run again."""
    systems = config["systems"]
    if stage == "equal_share":
        systems = to_scale(systems, config["recompute_ratio"])
    return [result(f"{stage}/{{dataset}}/{system}.jsonl") for system in systems]


def records(stage):
    """The records of every data set and system."""
    return expand(per_system(stage), dataset=config["datasets"])


def cope_records(dataset="{dataset}"):
    """The files of the systems that run on the CoPE model; none without an adapter."""
    return [
        result(f"accuracy/{dataset}/{system}.jsonl") for system in cope_systems(config)
    ]


def cope_file(name):
    """A result that only a configuration with an adapter has."""
    return result(name) if "cope" in config else []


def adapter_files(wildcards):
    """The CoPE adapter's files: a retrained or newly calibrated one makes its results out of date."""
    folder = Path(config["cope"]["adapter"])
    if not (folder / "cope.json").is_file():
        stop(f"cope.adapter: there is no adapter in {folder}")
    return sorted(str(p) for p in folder.iterdir() if p.stem in ("cope", "ccpe"))


def wca_options(wildcards):
    """Whole words with "=", so that a name that begins with "-" is no option. A function: braces are no wildcards then."""
    adapter = config.get("cope", {}).get("adapter")
    return [
        f"--model={config['model']}",
        *([f"--adapter={adapter}"] if adapter else []),
    ]


def model_name(wildcards):
    """The configuration's model; as a plain string in a rule, braces in it would be wildcards."""
    return config["model"]


def agent_model_files(wildcards):
    """The agents' checkpoint."""
    return checkpoint_files(config["agents"]["model"], "agents.model")


def agent_traces():
    """The recorded episodes, where this configuration has agents."""
    return result("agents/traces.jsonl") if has_agents(config) else []


def agent_records():
    """One record file a section of `agents:`."""
    return [result(f"agents/{section}.jsonl") for section in agent_sections(config)]


def agent_figures():
    """The figures that are drawn from these files alone."""
    sections = [s for s in agent_sections(config) if s in AGENT_FIGURES]
    return [path for section in sections for path in figure(AGENT_FIGURES[section])]


def latency_records():
    return [result(f"latency/{tokens}.jsonl") for tokens in config["latency"]["tokens"]]


def study():
    """Everything that a configuration makes."""
    figures = [path for name in figures_of(config) for path in figure(name)]
    return [result("summary.json"), result("report.html"), *figures]


def smoke_study(wildcards):
    if config["run"] != "smoke":
        stop(
            f"target smoke belongs to config/smoke.yaml; for run {config['run']!r} ask for reproduce-all"
        )
    return study()
