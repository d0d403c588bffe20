"""A real Valkey or Redis server on loopback, and a tier on it."""

import shutil
import socket
import subprocess
from contextlib import contextmanager

import pytest

from cacheslide.store.persistent.remote import RemoteOptions, ValkeyTier
from tests.helpers.waiting import eventually

pytest.importorskip("redis", reason="the client library `redis` is not installed (pip install 'cacheslide[remote]')")

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(folder, *flags, port=None, tls=False):
    port = port or free_port()
    where = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    command = [SERVER, "--bind", "127.0.0.1", *where, "--save", "", "--appendonly", "no", "--dir", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: listens(port) or process.poll() is not None) and process.poll() is None
        yield port
    finally:
        process.terminate()
        process.wait(60)


def tier(port, **kw) -> ValkeyTier:
    return ValkeyTier(RemoteOptions(port=port, **({"timeout_s": 60.0} | kw)))
