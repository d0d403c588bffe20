"""The table of the study's steps: `workflows/study.smk` makes one rule of each.

A path is a pattern. `{dataset}` and the other names of `paths.lists` stand for every value of a list of the
configuration; names in the step's `each` give one job for each value. Other names are keys of the configuration.
`{model}/*` are the files of a checkpoint's folder, `{model}/tokenizer*` those of its tokenizer. `{root}/` begins the
full path of a committed record of another study: it is read if it exists, and never made by this study.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.inventory import AGENT_FIGURES, FIGURES, agent_sections, has_agents, has_chunk_files, has_cksim

Config = Mapping[str, Any]
RUN, FIGURE = "results/{run}/", "figures/{run}/"
EVERYTHING = ("*",)
MODEL = ("model", "backend", "device", "dtype")
ENGINE = (*MODEL, "vllm", "store_dtype", "chunk_size", "suffix_len")
AGENT = ("run", "seed", "device", "dtype", "store_dtype", "chunk_size", "suffix_len", "agents.model", "agents.layer")
COPE = ("model", "device", "dtype", "cope.adapter")
TIMED = ("dataset", "systems")  # keys of `latency` and `throughput`


def always(config: Config) -> bool:
    """True: every configuration has this step."""
    return True


def with_cope(config: Config) -> bool:
    """Whether the configuration names a CoPE adapter."""
    return "cope" in config


def with_section(section: str) -> Callable[[Config], bool]:
    """Predicate: the configuration has this section of `agents:`."""
    return lambda config: section in agent_sections(config)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes
    ----------
    name : str
        The rule's name.
    call : str
        `module:function` within `harness`. It is called with those of its parameters that name an input, an option,
        `config` (the slice `reads`), `output` (a path), `outputs` (all) or `threads`.
    reads : tuple of str
        Keys of the configuration that it reads, such as `latency.repeats`; a section's name means all of its keys.
    inputs, outputs
        Patterns of paths; inputs by name.
    each : tuple of str
        Names in the patterns; each of their values is a job of its own.
    options : dict
        Additional arguments of the function.
    runs_model : bool
        Whether it runs a model. On a GPU, or inside vLLM, no two such steps run at once.
    timed : bool
        Whether it measures times: it takes every core, with nothing running beside it.
    priority : int
        Snakemake's priority.
    of_records : bool
        Whether it makes tables, a figure or the report from existing results.
    temporary : bool
        Whether its output is a folder that is removed after its last reader.
    when
        Whether a configuration has this step.
    """

    name: str
    call: str
    reads: tuple[str, ...] = ()
    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    runs_model: bool = False
    timed: bool = False
    priority: int = 0
    of_records: bool = False
    temporary: bool = False
    when: Callable[[Config], bool] = always


def runs_alone(step: Step, config: Config) -> bool:
    """Whether nothing runs beside a step: it is timed, or it runs a model on what there is one of."""
    shared = config["device"] == "cpu" and config["backend"] == "reference"
    return step.timed or (step.runs_model and not shared)


def _of(section: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for key in keys)


def _figure(name: str) -> tuple[str, ...]:
    """SVG and PDF for the web and print, PNG for viewing."""
    return tuple(f"{FIGURE}{name}.{kind}" for kind in ("svg", "pdf", "png"))


def _drawn(name: str, source: str, when: Callable[[Config], bool], **further: str) -> Step:
    inputs = {"source": RUN + source} | {k: RUN + v for k, v in further.items()}
    call, options = "plots.render:render", {"name": name}
    return Step(name, call, (), inputs, _figure(name), options=options, of_records=True, when=when)


DATA = f"{RUN}data/"
LAYER = f"{RUN}selection_layer.json"
TRACES = f"{RUN}agents/traces.jsonl"
BESIDE = {"fig04a": {"cope": "cksim_cope.jsonl"}, "fig05": {"cope": "prompts_cope.json"}}  # read if they exist
CHECKPOINT = {"model": "{model}/*"}
ON_COPE = {**CHECKPOINT, "adapter": "{cope.adapter}/*"}

