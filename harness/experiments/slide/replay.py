"""SWE-style turns replayed through the tiered store with real I/O: bytes written and write stalls by eviction policy.

Every template is an open session. A turn is one prefill slice and `slices - 1` decode slices; sessions take slices in
a random order, as requests that share a GPU do. In the prefill slice the session's reference chunks are read and the
rows that WCA corrected (from a trace, `slide_trace`) are rewritten; a decode slice reads all of the session's KV with
its corrections. The next turn's notes make the corrections worthless: they are released. Memory holds a third of the
pages in use, reference pages and the corrected versions of one turn together. The policies see the same slices, the
same dirty bits and the same write skipping.
"""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cacheslide.store.base import ChunkKV
from cacheslide.store.files import Files
from cacheslide.store.persistent.filetier import FileOptions, FileTier
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.spill import SpillFile
from cacheslide.store.slide.tiered import TieredChunkStore
from harness.experiments.slide.faults import made_key
from harness.experiments.slide.trace import Template

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """One run. `memory` is the share of the pages in use; `warm` turns a session come before counting starts."""

    policy: str
    seed: int
    kv_heads: int = 8
    head_dim: int = 128
    page_tokens: int = 16
    memory: float = 1 / 3
    slices: int = 3
    turns: int = 6
    warm: int = 1
    queue_share: float = 1 / 16


