"""Fault injection into the chunk store: counts wrong pages served afterwards.

Every chunk's content follows from its number, so each one that is served can be compared page by page.
"""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV
from cacheslide.store.files import Files
from cacheslide.store.pages import PageLayout
from cacheslide.store.persistent.breaker import Breaker
from cacheslide.store.persistent.filetier import FileOptions, FileTier
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.spill import SpillFile
from cacheslide.store.slide.tiered import TieredChunkStore

PAGE_TOKENS, LAYERS, TOKENS = 16, 4, 64


def made_chunk(number: int) -> ChunkKV:
    """The chunk that `number` stands for."""
    g = torch.Generator().manual_seed(number)
    k, v = torch.randn(2, LAYERS, TOKENS, 4, 32, generator=g)
    return ChunkKV(k, v, torch.arange(TOKENS))


def made_key(number: int) -> str:
    """Its key."""
    return f"{(number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC8341082276B % 2**160:040x}"


LAYOUT = PageLayout.of(made_chunk(0), PAGE_TOKENS)


@dataclass
class Verdict:
    """Outcome of one kind of fault. `seconds` is the longest single call."""

    kind: str
    faults: int = 0
    served: int = 0
    missed: int = 0
    wrong_pages: int = 0
    seconds: float = 0.0
    says: dict[str, int] = field(default_factory=dict)

    def look(self, store: TieredChunkStore, numbers) -> "Verdict":
        """Fetch chunks and compare every page served."""
        for n in numbers:
            start = time.monotonic()
            found = store.fetch(made_key(n))
            self.seconds = max(self.seconds, time.monotonic() - start)
            if found.chunk is None:
                self.missed += 1
                why = found.why.split(":")[0]
                self.says[why] = self.says.get(why, 0) + 1
                continue
            self.served += 1
            want = made_chunk(n)
            same = (found.chunk.k == want.k) & (found.chunk.v == want.v)
            pages = same.view(LAYERS, TOKENS // PAGE_TOKENS, -1).all(dim=2)
            self.wrong_pages += int((~pages).sum())
        return self


def small_store(
    path: Path, files: Files | None = None, *, capacity_chunks=48, memory_chunks=4, **kw
) -> TieredChunkStore:
    """A store with little memory over a folder: almost every operation moves pages."""
    files = files or Files()
    size = LAYOUT.payload_bytes
    file = FileTier(
        FileOptions(path / "chunks", 48 * (size + 8192), shards=2, segment_bytes=4 * size, durable=False,
                    lock_timeout_s=5.0),
        files,
    )  # fmt: skip
    spill = SpillFile(path / "spill", 64 * size, LAYOUT.page_bytes, files)
    host = Arena("host", 4 * size, LAYOUT.page_bytes, "cpu", "clean-first")
    host.slots.fill_(255)
    options = {"queue_bytes": 4 * size, "batch_bytes": 2 * size, "stall_limit_s": 1.0} | kw
    return TieredChunkStore(PAGE_TOKENS, LAYOUT.page_bytes, host=host, file=file, spill=spill, **options)


def churn(store: TieredChunkStore, seed: int, steps: int, universe: int = 64) -> None:
    """Build, read, correct and release chunks in a random order."""
    rng = random.Random(seed)
    for _ in range(steps):
        n, owner = rng.randrange(universe), f"owner {rng.randrange(4)}"
        if store.get(made_key(n)) is None:
            store.put(made_key(n), made_chunk(n))
        with suppress(StoreError):
            rows = torch.tensor(sorted(rng.sample(range(TOKENS), 17)))
            store.correct(made_key(n), owner, rng.randrange(LAYERS), rows, *torch.full((2, 17, 4, 32), -1.0))
        if rng.random() < 0.1:
            store.release(owner)


class DiesWriting(Files):
    """At its n-th write the process writes a part of the buffer, then kills itself with signal 9."""

    def __init__(self, n: int, share: float) -> None:
        self.left, self.share = n, share

    def write(self, fd, buffer, offset):
        self.left -= 1
        if self.left <= 0:
            super().write(fd, buffer[: int(len(buffer) * self.share)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(fd, buffer, offset)


def _die(path: Path, seed: int, n: int, share: float) -> None:
    churn(small_store(path, DiesWriting(n, share)), seed, 10_000)
    os._exit(3)


def kill_9(path: Path, points: int, seed: int = 0) -> Verdict:
    """Kill a writing process in the middle of a write, at random writes and bytes; check with a newly opened store.

    All deaths happen in one folder, one after the other: later ones also hit stores that were repaired before.
    """
    verdict, rng = Verdict("kill -9 in mid-write"), random.Random(seed)
    # Not forked: a child of a process with threads inherits locks that are never released.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for point in range(points):
        victim = context.Process(target=_die, args=(path, seed * 1000 + point, rng.randint(1, 60), rng.random()))
        victim.start()
        victim.join(300)
        if victim.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the writer ended with {victim.exitcode}, not by signal 9")
        verdict.faults += 1
        store = small_store(path)
        verdict.look(store, range(64))
        churn(store, seed + point, 3)  # the folder can be written again
        store.close()
        note(verdict, "recovered", sum(s.stats.recovered for s in store.persistent.file.shards))
    return verdict


def note(verdict: Verdict, what: str, n: int) -> None:
    """Add `n` to the verdict's count of `what`."""
    if n:
        verdict.says[what] = verdict.says.get(what, 0) + n


def rot(path: Path, points: int, seed: int = 0) -> Verdict:
    """Flip single bits, cut files short and blank stretches of them, each checked with a newly opened store."""
    verdict, rng = Verdict("bit flips, cuts and blanks"), random.Random(seed)
    for _ in range(points):
        store = small_store(path)
        for n in range(24):  # as the engine does: chunks not served are computed and stored again
            if store.get(made_key(n)) is None:
                store.put(made_key(n), made_chunk(n))
        store.close()
        file = rng.choice(sorted((path / "chunks").rglob("seg-*.log")) + sorted((path / "chunks").rglob("head")))
        raw = bytearray(file.read_bytes())
        if not raw:
            continue
        at = rng.randrange(len(raw))
        match rng.choice(["flip", "flip", "flip", "cut", "blank"]):
            case "flip":
                raw[at] ^= 1 << rng.randrange(8)
            case "cut":
                raw = raw[:at]
            case "blank":
                raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
        file.write_bytes(raw)
        verdict.faults += 1
        verdict.look(small_store(path), range(24))
    return verdict


class Fails(Files):
    """Reads or writes of whole blocks fail with `code` while `armed`."""

    def __init__(self, code: int, reads: bool = False, writes: bool = False, delay_s: float = 0.0) -> None:
        self.code, self.reads, self.writes, self.delay_s = code, reads, writes, delay_s
        self.armed, self.count = False, 0

    def _fault(self, wanted: bool, size: int) -> None:
        if self.armed and wanted and size > 64:
            self.count += 1
            if self.delay_s:
                time.sleep(self.delay_s)
            else:
                raise OSError(self.code, os.strerror(self.code))

    def read(self, fd, buffer, offset):
        self._fault(self.reads, len(buffer))
        return super().read(fd, buffer, offset)

    def write(self, fd, buffer, offset):
        self._fault(self.writes, len(buffer))
        super().write(fd, buffer, offset)


def failing_disk(path: Path, files: Fails, kind: str) -> Verdict:
    """Work while the disk fails (or crawls), then while it works again."""
    verdict = Verdict(kind)
    store = small_store(path, files)
    store.persistent.file_breaker = Breaker(0.01, 0.02)
    churn(store, 1, 60)
    store.flush(30)
    files.armed = True
    begun = time.monotonic()
    churn(store, 2, 60)
    verdict.look(store, range(64))
    verdict.says["seconds for 60 steps"] = round(time.monotonic() - begun, 2)
    files.armed = False
    verdict.faults = files.count
    store.flush(30)
    time.sleep(0.05)
    churn(store, 3, 60)
    verdict.look(store, range(64))
    for what in ("read_errors", "write_errors", "lost", "dirty_dropped"):
        note(verdict, what, getattr(store.stats, what))
    store.close()
    verdict.look(small_store(path), range(64))
    return verdict


@contextmanager
def small_disk(size: int):
    """A folder on a file system of its own of `size` bytes (needs root); None if it cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
        ) if os.geteuid() == 0 else None  # fmt: skip
        if done is None or done.returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def full_disk(path: Path) -> Verdict:
    """A real file system that is smaller than the capacities; without root, the same error from the file layer."""
    with small_disk(24 * LAYOUT.payload_bytes) as folder:
        if folder is None:
            return failing_disk(path, Fails(errno.ENOSPC, writes=True), "no space left (injected)")
        verdict = Verdict("no space left (tmpfs)")
        store = small_store(folder)
        store.persistent.file_breaker = Breaker(0.01, 0.02)
        for seed in range(4):
            churn(store, seed, 60)
            verdict.look(store, range(64))
        store.flush(30)
        verdict.faults = store.stats.write_errors
        for what in ("write_errors", "lost", "dirty_dropped"):
            note(verdict, what, getattr(store.stats, what))
        store.close()
        return verdict.look(small_store(folder), range(64))


def clock_jump(path: Path) -> Verdict:
    """The wall clock jumps by decades, back and forth, and file times with it."""
    verdict = Verdict("clock jumps")
    store = small_store(path)
    for jump in (-3e8, 6e8, 0.0):
        shifted = time.time() + jump
        with (
            mock.patch("time.time", lambda at=shifted: at),
            mock.patch("time.time_ns", lambda at=shifted: int(at * 1e9)),
        ):
            churn(store, int(abs(jump)) % 97, 40)
            for file in path.rglob("*"):
                with suppress(FileNotFoundError):
                    os.utime(file, (shifted, shifted))
            verdict.faults += 1
            verdict.look(store, range(64))
            fresh = small_store(path)
            verdict.look(fresh, range(64))
            fresh.close()
    store.close()
    return verdict


def all_faults(folder: Path, kills: int, rots: int) -> list[Verdict]:
    """Every kind once; `kills` and `rots` points."""
    kinds: list[Callable[[Path], Verdict]] = [
        lambda p: kill_9(p, kills),
        lambda p: rot(p, rots),
        full_disk,
        lambda p: failing_disk(p, Fails(errno.EIO, writes=True), "write errors"),
        lambda p: failing_disk(p, Fails(errno.EIO, reads=True), "read errors"),
        lambda p: failing_disk(p, Fails(0, writes=True, reads=True, delay_s=0.02), "slow disk"),
        clock_jump,
    ]
    return [kind(folder / str(i)) for i, kind in enumerate(kinds)]
