"""Connections to a Valkey or Redis server with one time limit per request and one size limit per answer.

With a limit per `recv` only, a server that sends a byte now and then could block a reader indefinitely.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis


class Allowance(threading.local):
    """The rest of this thread's current request: time limit `until`, and bytes that may still be received."""

    until = math.inf
    room = math.inf

    @contextmanager
    def request(self, seconds: float, room: int) -> Iterator[None]:
        """Context of a request that may take `seconds` and receive `room` bytes."""
        self.until, self.room = time.monotonic() + seconds, room
        try:
            yield
        finally:
            self.until = self.room = math.inf

    @property
    def left(self) -> float:
        """Seconds left; TimeoutError if there are none."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took longer than its limit")
        return left

    def took(self, received: int) -> None:
        """Count received bytes; OSError if they exceed any valid answer."""
        self.room -= received
        if self.room < 0:
            raise OSError("the answer is larger than any record")


class _Socket:
    """A connected socket whose calls all end within the request's time."""

    def __init__(self, plain: Any, allowance: Allowance) -> None:
        self._plain, self._allowance = plain, allowance
        self._timeout = plain.gettimeout()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def settimeout(self, seconds: float | None) -> None:
        """As `socket.settimeout`, further limited by the request's time."""
        self._timeout = seconds
        self._plain.settimeout(seconds)

    def _limit(self) -> None:
        if self._timeout != 0:  # 0 only polls
            left = self._allowance.left
            self._plain.settimeout(self._timeout if left == math.inf else min(left, self._timeout or left))

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As `socket.recv`."""
        self._limit()
        data = self._plain.recv(size, flags)
        self._allowance.took(len(data))
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.recv_into`."""
        self._limit()
        n = self._plain.recv_into(buffer, nbytes, flags)
        self._allowance.took(n)
        return n

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As `socket.sendall`, which has one time limit for the whole call."""
        self._limit()
        self._plain.sendall(data, flags)


class _Limited:
    """Mixin for the connection classes of `redis`."""

    def __init__(self, *args: Any, allowance: Allowance, **kwargs: Any) -> None:
        self._allowance = allowance
        super().__init__(*args, **kwargs)

    def _connect(self) -> _Socket:
        if (left := self._allowance.left) < math.inf:
            self.socket_connect_timeout = left
        return _Socket(super()._connect(), self._allowance)


class LimitedConnection(_Limited, redis.Connection):
    """Over TCP."""


class LimitedTls(_Limited, redis.SSLConnection):
    """Over TLS."""
