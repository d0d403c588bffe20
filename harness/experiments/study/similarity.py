"""CKSim against prefix shift (Fig. 4a): similarity of a cached segment's keys after a shift, by cause of the loss.

"position": the segment attends to itself only, so the position encoding alone differs. "context": the segment is
prefilled behind a real prefix, so its context differs too. Each with keys left at their old positions
(stale) and re-rotated to their new ones (delta).
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from cacheslide.core.encoder import prefill_exact
from cacheslide.errors import DataError
from cacheslide.quality.similarity import cksim
from harness.backends.reference import ReferenceBackend
from harness.results.records import RecordWriter, guarded
from harness.tasks.example import TaskExample, fixed


def measure_similarity(
    backend: ReferenceBackend,
    examples: Sequence[TaskExample],
    shifts: Sequence[int],
    writer: RecordWriter,
    progress: str | None = "CKSim",
) -> None:
    """One record per example and shift: CKSim per layer [layers], mean over the segment's rows."""
    for i, example in enumerate(tqdm(examples, desc=progress, disable=progress is None, mininterval=1)):
        segment = backend.encode(fixed(example.segments)[1].text)
        filler = prefix_text(backend, [*examples[i + 1 :], *examples[:i]], max(shifts))
        alone = prefill_exact(backend.model, segment).k
        for shift in shifts:
            guarded(
                writer,
                f"{example.id}-{shift}",
                lambda shift=shift, alone=alone, segment=segment, filler=filler: _one(
                    backend, segment, alone, filler[:shift]
                ),
            )


def prefix_text(backend: ReferenceBackend, others: Sequence[TaskExample], length: int) -> tuple[int, ...]:
    """Real text of other prompts, `length` tokens of it."""
    ids: tuple[int, ...] = ()
    for example in others:
        for s in example.segments:
            ids += backend.encode(s.text)
        if len(ids) >= length:
            return ids[:length]
    raise DataError(f"the other prompts hold {len(ids)} tokens, a prefix needs {length}")


def _one(backend, segment, alone, prefix) -> dict:
    n, shift = len(segment), len(prefix)
    here = torch.arange(n, device=backend.model.device)
    there = here + shift
    moved = torch.stack([r.move(k, here, there) for r, k in zip(backend.model.rotaries, alone, strict=True)])
    unseen = prefill_exact(backend.model, segment, first_position=shift).k  # shifted, without the prefix
    behind = prefill_exact(backend.model, (*prefix, *segment)).k[:, shift:]
    measured = {
        ("position", "stale"): (unseen, alone),
        ("position", "delta"): (unseen, moved),
        ("context", "stale"): (behind, alone),
        ("context", "delta"): (behind, moved),
    }
    return {
        "shift": shift,
        "tokens": n,
        "cksim": {f"{why}_{how}": cksim(a, b).mean(dim=1).tolist() for (why, how), (a, b) in measured.items()},
    }
