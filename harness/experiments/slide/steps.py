"""SLIDE's experiments (paper section 4.4, figures 12a-d) as steps that keep their records: `python -m ... STEP`.

    trace    which rows WCA corrects, from the shipped model (slide_trace)
    volume   bytes written and write stalls by eviction policy, real I/O (slide_replay)
    scan     known templates returning between novel queries through a full store
    index    start-up over 10^5 pages, lookup among 10^6 chunks
    faults   faults put in on purpose, and wrong pages served (slide_faults)
    orders   layer latency of the three load-write orders (slide_orders)
    summary  results/slide/summary.json from the records
    figures  figures/slide/ from the summary

An interrupted step resumes, and `--minutes` ends `volume` and `orders`. Everything is written
under --out, work files under --work.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cacheslide import renamed
from harness.experiments.slide import faults as slide_faults
from harness.experiments.slide import index as slide_index
from harness.experiments.slide import orders as slide_orders
from harness.experiments.slide import replay as slide_replay
from harness.experiments.slide import trace as slide_trace
from harness.limit import Limit, add_minutes
from harness.plots.render import render
from harness.quiet import watched
from harness.results.provenance import machine, provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.slide import summarise
from harness.step import command

POLICIES = ("clean-first", "lru", "fifo")
# name -> trace, seeds, templates, settings, bytes a second that writes are held to (0: the disk's own speed)
CONDITIONS: dict[str, tuple[str, int, int, dict[str, Any], int]] = {
    "main sparse": ("sparse@1", 5, 8, {}, 0),
    "main deep": ("deep@1", 5, 8, {}, 0),
    "slow disk": ("deep@1", 5, 8, {}, 100 << 20),
    "batch 4": ("deep@1", 2, 4, {}, 0),
    "batch 6": ("deep@1", 2, 6, {}, 0),
    "selection layer 4": ("deep@4", 2, 8, {}, 0),
    "slow disk, selection layer 4": ("deep@4", 5, 8, {}, 100 << 20),
    "shipped model's pages": ("deep@1", 2, 8, {"kv_heads": 6, "head_dim": 64}, 0),
    "memory 1/2": ("deep@1", 1, 8, {"memory": 1 / 2}, 0),
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; none when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(record, sort_keys=True) + "\n")


def _runs() -> Iterator[tuple[str, str, int]]:
    for condition, (_, seeds, *_) in CONDITIONS.items():
        for seed in range(seeds):
            for policy in POLICIES:
                yield condition, policy, seed


def trace(out: Path, work: Path, model: str, limit: Limit) -> None:
    """Record the traces."""
    (out / "trace.json").write_text(json.dumps(slide_trace.main(model)))


def volume(out: Path, work: Path, model: str, limit: Limit) -> None:
    """Run every condition, seed and policy once."""
    traces = json.loads((out / "trace.json").read_text())
    file = out / "volume.jsonl"
    done = {(r["condition"], r["policy"], r["seed"]) for r in read_lines(file)}
    for condition, policy, seed in _runs():
        if (condition, policy, seed) in done:
            continue
        if limit.over:
            return
        name, _, count, changes, speed = CONDITIONS[condition]
        templates = [slide_trace.Template.from_dict(t) for t in traces[name]][:count]
        setting = slide_replay.Setting(policy, seed, **({"turns": 3} | changes))
        files = slide_replay.Throttled(speed) if speed else None
        with tempfile.TemporaryDirectory(dir=work) as folder, watched() as quiet:
            got = slide_replay.replay(Path(folder), templates, setting, files)
        head = {"condition": condition, "policy": policy, "seed": seed, "trace": name, "templates": count}
        _append(file, head | {"setting": asdict(setting), "write_bytes_per_s": speed, "counts": got, "quiet": quiet})
        print(condition, policy, seed, int(got["spill_bytes"]) >> 20, "MiB", round(got["stall_s"], 3), "s", flush=True)


def scan(out: Path, work: Path, model: str, limit: Limit) -> None:
    """1,000 novel queries and known templates through a full store."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        record = slide_index.scan(Path(folder))
    (out / "scan.json").write_text(json.dumps(record | {"machine": machine()}, indent=1))


def index(out: Path, work: Path, model: str, limit: Limit) -> None:
    """Start-up and lookup."""
    with tempfile.TemporaryDirectory(dir=work) as folder, watched() as quiet:
        record = slide_index.figures(Path(folder)) | {"quiet": quiet}
    (out / "index.json").write_text(json.dumps(record | {"machine": machine()}, indent=1))


def faults(out: Path, work: Path, model: str, limit: Limit) -> None:
    """All faults, a hundred kills among them."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = [asdict(v) for v in slide_faults.all_faults(Path(folder), kills=100, rots=100)]
    (out / "faults.json").write_text(json.dumps({"faults": found, "machine": machine()}, indent=1))


def orders(out: Path, work: Path, model: str, limit: Limit) -> None:
    """The three load-write orders on this machine's device: orders_cpu.json, or for example orders_h200.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name().split()[-1].lower() if device == "cuda" else "cpu"
    file, where = out / f"orders_{name}.json", machine()
    known = renamed.record(json.loads(file.read_text())) if file.exists() else None
    if known is not None and known["machine"]["git_commit"] != where["git_commit"]:
        where["begun_at_commit"] = known["machine"].get("begun_at_commit", known["machine"]["git_commit"])

    def keep(record: dict[str, Any]) -> None:
        write_json(file, record | {"machine": where})

    with tempfile.TemporaryDirectory(dir=work) as folder:
        slide_orders.measure(Path(folder), device, known=known, keep=keep, limit=limit)


def summary(out: Path, work: Path, model: str, limit: Limit) -> None:
    """The committed summary, from the records."""
    conditions = {
        k: {"trace": v[0], "templates": v[2], **v[3], "write_bytes_per_s": v[4]} for k, v in CONDITIONS.items()
    }
    about = provenance({"conditions": conditions}, {}, model)
    write_json(out / "summary.json", rounded(summarise(out, about)))


def figures(out: Path, work: Path, model: str, limit: Limit) -> None:
    """Figures 12a-d from the summary, beside the other figures."""
    folder = Path("figures") / out.name
    for part in "abcd":
        name = f"fig12{part}"
        render(name, out / "summary.json", [folder / f"{name}.{kind}" for kind in ("svg", "png")])


STEPS = {f.__name__: f for f in (trace, volume, scan, index, faults, orders, summary, figures)}


def main(argv: list[str] | None = None) -> None:
    """Run steps in the order given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, default=Path("results/slide"))
    parser.add_argument("--work", type=Path, default=Path("build/slide"), help="folder on the disk to be measured")
    parser.add_argument("--model", default="models/tiny-llama-12m")
    add_minutes(parser)
    args = parser.parse_args(argv)
    limit = Limit(args.minutes)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for step in args.steps:
        start = time.monotonic()
        STEPS[step](args.out, args.work, args.model, limit)
        print(f"{step}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    command(main)
