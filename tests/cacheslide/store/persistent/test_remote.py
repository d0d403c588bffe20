"""The remote tier against a real Valkey or Redis server, started here on loopback."""

import shutil
import subprocess
import time

import pytest

from cacheslide.errors import StoreError
from cacheslide.store.persistent.breaker import Breaker
from cacheslide.store.persistent.record import Damaged, chunk_of
from cacheslide.store.persistent.remote import RemoteOptions
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from tests.helpers.chunks import assert_same, chunk, encoded, name
from tests.helpers.tiered import PAGES, key, store
from tests.helpers.valkey import SERVER, free_port, server, tier

pytest.importorskip("redis", reason="the client library `redis` is not installed (pip install 'cacheslide[remote]')")
pytestmark = [
    pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with server(tmp_path_factory.mktemp("valkey")) as port:
        yield port


@pytest.fixture
def port(shared):
    tier(shared)._client.flushall()
    return shared


def test_round_trip_and_tenants(port):
    a, b = tier(port), tier(port)
    assert a.read(name(1)) is None and not a.contains(name(1))
    assert a.write(encoded(1)) == encoded(1).size and b.write(encoded(1)) == 0
    assert b.contains(name(1)) and not b.contains(name(1, "other"))
    assert_same(chunk_of(*b.read(name(1))), chunk(1))
    assert b.nbytes == encoded(1).size


def test_capacity_is_the_servers_and_the_least_recently_used_leave(port):
    size = encoded(0).size
    clients = [tier(port, capacity=5 * size) for _ in range(2)]
    for i in range(12):
        clients[i % 2].write(encoded(i))
        clients[0].read(name(0))
        assert clients[1].nbytes <= 5 * size
    here = [i for i in range(12) if clients[0].contains(name(i))]
    assert here == [0, 8, 9, 10, 11]
    clients[0]._client.delete(clients[0]._key(name(9)))  # the server may drop a value by itself
    clients[0].write(encoded(9))
    assert clients[0].nbytes == 5 * size and clients[0].contains(name(9))
    with pytest.raises(StoreError, match="larger than the remote tier"):
        tier(port, capacity=size - 1).write(encoded(50))
    persistent = PersistentTiers(None, tier(port, capacity=size), TieredStats())
    records = [encoded(50, n=80), encoded(51)]
    assert persistent.write(records) == [False, True]  # one that cannot be kept keeps no other from it
    assert persistent.stats.refused == 1 and persistent.stats.remote_errors == 0


def test_altered_records_are_found(port):
    t = tier(port)
    for at in (3, 60, 300, 4096, encoded(1).size // 2):
        t.write(encoded(1))
        t._client.setrange(t._key(name(1)), at, b"\xff\x00\xff")
        with pytest.raises(Damaged):
            t.read(name(1))
        assert not t.contains(name(1))
    t.write(encoded(1))
    t._client.set(t._key(name(2)), t._client.get(t._key(name(1))))
    with pytest.raises(Damaged):
        t.read(name(2))


def test_user_and_password(tmp_path):
    with server(tmp_path, "--requirepass", "s3cret") as port:
        with pytest.raises(StoreError, match="refuses this user"):
            tier(port).ping()
        with pytest.raises(StoreError, match="refuses this user"):
            tier(port, password="wrong").ping()
        tier(port, password="s3cret").ping()
        assert "s3cret" not in repr(RemoteOptions(password="s3cret"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: no certificates for the test")
def test_tls(tmp_path):
    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", private, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    files = ["--tls-cert-file", str(cert), "--tls-key-file", str(private), "--tls-ca-cert-file", str(cert)]
    with server(tmp_path, *files, tls=True) as port:
        mine = {"tls": True, "ca_file": str(cert), "cert_file": str(cert), "key_file": str(private)}
        good = tier(port, **mine)
        good.write(encoded(1))
        assert_same(chunk_of(*good.read(name(1))), chunk(1))
        with pytest.raises(OSError, match="does not answer"):
            tier(port, tls=True, timeout_s=1.0).ping()  # an unknown authority is refused
        with pytest.raises(OSError, match="does not answer"):
            tier(port, tls=False, timeout_s=1.0).ping()


def test_two_hosts_share_through_the_server_and_their_tenants_do_not(port, tmp_path):
    first = store(tmp_path / "a", host=2 * PAGES, remote=tier(port))
    second = store(tmp_path / "b", host=2 * PAGES, remote=tier(port))
    stranger = store(tmp_path / "c", host=2 * PAGES, remote=tier(port), namespace="stranger")
    for i in range(6):
        first.put(key(i), chunk(i))
    assert first.flush(20)
    for i in range(6):
        assert_same(second.get(key(i)), chunk(i))
    assert second.stats.hits_remote == 6
    assert all(stranger.get(key(i)) is None for i in range(6))
    assert second.fetch(key(0)).tier == "file"  # what came from afar is kept near
    for s in (first, second, stranger):
        assert s.close()


def test_remote_gone_and_back(tmp_path):
    port = free_port()
    far = tier(port)
    s = store(tmp_path / "a", host=2 * PAGES, remote=far, disk=None)
    s.persistent.remote_breaker = Breaker(0.05, 0.1)
    begun = time.monotonic()
    assert s.get(key(1)) is None and s.fetch(key(1)).why.startswith("remote unavailable")
    with server(tmp_path, port=port):
        time.sleep(0.15)
        for i in range(6):
            s.put(key(i), chunk(i))
        assert s.flush(20) and s.stats.remote_bytes > 0
        seen = [i for i in range(6) if s.get(key(i)) is not None]
        assert seen == list(range(6)) and s.stats.hits_remote > 0
    for i in range(6):  # gone: what is still in memory is served, the rest is said to be unavailable
        found = s.fetch(key(i))
        assert found.why.startswith("remote unavailable") if found.chunk is None else not found.why
        if found.chunk is not None:
            assert_same(found.chunk, chunk(i))
    with server(tmp_path, port=port):
        time.sleep(0.15)
        s.put(key(9), chunk(9))
        assert s.flush(20) and far.contains(name(9))
    assert time.monotonic() - begun < 60 and s.stats.remote_errors > 0
    assert s.close()
