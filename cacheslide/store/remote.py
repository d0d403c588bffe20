"""The remote tier on Valkey or Redis: whole records under their names, capacity kept by the server for all clients.

The client library is `redis` (install `cacheslide[remote]`). All commands have a time limit and are not retried: the
store's breaker decides when to ask again. Order is kept by a counter on the server, not by clocks.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.files import aligned_buffer
from cacheslide.store.record import Encoded, Head, NoRoom, decode, to_bytes

_SALT = bytes(16)
# Sizes are kept beside the values, so that a value the server dropped by itself is still taken off the account.
_PUT = """
local size, capacity = #ARGV[1], tonumber(ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, 0} end
if size > capacity then return redis.error_reply('TOOLARGE') end
local used, gone = tonumber(redis.call('GET', KEYS[2]) or '0'), 0
local stale = redis.call('HGET', KEYS[4], KEYS[1])
if stale then used = used - tonumber(stale) end
while used + size > capacity do
  local oldest = redis.call('ZPOPMIN', KEYS[3])
  if #oldest == 0 then used = 0 break end
  if oldest[1] ~= KEYS[1] then
    used = used - tonumber(redis.call('HGET', KEYS[4], oldest[1]) or '0')
    redis.call('HDEL', KEYS[4], oldest[1])
    redis.call('DEL', oldest[1])
    gone = gone + 1
  end
end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[5]), KEYS[1])
redis.call('HSET', KEYS[4], KEYS[1], size)
redis.call('SET', KEYS[2], used + size)
return {size, gone}
"""
_GET = """
local value = redis.call('GET', KEYS[1])
if value then redis.call('ZADD', KEYS[2], 'XX', redis.call('INCR', KEYS[3]), KEYS[1]) end
return value
"""


@dataclass(frozen=True)
class RemoteOptions:
    """Where the server is and how to talk to it.

    `capacity` in bytes holds for all clients together (bytes of records; the server's own overhead comes on top).
    `timeout_s` limits every command. With `tls`, `ca_file` verifies the server and `cert_file`/`key_file` identify the
    client; `tls_verify=False` is for tests with self-signed certificates only.
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
    """A `RemoteTier` on one Valkey or Redis server (all keys share a hash tag, so a cluster keeps them on one node)."""

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
        pool = redis.BlockingConnectionPool(
            max_connections=options.connections,
            timeout=options.timeout_s,
            connection_class=redis.SSLConnection if options.tls else redis.Connection,
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
        self._put = self._client.register_script(_PUT)
        self._get = self._client.register_script(_GET)
        tag = f"{options.prefix}:{{v1}}"
        self._used, self._order, self._sizes, self._clock = (f"{tag}:{x}" for x in ("used", "order", "sizes", "clock"))
        self._tag = tag

    def _key(self, name: bytes) -> str:
        return f"{self._tag}:chunk:{name[:16].hex()}:{name[16:].hex()}"

    def _ask(self, command, *args, **kwargs):
        """Run a command; OSError when the server cannot be reached in time, StoreError when it refuses."""
        try:
            return command(*args, **kwargs)
        except (self._errors.AuthenticationError, self._errors.NoPermissionError) as refused:
            raise StoreError(f"the server at {self._where} refuses this user: {refused}") from None
        except (self._errors.ConnectionError, self._errors.TimeoutError) as gone:
            raise OSError(f"the server at {self._where} does not answer: {gone}") from None
        except self._errors.RedisError as wrong:
            if "TOOLARGE" in str(wrong):
                raise NoRoom(f"a record is larger than the remote tier's {self.options.capacity} bytes") from None
            raise StoreError(f"the server at {self._where} cannot do this: {wrong}") from None

    @property
    def _where(self) -> str:
        return f"{self.options.host}:{self.options.port}"

    def ping(self) -> None:
        """OSError or StoreError unless the server can be used."""
        self._ask(self._client.ping)

    def contains(self, name: bytes) -> bool:
        """See `RemoteTier`."""
        return bool(self._ask(self._client.exists, self._key(name)))

    def read(self, name: bytes) -> tuple[Head, Tensor] | None:
        """See `RemoteTier`. A record that does not verify is removed."""
        raw = self._ask(self._get, keys=[self._key(name), self._order, self._clock])
        if raw is None:
            return None
        buffer = aligned_buffer(len(raw))
        buffer[:] = raw
        try:
            return decode(buffer, name, _SALT, 0)
        except StoreError:
            self._ask(self._client.delete, self._key(name))
            raise

    def write(self, record: Encoded) -> int:
        """See `RemoteTier`. The least recently used records of all tenants make room."""
        keys = [self._key(record.name), self._used, self._order, self._sizes, self._clock]
        sent, _ = self._ask(self._put, keys=keys, args=[bytes(to_bytes(record)), self.options.capacity])
        return int(sent)

    @property
    def nbytes(self) -> int:
        """See `RemoteTier`."""
        return int(self._ask(self._client.get, self._used) or 0)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
