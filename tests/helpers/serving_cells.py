"""Cells of the serving experiment, written as records."""

import json


def cell(system: str, ttft: list[list[float]], share: float | None = None, failed=None, store="model", tokens=8192):
    runs = [{"ttft": t} | ({} if share is None else {"compute_fraction": [share], "bytes_loaded": [7]}) for t in ttft]
    return {"kind": "cell", "store": store, "tokens": tokens, "batch": 1, "system": system, "runs": runs,
            "failed": failed}  # fmt: skip


START = {"kind": "start", "settings": {"shape": "mistral-7b"}, "provenance": {}}
RECORDS = [
    START,
    {"kind": "engine", "dtype": "torch.bfloat16"},
    {"kind": "overhead", "tokens": 64, "decode_tokens": 4, "runs": {
        "vanilla": {"ttft": [0.1, 0.1], "decode": [1.0, 1.0]},
        "plugin": {"ttft": [0.101, 0.101], "decode": [1.0, 1.0]}}},
    cell("recompute", [[0.2], [0.2], [0.4]]),
    cell("cacheslide@0.26", [[0.1], [0.1], [0.1]], 0.4),
    cell("cacheslide@0.26", [[0.16], [0.16], [0.16]], 0.4, store="cpu"),
    cell("cacheslide@0.05", [], 0.2, failed="reuse did not happen"),
    {"kind": "end"},
]  # fmt: skip


def written(tmp_path, records, tail=""):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path
