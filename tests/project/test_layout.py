"""The house rules that a machine can check: the README's tree, imports that only go down, no pickle, no local paths."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from harness.structure import ASKED, cycles, module_arrows, type_questions
from tests.helpers.places import ROOT
from tests.helpers.project_files import python_files

# Arrows only go down: a file may import from its own level and from those before it.
LEVELS = {"cacheslide": 0, "baselines": 1, "harness": 2, "workflows": 3, "scripts": 3, "models": 3}
PACKAGES = ("cacheslide", "baselines", "harness")
# Who may import vLLM: the connector, the command that starts a server, and what drives an engine in its own process.
VLLM_HOSTS = ("cacheslide/vllm", "cacheslide/cli/serve.py", "harness/backends", "harness/frozen", "harness/robustness")
GENERATED = {"__pycache__", "build", "dist"}


def folders(parent: Path) -> list[Path]:
    """The folders that belong to the project: not hidden, not generated."""
    return sorted(
        path
        for path in parent.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in GENERATED and path.suffix != ".egg-info"
    )


def package_folders() -> Iterator[Path]:
    """Every folder of the packages that holds modules."""
    for package in PACKAGES:
        yield from sorted({path.parent for path in python_files(package)})


def read_tree(text: str) -> list[str]:
    """The paths named by an annotated tree, one a line, relative to the root.

    Lines look like `├── store/   where chunks are kept` or are indented by spaces alone; depth is the column in
    which the name starts. A first line that is the root itself (`.` or `name/` in column 0 above box characters)
    is not needed and not understood.
    """
    paths: list[str] = []
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        bare = re.sub(r"[│├└─]", " ", line)
        if not bare.strip():
            continue
        column = len(bare) - len(bare.lstrip())
        name = bare.split()[0].rstrip("/")
        while stack and stack[-1][0] >= column:
            stack.pop()
        path = f"{stack[-1][1]}/{name}" if stack else name
        stack.append((column, path))
        paths.append(path)
    return paths


def readme_tree() -> list[str]:
    block = re.search(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block, "README.md needs its annotated tree as the first ```text block"
    return read_tree(block[1])


def test_the_tree_reader_understands_both_ways_to_draw_one():
    drawn = "a/        first\n├── b/   second\n│   └── c.py  third\n└── d.py\n"
    indented = "a/        first\n  b/      second\n    c.py  third\n  d.py\n"
    assert read_tree(drawn) == read_tree(indented) == ["a", "a/b", "a/b/c.py", "a/d.py"]


def test_readme_tree_names_every_folder():
    listed = set(readme_tree())
    wanted = [*folders(ROOT), *package_folders()]
    missing = [str(path.relative_to(ROOT)) for path in wanted if str(path.relative_to(ROOT)) not in listed]
    assert not missing, f"README.md's tree lacks {missing}"


def test_readme_tree_names_nothing_that_is_gone():
    gone = [path for path in readme_tree() if not (ROOT / path).exists()]
    assert not gone, f"README.md's tree names {gone}, which do not exist"


@cache
def imported(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every import in a file, at any depth; relative imports are resolved."""
    return list(_imported(path))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])


def test_imports_only_go_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(*LEVELS)
        for line, name in imported(path)
        if LEVELS.get(name.split(".")[0], 0) > LEVELS[path.relative_to(ROOT).parts[0]]
    ]
    assert not wrong


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Which module imports which."""
    return module_arrows()


def test_no_files_import_each_other_in_a_circle(arrows):
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert len(arrows) > 300 and cycles(arrows) == []


def test_in_the_store_what_outlives_a_process_knows_nothing_of_pages_in_memory(arrows):
    """Serving's files and servers stand by themselves; SLIDE's pages lie over them, and what both share lies under."""
    store = "cacheslide.store."
    persistent, slide = (sorted(m for m in arrows if m.startswith(store + room)) for room in ("persistent.", "slide."))
    opens = {store + "config", store + "directory"}
    below = [m for m in arrows if m.startswith(store) and m not in {*persistent, *slide} | opens]
    assert len(persistent) > 10 and len(slide) > 8 and len(below) > 6
    assert not [(m, to) for m in persistent for to in arrows[m] if to.startswith(store + "slide.")]
    assert not [(m, to) for m in below for to in arrows[m] if to in {*persistent, *slide} | opens]


def test_no_file_asks_for_the_type_of_a_policys_part():
    """A new rule is one file: whoever needs to know something of a part asks it."""
    assert ASKED.search("isinstance(rule, TopDeviation | X)") and ASKED.search("if policy.encoding.name == 'x'")
    assert not type_questions()


def test_vllm_is_imported_by_its_adapter_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files(*LEVELS)
        if not any(path.is_relative_to(ROOT / host) for host in VLLM_HOSTS)
        for line, name in imported(path)
        if name.split(".")[0] == "vllm"
    ]
    assert not wrong


def test_nothing_is_pickled():
    """Safetensors and JSON only: loading a file must never run code."""
    modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    calls = {("torch", "load"), ("torch", "save")}
    wrong = []
    for path in python_files(*LEVELS, "tests"):
        where = path.relative_to(ROOT)
        wrong += [f"{where}:{line} {name}" for line, name in imported(path) if name.split(".")[0] in modules]
        text = path.read_text()
        if not re.search(r"torch\.(load|save)|\.(read|to)_pickle", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if (node.value.id, node.attr) in calls or node.attr in ("read_pickle", "to_pickle"):
                wrong.append(f"{where}:{node.lineno} {node.value.id}.{node.attr}")
    assert not wrong


def text_files() -> list[Path]:
    suffixes = {".py", ".smk", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".rst", ""}
    found = [ROOT / ".ci/run", ROOT / ".gitignore", *(path for path in ROOT.iterdir() if path.is_file())]
    for folder in folders(ROOT):
        if folder.name not in ("results", "figures"):
            found += [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for path in found if path.suffix in suffixes and path.name != ".git"]


def test_no_path_or_host_of_one_machine():
    path_of_a_machine = re.compile(r"(?:^|[^\w.$}])/(?:work|farm|root|home|tmp|mnt|opt/(?:wheels|pypi))/")
    registry = re.compile(r"--(?:extra-)?index-url|--find-links[ =]/|file:///\w")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path_of_a_machine.search(line) or (registry.search(line) and path.parent.name == "requirements")
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_files_stay_readable_in_one_sitting(package):
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(package)}
    assert not {path: lines for path, lines in long.items() if lines > 400}
