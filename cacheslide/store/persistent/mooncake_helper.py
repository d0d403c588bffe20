"""Helper process with a Mooncake client for `MooncakeTier`; run as a script, it imports nothing of this package.

The client needs its own process: `setup` and `close` hold the GIL while the master does not answer (4 s per attempt if
it is down, 20 attempts by default; 30 s if it hangs), a call after `close` is a segmentation fault, and loading it
starts some thirty threads and installs handlers for SIGSEGV, SIGBUS, SIGFPE and SIGURG.

Standard input is a socket of messages. First this process sends "ok", or an error; then every message brings one end of
a connection, served by a thread until the other end closes. A request on it is an operation (one byte, for reading
followed by the maximum bytes wanted and a colon) and a key; the answer is a number, negative for Mooncake's errors.
Records are passed as anonymous files. The process ends when standard input ends or its parent dies.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time

NO_ROOM, NOT_CONNECTED = -200, -900  # Mooncake's NO_AVAILABLE_HANDLE and RPC_FAIL
TOO_LARGE = -100_000  # own code: the record exceeds the requested size
_NO_MASTER = -1  # result of `setup` without a master
_PAUSES = (0.02, 0.04, 0.08, 0.16)  # seconds: the master makes room in the background after its first refusal
_RETRY_S, _CLOSE_S = 0.5, 15


class Client:
    """A Mooncake client that connects in the background; used by many threads."""

    def __init__(self, kind: type, settings: dict) -> None:
        self._kind, self._settings, self._store, self._why = kind, settings, None, NOT_CONNECTED
        self._connected = threading.Event()
        threading.Thread(target=self._connect, daemon=True).start()

    def _connect(self) -> None:
        s = self._settings
        while True:
            try:
                # Tries the port first: without a listener `setup` blocks everything for 4 s.
                with socket.create_connection((s["host"], s["port"]), s["timeout_s"]) as probe:
                    host, address = probe.getsockname()[0], probe.getpeername()[0]
                store, master = self._kind(), f"{address}:{s['port']}"
                refused = store.setup(host, s["metadata"], s["segment"], 0, s["protocol"], s["devices"], master)
                if not refused:
                    break
                self._why = NOT_CONNECTED if refused == _NO_MASTER else refused
            except OSError:
                self._why = NOT_CONNECTED
            time.sleep(_RETRY_S)
        self._store = store
        self._connected.set()

    def run(self, operation: str, key: str, file: int | None) -> tuple[int, int | None]:
        """The answer to one request, and its file if any."""
        if not self._connected.wait(self._settings["timeout_s"]):
            return self._why, None
        if operation == "r":
            most, _, key = key.partition(":")
            return self._read(key, int(most))
        if operation == "w":
            return self._write(key, file), None
        return self._store.is_exist(key) if operation == "e" else self._store.remove(key, True), None

    def _read(self, key: str, most: int) -> tuple[int, int | None]:
        size = self._store.get_size(key)
        if size <= 0 or size > most:
            return (size if size <= 0 else TOO_LARGE), None
        file = os.memfd_create("cacheslide")
        try:
            os.ftruncate(file, size)
            return self._transfer(self._store.get_into, key, file, size), file
        except BaseException:
            os.close(file)
            raise

    def _write(self, key: str, file: int) -> int:
        if (exists := self._store.is_exist(key)) != 0:
            return min(exists, 0)
        size = os.fstat(file).st_size
        for pause in (*_PAUSES, 0.0):
            done = self._transfer(self._store.put_from, key, file, size)
            if done != NO_ROOM:
                break
            time.sleep(pause)
        return done or size

    def _transfer(self, call, key: str, file: int, size: int) -> int:
        with mmap.mmap(file, size) as memory:
            first = ctypes.c_char.from_buffer(memory)
            address = ctypes.addressof(first)
            try:
                if wrong := self._store.register_buffer(address, size):
                    return wrong
                try:
                    return call(key, address, size)
                finally:
                    self._store.unregister_buffer(address)
            finally:
                del first  # otherwise the mapping cannot be closed

    def close(self) -> None:
        """Remove this process's memory from the pool, if the master can be reached."""
        if self._connected.is_set():
            self._store.close()


def serve(connection: socket.socket, client: Client) -> None:
    """Answer the requests of one connection until its other end closes."""
    with connection:
        while True:
            raw, files, _, _ = socket.recv_fds(connection, 4096, 1)
            if not raw:
                return
            answer, file = NOT_CONNECTED, None
            try:
                answer, file = client.run(chr(raw[0]), raw[1:].decode(), files[0] if files else None)
            finally:
                for f in files:
                    os.close(f)
            try:
                socket.send_fds(connection, [str(answer).encode()], [] if file is None else [file])
            except OSError:  # the caller has given up
                return
            finally:
                if file is not None:
                    os.close(file)


def main() -> None:
    """Serve the process at the other end of standard input."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=0)
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as missing:
        control.send(str(missing).encode()[:2000])
        return
    control.send(b"ok")
    client = Client(MooncakeDistributedStore, settings)
    control.settimeout(1.0)
    while os.getppid() == settings["parent"]:  # a fork of the parent may keep the socket's other end open
        try:
            raw, files, _, _ = socket.recv_fds(control, 16, 1)
        except TimeoutError:
            continue
        if not raw:
            break
        threading.Thread(target=serve, args=(socket.socket(fileno=files[0]), client), daemon=True).start()
    signal.alarm(_CLOSE_S)  # ends the process whatever `close` waits for, also if the GIL is held
    client.close()
    os._exit(0)  # threads may still be inside the closed client


if __name__ == "__main__":
    main()
