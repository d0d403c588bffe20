"""The remote tier against a real `mooncake_master`, started here on loopback with memory from a helper process."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cacheslide.cli import main
from cacheslide.errors import StoreError
from cacheslide.store import open_store
from cacheslide.store.files import Files, aligned_buffer
from cacheslide.store.persistent import mooncake
from cacheslide.store.persistent.breaker import Breaker
from cacheslide.store.persistent.mooncake import MooncakeOptions, MooncakeTier, why_not
from cacheslide.store.persistent.mooncake_pool import _die_with_parent
from cacheslide.store.persistent.record import Damaged, NoRoom, chunk_of, to_bytes
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from tests.helpers.chunks import MIB, assert_same, chunk, encoded, name
from tests.helpers.store_rows import ROW
from tests.helpers.tiered import PAGES, key, store
from tests.helpers.valkey import free_port, listens
from tests.helpers.waiting import eventually


def missing() -> str:
    """Why Mooncake cannot be used here; empty when it can. Asked of another process: importing it is not harmless."""
    if importlib.util.find_spec("mooncake") is None:
        return "no package of Mooncake is installed (pip install 'cacheslide[mooncake]')"
    tried = subprocess.run([sys.executable, "-P", "-c", "import mooncake.store"], capture_output=True, text=True)
    return why_not(tried.stderr.strip().rpartition("\n")[2]) if tried.returncode else ""


pytestmark = [pytest.mark.skipif(bool(why := missing()), reason=why), pytest.mark.slow]
POOL = 64 * MIB
LONG, SHORT = 60.0, 0.3  # seconds a call: what must not fail on a busy machine, and what must
prefixes = (f"test{i}" for i in itertools.count())


def tier(ports, **kw) -> MooncakeTier:
    port, metrics_port = ports
    settings = {"port": port, "metrics_port": metrics_port, "timeout_s": LONG, "capacity": POOL}
    return MooncakeTier(MooncakeOptions(**(settings | kw)))


@contextmanager
def opened(*tiers):
    try:
        yield tiers if len(tiers) > 1 else tiers[0]
    finally:
        for t in tiers:
            for helper in t._running:
                helper.process.kill()  # saying goodbye takes a client up to two seconds
            t.close()


@contextmanager
def master(ports=None, *flags):
    """A process and its two ports."""
    port, metrics_port = ports = ports or (free_port(), free_port())
    command = [sys.executable, "-P", "-m", "mooncake.cli", "-rpc_address=127.0.0.1", "-metrics_host=127.0.0.1"]
    command += [f"-rpc_port={port}", f"-metrics_port={metrics_port}", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=_die_with_parent, **quiet)
    try:
        up = eventually(lambda: all(map(listens, ports)) or process.poll() is not None)
        assert up and process.poll() is None
        yield process, ports
    finally:
        process.kill()  # it may be stopped
        process.wait(60)


@pytest.fixture(scope="module")
def ports():
    """Of a master with a pool that lives as long as this module."""
    with master() as (_, ports), opened(tier(ports, segment=POOL)) as pool:
        pool.ping()
        yield ports


@pytest.fixture
def prefix():
    return next(prefixes)


def overwrite(t: MooncakeTier, which: bytes, raw: bytes) -> None:
    """Put other bytes under a record's name, on the server."""
    t._ask("d", which)
    file = os.memfd_create("test")
    try:
        Files().write(file, memoryview(raw), 0)
        assert t._ask("w", which, file)[0] == len(raw)
    finally:
        os.close(file)


def states(process: int) -> set[str]:
    """Of its threads, in the letters of proc(5): a signal reaches them one by one, after it was sent."""
    tasks = Path(f"/proc/{process}/task").glob("*/stat")
    found = set()
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):
            found.add(task.read_text().rsplit(")", 1)[1].split()[0])
    return found


def gone(process: int) -> bool:
    return states(process) <= {"Z"}


