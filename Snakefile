from snakemake.utils import min_version

from harness.own_python import first_on_path

min_version("9.20")
first_on_path()  # rules call `python`


# Only when none is given: Snakemake merges files, and the keys of this one would show through in another.
if not workflow.overwrite_configfiles:

    configfile: "config/smoke.yaml"


include: "workflows/common.smk"


TABLES_ONLY = tables_option(config)
REPRODUCTION_FILE, REPRODUCTION = reproduction_options(config)
REAL_CONFIG, REAL_SHARDS = real_options(config)
check_config(config)
STUDY = only_tables(config) if TABLES_ONLY else steps_of(config)


wildcard_constraints:
    dataset="[a-z0-9-]+",
    tokens="[0-9]+",


include: "workflows/study.smk"
include: "workflows/slide.smk"
include: "workflows/wca.smk"
include: "workflows/records.smk"
include: "workflows/real.smk"
include: "workflows/reproduction.smk"


rule all:
    """All results of the configuration, the target when none is named."""
    default_target: True
    input:
        study(),
    localrule: True


rule smoke:
    """The study in small; belongs to config/smoke.yaml (`make smoke`)."""
    input:
        smoke_study,
    localrule: True


rule:
    """All results of the configuration."""
    name:
        "reproduce-all"
    input:
        gpu_figure() if REPRODUCTION else study(),
    localrule: True
