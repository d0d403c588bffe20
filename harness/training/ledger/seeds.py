"""Train the ledger model with several seeds, then compare each with random choices of tokens, by one command.

`python -m harness.training.ledger.seeds --config config/training-ledger.yaml --out DIR --seconds 640`

The runs are parallel processes on one device, so that one compiles or waits for rows while another computes:
`--seconds` is the wall time of all. Each leaves DIR/seed-N (a model to serve, its training log, and `audit.json` of
`harness.experiments.rules.static_choices`); DIR/summary.json compares them. Existing runs continue with
`--resume`; `--audit-only` repeats only the audits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cacheslide.errors import ConfigError
from cacheslide.plain_values import at_least
from harness.step import command
from harness.training.ledger.settings import read_settings

SCHEMA = "cacheslide.ledger_seeds/1"
TRAIN, AUDIT = "harness.training.ledger.train", "harness.experiments.rules.static_choices"
AUDITED = ("--datasets", "hotpotqa-ledger", "swebench-ledger", "--tokens", "2048")


def side_by_side(commands: Sequence[list[str]], logs: Sequence[Path], together: int) -> list[int]:
    """Exit statuses of modules run with this Python, at most `together` at once; their output goes to `logs`."""
    waiting, running, out = list(enumerate(zip(commands, logs, strict=True))), {}, [0] * len(commands)
    try:
        while waiting or running:
            while waiting and len(running) < together:
                number, (words, log) = waiting.pop(0)
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("a") as told:
                    running[number] = subprocess.Popen([sys.executable, "-m", *words], stdout=told, stderr=told)
            for number, process in list(running.items()):
                if process.poll() is not None:
                    out[number] = running.pop(number).returncode
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
    return out


def summary(folders: Sequence[Path]) -> dict:
    """Results of the runs' logs and audits, by folder; a run without an audit has none."""
    out = {}
    for folder in folders:
        log = json.loads((folder / "training.json").read_text())
        told = {k: log[k] for k in ("step", "stage", "tokens", "seconds", "device", "scores", "switches")}
        audit = folder / "audit.json"
        if audit.is_file():
            told["headline"] = json.loads(audit.read_text())["headline"]
        out[folder.name] = told
    return {"schema": SCHEMA, "seeds": out}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="of training, in place of the configuration's")
    parser.add_argument("--together", type=at_least(1), default=3, help="runs at once")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--audit-only", action="store_true")
    parser.add_argument("--audit", nargs="*", metavar="ARGUMENT", help="further arguments of the audit; - for no audit")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    read_settings(args.config, args.set)  # reports an error once, before anything starts
    folders = [args.out / f"seed-{n}" for n in args.seeds]
    if not args.audit_only:
        workers = max(1, ((os.cpu_count() or 1) - 1) // min(args.together, len(args.seeds)))
        given = [f"workers={workers}", *args.set] + ([f"seconds={args.seconds}"] if args.seconds is not None else [])
        common = ["--config", str(args.config), *(["--resume"] if args.resume else []), "--set", *given]
        pairs = zip(folders, args.seeds, strict=True)
        trained = [[TRAIN, "--out", str(f), "--seed", str(n), *common] for f, n in pairs]
        _check(side_by_side(trained, [f / "training.log" for f in folders], args.together), folders, "training.log")
    if args.audit != ["-"]:
        given = [*AUDITED, *(args.audit or ())]
        audits = [[AUDIT, "--model", str(f), "--out", str(f / "audit.json"), *given] for f in folders]
        _check(side_by_side(audits, [f / "audit.log" for f in folders], args.together), folders, "audit.log")
    told = summary(folders)
    (args.out / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    for name, seed in told["seeds"].items():
        print(name, json.dumps({k: seed[k] for k in ("seconds", "tokens", "scores", "headline") if k in seed}))


def _check(statuses: Sequence[int], folders: Sequence[Path], log: str) -> None:
    if lost := [f.name for f, status in zip(folders, statuses, strict=True) if status]:
        raise ConfigError(f"{', '.join(lost)} ended with an error: see {log} in {folders[0].parent}")


if __name__ == "__main__":
    command(main)
