"""The structure of the code in numbers: `python -m harness.structure --out results/house/summary.json`.

The import graph of modules, its cycles, and type checks of policy parts outside the policies package; with --recorded
and --now, the outcomes of the frozen requests (`harness.frozen`) that changed.
"""

import argparse
import ast
import json
import re
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.frozen.compare import add_records, changed_of
from harness.results.provenance import ROOT, machine
from harness.results.records import write_json
from harness.step import command

PACKAGES = ("cacheslide", "baselines", "harness")
PARTS = r"Correction|TopDeviation|EdgeTokens|\w*Keying|InPrompt|FixedChain|Isolated|Placement"
ASKED = re.compile(rf"isinstance\([^)]*\b({PARTS})\b|(encoding|correction|keying)\.(kind|name) ==")
# The test that defines a correction and an encoding and serves them in both hosts.
OWN_POLICY = "tests/cacheslide/policies/test_own_policy.py"


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name of every module of the packages."""
    names = {}
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def module_arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """The import graph by module, including imports inside functions and for annotations."""
    names = module_files(root)
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for target in _imported(node):
                while target and target not in names:
                    target = target.rpartition(".")[0]
                if target and target != name and names[target].name != "__init__.py":
                    arrows[name].add(target)
    return arrows


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names an import may refer to: modules, or names inside them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def cycles(arrows: dict[str, set[str]]) -> list[frozenset[str]]:
    """Groups of modules that import each other, directly or not."""
    reached: dict[str, set[str]] = {}
    for name in arrows:
        seen, left = set(), [name]
        while left:
            new = arrows[left.pop()] - seen
            seen |= new
            left += new
        reached[name] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in arrows}
    return sorted(groups - {frozenset()}, key=sorted)


def type_questions(root: Path = ROOT) -> list[str]:
    """Places outside the policies package that check the type or the name of a policy's part."""
    tops = (*PACKAGES, "workflows", "scripts", "models")
    return [
        f"{path.relative_to(root)}:{number}"
        for path in sorted(p for top in tops for p in (root / top).rglob("*.py"))
        if not path.is_relative_to(root / "cacheslide/policies")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ASKED.search(line)
    ]


def tree_bytes(root: Path = ROOT) -> int:
    """Bytes of the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return sum((root / name).stat().st_size for name in listed.split("\0") if name and (root / name).is_file())


def touched_by_own_policy(root: Path = ROOT) -> int:
    """Files that name the system defined only in the test, besides the test itself."""
    name = re.search(r'^NAME = "(\w+)"', (root / OWN_POLICY).read_text(), re.M)[1]
    return sum(f'"{name}"' in path.read_text() for path in module_files(root).values())


def summary(root: Path, changed: list[str] | None) -> dict[str, Any]:
    """The counts, and the places counted."""
    arrows = module_arrows(root)
    circles, asked = cycles(arrows), type_questions(root)
    base = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return {
        "headline": {
            "files_touched_by_new_correction": touched_by_own_policy(root),
            "file_cycles": len(circles),
            "isinstance_on_policy_parts": len(asked),
            "base_dependencies": len(base),
            "tree_mib": round(tree_bytes(root) / 2**20, 2),
            "records_changed": None if changed is None else len(changed),
        },
        "modules": len(arrows),
        "arrows": sum(map(len, arrows.values())),
        "circles": [sorted(circle) for circle in circles],
        "type_questions": asked,
        "dependencies": base,
        "changed": changed,
        "provenance": machine(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    add_records(parser)
    args = parser.parse_args(argv)
    found = summary(ROOT, changed_of(args))
    write_json(args.out, found)
    print(json.dumps(found["headline"], indent=1))


if __name__ == "__main__":
    command(main)
