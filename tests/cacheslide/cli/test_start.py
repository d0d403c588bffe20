"""What the command imports before it knows what it is asked for, counted in modules: times differ by machine."""

import json
import subprocess
import sys
import tomllib

import pytest

from cacheslide import __version__
from cacheslide.cli.main import COMMANDS, main
from tests.helpers.places import ROOT

# Packages that take from a tenth of a second to many seconds to import.
HEAVY = {"torch", "transformers", "vllm", "numpy", "safetensors", "tokenizers", "huggingface_hub", "triton", "msgspec"}
SCRIPT = """
import json, sys
from cacheslide.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
json.dump(sorted({name.split(".")[0] for name in sys.modules}), sys.stderr)
"""


def imported(*argv: str) -> set[str]:
    """The heavy packages of a process that ran the command."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, cwd=ROOT)
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "argv",
    [("--help",), ("--version",), (), *((name, "--help") for name in COMMANDS if name not in ("serve", "store"))],
    ids=" ".join,
)
def test_help_and_version_import_nothing_heavy(argv):
    assert imported(*argv) == set()


@pytest.mark.slow
def test_a_command_that_needs_pytorch_imports_it_and_no_vllm():
    assert "torch" in imported("systems") and "vllm" not in imported("store", "--help")


def test_the_version_is_the_distributions(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"cacheslide {project['version']}\n" == f"cacheslide {__version__}\n"


def test_the_help_has_a_line_for_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, line in COMMANDS.items():
        assert f" {name} {line}" in out


@pytest.mark.parametrize("argv", [("fly",), (), ("analyse",), ("run", "m", "--prompt", "p", "--chunk-size", "many")])
def test_a_wrong_call_is_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--help`)" in err, err
