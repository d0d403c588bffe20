"""Small repositories with one wrong line, an issue that states what must hold, and a test that fails until the fix.

Three kinds of bugs: a wrong constant, a reference to the wrong name, a wrong operator. The names, the constants and
with them the lines that are wrong belong to one split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from cacheslide.errors import DataError
from harness.agents.tasks.qa import fresh_value
from harness.tasks.synthetic.words import names, values
from harness.tasks.synthetic.world import draw, pick

KINDS = ("constant", "reference", "operator")
_MEANING = {"+": "sum", "-": "differ", "*": "multiply"}
_APPLIED = {"+": 12, "-": 4, "*": 32}  # of 8 and 4


@dataclass(frozen=True)
class FixTask:
    """A repository before the fix, and its tests.

    `files` holds sources and tests by path; `path` and `line` (from 1) are the bug's place, `fixed` the right line;
    `fail_to_pass` and `pass_to_pass` are pytest ids.
    """

    id: str
    split: str
    kind: str
    issue: str
    files: dict[str, str]
    path: str
    line: int
    fixed: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]


def fix_tasks(split: str, seed: int, count: int, modules: int = 3, lines: int = 6) -> Iterator[FixTask]:
    """Draw `count` tasks of `modules` files with `lines` names each."""
    if modules < 1 or lines < 3:
        raise DataError(f"a repository has at least 1 module of 3 lines, not {modules} of {lines}")
    for i in range(count):
        rng = Random(f"agents-fixes-{split}-{seed}-{modules}-{lines}-{i}")
        yield draw_fix(rng, f"fix-{split}-{seed}-{i:05d}", split, modules, lines)


def draw_fix(rng: Random, task_id: str, split: str, modules: int, lines: int) -> FixTask:
    """One task."""
    by_second, kind = names(split), pick(rng, KINDS)
    drawn = iter([(pick(rng, by_second[s]), s) for s in draw(rng, list(by_second), modules * lines)])
    where, files, broken = int(rng.random() * modules), {}, None
    for module in range(modules):
        # Two names to refer to come first, so that every reference looks upwards.
        plan = ["constant", "constant", *[pick(rng, KINDS) for _ in range(lines - 2)]]
        site = 2 + int(rng.random() * (lines - 2)) if module == where else -1
        if site >= 0:
            plan[site] = kind
        path, body, held = f"conf/set_{module}.py", [], {}
        for at, what in enumerate(plan):
            name = "_".join(next(drawn))
            right, wrong, issue, check = _line(rng, split, name, what, held)
            if at == site:
                broken = (path, len(body) + 1, right, name, issue, check)
            body.append(wrong if at == site else right)
        files[path] = "\n".join(body) + "\n"
    path, line, fixed, name, issue, check = broken
    module = path.removesuffix(".py").replace("/", ".")
    test, other = f"tests/test_{name}.py", "tests/test_imports.py"
    files[test] = f"from {module} import {name}\n\n\ndef test_{name}():\n    assert {check}\n"
    imports = "".join(f"    importlib.import_module('conf.set_{m}')\n" for m in range(modules))
    files[other] = f"import importlib\n\n\ndef test_imports():\n{imports}"
    keys = (f"{test}::test_{name}",), (f"{other}::test_imports",)
    return FixTask(task_id, split, kind, issue, files, path, line, fixed, *keys)


def _line(rng, split, name, kind, held) -> tuple[str, str, str, str]:
    """The right line, a wrong one, the issue's text and the test's assertion; adds the name to `held`."""
    words = name.replace("_", " ")
    if kind == "constant":
        value = fresh_value(rng, split, [tuple(v.split()) for v in held.values()])
        held[name] = " ".join(value)
        other = " ".join(pick(rng, [v for v in values(split) if v != value]))
        right, wrong = f'{name} = "{held[name]}"', f'{name} = "{other}"'
        return right, wrong, f"{words} must be {held[name]}", f'{name} == "{held[name]}"'
    if kind == "reference":
        target, other = draw(rng, [n for n in held if not held[n].startswith("=")], 2)
        right, wrong = f"{name} = {target}", f"{name} = {other}"
        return right, wrong, f"{words} must follow {target.replace('_', ' ')}", f'{name} == "{held[target]}"'
    sign, other = draw(rng, list(_MEANING), 2)
    right, wrong = f"{name} = lambda x, y: x {sign} y", f"{name} = lambda x, y: x {other} y"
    return right, wrong, f"{words} must {_MEANING[sign]}", f"{name}(8, 4) == {_APPLIED[sign]}"