GENERATED = (  # part of the study, the keys that its prompts depend on, its file, and one file for each of
    ("accuracy", ("prompts", "tokens"), "accuracy/{dataset}", ("dataset",)),
    ("validation", ("prompts", "tokens"), "validation/{dataset}", ("dataset",)),
    ("throughput", ("requests", "tokens"), "throughput/{throughput.dataset}", ()),
    ("cksim", ("prompts", "tokens"), "cksim/{cksim.dataset}", ()),
    ("latency", ("prompts",), "latency-{tokens}/{latency.dataset}", ("tokens",)),
)

STEPS = (
    *(
        Step(
            f"generate_{part}",
            "experiments.study.steps:step_data",
            ("seed", *_of(part, *keys)),
            outputs=(f"{DATA}{path}.jsonl",),
            each=each,
            when=has_cksim if part == "cksim" else always,
        )
        for part, keys, path, each in GENERATED
    ),
    Step(
        "select_layer",
        "experiments.study.steps:step_select_layer",
        (*ENGINE, "recompute_ratio", "validation.questions"),
        CHECKPOINT | {"data": f"{DATA}validation/{{dataset}}.jsonl"},
        (LAYER,),
        runs_model=True,
    ),
    Step(
        "record_agents",
        "experiments.agents.steps:step_traces",
        ("seed", "agents.traces"),
        outputs=(TRACES,),
        when=has_agents,
    ),
    Step(
        "measure_prompts",
        "experiments.study.steps:step_prompts",
        ("model", "systems", "agents.model"),
        {
            "data": f"{DATA}accuracy/{{dataset}}.jsonl",
            "traces": TRACES,
            "tokenizer": ("{model}/tokenizer*", "{model}/config.json"),
            "agents_tokenizer": ("{agents.model}/tokenizer*", "{agents.model}/config.json"),
        },
        (f"{RUN}prompts.json",),
    ),
    Step(  # the largest files; removed after the evaluations of their data set
        "build_chunks",
        "experiments.study.steps:step_chunks",
        (*ENGINE, "systems"),
        CHECKPOINT | {"data": f"{DATA}accuracy/{{dataset}}.jsonl", "layer": LAYER},
        (f"{RUN}chunks/{{dataset}}",),
        each=("dataset",),
        runs_model=True,
        temporary=True,
        when=has_chunk_files,
    ),
    # All systems of a data set share one process: loading the model for each would take longer than the questions.
    # Priority: a data set is finished, and its chunk caches are removed, before the next one's are built.
    *(
        Step(
            name,
            f"experiments.study.steps:{function}",
            ("run", *ENGINE, "systems", "accuracy.questions", *more),
            CHECKPOINT
            | {"data": f"{DATA}accuracy/{{dataset}}.jsonl", "chunks": f"{RUN}chunks/{{dataset}}", "layer": LAYER},
            (f"{RUN}{output}.jsonl",),
            each=("dataset",),
            runs_model=True,
            priority=1,
        )
        for name, function, output, more in (
            ("evaluate", "step_accuracy", "accuracy/{dataset}/{system}", ()),
            ("equal_share", "step_equal_share", "equal_share/{dataset}/{scaled}", ("recompute_ratio",)),
        )
    ),
    Step(
        "measure_latency",
        "experiments.study.steps:step_latency",
        ("run", "seed", *ENGINE, *_of("latency", *TIMED, "warmups", "repeats")),
        CHECKPOINT | {"data": f"{DATA}latency-{{tokens}}/{{latency.dataset}}.jsonl", "layer": LAYER},
        (f"{RUN}latency/{{tokens}}.jsonl",),
        each=("tokens",),
        runs_model=True,
        timed=True,
    ),
    Step(
        "measure_throughput",
        "experiments.study.steps:step_throughput",
        ("run", "seed", *ENGINE, *_of("throughput", *TIMED, "batches")),
        CHECKPOINT | {"data": f"{DATA}throughput/{{throughput.dataset}}.jsonl", "layer": LAYER},
        (f"{RUN}throughput.jsonl",),
        runs_model=True,
        timed=True,
    ),
    Step(
        "measure_cksim",
        "experiments.study.steps:step_similarity",
        ("run", *MODEL, *_of("cksim", "dataset", "shifts")),
        CHECKPOINT | {"data": f"{DATA}cksim/{{cksim.dataset}}.jsonl"},
        (f"{RUN}cksim.jsonl",),
        runs_model=True,
        when=has_cksim,
    ),
    # On the model's CoPE adapter, with files of its own: extends a run measured without it.
    Step(
        "evaluate_cope",
        "experiments.cope.steps:step_cope_accuracy",
        (
            *("run", *COPE, "store_dtype", "chunk_size", "suffix_len", "accuracy.questions"),
            *_of("cope", "systems", "prompts"),
        ),
        ON_COPE | {"data": f"{DATA}accuracy/{{dataset}}.jsonl", "layer": LAYER},
        (f"{RUN}accuracy/{{dataset}}/{{cope_system}}.jsonl",),
        each=("dataset",),
        runs_model=True,
        when=with_cope,
    ),
    Step(
        "measure_cksim_cope",
        "experiments.cope.steps:step_cope_similarity",
        ("run", *COPE, "cope.cksim_prompts", *_of("cksim", "dataset", "shifts")),
        ON_COPE | {"data": f"{DATA}cksim/{{cksim.dataset}}.jsonl"},
        (f"{RUN}cksim_cope.jsonl",),
        runs_model=True,
        when=with_cope,
    ),
    Step(
        "measure_prompts_cope",
        "experiments.cope.steps:step_cope_prompts",
        (*COPE, "cope.cksim_prompts"),
        ON_COPE | {"data": f"{DATA}accuracy/{{dataset}}.jsonl"},
        (f"{RUN}prompts_cope.json",),
        runs_model=True,
        when=with_cope,
    ),
    *(
        Step(
            f"measure_agents_{section}",
            "experiments.agents.steps:step_agents",
            (*AGENT, f"agents.{section}", *(["agents.traces"] if section == "replay" else [])),
            {"model": "{agents.model}/*"} | ({"traces": TRACES} if section == "replay" else {}),
            (f"{RUN}agents/{section}.jsonl",),
            options={"section": section},
            runs_model=True,
            timed=True,
            when=with_section(section),
        )
        for section in ("replay", *AGENT_FIGURES)
    ),
    # Tables, figures and the report read results only and can be remade without running the model.
    Step(
        "summarize",
        "results.summary:summarize",
        EVERYTHING,  # it is part of the summary
        CHECKPOINT
        | {
            "accuracy": (
                f"{RUN}accuracy/{{dataset}}/{{system}}.jsonl",
                f"{RUN}accuracy/{{dataset}}/{{cope_system}}.jsonl",
            ),
            "equal_share": f"{RUN}equal_share/{{dataset}}/{{scaled}}.jsonl",
            "latency": f"{RUN}latency/{{tokens}}.jsonl",
            "throughput": f"{RUN}throughput.jsonl",
            "cksim": f"{RUN}cksim.jsonl",
            "cksim_cope": f"{RUN}cksim_cope.jsonl",
            "agents": f"{RUN}agents/{{section}}.jsonl",
            "prompts": f"{RUN}prompts.json",
            "prompts_cope": f"{RUN}prompts_cope.json",
            "layer": LAYER,
        },
        (f"{RUN}summary.json",),
        of_records=True,
    ),
    *(
        _drawn(name, source, has_cksim if name == "fig04a" else always, **BESIDE.get(name, {}))
        for name, source in FIGURES.items()
    ),
    *(_drawn(name, f"agents/{section}.jsonl", with_section(section)) for section, name in AGENT_FIGURES.items()),
    Step(
        "report",
        "report.builder:build_report",
        inputs={
            "summary_path": f"{RUN}summary.json",
            "figures": f"{FIGURE}{{figure}}.svg",
            "slide": "{root}/results/slide/summary.json",
            "real": "{root}/results/real/summary.json",
            "sessions": "{root}/results/real/sessions.json",
            "real_figures": "{root}/figures/real/*.svg",
        },
        outputs=(f"{RUN}report.html",),
        of_records=True,
    ),
)


def steps_of(config: Config) -> list[Step]:
    """The steps of `config`."""
    return [step for step in STEPS if step.when(config)]


def step_named(name: str) -> Step:
    """The step whose rule has this name."""
    return next(step for step in STEPS if step.name == name)
