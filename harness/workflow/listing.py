"""What `snakemake --list` says of a step, and which configuration has a target that the given one lacks."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cacheslide.errors import ConfigError
from harness.inventory import has_agents, read_config
from harness.results.provenance import ROOT
from harness.workflow.steps import STEPS, Config, Step, steps_of, with_cope

GROUPS = {"agents": has_agents, "cope": with_cope}  # rules of several steps


def line_of(step: Step) -> str:
    """The first line of the docstring of the step's function, or of its figure's module; nothing is imported."""
    module, _, function = step.call.partition(":")
    if module == "plots.render":
        return figure_line(step.options["name"])
    functions = [n for n in _parsed(module).body if isinstance(n, ast.FunctionDef) and n.name == function]
    return _first(functions[0])


def figure_line(name: str) -> str:
    """The first line of the docstring of a figure's module."""
    return _first(_parsed(f"plots.{name}"))


def _first(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


@cache
def _parsed(module: str) -> ast.Module:
    path = ROOT / "harness" / module.replace(".", "/")
    return ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))


def absent(config: Config) -> Iterator[tuple[str, str]]:
    """Targets that another configuration of config/ has and `config` lacks, each with what to do."""
    here = {step.name for step in steps_of(config)} | {name for name, has in GROUPS.items() if has(config)}
    for name in [*(step.name for step in STEPS if not step.each), *GROUPS]:
        if name not in here and (files := _with(name)):
            files = [f"--configfile {file}" for file in files]
            yield name, f"{name} is not part of run {config['run']!r}: it needs {' or '.join(files)}"


@cache
def _with(name: str) -> tuple[str, ...]:
    """The files of config/ whose study has this target, the committed run's first."""
    files = sorted(ROOT.glob("config/*.yaml"), key=lambda path: (path.stem != "cpu", path.stem))
    return tuple(str(path.relative_to(ROOT)) for path in files if name in _targets(path))


@cache
def _targets(path: Path) -> frozenset[str]:
    try:
        config = read_config(path)
    except ConfigError:
        return frozenset()
    if not {"run", "systems", "backend"} <= config.keys():  # of training, serving or a real model
        return frozenset()
    return frozenset({step.name for step in steps_of(config)} | {name for name, has in GROUPS.items() if has(config)})
