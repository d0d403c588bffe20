"""The remote tier on Mooncake Store: whole records in memory that the processes of a cluster put together.

A master (`mooncake_master`) knows the places of records and makes room; bytes are sent directly between processes. The
package is `mooncake-transfer-engine-non-cuda` (install `cacheslide[mooncake]`) or `mooncake-transfer-engine`, which has
the same module and needs the CUDA driver. The client runs in a helper process (see `mooncake_helper.py`), so that every
call here ends in time and its faults do not reach the engine.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cacheslide.errors import ConfigError, StoreError
from cacheslide.store.files import Files, aligned_buffer
from cacheslide.store.persistent.record import Accept, Encoded, Head, Misfit, NoRoom, anything, decode, to_bytes

_SALT = bytes(16)
_HELPER = Path(__file__).with_name("mooncake_helper.py")
_START_S = 60.0  # for starting the interpreter and the import on a busy machine
_CLOSE_S = 5.0
_LEAST = 16 << 20  # minimum bytes of a segment
# Mooncake's error codes (its types.h). Codes in neither set are refusals.
_ABSENT = {-703, -704, -710, -712}  # being written, not there, without a copy
_NO_ROOM = {-10, -200}
TOO_LARGE = -100_000  # the helper's own code: the record exceeds the requested size
_METRICS = 1 << 22  # bytes
_UNREACHABLE = {-1, -101, -103, -707, -800, -1010}  # and -900 to -999: no answer, or none from the record's holder


@dataclass(frozen=True)
class MooncakeOptions:
    """Address of the master, and this process's part of the pool.

    `port` is the master's RPC port and `metrics_port` its HTTP port, used by `nbytes`. `capacity` is the configured
    size of the pool in bytes; larger records are not sent, since room for them would evict others. `segment` is the
    memory in bytes (0, or at least 16 MiB) that this process adds to the pool; records in it are lost when the process
    ends. `protocol` "rdma" with `devices` (comma-separated) has not been tested here. A call takes at most `timeout_s`,
    or twice that if the helper process must be restarted.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 9003
    capacity: int = 4 << 30
    segment: int = 0
    metadata_server: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    devices: str = ""
    timeout_s: float = 2.0
    connections: int = 8
    prefix: str = "cacheslide"

    def __post_init__(self) -> None:
        if 0 < self.segment < _LEAST:
            raise ConfigError(f"Mooncake takes memory of at least {_LEAST} bytes a process, not {self.segment}")


def why_not(message: str) -> str:
    """Explains a helper process's first message other than "ok", and how to repair the installation."""
    if "cannot open shared object file" in message and "libcuda" not in message:  # the package without CUDA
        return f"Mooncake needs a library of the system (on Debian libibverbs1, libnuma1 and libcurl4): {message}"
    return (
        "the remote tier needs the package `mooncake-transfer-engine-non-cuda` or `mooncake-transfer-engine`: "
        f"pip install 'cacheslide[mooncake]' ({message or 'its helper process ended'})"
    )


class _Helper:
    """The helper process and its control socket."""

    def __init__(self, options: MooncakeOptions, limit_s: float) -> None:
        settings = {
            "host": options.host,
            "port": options.port,
            "segment": options.segment,
            "metadata": options.metadata_server,
            "protocol": options.protocol,
            "devices": options.devices,
            "timeout_s": options.timeout_s,
            "parent": os.getpid(),
        }
        limits = {"MC_STORE_CLIENT_SETUP_RETRIES": "1", "MC_RPC_TIMEOUT_MS": str(max(1, int(options.timeout_s * 1000)))}
        self.control, helper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with helper_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_HELPER), json.dumps(settings)],  # -P: ignores the mooncake.py beside it
                stdin=helper_end,
                stdout=subprocess.DEVNULL,
                # Its log repeats the store's statistics, several lines a second while the master is unreachable.
                stderr=None if "MC_LOG_LEVEL" in os.environ else subprocess.DEVNULL,
                start_new_session=True,  # its parent handles an interrupt from the terminal
                env=limits | os.environ,
            )
        self.control.settimeout(limit_s)
        try:
            hello = self.control.recv(2048).decode()
        except OSError as late:
            self.stop(0)
            raise OSError(f"the helper process for Mooncake did not start within {limit_s:g} s") from late
        if hello != "ok":
            self.stop(0)
            raise StoreError(why_not(hello))

    def connect(self) -> socket.socket:
        """A new connection to the helper."""
        own_end, helper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with helper_end:
            try:
                socket.send_fds(self.control, [b"+"], [helper_end.fileno()])
            except OSError:
                own_end.close()
                raise
        return own_end

    def stop(self, limit_s: float) -> None:
        """End the helper, by force after `limit_s`."""
        self.control.close()
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _stop(running: list[_Helper]) -> None:
    while running:
        running.pop().stop(_CLOSE_S)


def _cut_off(connection: http.client.HTTPConnection) -> None:
    """Abort whatever waits for a connection."""
    with contextlib.suppress(OSError):
        if (plain := connection.sock) is not None:
            plain.shutdown(socket.SHUT_RDWR)


