"""Runs one job: the step's function with its inputs, outputs, options and its slice of the configuration."""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from harness.workflow.slices import Slice
from harness.workflow.steps import EVERYTHING, Step, step_named


def perform(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str], threads: int
) -> None:
    """Run the job of step `name`.

    Parameters
    ----------
    config : mapping
        The slice `Step.reads` of a checked configuration, from `slice_of`.
    inputs : mapping
        Path or list of paths by name; an input of the step that this configuration lacks is None.

    Raises
    ------
    ConfigError
        If the step reads a key that it does not declare.
    """
    step = step_named(name)
    module, _, function = step.call.partition(":")
    call = getattr(import_module(f"harness.{module}"), function)
    call(**_arguments(call, step, config, inputs, list(outputs), threads))


def _arguments(
    call, step: Step, config: Mapping[str, Any], inputs: Mapping[str, Any], outputs: list[str], threads: int
) -> dict[str, Any]:
    read = dict(config) if step.reads == EVERYTHING else Slice(config, step.reads)
    arguments = {**dict.fromkeys(step.inputs), **inputs, **step.options, "config": read}
    arguments |= {"output": outputs[0], "outputs": outputs, "threads": threads}
    names = inspect.signature(call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in names.values()):
        return {k: v for k, v in arguments.items() if k in names or k in inputs}
    return {k: v for k, v in arguments.items() if k in names}