def pages_in_use(templates: Sequence[Template], page_tokens: int) -> tuple[int, int]:
    """Reference pages of all templates, and corrected pages of one turn of each (the mean over its turns)."""
    reference = sum(-(-n // page_tokens) for t in templates for n in t.lengths for _ in range(t.layers))
    dirty = 0.0
    for t in templates:
        for turn in t.turns:
            for mask in turn:
                pages = np.add.reduceat(mask, np.arange(0, len(mask), page_tokens)) > 0
                dirty += (int(pages.sum()) * (t.layers - t.layer) + len(pages) * (t.layer - 1)) / len(t.turns)
    return reference, round(dirty)


class Throttled(Files):
    """A disk that takes at most `rate` bytes a second."""

    def __init__(self, rate: int) -> None:
        self.rate = rate

    def write(self, fd, buffer, offset):
        start = time.monotonic()
        super().write(fd, buffer, offset)
        time.sleep(max(0.0, len(buffer) / self.rate - (time.monotonic() - start)))


class Session:
    """One template's progress, and the expected content of its KV."""

    def __init__(self, number: int, template: Template, setting: Setting) -> None:
        self.number, self.template, self.setting = number, template, setting
        self.keys = [made_key(1000 * number + i) for i in range(len(template.lengths))]
        self.turn, self.slice = 0, 0

    @property
    def owner(self) -> str:
        return f"session {self.number}"

    def base(self, i: int) -> float:
        """The number that fills reference chunk i."""
        return float((self.number * 16 + i) % 128 + 1)

    def chunk(self, i: int) -> ChunkKV:
        """Reference chunk i: one number everywhere, so that any wrong page shows."""
        s, n = self.setting, self.template.lengths[i]
        k = torch.full((self.template.layers, n, s.kv_heads, s.head_dim), self.base(i), dtype=DTYPE)
        return ChunkKV(k, k, torch.arange(n))

    def corrections(self, i: int):
        """(layer, rows) of the current turn: all rows below the selection layer, the selected ones from it on."""
        t = self.template
        mask = t.turns[self.turn % len(t.turns)][i]
        for layer in range(1, t.layers):
            rows = np.arange(len(mask)) if layer < t.layer else np.flatnonzero(mask)
            if len(rows):
                yield layer, torch.from_numpy(rows)

    def fresh(self) -> float:
        """The number that this turn's corrected rows hold."""
        return -float(self.turn % 100 + 1)

    def wrong_rows(self, i: int, got: ChunkKV) -> int:
        """Rows of any layer that differ from the expected reference or corrected content."""
        want = torch.full((self.template.layers, self.template.lengths[i]), self.base(i))
        for layer, rows in self.corrections(i):
            want[layer, rows] = self.fresh()
        return int(((got.k[:, :, -1, -1].float() != want) | (got.v[:, :, 0, 0].float() != want)).sum())


def replay(path: Path, templates: Sequence[Template], setting: Setting, files: Files | None = None) -> dict[str, Any]:
    """Run one setting in the folder `path`; returns counts of the measured part."""
    s, files = setting, files or Files()
    row = 2 * s.kv_heads * s.head_dim * DTYPE.itemsize
    page = s.page_tokens * row
    reference, corrected = pages_in_use(templates, s.page_tokens)
    memory = int((reference + corrected) * s.memory) * page
    queue = max(4 * page, int(memory * s.queue_share))
    capacity = 4 * reference * page + (64 << 20)
    store = TieredChunkStore(
        s.page_tokens,
        page,
        host=Arena("host", memory, page, "cpu", s.policy),
        file=FileTier(FileOptions(path / "chunks", capacity, shards=1, direct=True), files),
        spill=SpillFile(path / "spill", capacity, page, files, direct=True),
        queue_bytes=queue,
        batch_bytes=max(page, queue // 4),
        stall_limit_s=120,
    )
    sessions = [Session(n, t, s) for n, t in enumerate(templates)]
    rng, wrong, before, slices = random.Random(s.seed), 0, None, 0
    order = [session for session in sessions for _ in range(s.slices)]
    rounds = []
    for _ in range(s.warm + s.turns):
        rng.shuffle(order)
        rounds.append(list(order))
    for number, round_ in enumerate(rounds):
        if number == s.warm:
            store.flush()
            before, slices = _counts(store), 0
        for session in round_:
            wrong += _slice(store, session)
            slices += 1
    stalled = store.queue.stall_s - before["stall_s"]
    finished = time.monotonic() - before["seconds"]
    store.flush()
    after = _counts(store)
    out = {k: after[k] - before[k] for k in after} | {"stall_s": stalled, "seconds": finished}
    out |= {"memory_bytes": store.arenas[0].capacity, "reference_pages": reference, "corrected_pages": corrected}
    out |= {"page_bytes": page, "slices": slices, "wrong_rows": wrong, "setup_record_bytes": before["record_bytes"]}
    out["lost"] = store.stats.lost + store.stats.dirty_dropped + store.stats.write_errors
    store.close()
    return out


def _slice(store: TieredChunkStore, session: Session) -> int:
    """One slice of a session; returns wrong rows."""
    wrong = 0
    if session.slice == 0:
        store.release(session.owner)
        for i, key in enumerate(session.keys):
            reference = store.get(key)
            if reference is None:
                reference = session.chunk(i)
                store.put(key, reference)
            heads, dim = session.setting.kv_heads, session.setting.head_dim
            for layer, rows in session.corrections(i):
                fresh = torch.full((len(rows), heads, dim), session.fresh(), dtype=DTYPE)
                store.correct(key, session.owner, layer, rows, fresh, fresh, reference)
    for i, key in enumerate(session.keys):
        got = store.fetch(key, session.owner)
        if got.chunk is None:
            raise RuntimeError(f"a session's KV was lost: {got.why}")
        wrong += session.wrong_rows(i, got.chunk)
    session.slice += 1
    if session.slice == session.setting.slices:
        session.slice, session.turn = 0, session.turn + 1
    return wrong


def _counts(store: TieredChunkStore) -> dict[str, float]:
    """The store's counters and the kernel's, now."""
    stats, extents = store.stats, store.spill.extents
    own = {
        name: getattr(stats, name)
        for name in ("record_bytes", "spill_bytes", "spill_read_bytes", "clean_dropped", "dirty_written", "cancelled",
                     "released", "corrected", "bytes_read", "hits_host", "hits_file")
    }  # fmt: skip
    own |= {"stall_s": store.queue.stall_s, "stalls": store.queue.stalls, "extents": extents}
    own |= {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}
    return own | kernel_counts(store.persistent.file.options.path)


def kernel_counts(path: Path) -> dict[str, int]:
    """/proc/self/io of this process, and the bytes of the block device under `path` (others may use it as well)."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    out = {f"proc_{k}": int(found[k]) for k in ("read_bytes", "write_bytes", "cancelled_write_bytes")}
    device = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    if stat.exists():
        fields = stat.read_text().split()
        out |= {"device_read_bytes": 512 * int(fields[2]), "device_write_bytes": 512 * int(fields[6])}
    return out
