"""CacheSlide's TTFT over recompute's at one length: `python -m harness.experiments.serving.ttft_ratio`.

The study's own step (`harness.experiments.study.latency`) on a few of the study's own prompts. Records go to --out;
the printed line is the table's row, with the disturbed rounds. Exit status 3: too many were disturbed for a valid
ratio.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from harness.configuration import check
from harness.experiments.study.steps import selected_layer, step_latency
from harness.inventory import read_config
from harness.results.provenance import ROOT
from harness.results.runs import OURS, REFERENCE, Run, read_file
from harness.results.timing import latency_table
from harness.step import command
from harness.tasks.data import write_dataset


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", type=Path, default=ROOT / "config/cpu.yaml")
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--layer", type=int, help="selection layer (default: the one that the configuration's run chose)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, help="record file; an interrupted run goes on (default: kept nowhere)")
    args = p.parse_args()
    config = read_config(args.config)
    check(config, ROOT / "workflows/schemas/config.schema.yaml")
    chosen = ROOT / "results" / config["run"] / "selection_layer.json"
    layer = selected_layer(chosen) if args.layer is None else args.layer
    config["latency"] |= {"systems": [REFERENCE, OURS], "prompts": args.prompts, "repeats": args.repeats}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/{config['latency']['dataset']}.jsonl"
        out = args.out or Path(folder) / f"{args.tokens}.jsonl"
        write_dataset(data, config["latency"]["dataset"], "test", config["seed"], args.prompts, args.tokens)
        step_latency(config, data, layer, str(out), args.threads)
        [row] = [r for r in latency_table(Run(config, latency={args.tokens: read_file(out)})) if r["system"] == OURS]
        records = read_file(out).records
    rounds = [r for record in records for q in record.get("quiet", ()) for r in q["rounds"]]
    marked = [r["why"] for r in rounds if r["disturbed"]]
    ratio = row["ttft_ratio"]
    said = "no ratio: " + row["ratio_reason"]
    if ratio is not None:
        said = f"TTFT of {OURS} over {REFERENCE}: {ratio['value']:.3f} [{ratio['low']}, {ratio['high']}]"
    print(f"{args.tokens} tokens, {row['prompts']} prompts, layer {layer}: {said}; ideal {row['compute_fraction']:.3f}")
    print(
        f"{len(marked)} of {len(rounds)} rounds disturbed"
        + (f" ({'; '.join(sorted(set(marked))[:3])})" if marked else "")
    )
    if row.get("disturbed"):
        sys.exit(3)


if __name__ == "__main__":
    command(main)
