"""Store configurations (this project's JSON, CrossCache's, the connector's options), and opening the store."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, StoreError
from cacheslide.store.base import MAX_GENERATION
from cacheslide.store.files import Files
from cacheslide.store.folder import Foreign
from cacheslide.store.persistent.filetier import FileOptions, FileTier
from cacheslide.store.persistent.mooncake import MooncakeOptions
from cacheslide.store.persistent.remote import RemoteOptions
from cacheslide.store.persistent.remotes import RemoteSettings, check_remote, open_remote, remote_options
from cacheslide.store.persistent.shape import ChunkShape
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.eviction import POLICIES
from cacheslide.store.slide.spill import SpillFile
from cacheslide.store.slide.tiered import TieredChunkStore
from cacheslide.units import GIB, MIB

_MOST = 10**9  # limit of any number in a configuration
logger = logging.getLogger("cacheslide.store")
RETIRED = ("io_workers", "staging_buffers")  # former options without effect
# CrossCache's configuration: section -> key -> field here (or None) and conversion of its value.
CROSSCACHE = {
    "Basic": {
        "Port": ("remote_port", int),
        "ChunkSize": ("chunk_tokens", int),
        "PoolSize": ("host_gib", float),
        "CacheDir": ("path", str),
    },
    "Request": {
        "LoadWorker": ("load_workers", int),
        "StoreWorker": ("store_workers", int),
        "CommWorker": ("connections", int),
    },
    "Cache": {
        "IOWorker": (None, int),
        "CopyWorker": (None, int),
        "LookupMapScale": ("shards", lambda scale: max(1, min(256, int(scale) // 256))),
    },
}


@dataclass(frozen=True)
class StoreConfig(RemoteSettings):
    """Settings of a tiered store. Sizes in GiB or MiB by their names; tiers of size 0 do not exist.

    Settings of the remote tier are in `RemoteSettings`.

    Attributes
    ----------
    chunk_tokens : int
        Maximum tokens of a chunk, for the engine that cuts prompts; the store accepts any.
    page_tokens : int
        Tokens per page.
    policy : str
        Eviction order of the memory tiers: "clean-first", "lru" or "fifo".
    write_back : str
        "through" or "evict", see `TieredChunkStore`.
    device_gib, host_gib, file_gib, spill_gib, remote_gib : float
        Capacities. The file, spill and remote capacities are shared by all processes.
    path : str
        Folder of the file tier; without it there is no file tier and no spill file.
    shards : int
        Writer locks of a newly created folder.
    direct, durable : bool
        See `Shard`.
    shared_folder : bool
        Accept a folder that others may write to, or that belongs to another user.
    store_workers, load_workers : int
        Threads for write-back, and threads that read chunks for a server.
    """

    chunk_tokens: int = 1024
    page_tokens: int = 16
    policy: str = "clean-first"
    write_back: str = "through"
    device_gib: float = 0.0
    host_gib: float = 4.0
    path: str = ""
    file_gib: float = 32.0
    spill_gib: float = 8.0
    shards: int = 16
    segment_mib: int = 64
    direct: bool = True
    durable: bool = True
    shared_folder: bool = False
    lock_timeout_s: float = 10.0
    queue_mib: int = 256
    stall_limit_s: float = 10.0
    store_workers: int = 1
    load_workers: int = 4
    max_generation: int = MAX_GENERATION

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or isinstance(value, bool) != (kind is bool):
                raise ConfigError(f"store option {f.name} must be of type {kind.__name__}, not {value!r}")
            if kind in (int, float) and not 0 <= value <= _MOST:
                least = "must not be negative" if value < 0 else f"must be a number of at most {_MOST}"
                raise ConfigError(f"store option {f.name} {least}, but is {str(value)[:20]}")
            if kind is str and not value.isprintable():
                raise ConfigError(f"store option {f.name} must be one printable line, not {value!r}")
        counts = "chunk_tokens page_tokens segment_mib queue_mib store_workers load_workers"
        for name in (*counts.split(), "connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"store option {name} must be at least 1")
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown eviction policy {self.policy!r}: choose {', '.join(POLICIES)}")
        if self.write_back not in ("through", "evict"):
            raise ConfigError(f"write_back must be 'through' or 'evict', not {self.write_back!r}")
        if not 1 <= self.shards <= 256:
            raise ConfigError(f"shards must lie in 1 to 256, not {self.shards}")
        check_remote(self)
        if not self.device_gib and not self.host_gib:
            raise ConfigError("device_gib and host_gib are both 0: a store needs memory for pages")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "StoreConfig":
        """From parsed JSON: CrossCache's sections, or the fields of this class. ConfigError for unknown keys."""
        if not isinstance(raw, Mapping):
            raise ConfigError("a store configuration is a JSON object of options")
        if set(raw) & set(CROSSCACHE):
            return cls(**_from_crosscache(raw))
        if old := sorted(set(raw) & set(RETIRED)):
            logger.warning("store option %s has no effect: nothing reads it", ", ".join(old))
            raw = {name: value for name, value in raw.items() if name not in RETIRED}
        unknown = sorted(set(raw) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown store option {', '.join(unknown)}")
        return cls(**raw)

    @classmethod
    def from_file(cls, path: str | Path) -> "StoreConfig":
        """From a JSON file."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        try:
            return cls.from_dict(raw)
        except ConfigError as wrong:
            raise ConfigError(f"{path}: {wrong}") from None

    def with_server(self, extra: Mapping[str, Any]) -> "StoreConfig":
        """With CrossCache's connector options: `cache.server.host` ("tcp://…" or bare) and `cache.server.port`."""
        changes: dict[str, Any] = {}
        if "cache.server.host" in extra:
            host = str(extra["cache.server.host"]).removeprefix("tcp://").rstrip("/")
            if not host or "/" in host or "@" in host:
                raise ConfigError(f"cache.server.host must be a host or tcp://host, not {extra['cache.server.host']!r}")
            changes["remote_host"] = host
        if "cache.server.port" in extra:
            try:
                changes["remote_port"] = int(extra["cache.server.port"])
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(
                    f"cache.server.port must be a number, not {str(extra['cache.server.port'])[:60]!r}"
                ) from None
            changes.setdefault("remote_host", self.remote_host or "127.0.0.1")
        return replace(self, **changes)

    @property
    def file_options(self) -> FileOptions | None:
        """Settings of the file tier; None without one."""
        if not self.path or not self.file_gib:
            return None
        return FileOptions(
            Path(self.path),
            int(self.file_gib * GIB),
            self.shards,
            self.segment_mib * MIB,
            self.lock_timeout_s,
            self.direct,
            self.durable,
            self.shared_folder,
        )

    @property
    def remote_options(self) -> RemoteOptions | MooncakeOptions | None:
        """Settings of the remote tier; None without one."""
        return remote_options(self)


def _from_crosscache(raw: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for section, content in raw.items():
        known = CROSSCACHE.get(section)
        if known is None or not isinstance(content, Mapping):
            raise ConfigError(f"unknown section {section!r} (CrossCache's are {', '.join(CROSSCACHE)})")
        for key, value in content.items():
            if key not in known:
                raise ConfigError(f"unknown key {section}.{key} (known: {', '.join(known)})")
            name, turn = known[key]
            if isinstance(value, bool) or not isinstance(value, str if turn is str else int | float):
                raise ConfigError(f"{section}.{key} must be {'a path' if turn is str else 'a number'}, not {value!r}")
            try:
                value = turn(value)
            except (OverflowError, ValueError):
                raise ConfigError(f"{section}.{key} must be a finite number, not {value!r}") from None
            if name is not None:
                out[name] = value
    if "remote_port" in out:
        out["remote_host"] = "127.0.0.1"
    if "host_gib" in out:  # the pool is also the server's
        out["remote_gib"] = out["host_gib"]
    return out


def open_persistent(
    config: StoreConfig, stats: TieredStats | None = None, files: Files | None = None
) -> PersistentTiers:
    """The file and remote tiers of a configuration, without memory above them: sufficient to look chunks up."""
    options = config.file_options
    return PersistentTiers(
        None if options is None else FileTier(options, files or Files()),
        open_remote(config),
        stats or TieredStats(),
    )


def open_store(
    config: StoreConfig | str | Path | Mapping[str, Any],
    row_bytes: int,
    *,
    namespace: str = "",
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
    files: Files | None = None,
    shape: ChunkShape | None = None,
) -> TieredChunkStore:
    """Open the store of a configuration.

    Parameters
    ----------
    config : StoreConfig, path of a JSON file, or parsed JSON
    row_bytes : int
        Bytes of one token's K and V in one layer: 2 · kv_heads · head_dim · bytes an element, of this rank.
    namespace : str
        The tenant's namespace.
    rank, ranks : int
        This worker's rank under tensor parallelism, and the number of ranks.
    device : str
        Device of the device tier, for example "cuda:0".
    shape : ChunkShape, optional
        Shape of the model's chunks: records of another shape are misses. Without it only `row_bytes` is checked.
    """
    if not isinstance(config, StoreConfig):
        config = StoreConfig.from_file(config) if isinstance(config, str | Path) else StoreConfig.from_dict(config)
    page_bytes = config.page_tokens * row_bytes
    if page_bytes < 1:
        raise StoreError(f"row_bytes must be at least 1, not {row_bytes}")
    sizes = {"device": int(config.device_gib * GIB), "host": int(config.host_gib * GIB)}
    where = {"device": device, "host": "cpu"}
    memory = {t: Arena(t, n, page_bytes, where[t], config.policy) for t, n in sizes.items() if n}
    files = files or Files()
    persistent, spill = open_persistent(config, files=files), None
    if persistent.file is not None and config.spill_gib:
        try:
            spill = SpillFile(
                Path(config.path) / "spill",
                int(config.spill_gib * GIB),
                page_bytes,
                files,
                direct=config.direct,
                shared=config.shared_folder,
            )
        except Foreign as wrong:
            logger.warning("CacheSlide's store keeps corrected pages in memory only: %s", wrong)
    return TieredChunkStore(
        config.page_tokens,
        page_bytes,
        **memory,
        file=persistent.file,
        remote=persistent.remote,
        spill=spill,
        namespace=namespace,
        rank=rank,
        ranks=ranks,
        write_back=config.write_back,
        queue_bytes=config.queue_mib * MIB,
        batch_bytes=max(MIB, config.queue_mib * MIB // 8),
        stall_limit_s=config.stall_limit_s,
        workers=config.store_workers,
        max_generation=config.max_generation,
        shape=shape,
    )
