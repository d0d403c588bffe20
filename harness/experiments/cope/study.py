"""Measurements of a CoPE model for figures 4a and 5: cached keys and position indices after a shift.

`measure_similarity` adds a third protocol to those of `similarity.py`, which CCPE needs: [system] [updated text]
[segment], with the segment cached in the chain behind the system prompt, as CacheSlide caches it. Live gates are called
"cope", calibrated slot offsets "ccpe".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cacheslide.core.encoder import prefill_exact
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.models.adapter import RowGroup
from cacheslide.models.cope import CopeLlama
from cacheslide.positions.ccpe import PromptSlots, slots_between, slots_in
from cacheslide.positions.cope import contextual_positions, query_blocks, scores_and_gates
from cacheslide.quality.similarity import cksim
from harness.backends.cope import CopeBackend
from harness.backends.reference import ReferenceBackend
from harness.experiments.study.prompts import displacement
from harness.experiments.study.similarity import prefix_text
from harness.results.records import RecordWriter, guarded
from harness.tasks.example import TaskExample, fixed


def measure_similarity(
    native: ReferenceBackend,
    variants: Mapping[str, CopeBackend],
    examples: Sequence[TaskExample],
    shifts: Sequence[int],
    writer: RecordWriter,
    prompts: int,
) -> None:
    """One record per shift and example (the first `prompts`): CKSim per layer, mean over the segment's rows."""
    for i, example in enumerate(tqdm(examples[:prompts], desc="CKSim, CoPE", mininterval=1)):
        system, segment = (native.encode(s.text) for s in fixed(example.segments)[:2])
        filler = prefix_text(native, [*examples[i + 1 :], *examples[:i]], max(shifts))
        cached: dict[tuple[str, bool], Tensor] = {}  # independent of the shift's length
        for shift in shifts:
            guarded(
                writer,
                f"{example.id}-{shift}",
                lambda shift=shift, system=system, segment=segment, filler=filler, cached=cached: {
                    "shift": shift,
                    "tokens": len(segment),
                    "cksim": dict(_kinds(native, variants, cached, system, segment, filler[:shift])),
                },
            )


def _kinds(native: ReferenceBackend, variants: Mapping[str, CopeBackend], cached, system, segment, prefix):
    n = len(segment)
    prompt = Prompt(
        (
            Segment(system, Role.REUSE),
            *([Segment(prefix, Role.RECOMPUTE)] if prefix else []),
            Segment(segment, Role.REUSE),
        )
    )

    def chained(name: str, model) -> Tensor:
        return _once(cached, (f"{name} chain", bool(prefix)), lambda: _chained(model, prompt, n))

    for name, backend in variants.items():
        model, none = backend.model, PromptSlots((), torch.ones(n, dtype=torch.bool))
        alone = _once(cached, (name, False), lambda model=model, none=none: prefill_exact(model, segment, slots=none).k)
        for why, there in (
            ("position", prefill_exact(model, segment, first_position=len(prefix), slots=none).k),
            ("context", _behind(model, Prompt(prompt.segments[1:]), n)),
        ):
            yield f"{why}_{name}", _alike(there, alone)
        yield f"chain_{name}", _alike(_behind(model, prompt, n), chained(name, model))
    model = native.model
    there, held = _behind(model, prompt, n), chained("native", model)
    here = torch.arange(n, device=model.device) + len(system)
    moved = torch.stack([r.move(k, here, here + len(prefix)) for r, k in zip(model.rotaries, held, strict=True)])
    yield "chain_stale", _alike(there, held)
    yield "chain_delta", _alike(there, moved)


def _once(cached: dict, key: tuple[str, bool], compute: Callable[[], Tensor]) -> Tensor:
    if key not in cached:
        cached[key] = compute()
    return cached[key]


def _behind(model, prompt: Prompt, rows: int) -> Tensor:
    """Keys of the last `rows` rows of a prompt prefilled in full."""
    return prefill_exact(model, prompt.token_ids, slots=slots_in(prompt)).k[:, -rows:]


def _chained(model, prompt: Prompt, rows: int) -> Tensor:
    """As `_behind`, of the fixed segments alone with empty slots, as a cache holds them."""
    ids = [t for s in prompt.segments if s.role is Role.REUSE for t in s.token_ids]
    return prefill_exact(model, ids, slots=slots_between(prompt)).k[:, -rows:]


def _alike(recomputed: Tensor, reused: Tensor) -> list[float]:
    return cksim(recomputed, reused).mean(dim=1).tolist()


def measure_moves(
    variants: Mapping[str, CopeBackend], data: Mapping[str, Sequence[TaskExample]], prompts: int
) -> dict[str, Any]:
    """Per data set, for its first `prompts` examples: displacement in tokens, and the shift of position indices.

    `shift[variant]` is the mean over layers, heads and rows of fixed chunks behind the updated slot of |Δp|, where p is
    the position at which the row sees the last row in front of the slot, at most p_max - 1, in this turn and the one
    before; `unsaturated[variant]` is the share of p below p_max - 1 in this turn.
    """
    out = {}
    for dataset, examples in data.items():
        moves = []
        for example in tqdm(examples[:prompts], desc=f"moves, CoPE, {dataset}", mininterval=1):
            move: dict[str, Any] = {"example": example.id, "shift": {}, "unsaturated": {}}
            for name, backend in variants.items():
                now, before = backend.prompt(example.segments), backend.prompt(example.previous)
                move["displacement"] = displacement(before, now)
                p, old = seen_across(backend.model, now), seen_across(backend.model, before)
                move["shift"][name] = float((p - old).abs().mean())
                move["unsaturated"][name] = float((p < backend.model.tables[0].shape[0] - 1).float().mean())
            moves.append(move)
        out[dataset] = {"moves": moves}
    return {"datasets": out}


@torch.inference_mode()
def seen_across(model: CopeLlama, prompt: Prompt) -> Tensor:
    """Positions [layers, heads, rows] at which fixed chunks' rows behind the first slot see the row in front of it."""
    ids, slots = torch.tensor(prompt.token_ids, device=model.device), slots_in(prompt)
    rows, kv, hidden = torch.arange(len(ids), device=model.device), model.new_kv(len(ids)), model.embed(ids)
    model.describe(kv, slots)
    first, end = slots.bounds[0]
    mine = rows[(slots.canonical.to(rows.device)) & (rows >= end)]
    out = []
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, rows)
        kv.write(layer, rows, k, v)
        crossed, found = model.crossed(layer, RowGroup(kv, mine)), []
        for part, stop in query_blocks(mine, q.shape[1]):
            _, gates = scores_and_gates(q[mine[part]], kv.k[layer][:stop], mine[part], None)
            among = None if crossed is None else crossed.of(0, part)
            found.append(
                contextual_positions(gates, mine[part], model.tables[0].shape[0], among)[:, :, first - 1].cpu()
            )
        out.append(torch.cat(found, 1))
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return torch.stack(out)
