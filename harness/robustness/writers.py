"""Campaign: two processes write to one store folder and are killed, at any moment or in the middle of a write.

Every acknowledged record must be present afterwards: nothing is evicted, since the capacity is never reached.
"""

import multiprocessing
import os
import random
import signal
import struct
import time
from pathlib import Path

import torch

from cacheslide.store.files import Files
from cacheslide.store.persistent.filetier import FileOptions, FileTier
from cacheslide.store.persistent.record import Encoded, chunk_of
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from harness.experiments.slide.faults import DiesWriting
from harness.robustness.folder_changes import PAGE_TOKENS, made_chunk, made_name
from harness.robustness.folders import WANTED
from harness.robustness.silence import silent_store

_ROUNDS = 10  # in one folder
_ROUND = 1 << 20  # numbers of a round
_WAIT_S = 120.0
_NUMBER = struct.Struct("<Q")


def _options(root: Path) -> FileOptions:
    return FileOptions(root, 1 << 30, shards=2, segment_bytes=1 << 18, durable=False, lock_timeout_s=60.0)


def _write(root: Path, said: Path, first: int, dies_at: int, share: float) -> None:
    """Write every second number from `first` on, and report each acknowledged one, until killed."""
    files = DiesWriting(dies_at, share) if dies_at else Files()
    tier = FileTier(_options(root), files)
    out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for number in range(first, first + _ROUND // 2, 2):
        tier.write([Encoded.of(made_name(number), made_chunk(number % 60), PAGE_TOKENS)])
        os.write(out, _NUMBER.pack(number))


def _kept(said: Path) -> list[int]:
    raw = said.read_bytes() if said.exists() else b""
    return [n for (n,) in _NUMBER.iter_unpack(raw[: len(raw) // 8 * 8])]


def _wait(said: Path, count: int, process) -> None:
    """Wait until the writer has reported `count` records or has died."""
    until = time.monotonic() + _WAIT_S
    while process.is_alive() and len(_kept(said)) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"a writer got nowhere in {_WAIT_S} s")
        time.sleep(0.002)


def look(root: Path, numbers: list[int]) -> tuple[int, int]:
    """Counts of records of `numbers` that are missing, and that differ from the written ones."""
    persistent, lost, wrong = PersistentTiers(FileTier(_options(root)), None, TieredStats()), 0, 0
    for number in numbers:
        found = persistent.read(made_name(number), accept=WANTED)
        if isinstance(found, str):
            lost += 1
            continue
        got, want = chunk_of(found[0], found[1]), made_chunk(number % 60)
        wrong += not (torch.equal(got.k, want.k) and torch.equal(got.v, want.v))
    return lost, wrong


def one_round(root: Path, number: int, rng: random.Random, context) -> tuple[int, list[int]]:
    """The count of kills, and the numbers of the acknowledged records."""
    writers, said = [], [root.with_name(f"{root.name}-{number}-{i}") for i in range(2)]
    for i in range(2):
        dies_at = rng.randint(1, 60) if rng.random() < 0.5 else 0
        settings = (root, said[i], number * _ROUND + i, dies_at, rng.random())
        writers.append(context.Process(target=_write, args=settings))
        writers[i].start()
    for i in rng.sample(range(2), 2):  # the other continues over this one's unfinished writes
        _wait(said[i], rng.randint(1, 30), writers[i])
        if writers[i].is_alive():
            os.kill(writers[i].pid, signal.SIGKILL)
        writers[i].join(_WAIT_S)
    kills = sum(w.exitcode == -signal.SIGKILL for w in writers)
    return kills, [n for path in said for n in _kept(path)]


@silent_store()
def run(minutes: float, seed: int, work: Path) -> dict:
    """See `harness.robustness.__main__`."""
    # Not forked from here: a process that has run threads leaves its child locks that are never released.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found, rng = dict.fromkeys(("rounds", "kills", "kept", "wrong_pages", "lost_finished"), 0), random.Random(seed)
    until = time.monotonic() + 60 * minutes
    all_kept: list[int] = []
    while time.monotonic() < until:
        root = work / f"store-{found['rounds'] // _ROUNDS}"
        if found["rounds"] % _ROUNDS == 0:
            all_kept = []
        kills, kept = one_round(root, found["rounds"], rng, context)
        all_kept += kept
        lost, wrong = look(root, all_kept)
        for what, n in (("rounds", 1), ("kills", kills), ("kept", len(kept)), ("lost_finished", lost)):
            found[what] += n
        found["wrong_pages"] += wrong
    return found | {"faults": found["wrong_pages"] + found["lost_finished"]}
