"""`cacheslide store`: inspects, checks and cleans a chunk store's folder, and starts a server that shares chunks."""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from cacheslide.errors import CacheSlideError, ConfigError, StoreError
from cacheslide.store.config import StoreConfig
from cacheslide.store.files import Files
from cacheslide.store.folder import Folder
from cacheslide.store.persistent.filetier import FileOptions, FileTier, namespace_id
from cacheslide.store.persistent.mooncake import MooncakeOptions
from cacheslide.store.persistent.mooncake_pool import serve as serve_mooncake
from cacheslide.store.slide.spill import spills, stale_spills
from cacheslide.units import GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `store`."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, text in (
        ("stat", _stat, "what the folder holds, by namespace, as JSON"),
        ("ls", _ls, "one line a chunk: namespace, key, bytes, segment"),
        ("verify", _verify, "read every page and check it; exit status 1 when something is damaged"),
        ("gc", _gc, "give back the room of damaged, superseded and unwanted chunks"),
    ):
        p = actions.add_parser(name, help=text)
        p.add_argument("folder", type=Path, help="the store's folder, or its configuration file")
        p.set_defaults(run=run)
        if name in ("ls", "gc"):
            text = "only this tenant's chunks" if name == "ls" else "remove this tenant's chunks"
            p.add_argument("--namespace", help=text)
        if name == "gc":
            p.add_argument("--gib", type=float, help="shrink the folder to at most this size")
    serve = actions.add_parser("serve", help="start Valkey, Redis or Mooncake as the remote tier, from a configuration")
    serve.add_argument("config", type=Path, help="JSON: CrossCache's sections or this store's options")
    serve.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--password-file", type=Path, help="file whose first line is the password clients must give")
    serve.add_argument("--open", action="store_true", help="Mooncake, which has no passwords: allow more than loopback")
    serve.set_defaults(run=_serve)


def _open(where: Path, gib: float | None = None) -> FileTier:
    path, shared = where, False
    if where.is_file():
        config = StoreConfig.from_file(where)
        if not config.path:
            raise StoreError(f"{where} names no folder of chunks (option path)")
        path, shared = Path(config.path), config.shared_folder
    if not (path / "format.json").is_file():
        raise StoreError(f"{path} is not a chunk store (it has no format.json)")
    capacity = int(gib * GIB) if gib is not None else 1 << 60
    return FileTier(FileOptions(path, capacity, segment_bytes=64 << 20, shared=shared, strike=False))


def _spill_folder(tier: FileTier) -> Folder:
    return Folder(Path(tier.options.path) / "spill", Files(), shared=tier.options.shared)


def _ids(namespace: str | None) -> frozenset[bytes] | None:
    """A tenant's ids on disk, for every rank of up to 64; None for all tenants."""
    if namespace is None:
        return None
    return frozenset(namespace_id(namespace, rank, ranks) for ranks in range(1, 65) for rank in range(ranks))


def _stat(args: argparse.Namespace) -> int:
    tier = _open(args.folder)
    spaces = Counter(n[:16].hex() for n in tier.names())
    sizes = Counter()
    for shard in tier.shards:
        for name, place in shard.index.places.items():
            sizes[name[:16].hex()] += place.size
    folder = Path(tier.options.path)
    spill = spills(_spill_folder(tier))
    out = {
        "folder": str(folder),
        "shards": len(tier.shards),
        "chunks": len(tier),
        "bytes": tier.nbytes,
        "superseded_bytes": tier.nbytes - sum(sizes.values()) - sum(4096 * len(s.index.segments) for s in tier.shards),
        "damaged_stretches": sum(s.index.skipped for s in tier.shards),
        "spill_files": len(spill),
        "spill_bytes": sum(spill.values()),
        "namespaces": {n: {"chunks": c, "bytes": sizes[n]} for n, c in sorted(spaces.items())},
    }
    print(json.dumps(out, indent=1))
    return 0


def _ls(args: argparse.Namespace) -> int:
    tier = _open(args.folder)
    wanted = _ids(args.namespace)
    for number, shard in enumerate(tier.shards):
        for name, place in sorted(shard.index.places.items()):
            if wanted is None or name[:16] in wanted:
                print(
                    f"{name[:16].hex()} {name[16:].hex()} {place.size:>12} shard {number:02x} segment {place.segment}"
                )
    return 0


def _verify(args: argparse.Namespace) -> int:
    tier = _open(args.folder)
    good = pages = bad = 0
    for name in list(tier.names()):
        try:
            record = tier.read(name)
        except (StoreError, OSError) as damage:
            bad += 1
            print(f"{name[16:].hex()}: {damage}")
            continue
        if record is not None:
            good += 1
            pages += record[0].layout.pages
    skipped = sum(s.index.skipped for s in tier.shards)
    print(f"{good} chunks ({pages} pages) are sound, {bad} are damaged, {skipped} stretches hold no readable record")
    return 1 if bad or skipped else 0


def _gc(args: argparse.Namespace) -> int:
    tier = _open(args.folder, args.gib)
    unwanted = _ids(args.namespace) or frozenset()
    freed = sum(s.compact(lambda name: name[:16] not in unwanted) for s in tier.shards)
    removed = stale_spills(_spill_folder(tier))
    print(f"gave back {freed} bytes and {removed} spill files of dead processes; {tier.nbytes} bytes remain")
    return 0


def _serve(args: argparse.Namespace) -> int:
    config = StoreConfig.from_file(args.config)
    local = args.bind in ("127.0.0.1", "::1", "localhost")
    if config.remote_engine == "mooncake":
        if args.password_file is not None:
            raise ConfigError("--password-file cannot be used with remote_engine mooncake: it has no passwords")
        if not local and not args.open:
            raise ConfigError(f"Mooncake asks nobody for a password: listening on {args.bind} needs --open")
        if args.bind == "0.0.0.0" or ":" in args.bind:
            raise ConfigError(f"Mooncake cannot listen on {args.bind}: name the IPv4 address that clients reach")
        options = replace(config, remote_host=args.bind, remote_segment_gib=0.0).remote_options
        assert isinstance(options, MooncakeOptions)
        return serve_mooncake(options, args.bind)
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise ConfigError("neither valkey-server nor redis-server is installed: install one of them")
    settings = {
        "bind": args.bind,
        "port": config.remote_port,
        "save": '""',
        "appendonly": "no",
        "maxmemory": f"{int(config.remote_gib * 1152) + 64}mb",  # records plus the server's overhead
        "maxmemory-policy": "noeviction",
    }
    if args.password_file is not None:
        settings["requirepass"] = json.dumps(_password(args.password_file))
    elif not local:
        raise ConfigError(f"listening on {args.bind} needs --password-file: chunks must not be open to the network")
    reading, writing = os.pipe()
    os.write(writing, "\n".join(f"{k} {v}" for k, v in settings.items()).encode())
    os.close(writing)
    os.dup2(reading, 0)
    os.execv(program, [program, "-"])


def _password(path: Path) -> str:
    """The first line of a password file."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if not lines or not lines[0]:
        raise ConfigError(f"{path} is empty: its first line is the password")
    return lines[0]


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m cacheslide.cli.store`."""
    parser = argparse.ArgumentParser(prog="cacheslide")
    add_arguments(parser.add_subparsers(dest="command", required=True).add_parser("store"))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CacheSlideError as error:
        print(f"cacheslide: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
