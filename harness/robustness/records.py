"""Campaign: record files under kill -9. Writers, fresh and resumed, die at random; every finished line is counted.

A line is finished once `add` has returned: the writer then sends its number over a pipe. After every kill the file is
read as by a summary, and resumed by the next writer. Sometimes bytes are damaged between two writers.
"""

import contextlib
import io
import json
import os
import random
import select
import signal
import time
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.results.records import RecordWriter, read_file

RECORDS, PAD = 4000, 300


def run(minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """Counts of kills, of finished lines that are lost, and of damaged lines accepted as valid."""
    rng, until = random.Random(seed), time.monotonic() + 60 * minutes
    kills = lost = damaged = undetected = 0
    number = 0
    while time.monotonic() < until:
        number += 1
        output, done = work / f"{number}.jsonl", set()
        for _ in range(rng.randint(3, 12)):
            said = _killed(output, rng.uniform(0.0, 0.08))
            kills += 1
            done |= said
            found = _held(output)
            lost += len(done - found)
            if rng.random() < 0.2 and len(found) > 10:
                victim = _damage(output, rng)
                damaged += 1
                now = _held(output)
                undetected += victim in now
                lost += len(done - now - {victim})
                done -= {victim}
    return {
        "kills": kills,
        "records_lost_in_kills": lost,
        "lines_damaged": damaged,
        "damage_undetected": undetected,
        "runs": number,
        "faults": lost + undetected,
    }


def _part(output: Path) -> Path:
    return output.with_name(f".{output.name}.part")


def _killed(output: Path, seconds: float) -> set[str]:
    """The ids that a writer reported as finished before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            writer = RecordWriter(output, {"a": 1})
            for i in range(RECORDS):
                if str(i) not in writer.done:
                    writer.add({"id": str(i), "x": i, "pad": "y" * PAD})
                    os.write(writing, f"{i}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    select.select([], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b""
    while part := os.read(reading, 1 << 16):
        said += part
    os.close(reading)
    return {line.decode() for line in said[: said.rfind(b"\n") + 1].split()}


def _held(output: Path) -> set[str]:
    part = _part(output)
    if not part.exists():
        return set()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a warning for every bad line
            return {record["id"] for record in read_file(part).records}
    except DataError:
        return set()


def _damage(output: Path, rng: random.Random) -> str | None:
    """Flip a bit in one finished line; returns its id, None for the header or its copy."""
    part = _part(output)
    raw = bytearray(part.read_bytes())
    lines = raw.split(b"\n")
    index = rng.randrange(len(lines) - 1)
    at = sum(len(line) + 1 for line in lines[:index]) + rng.randrange(len(lines[index]))
    victim = json.loads(lines[index]).get("id")
    raw[at] ^= 1 << rng.randrange(7)
    if raw[at] in b"\n\r":
        raw[at] ^= 0x40
    part.write_bytes(bytes(raw))
    return victim
