import os
import sys

from snakemake.utils import min_version

min_version("9.20")

# Rules call `python`: the one beside Snakemake, also where its environment is not activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


# Only when none is given: Snakemake merges files, and the keys of this one would show through in another.
if not workflow.overwrite_configfiles:

    configfile: "config/smoke.yaml"


include: "workflows/common.smk"


REAL_CONFIG, REAL_SHARDS = real_options(config)
check_config(config)


wildcard_constraints:
    part="[a-z0-9-]+",
    dataset="[a-z0-9-]+",
    tokens="[0-9]+",


include: "workflows/data.smk"
include: "workflows/chunks.smk"
include: "workflows/evaluate.smk"
include: "workflows/cope.smk"
include: "workflows/figures.smk"
include: "workflows/slide.smk"
include: "workflows/wca.smk"
include: "workflows/agents.smk"
include: "workflows/real.smk"


rule all:
    default_target: True
    input:
        study(),
    localrule: True


rule smoke:
    input:
        smoke_study,
    localrule: True


rule:
    name:
        "reproduce-all"
    input:
        study(),
    localrule: True