class MooncakeTier:
    """A `RemoteTier` on one Mooncake master."""

    def __init__(self, options: MooncakeOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(options.connections)
        self._idle: list[socket.socket] = []
        self._closed = False
        self._running = [_Helper(options, _START_S)]
        self._end = weakref.finalize(self, _stop, self._running)  # at interpreter exit at the latest

    def _key(self, name: bytes) -> str:
        return f"{self.options.prefix}:v1:{name[:16].hex()}:{name[16:].hex()}"

    @property
    def _where(self) -> str:
        return f"{self.options.host}:{self.options.port}"

    def _connection(self) -> socket.socket:
        """A connection to the helper, which is restarted if it has died."""
        if not self._lock.acquire(timeout=self.options.timeout_s):
            raise OSError("the helper process for Mooncake is being started")
        try:
            if self._closed:
                raise OSError("the remote tier is closed")
            if not self._running or self._running[0].process.poll() is not None:
                _stop(self._running)
                while self._idle:
                    self._idle.pop().close()
                self._running.append(_Helper(self.options, self.options.timeout_s))
            return self._idle.pop() if self._idle else self._running[0].connect()
        finally:
            self._lock.release()

    def _ask(self, operation: str, name: bytes, file: int | None = None) -> tuple[int, int | None]:
        """Answer and file of one request; OSError if none arrives in time."""
        until = time.monotonic() + self.options.timeout_s
        if not self._slots.acquire(timeout=self.options.timeout_s):
            raise OSError(f"all {self.options.connections} connections to Mooncake at {self._where} are busy")
        try:
            connection = self._connection()
            try:
                connection.settimeout(max(0.001, until - time.monotonic()))
                request = operation.encode() + self._key(name).encode()
                socket.send_fds(connection, [request], [] if file is None else [file])
                raw, files, _, _ = socket.recv_fds(connection, 64, 1)
                if not raw:
                    raise OSError("its helper process ended")
            except OSError as gone:
                connection.close()  # a late answer must not be taken for the next request's
                raise OSError(f"Mooncake at {self._where} does not answer: {gone}") from None
            self._idle.append(connection)
        finally:
            self._slots.release()
        return int(raw), files[0] if files else None

    def _checked(self, code: int) -> int:
        """A non-negative result; otherwise OSError if Mooncake cannot be reached, StoreError if it refuses."""
        if code >= 0:
            return code
        if code in _UNREACHABLE or -1000 < code <= -900:
            raise OSError(f"Mooncake at {self._where} does not answer (its error {code})")
        if code in _NO_ROOM:
            raise NoRoom(f"Mooncake at {self._where} has no room: what it holds is in use (its error {code})")
        raise StoreError(f"Mooncake at {self._where} cannot do this (its error {code})")

    def ping(self) -> None:
        """OSError or StoreError unless the master answers."""
        self.contains(bytes(36))

    def contains(self, name: bytes) -> bool:
        """See `RemoteTier`. The master counts it as a use and keeps the record for its lease."""
        return bool(self._checked(self._ask("e", name)[0]))

    def read(self, name: bytes, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """See `RemoteTier`. A record that does not verify or is not accepted is removed."""
        most = min(accept.most, self.options.capacity)
        code, file = self._ask(f"r{most}:", name)
        try:
            if code in _ABSENT:
                return None
            if code == TOO_LARGE:
                self._remove(name)
                raise Misfit(f"a record of more than {most} bytes")
            size = self._checked(code)
            if size > most:
                raise StoreError(f"Mooncake at {self._where} answers nonsense: {size} bytes")
            buffer = aligned_buffer(size)
            if file is not None:
                Files().read(file, buffer, 0)
        finally:
            if file is not None:
                os.close(file)
        try:
            return decode(buffer, name, _SALT, 0, accept)
        except StoreError:
            self._remove(name)
            raise

    def _remove(self, name: bytes) -> None:
        gone, _ = self._ask("d", name)
        if gone not in _ABSENT:
            self._checked(gone)

    def write(self, record: Encoded) -> int:
        """See `RemoteTier`. NoRoom if it is larger than the pool, or if everything in the pool is in use."""
        if record.size > self.options.capacity:
            raise NoRoom(f"a record is larger than the remote tier's {self.options.capacity} bytes")
        file = os.memfd_create("cacheslide")
        try:
            Files().write(file, to_bytes(record), 0)
            return self._checked(self._ask("w", record.name, file)[0])
        finally:
            os.close(file)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by the master, from its metrics: of all clients and tenants, not of this store alone."""
        connection = http.client.HTTPConnection(
            self.options.host, self.options.metrics_port, timeout=self.options.timeout_s
        )
        late = threading.Timer(self.options.timeout_s, _cut_off, [connection])  # one limit, headers included
        late.daemon = True
        try:
            late.start()
            connection.request("GET", "/metrics")
            text = connection.getresponse().read(_METRICS).decode("utf-8", "replace")
        except (http.client.HTTPException, ValueError, AttributeError) as wrong:
            raise OSError(f"the metrics of Mooncake at {self._where} cannot be read: {wrong}") from None
        finally:
            late.cancel()
            connection.close()
        held = re.search(r"^master_allocated_bytes ([0-9]{1,19})\b", text, re.MULTILINE)
        if held is None:
            raise StoreError(f"port {self.options.metrics_port} of {self.options.host} has no metrics of Mooncake")
        return int(held[1])

    @property
    def alive(self) -> bool:
        """Whether the helper process runs; if it ends, the memory that it added to the pool is lost."""
        return bool(self._running) and self._running[0].process.poll() is None

    def close(self) -> None:
        """End the helper process; its memory leaves the pool with the records in it."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
        with contextlib.suppress(OSError):
            self._end()
