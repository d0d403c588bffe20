"""Settings of a store's remote tier, their validation, and the choice of its engine."""

from dataclasses import dataclass
from pathlib import Path

from cacheslide.errors import ConfigError
from cacheslide.store.persistent.mooncake import MooncakeOptions, MooncakeTier
from cacheslide.store.persistent.remote import RemoteOptions, ValkeyTier
from cacheslide.store.persistent.tiers import RemoteTier
from cacheslide.units import GIB

ENGINES = ("valkey", "mooncake")
PROTOCOLS = ("tcp", "rdma")
# Configuration fields that apply to one engine only.
_VALKEY_ONLY = "remote_username remote_password_file remote_tls remote_ca_file remote_cert_file remote_key_file".split()
_MOONCAKE_ONLY = "remote_segment_gib remote_metrics_port remote_metadata_server remote_protocol remote_devices".split()


@dataclass(frozen=True)
class RemoteSettings:
    """Settings of the remote tier, under the names of a store's configuration.

    Attributes
    ----------
    remote_engine : str
        "valkey" (also Redis) or "mooncake".
    remote_host : str
        Empty: no remote tier. Other fields: see `RemoteOptions` and `MooncakeOptions`; the password is read from a
        file.
    remote_gib : float
        Capacity in GiB, shared by all processes.
    remote_segment_gib : float
        Memory in GiB that every process which opens the store adds to Mooncake's pool.
    connections : int
        Maximum connections to the server.
    """

    remote_engine: str = "valkey"
    remote_host: str = ""
    remote_port: int = 6379
    remote_gib: float = 16.0
    remote_username: str = ""
    remote_password_file: str = ""
    remote_tls: bool = False
    remote_ca_file: str = ""
    remote_cert_file: str = ""
    remote_key_file: str = ""
    remote_timeout_s: float = 2.0
    remote_segment_gib: float = 0.0
    remote_metrics_port: int = 9003
    remote_metadata_server: str = "P2PHANDSHAKE"
    remote_protocol: str = "tcp"
    remote_devices: str = ""
    connections: int = 8


def check_remote(config: RemoteSettings) -> None:
    """Raise ConfigError for contradictory settings of the remote tier."""
    if config.remote_engine not in ENGINES:
        raise ConfigError(f"unknown remote_engine {config.remote_engine!r}: choose {', '.join(ENGINES)}")
    for name in ("remote_port", "remote_metrics_port"):
        if not 0 < getattr(config, name) < 65536:
            raise ConfigError(f"{name} must lie in 1 to 65535, not {getattr(config, name)}")
    mooncake = config.remote_engine == "mooncake"
    for name in _VALKEY_ONLY if mooncake else _MOONCAKE_ONLY:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            why = "Mooncake has no users, passwords or TLS" if mooncake else "it is an option of remote_engine mooncake"
            raise ConfigError(f"{name} cannot be used with remote_engine {config.remote_engine}: {why}")
    if config.remote_protocol not in PROTOCOLS:
        raise ConfigError(f"unknown remote_protocol {config.remote_protocol!r}: choose {', '.join(PROTOCOLS)}")
    if not config.remote_metadata_server:
        raise ConfigError("remote_metadata_server must be an address, or P2PHANDSHAKE for none")
    if config.remote_devices and config.remote_protocol == "tcp":
        raise ConfigError("remote_devices names RDMA devices: set remote_protocol to rdma")


def remote_options(config: RemoteSettings) -> RemoteOptions | MooncakeOptions | None:
    """Settings of the remote tier; None without one."""
    if not config.remote_host:
        return None
    common = {
        "host": config.remote_host,
        "port": config.remote_port,
        "capacity": int(config.remote_gib * GIB),
        "timeout_s": config.remote_timeout_s,
        "connections": config.connections,
    }
    if config.remote_engine == "mooncake":
        return MooncakeOptions(
            **common,
            metrics_port=config.remote_metrics_port,
            segment=int(config.remote_segment_gib * GIB),
            metadata_server=config.remote_metadata_server,
            protocol=config.remote_protocol,
            devices=config.remote_devices,
        )
    password = None
    if config.remote_password_file:
        try:
            password = Path(config.remote_password_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read {config.remote_password_file}: {error.strerror}") from None
    return RemoteOptions(
        **common,
        username=config.remote_username or None,
        password=password,
        tls=config.remote_tls,
        ca_file=config.remote_ca_file or None,
        cert_file=config.remote_cert_file or None,
        key_file=config.remote_key_file or None,
    )


def open_remote(config: RemoteSettings) -> RemoteTier | None:
    """The remote tier of a configuration; None without one; StoreError if its package is missing."""
    options = remote_options(config)
    if options is None:
        return None
    return MooncakeTier(options) if isinstance(options, MooncakeOptions) else ValkeyTier(options)
