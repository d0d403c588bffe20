"""A server that says anything at all: a miss in time, a counted failure, and a breaker for that tier only."""

import socket
import struct
import threading
import time
from contextlib import contextmanager

import pytest

from cacheslide.errors import StoreError
from cacheslide.store import open_store
from cacheslide.store.persistent.filetier import namespace_id
from cacheslide.store.persistent.mooncake import MooncakeOptions, MooncakeTier
from cacheslide.store.persistent.record import Encoded, to_bytes
from cacheslide.store.persistent.shape import Wanted
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from tests.helpers.chunks import assert_same, chunk, encoded, name
from tests.helpers.forged import HEADERS, OTHERS, ROW, SHAPE, with_header
from tests.helpers.tiered import key

pytest.importorskip("redis", reason="the client library `redis` is not installed (pip install 'cacheslide[remote]')")
from tests.helpers.valkey import SERVER, server, tier

pytestmark = [pytest.mark.fault("lying_store"), pytest.mark.slow]
needs_server = pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed")


@contextmanager
def liar(answer):
    """A server on loopback that answers everything with the same bytes, or with what `answer(connection)` sends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(connection):
            with connection:
                try:
                    while connection.recv(1 << 16):
                        answer(connection) if callable(answer) else connection.sendall(answer)
                except OSError:
                    return

        def accept():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def trickle(connection) -> None:
    connection.sendall(b"$1000000\r\n")
    for _ in range(600):
        connection.sendall(b"x")
        time.sleep(0.1)


def flood(connection) -> None:
    connection.sendall(b"$999999999999\r\n")
    while True:
        connection.sendall(bytes(1 << 20))


LIES = {
    "garbage": b"\xff\xfe\r\n",
    "a status": b"+OK\r\n",
    "a number": b":5\r\n",
    "a number of 5,000 digits": b":" + b"9" * 5000 + b"\r\n",
    "no number": b":x\r\n",
    "a huge bulk": b"$999999999999\r\nabc",
    "a negative bulk": b"$-7\r\n",
    "a bulk of no length": b"$x\r\n",
    "nested arrays": b"*1\r\n" * 5000,
    "a huge array": b"*999999999\r\n",
    "an empty array": b"*0\r\n",
    "a map": b"%1\r\n+a\r\n+b\r\n",
    "a push": b">2\r\n+a\r\n+b\r\n",
    "a boolean": b"#t\r\n",
    "a double": b",inf\r\n",
    "an error": b"-ERR no\r\n",
    "a long error": b"-" + b"x" * 100_000 + b"\r\n",
    "nothing, and closes": lambda connection: connection.close(),
    "a line without end": b"+" + b"x" * 100_000,
    "a byte now and then": trickle,
    "bytes without end": flood,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_a_miss_in_time_and_closes_no_other_tier(tmp_path, lie):
    with liar(LIES[lie]) as port:
        far = tier(port, timeout_s=0.5, capacity=8 << 20)
        config = {"path": str(tmp_path / "s"), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0}
        store = open_store(config, ROW, shape=SHAPE)
        store.persistent.remote = far
        for i, ask in enumerate((lambda: store.fetch(key(1), tokens=40), lambda: store.contains(key(1)))):
            store.persistent.remote_breaker.worked()  # ask it anew, breaker or not
            begun = time.monotonic()
            found = ask()
            assert time.monotonic() - begun < 20  # the limit is 0.5 s; a machine may be busy
            assert store.stats.remote_errors == i + 1 and store.persistent.remote_breaker.open
            assert found is False or (found.chunk is None and found.why.startswith("remote unavailable"))
            assert "\n" not in store.persistent.remote_breaker.last_error
        store.put(key(2), chunk(2))
        assert (
            store.flush(60) and store.persistent.file.contains(name(2)) and not store.persistent.file_breaker.failures
        )
        assert_same(store.get(key(2)), chunk(2))
        store.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with server(tmp_path_factory.mktemp("valkey")) as port:
        yield port


@pytest.fixture
def far(port):
    t = tier(port, capacity=64 << 20)
    t._client.flushall()
    return t


def persistent(t) -> PersistentTiers:
    return PersistentTiers(None, t, TieredStats())


WANTED = Wanted(SHAPE, 16, 16 * ROW, 4, tokens=40)
GOOD = bytes(to_bytes(encoded(1)))
V2 = bytearray(GOOD)
V2[8:12] = struct.pack("<I", 2)
VALUES = {
    "empty": b"",
    "text": b"OK",
    "zeros": bytes(len(GOOD)),
    "short": GOOD[:200],
    "half": GOOD[: len(GOOD) // 2],
    "another chunk's": bytes(to_bytes(encoded(2))),
    "another version's": bytes(V2),
    "32 MiB of x": b"x" * (32 << 20),
    **{f"shape: {k}": bytes(to_bytes(Encoded.of(name(1), c, 16))) for k, c in OTHERS.items()},
    **{f"header: {k}": bytes(to_bytes(with_header(encoded(1), HEADERS[k]))) for k in ("nested", "Infinity", "no layout",
       "tokens 10^12", "a list")},
}  # fmt: skip


@needs_server
@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_is_no_such_record_is_a_miss_and_is_removed(far, kind):
    far._client.set(far._key(name(1)), VALUES[kind])
    far.write(encoded(3))
    b = persistent(far)
    found = b.read(name(1), accept=WANTED)
    assert isinstance(found, str) and found.startswith(("damaged", "misfit"))
    assert b.stats.damaged + b.stats.misfits == 1 and not b.stats.remote_errors and not b.remote_breaker.open
    assert not far.contains(name(1)) and not isinstance(b.read(name(3), accept=WANTED), str)  # its neighbour is served
    assert b.write([encoded(1)]) == [True] and not isinstance(b.read(name(1), accept=WANTED), str)


@needs_server
@pytest.mark.parametrize("kind", ["list", "hash", "set", "zset", "stream"])
def test_a_value_of_another_type_is_a_miss_and_closes_nothing(far, kind):
    place, r = far._key(name(1)), far._client
    {"list": lambda: r.rpush(place, "a"), "hash": lambda: r.hset(place, "a", 1), "set": lambda: r.sadd(place, "a"),
     "zset": lambda: r.zadd(place, {"a": 1}), "stream": lambda: r.xadd(place, {"a": 1})}[kind]()  # fmt: skip
    b = persistent(far)
    assert b.read(name(1)).startswith("damaged") and not b.remote_breaker.open
    assert b.write([encoded(1)]) == [True] and not isinstance(b.read(name(1)), str)


@needs_server
def test_a_sound_record_that_another_put_there_meanwhile_is_not_removed(far):
    far.write(encoded(1))
    far._remove(name(1), b"what was read" + bytes(115))
    assert far.contains(name(1))
    far._remove(name(1), GOOD[:128])
    assert not far.contains(name(1)) and far.nbytes == 0


@needs_server
@pytest.mark.fault("hostile_store")
@pytest.mark.parametrize("used", ["-1000000000000", "1000000000000", "0", "notanumber", "nan", "inf", "1e300", ""])
def test_capacity_is_counted_from_what_is_there(far, port, used):
    size = encoded(0).size
    small = tier(port, capacity=6 * size)
    for i in range(4):
        small.write(encoded(i))
    far._client.set("cacheslide:{v1}:used", used)
    for i in range(4, 100):
        small.write(encoded(i))
    held = list(far._client.scan_iter("cacheslide:{v1}:chunk:*"))
    assert 4 <= len(held) <= 6 and small.nbytes == len(held) * size
    assert small.contains(name(99))


@needs_server
@pytest.mark.fault("hostile_store")
def test_counters_that_are_broken_or_gone_are_made_anew_and_nothing_foreign_is_removed(far, port):
    size, r = encoded(0).size, far._client
    small = tier(port, capacity=6 * size)
    r.set("foreign", "precious")
    for i in range(6):
        small.write(encoded(i))
    r.delete("cacheslide:{v1}:order", "cacheslide:{v1}:sizes", "cacheslide:{v1}:used")  # records that nothing counts
    for i in range(6, 12):
        small.write(encoded(i))
    assert len(list(r.scan_iter("cacheslide:{v1}:chunk:*"))) <= 6
    for kind in ("order", "sizes", "used", "clock"):
        r.delete(f"cacheslide:{{v1}}:{kind}")
        r.rpush(f"cacheslide:{{v1}}:{kind}", "x") if kind != "order" else r.set("cacheslide:{v1}:order", "x")
        assert persistent(small).write([encoded(50)]) == [True] and persistent(small).read(name(50))[2] == "remote"
        small._client.delete(small._key(name(50)))
    r.delete("cacheslide:{v1}:order")
    r.zadd("cacheslide:{v1}:order", {"foreign": -5, "cacheslide:{v1}:used": -6})
    r.hset("cacheslide:{v1}:sizes", "foreign", 10**9)
    for i in range(20, 40):
        small.write(encoded(i))
    assert r.get("foreign") == b"precious"
    assert 4 <= len(list(r.scan_iter("cacheslide:{v1}:chunk:*"))) <= 6


@needs_server
@pytest.mark.fault("tenant_key")
def test_the_server_is_asked_the_same_for_another_tenants_chunk_and_for_none(far, monkeypatch):
    """No time to compare: the requests are the same, so there is nothing that could differ."""
    far.write(encoded(1))  # of the tenant ""
    stores, asked = [], []
    store = open_store({"path": "", "host_gib": 1e-4, "file_gib": 0, "spill_gib": 0}, ROW, namespace="mine")
    store.persistent.remote = far
    run = far._client.execute_command
    monkeypatch.setattr(
        far._client, "execute_command", lambda *a, **kw: (asked.append((a[0], len(a))), run(*a, **kw))[1]
    )
    for i in (1, 1001):
        asked.clear()
        assert not store.contains(key(i)) and store.fetch(key(i)).why == "absent" and store.tier_of(key(i)) is None
        stores.append(list(asked))
    assert stores[0] == stores[1] and stores[0]
    assert namespace_id("mine") != namespace_id("")
    store.close()


def test_mooncake_and_valkey_names_are_of_fixed_width():
    """So that no namespace and key, whatever they hold, can be cut in another place."""
    mooncake = MooncakeTier.__new__(MooncakeTier)
    mooncake.options = MooncakeOptions()
    for remote in (mooncake, tier(1)):
        names = {remote._key(bytes([a]) * 16 + bytes([b]) * 20) for a in (0, 58, 255) for b in (0, 58, 255)}
        assert len(names) == 9 and len({len(n) for n in names}) == 1


@pytest.mark.parametrize("begins", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"])
def test_metrics_that_trickle_end_in_time(begins):
    def slowly(connection):
        connection.sendall(begins)
        for _ in range(600):
            connection.sendall(b"x")
            time.sleep(0.1)

    with liar(slowly) as port:
        far = MooncakeTier.__new__(MooncakeTier)
        far.options = MooncakeOptions(metrics_port=port, timeout_s=0.5)
        begun = time.monotonic()
        with pytest.raises((OSError, StoreError)):
            _ = far.nbytes
        assert time.monotonic() - begun < 20