def test_round_trip_and_tenants(ports, prefix, monkeypatch):
    def poisoned(n):
        buffer = aligned_buffer(n)
        buffer[:] = b"\xff" * n
        return buffer

    monkeypatch.setattr(mooncake, "aligned_buffer", poisoned)  # what is not read must not look like what was written
    with opened(tier(ports, prefix=prefix), tier(ports, prefix=prefix)) as (a, b):
        assert a.read(name(1)) is None and not a.contains(name(1))
        before = a.nbytes
        assert a.write(encoded(1)) == encoded(1).size and b.write(encoded(1)) == 0
        assert b.contains(name(1)) and not b.contains(name(1, "other")) and b.read(name(1, "other")) is None
        assert_same(chunk_of(*b.read(name(1))), chunk(1))
        assert b.nbytes == before + encoded(1).size
        large = encoded(2, n=2000, heads=4, dim=32)
        assert b.write(large) == large.size > 4 * MIB
        assert_same(chunk_of(*a.read(name(2))), chunk(2, n=2000, heads=4, dim=32))


def _write(ports, prefix, pipe) -> None:
    t = tier(ports, prefix=prefix)
    for i in range(5):
        t.write(encoded(i))
    helper = t._running[0]
    heir = subprocess.Popen(["sleep", "300"], pass_fds=[helper.control.fileno()])  # keeps the socket open, like a fork
    pipe.send((helper.process.pid, heir.pid))
    time.sleep(300)


def test_records_outlive_the_process_that_wrote_them_and_its_helper_does_not(ports, prefix):
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    writer = spawn.Process(target=_write, args=(ports, prefix, theirs))
    writer.start()
    started = []
    try:
        assert mine.poll(300)
        helper, _ = started = mine.recv()
        assert not gone(helper)
        writer.kill()
        writer.join(60)
        assert eventually(lambda: gone(helper))
    finally:
        writer.kill()
        writer.join(60)
        for process in started:
            if not gone(process):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    with opened(tier(ports, prefix=prefix), tier(ports, prefix=f"{prefix}-other")) as (t, other):
        for i in range(5):
            assert_same(chunk_of(*t.read(name(i))), chunk(i))
            assert t.read(name(i, "stranger")) is None and other.read(name(i)) is None


def test_altered_and_truncated_records_are_found(ports, prefix):
    raw = bytes(to_bytes(encoded(1)))
    wrong = [raw[:at] + bytes(x ^ 0x5A for x in raw[at : at + 3]) + raw[at + 3 :] for at in (3, 60, 300, 4096, 12000)]
    wrong += [raw[:size] for size in (1, 100, 4096, 4096 + 17, len(raw) - 4096)]
    wrong.append(bytes(to_bytes(encoded(2))))
    with opened(tier(ports, prefix=prefix)) as t:
        for there in wrong:
            overwrite(t, name(1), there)
            with pytest.raises(Damaged):
                t.read(name(1))
            assert not t.contains(name(1)) and t.read(name(1)) is None
        persistent = PersistentTiers(None, t, TieredStats())
        overwrite(t, name(1), wrong[3])
        assert persistent.read(name(1)).startswith("damaged") and persistent.read(name(1)) == "absent"
        assert persistent.stats.damaged == 1 and not persistent.remote_breaker.open
        overwrite(t, name(1), raw)  # and what is right is served
        assert_same(chunk_of(*t.read(name(1))), chunk(1))


