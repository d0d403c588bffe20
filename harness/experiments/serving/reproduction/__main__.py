"""The reproduction on GPUs, stage by stage: `python -m harness.experiments.serving.reproduction plan|run …`.

    plan --config config/h200.yaml                          the stages, with estimated seconds, and what is left out
    run --config config/h200.yaml --stage 3 --out DIR       measure a stage; again with the same words: go on

A stage writes DIR/NN-NAME.jsonl, a record a cell as soon as it is measured. With --minutes no cell begins that is
not expected to end by then; exit status 3 says that cells are left. docs/gpu.md has the whole procedure.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cacheslide.errors import ConfigError
from harness.experiments.serving.reproduction.settings import read_settings
from harness.experiments.serving.reproduction.stages import Plan, Stage, plan
from harness.limit import Limit, add_minutes
from harness.step import command

LEFT = 3  # exit status


def shown_plan(made: Plan) -> str:
    """The plan as text."""
    lines = [f"{made.settings.run}: {len(made.stages)} stages; seconds with a start (the first start on a machine)"]
    for stage in made.stages:
        seconds, first = made.seconds(stage), made.seconds(stage, first=True)
        lines.append(f"stage {stage.number:2}  {seconds:4.0f} s ({first:.0f})  {stage.file}")
        for cell in stage.cells:
            how = f"{cell.repeats} turns" if cell.repeats else "closed loop"
            lines.append(f"          {cell.id}: {len(cell.arms)} arms, {how}")
    total = sum(map(made.seconds, made.stages)) / 60
    lines.append(f"together {total:.0f} minutes ({total * made.settings.tensor_parallel:.0f} GPU minutes)")
    lines += [f"left out: {name}: {why}" for name, why in made.left_out.items()]
    return "\n".join(lines)


def chosen(made: Plan, number: int) -> Stage:
    """The stage of that number; ConfigError if there is none."""
    if not 1 <= number <= len(made.stages):
        raise ConfigError(f"--stage {number}: the plan has stages 1 to {len(made.stages)}")
    return made.stages[number - 1]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan, or measure a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("plan", "run"):
        part = parts.add_parser(name)
        part.add_argument("--config", type=Path, required=True, help="such as config/h200.yaml")
        if name == "run":
            part.add_argument("--stage", type=int, required=True, help="its number in the plan")
            part.add_argument("--out", type=Path, required=True, help="folder of the records")
            add_minutes(part)
    args = parser.parse_args(argv)
    made = plan(read_settings(args.config))
    if args.part == "plan":
        print(shown_plan(made))
        return
    stage = chosen(made, args.stage)
    from harness.experiments.serving.reproduction.run import run_stage  # opens engines

    if left := run_stage(made.settings, stage, args.out, Limit(args.minutes)):
        print(f"stage {stage.number}: {left} of {len(stage.cells)} cells are left; the same command goes on")
        sys.exit(LEFT)


if __name__ == "__main__":
    command(main)
