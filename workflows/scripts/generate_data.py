"""One data file of the synthetic family."""

import sys

from harness.step import step
from harness.tasks.data import write_dataset

s = snakemake
with step(s.log[0], s.rule):
    spec = s.params.spec
    digest = write_dataset(
        s.output[0], s.wildcards.dataset, spec["split"], s.params.seed, spec["prompts"], spec["tokens"]
    )
    print(f"{digest}  {s.output[0]}", file=sys.stderr)
