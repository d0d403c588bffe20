"""What scripts/install.sh brings is what the lists say, on an empty environment; what a test run left out is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.robustness.rows import ROWS
from tests.helpers.pins import pins
from tests.helpers.places import ROOT
from tests.helpers.skips import brings, lines

pytestmark = pytest.mark.slow

UNREACHABLE = r"dns error|client error \(Connect\)|error sending request|operation timed out|connection reset"


def dry_run(name: str, **environment: str) -> dict[str, str]:
    """The versions that the list `name` brings into an empty environment, resolved by the script itself."""
    variables = {**os.environ, "VENV": sys.prefix, "UV_HTTP_TIMEOUT": "60", **environment}
    command = ["bash", "scripts/install.sh", name, "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode and re.search(UNREACHABLE, done.stderr, re.IGNORECASE):
        pytest.skip("no index of Python packages can be reached")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^ \+ ([A-Za-z0-9._-]+)==(\S+)$", done.stderr, re.MULTILINE)
    return {package: version.split("+")[0] for package, version in found}


@pytest.mark.parametrize("name", ["cpu", "gpu", "rag", "slurm"])
def test_a_list_brings_its_own_versions_into_an_empty_environment(name):
    assert dry_run(name) == pins(name)


def test_settings_for_other_purposes_do_not_change_a_version(tmp_path):
    """uv reads overrides from the environment too, and from the pyproject.toml of any folder above."""
    (tmp_path / "overrides.txt").write_text("snakemake-executor-plugin-slurm==2.0.0\n")
    assert dry_run("slurm", UV_OVERRIDE=str(tmp_path / "overrides.txt")) == pins("slurm")


@pytest.mark.parametrize("variable", ["UV_CONFIG_FILE", "XDG_CONFIG_HOME"])
def test_a_users_own_settings_of_uv_are_read(tmp_path, variable):
    own = tmp_path / "uv/uv.toml"
    own.parent.mkdir()
    own.write_text("this is no setting")
    clean = {name: value for name, value in os.environ.items() if name not in ("UV_CONFIG_FILE", "UV_NO_CONFIG")}
    command = ["bash", "scripts/install.sh", "slurm", "--dry-run"]
    environment = {**clean, "VENV": sys.prefix, variable: str(own if variable == "UV_CONFIG_FILE" else tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and str(own) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["cpu", "--try"], "no option '--try'"), (["cpu", "--dry-run"], "run 'make install' first")],
)
def test_a_dry_run_that_cannot_be_is_one_line(tmp_path, arguments, said):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/install.sh").write_text((ROOT / "scripts/install.sh").read_text())
    bare = {name: value for name, value in os.environ.items() if name != "VENV"}
    command = ["bash", "scripts/install.sh", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def servers(tmp_path: Path, *programs: str) -> str:
    """What scripts/servers.sh misses where only these programs are on the PATH, and no library is known."""
    for program in ("bash", "grep"):
        (tmp_path / program).symlink_to(f"/bin/{program}")
    for program in programs:
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    command = ["/bin/bash", str(ROOT / "scripts/servers.sh"), "--missing"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_system_packages_that_tests_need_are_asked_for_by_name(tmp_path):
    assert servers(tmp_path).split()[:2] == ["redis-server", "openssl"]


@pytest.mark.parametrize("server", ["valkey-server", "redis-server"])
def test_either_server_will_do(tmp_path, server):
    assert "server" not in servers(tmp_path, server)


def test_every_reason_to_skip_is_counted_with_what_brings_it():
    redis, cuda = "neither valkey-server nor redis-server is installed", "needs a CUDA device"
    said = lines([f"Skipped: {cuda}", redis, redis, "a reason of its own"], left_out=4)
    assert said[0] == f"2 skipped: {redis}  -> make test-servers"
    assert f"1 skipped: {cuda}  -> {brings(cuda)}" in said and "1 skipped: a reason of its own" in said
    assert said[-1].startswith("4 not selected")
    assert lines([]) == []


def ended(folder, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run of pytest over one file, with the helpers that report."""
    (folder / "test_it.py").write_text(f"import pytest\n{source}")
    plugins = ["-p", "tests.helpers.skips", "-p", "tests.helpers.fault_report", "-p", "no:cacheprovider"]
    where = ["--rootdir", str(folder), "-c", str(ROOT / "pyproject.toml"), str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options, *where], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_a_run_says_at_its_end_what_it_left_out(tmp_path, options):
    source = (
        "@pytest.mark.skip(reason='Mooncake needs a library of the system')\ndef test_it(): pass\n"
        "@pytest.mark.server\ndef test_other(): pass\n"
    )
    done = ended(tmp_path, source, *options)
    assert "1 skipped: Mooncake needs a library of the system  -> make test-servers" in done.stdout
    assert "1 not selected, which start servers  -> make test PYTEST='-m server'" in done.stdout


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_outcomes_of_fault_tests_are_written(tmp_path, options):
    row, other = list(ROWS)[:2]
    source = (
        f"@pytest.mark.fault({row!r})\ndef test_holds(): pass\n"
        f"@pytest.mark.fault({row!r})\n@pytest.mark.fault({other!r})\ndef test_fails(): assert False\n"
        f"@pytest.mark.fault({other!r})\n@pytest.mark.skip\ndef test_skips(): pass\n"
    )
    done = ended(tmp_path, source, *options, "--fault-report", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert {r: {n.rpartition("::")[2]: o for n, o in tests.items()} for r, tests in report.items()} == {
        row: {"test_holds": "passed", "test_fails": "failed"},
        other: {"test_fails": "failed", "test_skips": "skipped"},
    }, done.stdout
