# Names and helper functions of the workflow; the rules are in the other files.
import sys
from dataclasses import asdict
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.configuration import check
from harness.experiments.real.plan import read_plan
from harness.experiments.serving.reproduction.settings import (
    is_reproduction,
    read_settings,
)
from harness.experiments.serving.reproduction.stages import plan as reproduction_plan
from harness.inventory import (
    AGENT_FIGURES,
    NO_AGENTS,
    NO_CKSIM,
    agent_sections,
    has_agents,
    has_cksim,
    read_config,
)
from harness.real_model.inputs import required
from harness.workflow.listing import absent, figure_line, line_of
from harness.workflow.paths import (
    inputs_of,
    loaded,
    only_tables,
    outputs_of,
    records_of,
    what_is_there,
)
from harness.workflow.slices import slice_of
from harness.workflow.steps import runs_alone, steps_of

SCHEMA = Path(workflow.basedir, "workflows", "schemas", "config.schema.yaml")


def stop(reason):
    """End with one line and status 2, before anything is run."""
    print(f"config: {reason}", file=sys.stderr)
    sys.exit(2)


def check_config(config):
    """Fill in the schema's defaults; stop at an error from harness.configuration."""
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


def describe(name, line):
    """Give a rule its line in `snakemake --list`; rules made in a loop have no docstring of their own."""
    workflow.get_rule(name).docstring = line


def refused(reason):
    """The input of a target that this configuration lacks: its run stops with the reason."""
    return lambda wildcards: stop(reason)


def real_options(config):
    """File and shards of the study on a real model, removed from `config` so that no other study depends on them."""
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


def reproduction_options(config):
    """File and plan of a reproduction on GPUs given by --configfile, else ("", None).

    Its keys leave `config`, so that the other rules keep the default's.
    """
    if not is_reproduction(config):
        return "", None
    file = workflow.overwrite_configfiles[-1]
    try:
        if config != read_config(file):
            stop("--config changes no key of a reproduction on GPUs: write a file")
        made = reproduction_plan(read_settings(file))
    except CacheSlideError as wrong:
        stop(wrong)
    config.clear()
    config.update(read_config("config/smoke.yaml"))
    return str(file), made


def gpu_result(path):
    """Path of a result of the reproduction."""
    return f"results/{REPRODUCTION.settings.run}/{path}"


def gpu_figure():
    """The three files of the reproduction's figure."""
    return multiext(
        f"figures/{REPRODUCTION.settings.run}/reproduction", ".svg", ".pdf", ".png"
    )


def gpu_folders():
    """Folders of records: the run's own first, then those of other sizes where they exist."""
    own = gpu_result("reproduction")
    return [
        own,
        *(
            str(p)
            for p in sorted(Path("results").glob("h200*/reproduction"))
            if str(p) != own and any(p.iterdir())
        ),
    ]


def gpu_beside():
    """Options that name tables made elsewhere, where they exist."""
    given = {
        name: Path("results/benchmark", f"{name}.json")
        for name in ("claims", "frontier")
    }
    return [f"--{name}={path}" for name, path in given.items() if path.is_file()]


def tables_option(config):
    """Whether nothing is measured (`--config tables=True`); removed from `config` so that no record depends on it."""
    tables = config.pop("tables", False)
    if not isinstance(tables, bool):
        stop(f"tables: {tables!r} is neither True nor False")
    return tables


def real_plan(wildcards):
    """The plan of the study on a real model, as plain values."""
    try:
        return asdict(read_plan(REAL_CONFIG))
    except CacheSlideError as wrong:
        stop(wrong)


def real_inputs(stage, table):
    """A stage's input files, for its rule. Missing files stop here, unless `table` exists and only drawing is needed.

    Records name model and data by their hashes, so a file's newer time alone invalidates no record.
    """

    def files(wildcards):
        plan = real_plan(wildcards)
        recordings = plan["recordings"] if stage in ("replay", "sessions") else ""
        try:
            rows = [] if stage == "sessions" else [*plan["data"], *plan["without"]]
            found = required(plan["model"], rows, recordings)
        except CacheSlideError as missing:
            if not Path(table).is_file():
                stop(missing)
            return []
        return [ancient(str(path)) for path in [REAL_CONFIG, *found]]

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
    """Paths of recorded sessions and of the tokenizer."""
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
    """Path of a result of this configuration."""
    return f"results/{config['run']}/{path}"


def figure(name):
    """The three files of a figure: vector for the web and for print, PNG to look at."""
    return multiext(f"figures/{config['run']}/{name}", ".svg", ".pdf", ".png")


def inputs_for(step):
    """A step's inputs by name, for `unpack`."""

    def inputs(wildcards):
        try:
            found = inputs_of(step, config, dict(wildcards.items()))
            return what_is_there(found, STUDY, config) if TABLES_ONLY else found
        except CacheSlideError as wrong:
            stop(wrong)

    return inputs


def outputs_for(step):
    """A step's outputs, with its names in braces."""
    paths = outputs_of(step, config)
    return [temp(directory(path)) for path in paths] if step.temporary else paths


def log_for(step):
    """One log a job."""
    names = [step.name, *(f"{{{name}}}" for name in step.each)]
    return result(Path("logs", *names).as_posix() + ".log")


def cores_for(step):
    """Every core for a step that must run alone; one for any other."""
    return all_cores if runs_alone(step, config) else 1


def slice_for(step):
    """The step's part of the configuration. A function, so that braces in names are no wildcards."""
    return lambda wildcards: slice_of(config, step.reads)


def all_cores(wildcards):
    """Every core, so that such a rule runs alone."""
    return workflow.cores or 1


def folder_files(folder, key, table):
    """The files of a model's folder, for a rule whose `table` names the model by its hash.

    A file's newer time alone invalidates nothing; where the table exists, the model is not needed.
    """

    def files(wildcards):
        try:
            # Braces are wildcards to Snakemake, in an input function's paths too: it cannot name such a file.
            return [ancient(path) for path in loaded(folder, key) if "{" not in path]
        except CacheSlideError as missing:
            if not Path(table).is_file():
                stop(missing)
            return []

    return files


def wca_inputs(wildcards):
    """The model and its adapter."""
    adapter = config.get("cope", {}).get("adapter")
    found = folder_files(config["model"], "model", WCA)(wildcards)
    return found + (
        folder_files(adapter, "cope.adapter", WCA)(wildcards) if adapter else []
    )


def wca_options(wildcards):
    """Whole words with "=", so that a name like "-x" is no option. A function, so that braces are no wildcards."""
    adapter = config.get("cope", {}).get("adapter")
    return [
        f"--model={config['model']}",
        *([f"--adapter={adapter}"] if adapter else []),
    ]


def agent_files():
    """The agents' records and the figures drawn from these alone; none without configured agents."""
    sections = agent_sections(config)
    drawn = [figure(AGENT_FIGURES[s]) for s in sections if s in AGENT_FIGURES]
    return [result(f"agents/{s}.jsonl") for s in sections] + [
        path for paths in drawn for path in paths
    ]


def cope_files():
    """The records of the steps on the CoPE model."""
    steps = [step for step in steps_of(config) if "adapter" in step.inputs]
    return [path for step in steps for path in outputs_of(step, config, {})]


def study():
    """All results of a configuration."""
    return [
        path for step in STUDY if step.of_records for path in outputs_of(step, config)
    ]


def smoke_study(wildcards):
    if config["run"] != "smoke":
        stop(
            f"target smoke belongs to config/smoke.yaml; for run {config['run']!r} ask for reproduce-all"
        )
    return study()
