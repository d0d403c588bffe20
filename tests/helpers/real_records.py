"""Invented records of the study on a real model."""

from harness.experiments.real.arms import NOISE
from harness.results.real import ISOLATED, NOTHING
from harness.results.records import RecordWriter

SETTINGS = {"model": "m", "dtype": "bfloat16", "seed": 0, "lengths": [200], "prompts": 9, "provenance": {"gpus": []}}

FRACTION = {NOISE: 1.0, NOTHING: 0.08, ISOLATED: 0.08, "First tokens 10 %": 0.17, "First tokens 26 %": 0.31,
            "CacheBlend, by V 50 % at layer 5": 0.7}  # fmt: skip


def record(trial, arm, kl, dataset="hotpotqa", agreement=1.0, **more):
    scored = {"kl": kl, "agreement": agreement, "nll_change": 2 * kl, "greedy_equal": agreement == 1}
    return {"id": f"{trial} | {arm} | {more.get('turn', '')}", "trial": trial, "arm": arm, "dataset": dataset,
            "compute_fraction": FRACTION.get(arm, 0.25), "tokens": 1000, "tokens_reused": 900,
            "answer": scored, "greedy": scored | {"kl": kl / 2}} | more  # fmt: skip


def write(folder, name, records, part=False, **changes):
    writer = RecordWriter(folder / f"{name}.jsonl", SETTINGS | changes)
    for one in records:
        writer.add(one)
    writer.close() if part else writer.finish()
