"""CoPE and CCPE on a trained adapter: `python -m harness.experiments.cope.adapter --model … --out FILE`.

Calibrates Γ on validation prompts (it is stored with the adapter), then measures on test prompts: the adapter's gap to
the native model when everything is recomputed; F1 and CKSim of reused chunks with live gates, with Γ, and with Γ as a
cap on the slot's own positions; the pairs on which Γ has an effect; reused rows over a hundred shifted turns.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import ENCODINGS
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.positions.ccpe import slots_in
from cacheslide.positions.cope import query_blocks, scores_and_gates
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.training import calibration as ccpe
from harness.backends.cope import CopeBackend
from harness.backends.reference import EngineSettings, ReferenceBackend, exact_arithmetic
from harness.results import intervals
from harness.results.provenance import provenance
from harness.scoring import question_records
from harness.step import command
from harness.tasks.example import TaskExample
from harness.tasks.synthetic.prompts import examples
from harness.tasks.synthetic.render import STYLES
from harness.tasks.synthetic.world import MIXES

VARIANTS = {"live": {"live": True}, "gamma": {}, "gamma_cap": {"cap": True}}
NEW_TOKENS = 4
TURNS = 100
CKSIM = ("cksim", "cksim_unsaturated")


def system(kind: str, share: float | None = None, layer: int = 1) -> ReusePolicy:
    """CacheSlide on a CoPE model: chunks of the fixed chain, keys as stored, WCA with `share`."""
    rule = NoCorrection() if share is None else TopDeviation(share, layer=layer)
    return ReusePolicy("cope", "", FixedChainKeying(), ENCODINGS[kind], Placement("stored"), rule)


def systems(layer: int) -> dict[str, ReusePolicy]:
    """The policies under which each variant answers."""
    plain = {"recompute": ReusePolicy("recompute", "recompute"), "chain": system("fixed_chain")}
    return plain | {"first_turn": system("in_prompt"), "wca": system("fixed_chain", 0.26, layer)}


@torch.inference_mode()
def unsaturated(model, prompt: Prompt) -> Tensor:
    """Bool [layers, rows, heads]: rows of fixed chunks behind the first slot that have not saturated before it."""
    ids, slots = torch.tensor(prompt.token_ids, device=model.device), slots_in(prompt)
    rows, kv, hidden = torch.arange(len(ids), device=model.device), model.new_kv(len(ids)), model.embed(ids)
    model.describe(kv, slots)
    end, last = slots.bounds[0][1], model.tables[0].shape[0] - 1
    out = torch.zeros(model.num_layers, len(ids), model.config.num_heads, dtype=torch.bool)
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, rows)
        kv.write(layer, rows, k, v)
        for part, stop in query_blocks(rows, q.shape[1]):
            _, gates = scores_and_gates(q[part], kv.k[layer][:stop], rows[part], None)
            out[layer, part] = (gates[:, :, end:].sum(-1) < last).t().cpu()
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    behind = slots.canonical & (torch.arange(len(ids)) >= end)
    return out & behind[:, None]


def similarity(one: Tensor, two: Tensor, weight: Tensor) -> list[float | None]:
    """Per layer but the first: cosine of keys [layers, rows, kv_heads, head_dim], weighted [layers, rows, kv_heads]."""
    cos = torch.nn.functional.cosine_similarity(one.float(), two.float(), dim=-1).cpu()
    sums = weight.sum((1, 2))
    return [float((c * w).sum() / s) if s else None for c, w, s in zip(cos, weight, sums, strict=True)][1:]


def prompts_of(split: str, count: int, tokens: int) -> list[TaskExample]:
    """`count` prompts of every style and mix."""
    return [x for style in STYLES for mix in MIXES for x in examples(style, mix, split, 0, count, tokens)]


def calibrate(backend: CopeBackend, adapter: Path, given: list[TaskExample], bin_width: float) -> dict[str, Any]:
    """Γ from live gates over `given`, stored with the adapter; returns the statistics of its inputs."""
    prompts = [backend.prompt(x.segments) for x in given]
    offsets, samples = ccpe.calibrate(backend.model, prompts, 1, bin_width)
    notes = {"prompts": len(prompts), "tokens": sum(map(len, prompts)) // len(prompts), "split": "validation"}
    digest = json.loads((adapter / "cope.json").read_text())["digest"]
    name = ccpe.template_id(["reuse:system", "recompute:notes", "reuse:documents"])
    ccpe.save_calibration(ccpe.Calibration(offsets, digest, name, bin_width, notes), adapter)
    share = samples.unsaturated_share()
    spread = []  # over queries and prompts, in positions
    for slots in samples.values:
        kept = [x[~x.isnan()] for x in torch.cat(slots[0], 1)]
        spread.append(sum(float(x.std()) if len(x) > 1 else 0.0 for x in kept) / len(kept))
    return notes | {
        "bin_width": bin_width,
        "gamma_by_layer": offsets.mean((1, 2)).tolist(),
        "unsaturated_share_by_layer": share.mean((1, 2)).tolist(),
        "unsaturated_share": float(share.mean()),
        "live_offset_std_by_layer": spread,
    }


def answer_all(backend, example: TaskExample, layer: int, open_rows: Tensor | None = None) -> dict[str, Any]:
    """F1 of every system on one example, and the similarity of its reused keys to the variant's own recompute.

    `open_rows` [layers, rows, heads] are the pairs of `unsaturated` under live gates, the same for every variant.
    """
    prompt, before = backend.prompt(example.segments), backend.prompt(example.previous)
    cope = isinstance(backend, CopeBackend)
    out: dict[str, Any] = {"f1": {}, "questions": len(example.questions), "cksim_unsaturated": {}, "cksim": {}}
    exact = None
    for name, policy in systems(layer).items() if cope else [("recompute", ReusePolicy("recompute", ""))]:
        engine = backend.engine(policy, MemoryChunkStore(), EngineSettings())
        engine.build(before)
        state = engine.prefill(prompt, following=1, room=backend.room(example, NEW_TOKENS))
        found = question_records(example, backend.answers(state, example, NEW_TOKENS))
        out["f1"][name] = sum(q["f1"] for q in found) / len(found)
        keys = state.kv.k[:, : len(prompt)]
        exact = keys.clone() if exact is None else exact
        if cope and name != "recompute":
            grouped = open_rows.float().unflatten(2, (keys.shape[2], -1)).mean(-1)
            earlier = torch.cat((grouped[:1] * 0, grouped[:-1]))  # a layer's keys depend on the layer before
            fixed = slots_in(prompt).canonical.float()[None, :, None].expand(grouped.shape)
            out["cksim_unsaturated"][name] = similarity(exact, keys, earlier)
            out["cksim"][name] = similarity(exact, keys, fixed)
    return out


def shifted_turns(backend: CopeBackend, given: Sequence[TaskExample], seed: int = 0) -> dict[str, Any]:
    """`TURNS` turns of one conversation whose notes change in text and length: reusable rows, and those reused."""
    rng, base = Random(seed), backend.prompt(given[0].segments)
    pool = [
        t for x in given for s in backend.prompt(x.segments).segments if s.role is Role.RECOMPUTE for t in s.token_ids
    ]
    engine = backend.engine(system("fixed_chain"), MemoryChunkStore(), EngineSettings(chunk_size=256))
    engine.build(base)
    reusable = reused = 0
    fallbacks = []
    for _ in range(TURNS):
        start, length = rng.randrange(max(1, len(pool) - 400)), rng.randrange(10, 400)
        notes = Segment(tuple(pool[start : start + length]), Role.RECOMPUTE)
        turn = Prompt(tuple(notes if s.role is Role.RECOMPUTE else s for s in base.segments))
        receipt = engine.prefill(turn, following=1).receipt
        reusable += sum(len(s.token_ids) for s in turn.segments if s.role is Role.REUSE)
        reused += receipt.tokens_reused
        fallbacks += [receipt.fallback] if receipt.fallback else []
    return {"turns": TURNS, "reusable_rows": reusable, "tokens_reused": reused, "share": reused / reusable,
            "fallbacks": fallbacks}  # fmt: skip


def summarise(rows: dict[str, list[dict]]) -> dict[str, Any]:
    """Means over examples: F1 by variant and system with its interval, CKSim by variant, system and layer."""
    out: dict[str, Any] = {}
    for variant, found in rows.items():
        table: dict[str, Any] = {"examples": len(found), "questions": sum(r["questions"] for r in found), "f1": {}}
        for name in found[0]["f1"]:
            table["f1"][name] = intervals.mean([r["f1"][name] for r in found])
        for kind in CKSIM:
            table[kind] = {}
            for name in found[0][kind]:
                columns = zip(*(r[kind][name] for r in found), strict=True)
                kept = [[x for x in c if x is not None] for c in columns]
                table[kind][name] = [sum(c) / len(c) if c else None for c in kept]
        out[variant] = table
    return out


def against_live(rows: dict[str, list[dict]]) -> dict[str, Any]:
    """Γ and capped Γ against live gates, paired by prompt: points of F1, and of CKSim (times 100, mean over layers)."""
    out: dict[str, Any] = {}
    for variant in (v for v in rows if v not in ("native", "live")):
        out[variant] = {}
        for name in rows["live"][0]["f1"]:
            pair = rows[variant], rows["live"]
            cell = {"f1_points": intervals.points_lost(*([r["f1"][name] for r in found] for found in pair))}
            for kind in CKSIM:
                means = [[_mean(r[kind].get(name, ())) for r in found] for found in pair]
                both = [(a, b) for a, b in zip(*means, strict=True) if a is not None and b is not None]
                cell[f"{kind}_points"] = intervals.points_lost(*zip(*both, strict=True)) if both else None
            out[variant][name] = cell | {"better": _better(cell["cksim_unsaturated_points"] or cell["f1_points"])}
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [x for x in values if x is not None]
    return sum(kept) / len(kept) if kept else None


def _better(gain: dict[str, Any]) -> str:
    """The variant that the interval of `gain` favours: by CKSim on unsaturated pairs, by F1 if nothing was reused."""
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        return "no clear difference"
    return "gamma" if gain["low"] > 0 else "live"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file, rewritten after every example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=10, help="test prompts of every style and mix")
    parser.add_argument("--calibration-prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layer", type=int, default=4, help="WCA's selection layer")
    parser.add_argument("--bin-width", type=float, default=0.5, help="of the histogram, in positions")
    parser.add_argument("--minutes", type=float, default=8.0, help="no example is begun after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    started, device = time.monotonic(), args.device
    exact_arithmetic()
    live = CopeBackend(args.model, args.adapter, device=device, live=True)
    validation = prompts_of("validation", args.calibration_prompts, args.tokens)
    result: dict[str, Any] = {
        "schema": 1,
        "conditions": vars_of(args)
        | {"dtype": "float32", "data": "synthetic; validation to calibrate, test to measure"},
        "provenance": provenance(vars_of(args), {}, live.model.model_id),
    }
    result["calibration"] = calibrate(live, args.adapter, validation, args.bin_width)
    result["shifted_turns"] = shifted_turns(live, validation)
    result["shifted_rows_reused_share"] = result["shifted_turns"]["share"]
    backends: dict[str, ReferenceBackend] = {"native": ReferenceBackend(args.model, device=device), "live": live}
    gamma = {name: how for name, how in VARIANTS.items() if name != "live"}
    backends |= {name: CopeBackend(args.model, args.adapter, device=device, **how) for name, how in gamma.items()}
    rows: dict[str, list[dict]] = defaultdict(list)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    given = prompts_of("test", args.prompts, args.tokens)
    Random(0).shuffle(given)  # so that a run that ends early covers every style and mix
    for example in given:
        open_rows = unsaturated(live.model, live.prompt(example.segments))
        for name, backend in backends.items():
            rows[name].append(answer_all(backend, example, args.layer, open_rows))
        result |= {"variants": summarise(rows), "gamma_against_live": against_live(rows)}
        native, adapted = ([r["f1"]["recompute"] for r in rows[v]] for v in ("native", "live"))
        result["adapter_f1_gap"] = intervals.points_lost(native, adapted)
        result["adapter_f1_gap_points"] = result["adapter_f1_gap"]["value"]
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        if time.monotonic() - started > 60 * args.minutes:
            break
    print(json.dumps({k: result[k] for k in ("shifted_rows_reused_share", "adapter_f1_gap_points")}), flush=True)


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as a configuration, without paths."""
    return {k: v for k, v in vars(args).items() if not isinstance(v, Path)}


if __name__ == "__main__":
    command(main)
