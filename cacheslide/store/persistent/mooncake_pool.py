"""`cacheslide store serve` for Mooncake: a master, and a process that provides the pool's memory."""

import ctypes
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

from cacheslide.errors import StoreError
from cacheslide.store.persistent.mooncake import MooncakeOptions, MooncakeTier

_START_S = 60.0
_PDEATHSIG = 1  # of prctl(2)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def serve(options: MooncakeOptions, bind: str) -> int:
    """Run master and pool until SIGTERM or SIGINT; StoreError if either cannot start or ends by itself.

    The pool has `options.capacity` bytes; the master begins to evict before it is full. Call from a process's main
    thread.
    """
    options = replace(options, host=bind, segment=options.capacity, timeout_s=max(options.timeout_s, 10.0))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    pool = MooncakeTier(options)  # first, for a clear error if the package is missing; connects by itself
    command = [sys.executable, "-P", "-m", "mooncake.cli", f"-rpc_address={bind}", f"-rpc_port={options.port}"]
    command += [f"-metrics_host={bind}", f"-metrics_port={options.metrics_port}"]
    master = subprocess.Popen(command, preexec_fn=_die_with_parent)  # a pool is useless without its master
    try:
        begun = time.monotonic()
        while not stop.is_set():
            if master.poll() is not None:
                raise StoreError(f"mooncake_master ended with status {master.returncode}: is port {options.port} free?")
            if _listens(bind, options.port) and _joined(pool):
                print(f"Mooncake serves {options.capacity} bytes at {bind}:{options.port}", flush=True)
                break
            if time.monotonic() - begun > _START_S:
                raise StoreError(f"no pool of {options.capacity} bytes at {bind}:{options.port} after {_START_S:g} s")
            time.sleep(0.02)
        while not stop.wait(0.5):
            if master.poll() is not None:
                raise StoreError(f"mooncake_master ended with status {master.returncode}")
            if not pool.alive:
                raise StoreError("the process that holds the pool's memory ended: is there so much memory?")
    finally:
        pool.close()
        master.terminate()
        try:
            master.wait(10)
        except subprocess.TimeoutExpired:
            master.kill()
            master.wait()
    return 0


def _listens(host: str, port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1.0)
        return s.connect_ex((host, port)) == 0


def _joined(pool: MooncakeTier) -> bool:
    try:
        pool.ping()
    except OSError:
        return False
    return True
