"""SLIDE's experiments in small: the workload follows from the traces, the comparison is fair, the summary adds up."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.backends.reference import ReferenceBackend
from harness.experiments.slide import index as slide_index
from harness.experiments.slide import orders as slide_orders
from harness.experiments.slide import replay as slide_replay
from harness.experiments.slide import trace as slide_trace
from harness.experiments.slide.steps import CONDITIONS
from harness.limit import Limit
from harness.report.claims_slide import BOTTLENECK
from harness.report.verdicts import LEAST
from harness.results import slide
from harness.results.runs import read_json
from tests.helpers.places import ROOT
from tests.helpers.slide_runs import run_record

pytestmark = pytest.mark.slow


def template(seed: int, recompute_ratio=0.26, lengths=(40, 64), turns=3) -> slide_trace.Template:
    rng = np.random.default_rng(seed)
    masks = tuple(tuple(rng.random(n) < recompute_ratio for n in lengths) for _ in range(turns))
    return slide_trace.Template(lengths, masks, layer=2, layers=4)


def test_traces_survive_json_and_say_what_the_model_selected(tmp_path):
    t = template(1)
    again = slide_trace.Template.from_dict(json.loads(json.dumps(t.as_dict())))
    assert again.lengths == t.lengths and all(
        np.array_equal(a, b) for x, y in zip(t.turns, again.turns, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert t.dirty_share(1) == pytest.approx(np.concatenate([m for turn in t.turns for m in turn]).mean())
    assert t.dirty_share(1) < t.dirty_share(4) < t.dirty_share(16) <= 1


def test_a_recorded_turn_selects_the_policys_share():
    backend = ReferenceBackend(ROOT / "models/tiny-llama-12m")
    [t] = slide_trace.record(backend, "sparse", 1, 2, 400, layer=1, recompute_ratio=0.26, seed=3)
    assert (t.layer, t.layers) == (1, 8) and len(t.turns) == 2
    for turn in t.turns:
        assert sum(int(m.sum()) for m in turn) == pytest.approx(0.26 * sum(t.lengths), abs=1)
    assert any(not np.array_equal(a, b) for a, b in zip(*t.turns, strict=True))  # other notes, other rows


def test_pages_in_use_counts_what_a_turn_corrects():
    mask = np.zeros(40, bool)
    mask[[3, 4, 39]] = True
    t = slide_trace.Template((40,), ((mask,),), layer=2, layers=4)
    # 3 pages a layer; layer 1 is computed in full (3 pages), layers 2 and 3 have two pages with selected rows
    assert slide_replay.pages_in_use([t], 16) == (12, 3 + 2 * 2)


def test_policies_read_the_same_and_clean_first_writes_least(tmp_path):
    templates = [template(s) for s in range(4)]
    setting = slide_replay.Setting("clean-first", 1, kv_heads=1, head_dim=8, turns=3)
    got = {}
    for policy in ("clean-first", "lru", "fifo"):
        got[policy] = slide_replay.replay(tmp_path / policy, templates, replace(setting, policy=policy))
        c = got[policy]
        assert c["wrong_rows"] == 0 and c["lost"] == 0
        assert c["slices"] == 4 * 3 * 3
        assert c["memory_bytes"] < c["page_bytes"] * (c["reference_pages"] + c["corrected_pages"]) / 2
        assert c["proc_write_bytes"] >= c["spill_bytes"] + c["record_bytes"] > 0
    assert len({c["corrected"] for c in got.values()}) == 1 and len({c["released"] for c in got.values()}) == 1
    assert got["clean-first"]["spill_bytes"] < min(got["lru"]["spill_bytes"], got["fifo"]["spill_bytes"])
    disk = slide_replay.Throttled(1 << 20)
    slow = slide_replay.replay(tmp_path / "slow", templates[:2], replace(setting, turns=1), disk)
    assert slow["wrong_rows"] == 0


def test_known_templates_stay_and_the_disk_limit_holds(tmp_path):
    found = slide_index.scan(tmp_path, queries=150, templates=2, capacity=36)
    assert found["most_bytes_on_disk"] <= found["capacity_bytes"] and found["evicted"] > 100
    assert found["returns"] == 16 and found["hits"].count("1") == 16


def test_the_orders_are_timed_only_when_they_agree(tmp_path):
    shape = slide_orders.Shape(3, 32, 48, 4, 2, 8, 40, dtype="float32")
    found = slide_orders.measure(tmp_path, "cpu", batches=(2,), repeats=2, shape=shape)
    assert {(r["source"], r["staging"], r["order"]) for r in found["rows"]} == {
        (s, n, o) for s in ("host", "file") for n in (1, 2) for o in ("locked", "relocate", "disjoint")
    }
    assert all(r["bitwise_equal"] and len(r["rounds_s"]) == 2 and r["load_s"]["value"] > 0 for r in found["rows"])
    locked = [r["reduction_pct"]["value"] for r in found["rows"] if r["order"] == "locked"]
    assert locked == [0.0] * 4

    limit, kept = Limit(), []

    def keep(record) -> None:
        kept.append(json.loads(json.dumps(record)))
        limit.end = 0.0  # over from here on

    shared = {"batches": (2,), "repeats": 2, "shape": shape, "keep": keep}
    slide_orders.measure(tmp_path / "a", "cpu", **shared, limit=limit)
    assert len(kept) == 1 and {(r["source"], r["staging"]) for r in kept[0]["rows"]} == {("host", 1)}
    assert not kept[0]["complete"]
    again = slide_orders.measure(tmp_path / "b", "cpu", **shared, known=kept[0])
    assert len(kept) == 4 and again["rows"][:3] == kept[0]["rows"] and again["complete"]
    assert [(r["source"], r["staging"]) for r in again["rows"][::3]] == [
        ("host", 1),
        ("host", 2),
        ("file", 1),
        ("file", 2),
    ]
    assert (
        again["rows"][0]["rounds_s"]
        != slide_orders.measure(tmp_path / "c", "cpu", **shared, known=again)["rows"][0]["rounds_s"]
    )  # a complete record is measured anew

    class Wrong(slide_orders.LayerModel):
        runs = 0

        def reset(self):
            super().reset()
            Wrong.runs += 1
            self.x = self.x + 1e-3 * Wrong.runs

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="nothing was timed"):
        patch.setattr(slide_orders, "LayerModel", Wrong)
        slide_orders.measure(tmp_path / "w", "cpu", batches=(1,), repeats=1, shape=shape, sources=("host",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_orders_agree_on_a_gpu(tmp_path):
    shape = slide_orders.Shape(4, 256, 512, 8, 2, 64, 512)
    found = slide_orders.measure(tmp_path, "cuda", batches=(1, 3), repeats=2, shape=shape)
    assert len(found["rows"]) == 2 * 2 * 2 * 3 and all(r["layer_s"]["value"] > 0 for r in found["rows"])


def test_the_summary_says_what_the_records_say(tmp_path):
    nothing = slide.summarise(tmp_path, {})
    assert all(v is None for v in nothing["headline"].values())
    assert "needs a GPU" in nothing["notes"]["layer_latency_reduction_pct"]
    runs = [
        run_record(p, s, w * (s + 1), t)
        for s in range(3)
        for p, w, t in (("clean-first", 100, 0.5), ("lru", 350, 2.0), ("fifo", 400, 0.0))
    ]
    (tmp_path / "volume.jsonl").write_text("\n".join(map(json.dumps, runs)))
    found = slide.summarise(tmp_path, {})
    assert found["headline"]["lru_over_clean_first_bytes"] == pytest.approx(3.5)
    assert found["headline"]["write_stall_reduction_pct"] == pytest.approx(75.0)
    assert found["main"]["write_stall_reduction_pct_against_fifo"]["value"] is None
    assert found["main"]["units"] == 3


def test_the_headline_takes_the_gpu_and_the_cpu_stays_beside_it(tmp_path):
    def record(device, percent):
        rows = [
            {
                "source": source, "batch": batch, "staging": staging, "order": order, "layer_s": {"value": 1.0},
                "reduction_pct": {"value": 0.0 if order == "locked" else pct, "low": pct - 1, "high": pct + 1},
            }
            for source in ("host", "file") for batch in (2, 4) for staging in (1, 2)
            for order, pct in (("locked", 0.0), ("relocate", 1.0),
                               ("disjoint", percent + batch if (source, staging) == ("host", 1) else 3.0))
        ]  # fmt: skip
        return json.dumps({"device": device, "rows": rows})

    (tmp_path / "orders_cpu.json").write_text(record("cpu", -50))
    assert slide.summarise(tmp_path, {})["headline"]["layer_latency_reduction_pct"] is None
    (tmp_path / "orders_h200.json").write_text(record("cuda", 20))
    found = slide.summarise(tmp_path, {})
    assert found["headline"]["layer_latency_reduction_pct"] == pytest.approx(23.0)
    assert found["orders"]["cpu"]["device"] == "cpu" and found["orders"]["cuda"]["device"] == "cuda"
    cut = json.loads(record("cuda", 20))
    cut["rows"] = [r for r in cut["rows"] if r["source"] == "file" or r["staging"] == 1]
    (tmp_path / "orders_h200.json").write_text(json.dumps(cut))
    assert "ended before" in slide.summarise(tmp_path, {})["notes"]["layer_latency_reduction_pct"]
    note = found["notes"]["layer_latency_reduction_pct"]
    assert "'disjoint'" in note and "batch 4: 24.0 [23.0, 25.0]" in note and "both, 'disjoint': 3.0" in note


def test_the_workflow_measures_what_figure_12_is_judged_on():
    """Stalls and bytes at the layer that keeps the answers: writes held to 100 MiB/s, and at the disk's own speed."""
    layer = read_json(ROOT / "results/cpu/summary.json")["conditions"]["selection_layer"]
    trace, seeds, *_, speed = CONDITIONS[f"{BOTTLENECK}, selection layer {layer}"]
    assert trace == f"deep@{layer}" and seeds >= LEAST and speed == 100 * 2**20
    trace, *_, speed = CONDITIONS[f"selection layer {layer}"]
    assert trace == f"deep@{layer}" and not speed