def test_a_full_pool_makes_room_or_refuses(prefix):
    def large(i):
        return encoded(i, n=1000)

    size, capacity = large(0).size, 16 * MIB
    with (
        master(None, "-default_kv_lease_ttl=3600000") as (_, ports),
        opened(tier(ports, segment=capacity), tier(ports, prefix=prefix, capacity=capacity)) as (pool, t),
    ):
        pool.ping()
        persistent = PersistentTiers(None, t, TieredStats())
        n = 2 * capacity // size
        for i in range(n):  # again, should the master not have made room in time
            assert eventually(lambda i=i: persistent.write([large(i)])[0])
        assert capacity // 2 < t.nbytes <= capacity
        here = [i for i in range(n) if t.contains(name(i))]  # which the master takes for a use: an hour's lease
        assert 0 < len(here) < n and not t.contains(name(0))
        for i in here:
            assert_same(chunk_of(*t.read(name(i))), chunk(i, n=1000))
        refused, fresh = persistent.stats.refused, itertools.count(n)

        def none_can_leave() -> bool:  # each is in use at once, if it has not left by then
            if not persistent.write([large(i := next(fresh))])[0]:
                return True
            t.contains(name(i))
            return False

        assert eventually(none_can_leave)
        assert persistent.stats.refused == refused + 1 and not t.contains(name(next(fresh) - 1))
        assert persistent.stats.remote_errors == 0 and not persistent.remote_breaker.open
        assert all(t.contains(name(j)) for j in here) and t.nbytes <= capacity
        with pytest.raises(NoRoom, match="larger than the remote tier"):
            t.write(encoded(2 * n, n=40000))
        t.options = replace(t.options, capacity=1 << 40)  # told wrong: the master refuses
        with pytest.raises(NoRoom, match="has no room"):
            t.write(encoded(2 * n, n=40000))


def test_master_gone_and_back(tmp_path):
    ports = free_port(), free_port()
    with opened(tier(ports, segment=POOL)) as far:
        patient, impatient = far.options, replace(far.options, timeout_s=SHORT)
        far.options = impatient
        s = store(tmp_path, host=2 * PAGES, remote=far, disk=None, spill=None)
        s.persistent.remote_breaker = Breaker(0.05, 0.1)
        begun = time.monotonic()
        assert s.get(key(1)) is None and s.fetch(key(1)).why.startswith("remote unavailable")

        def written(i: int) -> bool:
            time.sleep(0.1)
            try:
                return far.write(encoded(i)) > 0 or far.contains(name(i))
            except (OSError, NoRoom):  # the client has not come back, its memory has not
                return False

        far.options = patient
        with master(ports) as (process, _):
            assert eventually(lambda: written(50), 120)
            for i in range(6):
                s.put(key(i), chunk(i))
            assert s.flush(60)
            assert eventually(lambda: all(s.get(key(i)) is not None for i in range(6)))
            assert s.stats.hits_remote > 0
            far.options = impatient
            for end, state in ((signal.SIGSTOP, "T"), (signal.SIGKILL, "Z")):
                process.send_signal(end)
                assert eventually(lambda state=state: states(process.pid) == {state})
                for call in (lambda: far.contains(name(1)), lambda: far.read(name(1)), lambda: far.write(encoded(7))):
                    with pytest.raises(OSError, match="does not answer"):
                        call()
            for i in range(6):  # what is still in memory is served, the rest is said to be unavailable
                found = s.fetch(key(i))
                assert found.why.startswith("remote unavailable") if found.chunk is None else not found.why
                if found.chunk is not None:
                    assert_same(found.chunk, chunk(i))
            process.wait(60)
        far.options = patient
        with master(ports):  # which knows nothing of the old one's records
            assert eventually(lambda: written(60), 120)
            assert eventually(lambda: s.fetch(key(99)).why == "absent")
            assert far.read(name(50)) is None
            assert_same(chunk_of(*far.read(name(60))), chunk(60))
        assert time.monotonic() - begun < 300 and s.stats.remote_errors > 0
        s.close()


def test_memory_ends_with_its_process(prefix):
    with (
        master(None, "-client_ttl=5") as (_, ports),
        opened(tier(ports, segment=POOL), tier(ports, segment=POOL)) as (first, second),
        opened(tier(ports, prefix=prefix, timeout_s=5.0)) as t,
    ):
        first.ping()
        second.ping()
        for i in range(20):
            assert t.write(encoded(i))

        def found() -> int | None:
            try:
                return sum(t.read(name(i)) is not None for i in range(20))
            except OSError:
                return None

        assert found() == 20
        first.close()  # says goodbye: its half is gone at once
        assert 0 < found() < 20
        second._running[0].process.kill()  # the master lets it go when its time is over
        assert eventually(lambda: found() == 0)
        with pytest.raises(NoRoom):
            t.write(encoded(1))


