"""The remote tier on Valkey or Redis: whole records under their names, capacity kept by the server for all clients.

The client library is `redis` (install `cacheslide[remote]`). All commands have a time limit for the whole answer and
are not retried: the store's breaker decides when to try again. Order is kept by a counter on the server, not by clocks.
All answers of the server are checked.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.files import aligned_buffer
from cacheslide.store.persistent.record import PREAMBLE_BYTES, Accept, Encoded, Head, NoRoom, anything, decode, to_bytes
from cacheslide.store.persistent.remote_scripts import SCRIPTS
from cacheslide.store.strict import is_count

_SALT = bytes(16)
_REPLY = 1 << 20  # bytes of an answer beside the record


@dataclass(frozen=True)
class RemoteOptions:
    """Address and settings of the server.

    `capacity` in bytes is shared by all clients (bytes of records; the server's overhead comes on top). `timeout_s`
    limits every command. With `tls`, `ca_file` verifies the server and `cert_file`/`key_file` identify the client;
    `tls_verify=False` is for tests with self-signed certificates only.
    """

    host: str = "127.0.0.1"
    port: int = 6379
    capacity: int = 4 << 30
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_verify: bool = True
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    timeout_s: float = 2.0
    connections: int = 8
    prefix: str = "cacheslide"


class ValkeyTier:
    """A `RemoteTier` on one Valkey or Redis server (all keys have one hash tag, so a cluster has them on one node)."""

    def __init__(self, options: RemoteOptions) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise StoreError("the remote tier needs the package `redis`: pip install 'cacheslide[remote]'") from None
        self.options, self._errors = options, redis.exceptions
        tls: dict[str, Any] = {}
        if options.tls:
            tls = {"ssl_cert_reqs": "required" if options.tls_verify else "none"}
            tls |= {"ssl_ca_certs": options.ca_file, "ssl_certfile": options.cert_file, "ssl_keyfile": options.key_file}
            tls |= {} if options.tls_verify else {"ssl_check_hostname": False}
        from cacheslide.store.persistent.deadline import Allowance, LimitedConnection, LimitedTls

        self._allowance = Allowance()
        pool = redis.BlockingConnectionPool(
            max_connections=options.connections,
            timeout=options.timeout_s,
            connection_class=LimitedTls if options.tls else LimitedConnection,
            allowance=self._allowance,
            host=options.host,
            port=options.port,
            db=options.db,
            username=options.username,
            password=options.password,
            socket_timeout=options.timeout_s,
            socket_connect_timeout=options.timeout_s,
            retry=Retry(NoBackoff(), 0),
            **tls,
        )
        self._client = redis.Redis(connection_pool=pool)
        self._put, self._get, self._drop, self._sum = (self._client.register_script(s) for s in SCRIPTS)
        self._tag = f"{options.prefix}:{{v1}}"
        self._counters = [f"{self._tag}:{x}" for x in ("used", "order", "sizes", "clock")]
        self._walk = b"0"  # cursor of the scan over the server's keys for records missing in the counters

    def _key(self, name: bytes) -> str:
        return f"{self._tag}:chunk:{name[:16].hex()}:{name[16:].hex()}"

    def _ask(self, command, *args, room: int = _REPLY, **kwargs):
        """Run a command; OSError if the server cannot be reached in time, StoreError for refusals and invalid answers.

        The time limit covers the whole command, `room` bytes all answers.
        """
        try:
            with self._allowance.request(self.options.timeout_s, room):
                return command(*args, **kwargs)
        except (self._errors.AuthenticationError, self._errors.NoPermissionError) as refused:
            raise StoreError(f"the server at {self._where} refuses this user: {_line(refused)}") from None
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as gone:
            raise OSError(f"the server at {self._where} does not answer: {_line(gone)}") from None
        except self._errors.RedisError as wrong:
            if "TOOLARGE" in str(wrong):
                raise NoRoom(f"a record is larger than the remote tier's {self.options.capacity} bytes") from None
            raise StoreError(f"the server at {self._where} cannot do this: {_line(wrong)}") from None
        except Exception as nonsense:  # the client library may raise any exception on an invalid answer
            raise self._nonsense(type(nonsense).__name__) from None

    def _nonsense(self, answer: Any) -> StoreError:
        return StoreError(f"the server at {self._where} answers nonsense: {_line(answer)}")

    def _script(self, script, name: bytes, *args, room: int = _REPLY):
        return self._ask(script, keys=[*self._counters, self._key(name)], args=args, room=room)

    @property
    def _where(self) -> str:
        return f"{self.options.host}:{self.options.port}"

    def ping(self) -> None:
        """Raise OSError or StoreError unless the server can be used."""
        if self._ask(self._client.ping) is not True:
            raise self._nonsense("not a PONG")

    def contains(self, name: bytes) -> bool:
        """See `RemoteTier`."""
        answer = self._ask(self._client.exists, self._key(name))
        if not is_count(answer, 0, 1):
            raise self._nonsense(repr(answer))
        return bool(answer)

    def read(self, name: bytes, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """See `RemoteTier`. A record that does not verify or is not accepted is removed."""
        most = min(accept.most, self.options.capacity)
        raw = self._script(self._get, name, most, room=most + _REPLY)
        if raw is None:
            return None
        if not isinstance(raw, bytes):
            raise self._nonsense(repr(raw))
        buffer = aligned_buffer(len(raw))
        buffer[:] = raw
        try:
            return decode(buffer, name, _SALT, 0, accept)
        except StoreError:
            self._remove(name, raw[:PREAMBLE_BYTES])
            raise

    def _remove(self, name: bytes, begins: bytes) -> None:
        """Remove the record that was read, if it is unchanged on the server; StoreError for an invalid answer."""
        if begins and not is_count(gone := self._script(self._drop, name, begins), 0, 1):
            raise self._nonsense(repr(gone))

    def write(self, record: Encoded) -> int:
        """See `RemoteTier`. Evicts the least recently used records of all tenants."""
        reply = self._script(self._put, record.name, bytes(to_bytes(record)), self.options.capacity, self._walk)
        fits = (
            isinstance(reply, list) and len(reply) == 3 and reply[0] in (0, record.size) and isinstance(reply[2], bytes)
        )
        if not fits or not reply[2].isdigit() or len(reply[2]) > 20:
            raise self._nonsense(repr(reply))
        self._walk = reply[2]
        return reply[0]

    @property
    def nbytes(self) -> int:
        """See `RemoteTier`."""
        if not is_count(total := self._script(self._sum, bytes(36))):
            raise self._nonsense(repr(total))
        return total

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _line(value: Any) -> str:
    """An exception or an answer as one line of at most 200 characters."""
    return " ".join(str(value)[:200].split())
