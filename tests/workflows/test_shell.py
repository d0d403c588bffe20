"""No value of a configuration is read by a shell: every rule's command, and a run with hostile names in every key."""

import io
import os
import re
import string
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

from tests.helpers.places import ROOT

pytestmark = [pytest.mark.fault("shell_injection"), pytest.mark.slow]
WORKFLOW = [ROOT / "Snakefile", *sorted((ROOT / "workflows").glob("*.smk"))]
NUMBERS = {"threads"}  # Snakemake's own, always an integer
# What a shell, an option parser or Snakemake's own formatting would take for more than a name.
HOSTILE = ["$(touch PWNED)", "`touch PWNED`", "x; touch PWNED", "'; touch PWNED; '", '"; touch PWNED; "']
HOSTILE += [
    "x & touch PWNED",
    "-x",
    "--out=PWNED",
    "> PWNED",
    "| tee PWNED",
    "a b",
    "*",
    "~",
    "{threads}",
    "{{x}}",
    "data[1]",
    "#x",
    "ü$HOME",
]


def commands(source: str) -> list[str]:
    """The texts behind every `shell:` of a Snakefile, joined as Python joins neighbouring strings."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    layout = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.COMMENT}
    found = []
    for i, token in enumerate(tokens[:-1]):
        if token.string == "shell" and tokens[i + 1].string == ":":
            parts = []
            for later in tokens[i + 2 :]:
                if later.type == tokenize.STRING:
                    parts.append(eval(later.string))  # a literal of our own source
                elif later.type not in layout:
                    assert later.type == tokenize.DEDENT or parts, f"a shell: that is no literal: {later.line}"
                    break
            found.append("".join(parts))
    return found


def unquoted(command: str) -> list[str]:
    """The fields of a command that reach the shell as they are."""
    fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(command) if name is not None]
    return [name for name, spec in fields if not spec.endswith("q") and name not in NUMBERS]


def test_the_check_finds_what_it_looks_for():
    bad = (
        'rule a:\n    output: "x"\n    shell:\n        "run {params.model} {threads}"\n        " {log:q} > {output}"\n'
    )
    assert [unquoted(c) for c in commands(bad)] == [["params.model", "output"]]


def test_every_value_in_a_rules_command_is_quoted():
    found = {path.name: commands(path.read_text()) for path in WORKFLOW}
    assert sum(map(len, found.values())) >= 2
    for name, some in found.items():
        for command in some:
            assert unquoted(command) == [], (name, command)


@pytest.mark.parametrize("folder", ["workflows", "harness", "scripts", "cacheslide", "baselines"])
def test_no_code_hands_a_text_to_a_shell(folder):
    shells = re.compile(r"\bshell\s*=\s*True|\bos\.(system|popen)\(|\bgetoutput\(|(?<![\w.])shell\(|\bpopen2?\(")
    for path in [*WORKFLOW, *(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.smk")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not shells.search(line), f"{path.relative_to(ROOT)}:{number}"


def checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "cope.json"):
        (folder / name).write_text("{}")


def run(folder: Path, config: dict, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Snakemake in `folder`, off the PATH; the `python` of its rules records its words, NUL behind each."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/python").write_text(f'#!/bin/sh\nfor x in "$@"; do printf "%s\\0" "$x"; done >> {folder}/called\n')
    (folder / "bin/python").chmod(0o755)
    installed = f"import sys; sys.executable = {str(folder / 'bin/python')!r}"
    command = [sys.executable, "-c", f"{installed}; from snakemake.cli import main; main()"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--cores", "1"]
    command += ["--workflow-profile", "none", "--nolock", "-p", "results/wca/summary.json"]
    command += [*arguments, "--configfile", str(folder / "config.yaml")]
    environment = os.environ | {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


def hostile_config(name: str, adapter: str) -> dict:
    config = yaml.safe_load((ROOT / "config/cpu.yaml").read_text())
    return config | {"model": name, "cope": config["cope"] | {"adapter": adapter}}


def test_hostile_names_reach_a_command_as_one_word_each(tmp_path):
    """One run: the model's name holds every hostile text, the adapter's folder too, and both begin with "-"."""
    folder = tmp_path / "run"
    name = "-" + " ".join(x for x in HOSTILE if "/" not in x)
    model, adapter = f"{name}m"[:200], f"-a{name}"[:200]
    checkpoint(folder / model)
    checkpoint(folder / adapter)
    before = {p.name for p in folder.iterdir()} | {"config.yaml", "bin", "called", "results", ".snakemake"}
    done = run(folder, hostile_config(model, adapter))
    assert done.returncode == 0 or (folder / "called").exists(), done.stderr[-3000:]
    called = (folder / "called").read_text().split("\0")
    start = called.index("harness.experiments.wca.sweep")
    assert called[start + 1 : start + 3] == [f"--model={model}", f"--adapter={adapter}"], done.stderr
    assert {p.name for p in folder.iterdir()} <= before
    assert not list(tmp_path.rglob("PWNED*"))


STRINGS = ["run", "model", "systems.1", "datasets.0", "latency.dataset", "throughput.dataset", "cksim.dataset"]
STRINGS += ["cope.adapter", "cope.systems.0", "agents.model", "agents.systems.1", "device", "dtype", "backend"]


def test_hostile_values_in_every_key_make_no_file(tmp_path):
    """Each key in turn through the checks that the workflow calls, then one dry run."""
    from cacheslide.errors import CacheSlideError
    from harness.configuration import check

    schema, base = ROOT / "workflows/schemas/config.schema.yaml", (ROOT / "config/cpu.yaml").read_text()
    free = set()
    for key in STRINGS:
        for value in [*HOSTILE, "x\ntouch PWNED", "x\0"]:
            config = yaml.safe_load(base)
            config["cope"].setdefault("systems", ["recompute"])
            *path, last = [int(k) if k.isdigit() else k for k in key.split(".")]
            place = config
            for step in path:
                place = place[step]
            place[last] = value
            try:
                check(config, schema)
            except CacheSlideError as wrong:
                assert "\n" not in str(wrong)
            else:
                free.add(key)
    assert free == {"model", "cope.adapter", "agents.model"}  # names of folders; the run above covers their commands
    (tmp_path / "run").mkdir()
    done = run(tmp_path / "run", hostile_config("x\ntouch PWNED", "$(touch PWNED)"), "--dry-run")
    said = [line for line in done.stderr.splitlines() if line.startswith("config: ")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("config: model: "), done.stderr
    assert not list(tmp_path.rglob("PWNED*"))