def test_a_helper_that_dies_is_started_again(ports, prefix):
    with opened(tier(ports, prefix=prefix)) as t:
        t.write(encoded(1))
        t._running[0].process.kill()
        t._running[0].process.wait(60)
        assert_same(chunk_of(*t.read(name(1))), chunk(1))
        t._running[0].process.send_signal(signal.SIGSTOP)
        t.options = replace(t.options, timeout_s=SHORT)
        with pytest.raises(OSError, match="does not answer"):
            t.read(name(1))
        t._running[0].process.send_signal(signal.SIGCONT)
        t.options = replace(t.options, timeout_s=LONG)
        for i in range(3):  # the late answer is nobody's
            assert t.read(name(i)) is None if i != 1 else t.read(name(1)) is not None
    with pytest.raises(OSError, match="closed"):
        t.contains(name(1))


def test_chunks_outlive_the_store_that_made_them(ports):
    raw = {"remote_engine": "mooncake", "remote_host": "127.0.0.1", "remote_port": ports[0], "host_gib": 0.001,
           "remote_metrics_port": ports[1], "remote_gib": POOL / 2**30, "page_tokens": 8,
           "remote_timeout_s": LONG}  # fmt: skip
    first = open_store(raw, ROW, namespace="outlive")
    try:
        for i in range(6):
            first.put(key(i), chunk(i))
        assert first.flush(60) and first.stats.remote_bytes > 0
    finally:
        assert first.close()
    second, stranger = open_store(raw, ROW, namespace="outlive"), open_store(raw, ROW, namespace="stranger")
    try:
        for i in range(6):
            assert_same(second.get(key(i)), chunk(i))
            assert stranger.get(key(i)) is None
        assert second.stats.hits_remote == 6 and second.stats.remote_errors == stranger.stats.remote_errors == 0
    finally:
        assert second.close() and stranger.close()


@pytest.mark.parametrize(
    ("said", "code"), [("libcuda.so.1: cannot open shared object file", "raise ImportError('{}')"), ("ended", "1 / 0")]
)
def test_a_package_that_cannot_be_loaded_is_said_to(tmp_path, monkeypatch, said, code):
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").write_text("")
    (tmp_path / "mooncake/store.py").write_text(code.format(said))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StoreError, match=rf"mooncake-transfer-engine-non-cuda.*{said}"):
        tier((free_port(), free_port()))


def test_serve_starts_a_pool_that_clients_can_use(tmp_path, prefix, capsys):
    ports, file = (free_port(), free_port()), tmp_path / "c.json"
    raw = {"remote_engine": "mooncake", "remote_port": ports[0], "remote_metrics_port": ports[1]}
    file.write_text(json.dumps(raw | {"remote_gib": POOL / 2**30}))
    for said, *args in (
        ("needs --open", "--bind", "10.0.0.7"),
        ("name the IPv4 address", "--bind", "0.0.0.0", "--open"),
        ("no passwords", "--password-file", str(file)),
    ):
        assert main(["store", "serve", str(file), *args]) == 2 and said in capsys.readouterr().err
    command = [sys.executable, "-m", "cacheslide.cli.store", "store", "serve", str(file)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout.readline() == f"Mooncake serves {POOL} bytes at 127.0.0.1:{ports[0]}\n"
        parts = [int(p) for p in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
        assert len(parts) == 2
        with opened(tier(ports, prefix=prefix)) as t:
            assert t.write(encoded(1))
            assert_same(chunk_of(*t.read(name(1))), chunk(1))
        server.terminate()
        assert server.wait(60) == 0 and all(gone(p) for p in parts)
        assert not any(map(listens, ports))
    finally:
        server.kill()
        server.wait(60)
        server.stdout.close()
