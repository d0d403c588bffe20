"""Campaign: corrupted store folders, each opened, looked up, written to and closed as by an engine.

Each must end in time with hits equal to the written chunks, or misses; files not written by the store must not change.
"""

import gc
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from cacheslide.errors import StoreError
from cacheslide.store.persistent.filetier import OPEN_S, FileOptions, FileTier
from cacheslide.store.persistent.record import chunk_of
from cacheslide.store.persistent.shape import Wanted
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from harness.robustness.folder_changes import (
    CHANGES,
    CHUNKS,
    FOREIGN,
    PAGE_TOKENS,
    RECORDS,
    SHAPE,
    made_chunk,
    made_name,
)
from harness.robustness.silence import silent_store

LOOK_S = 10.0  # a look-up reads new records for 1 s at most; it may take longer beside other work
_HANG_S = 120
_ROW = 2 * SHAPE.kv_heads * SHAPE.head_dim * 4
WANTED = Wanted(SHAPE, PAGE_TOKENS, PAGE_TOKENS * _ROW, 4, tokens=3)
WANT = [made_chunk(i) for i in range(CHUNKS)]
_EXAMPLES = 20
_BROKEN = ("exceptions", "wrong_pages", "slow_openings", "slow_look_ups", "foreign_changed", "hangs", "tiers_closed")


class _Hang(BaseException):
    """Raised in a call that does not end."""


def _alarm(*_) -> None:
    raise _Hang


def _options(root: Path) -> FileOptions:
    return FileOptions(root, 1 << 20, shards=1, segment_bytes=1 << 16, durable=False, lock_timeout_s=1.0)


def _template(folder: Path) -> dict[str, bytes]:
    """The files of an intact store."""
    tier = FileTier(_options(folder))
    tier.write(RECORDS[:3])
    tier.write(RECORDS[3:])
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _lay_out(root: Path, files: dict[str, bytes]) -> None:
    root.mkdir(mode=0o700)
    (root / "shard-00").mkdir(mode=0o700)
    for name, raw in files.items():
        (root / name).write_bytes(raw)


def _beside(outside: Path) -> None:
    """Create foreign files."""
    outside.mkdir(mode=0o700)
    for name in ("file", "seg-0000000001.log", "head", "lock"):
        (outside / name).write_bytes(FOREIGN)


def _state(folder: Path) -> list:
    """Names, kinds and content of all files."""
    found = []
    with os.scandir(folder) as entries:
        for e in sorted(entries, key=lambda e: e.name):
            status = e.stat(follow_symlinks=False)
            plain = e.is_file(follow_symlinks=False)
            found.append((e.name, status.st_mode, status.st_size, _begins(Path(e.path)) if plain else b""))
    return found


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 16)


def _marked(root: Path) -> dict[str, tuple[int, bytes]]:
    """Foreign files that `names` put into the folder, identified by mode."""
    found = {}
    for folder in (root, root / "shard-00"):
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.iterdir():
                status = path.lstat()
                if status.st_mode == 0o100640:
                    found[str(path)] = status.st_size, _begins(path)
    return found


def use(root: Path, counts: Counter) -> None:
    """Open the folder, look every chunk up, write one, close."""
    begun = time.monotonic()
    try:
        tier = FileTier(_options(root))
    except StoreError as refused:
        counts["refused"] += 1
        counts["exceptions"] += "\n" in str(refused)
        return
    finally:
        took = time.monotonic() - begun
        counts["slow_openings"] += took > OPEN_S
        counts["slowest_opening_ms"] = max(counts["slowest_opening_ms"], int(1000 * took))
    persistent = PersistentTiers(tier, None, TieredStats())
    for i in range(CHUNKS):
        begun = time.monotonic()
        persistent.where(made_name(i))
        found = persistent.read(made_name(i), accept=WANTED)
        took = time.monotonic() - begun
        counts["slow_look_ups"] += took > LOOK_S
        counts["slowest_look_up_ms"] = max(counts["slowest_look_up_ms"], int(1000 * took))
        if isinstance(found, str):
            counts["misses"] += 1
            continue
        counts["hits"] += 1
        got, want = chunk_of(found[0], found[1]), WANT[i]
        same = torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
        counts["wrong_pages"] += not (same and torch.equal(got.positions, want.positions))
    persistent.write(RECORDS[:1])
    counts["tiers_closed"] += persistent.file_breaker.open and persistent.file_breaker.failures > 3


def trial(number: int, seed: int, folder: Path, files: dict[str, bytes], counts: Counter) -> str:
    """Run one corrupted folder; the description of a failure, or ""."""
    rng = random.Random(f"{seed}:{number}")
    root, outside = folder / "store", folder / "outside"
    _lay_out(root, files)
    changes = [rng.choice(CHANGES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for change in changes:
        with suppress(OSError):  # an earlier change may have replaced the file
            change(root, outside, rng)
    before, marked = _state(outside), _marked(root)
    earlier = [counts[f] for f in _BROKEN]
    signal.alarm(_HANG_S)
    try:
        use(root, counts)
        said = ""
    except _Hang:
        counts["hangs"] += 1
        said = "it hangs"
    except Exception as error:
        counts["exceptions"] += 1
        said = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if _state(outside) != before or _marked(root) != marked:
        counts["foreign_changed"] += 1
        shutil.rmtree(outside)
        _beside(outside)
    counts["hostile_folders_tried"] += 1
    wrong = [f for f, n in zip(_BROKEN, earlier, strict=True) if counts[f] > n]
    for path in (root, root / "shard-00"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(root)
    return f"trial {number}: {', '.join(c.__name__ for c in changes)}: {', '.join(wrong)} {said}" if wrong else ""


@silent_store()
def _work(first: int, step: int, seed: int, until: float) -> tuple[dict, list[str]]:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _alarm)
    memory = Path("/dev/shm")
    counts, examples = Counter(), []
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        files = _template(Path(folder) / "template")
        _beside(Path(folder) / "outside")
        number = first
        while time.time() < until:
            if said := trial(number, seed, Path(folder), files, counts):
                examples.append(said)
            number += step
            if number % 1000 < step:
                gc.collect()
    return dict(counts), examples[:_EXAMPLES]


def run(minutes: float, seed: int, work: Path) -> dict:
    """See `harness.robustness.__main__`. Uses a folder in memory if there is one, and up to two processes."""
    total, examples = Counter(), []
    workers, until = min(2, os.cpu_count() or 1), time.time() + 60 * minutes
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_work, i, workers, seed, until) for i in range(workers)]
        for counts, some in (future.result() for future in running):
            for what, n in counts.items():
                total[what] = max(total[what], n) if what.startswith("slowest") else total[what] + n
            examples += some
    found = {what: total[what] for what in ("hostile_folders_tried", "hits", "misses", "refused", *_BROKEN)}
    found |= {what: total[what] for what in ("slowest_opening_ms", "slowest_look_up_ms")}
    return found | {"faults": sum(total[what] for what in _BROKEN), "examples": examples[:_EXAMPLES]}
