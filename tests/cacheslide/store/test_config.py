"""Configurations and the command line of the store."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cacheslide.cli import main
from cacheslide.errors import ConfigError
from cacheslide.store.config import StoreConfig, open_store
from cacheslide.store.persistent.mooncake import MooncakeOptions, why_not
from cacheslide.store.slide.spill import SpillFile
from tests.helpers.chunks import assert_same, chunk, encoded, name, segment_files, tier
from tests.helpers.store_rows import ROW
from tests.helpers.tiered import key
from tests.helpers.valkey import SERVER, free_port
from tests.helpers.waiting import eventually

CROSSCACHE = """{
	"Basic": {
		"Port": 5555,
		"ChunkSize": 256,
		"PoolSize": 4,
		"CacheDir": "/var/log/crosscache"
	},
	"Request": {
		"LoadWorker": 4,
		"StoreWorker": 4,
		"CommWorker": 2
	},
	"Cache": {
		"IOWorker": 4,
		"CopyWorker": 4,
		"LookupMapScale": 4096
	}
}"""


def test_crosscaches_configuration_as_it_stands(tmp_path):
    file = tmp_path / "config.cfg"
    file.write_text(CROSSCACHE)
    c = StoreConfig.from_file(file)
    assert (c.remote_host, c.remote_port, c.chunk_tokens, c.host_gib) == ("127.0.0.1", 5555, 256, 4)
    assert (c.path, c.load_workers, c.store_workers, c.connections) == ("/var/log/crosscache", 4, 4, 2)
    assert (c.shards, c.remote_gib) == (16, 4)
    there = c.with_server({"cache.server.host": "tcp://10.0.0.7", "cache.server.port": 6000, "policy": "cacheslide"})
    assert (there.remote_options.host, there.remote_options.port) == ("10.0.0.7", 6000)
    assert StoreConfig().with_server({"cache.server.port": "5556"}).remote_options.host == "127.0.0.1"


def test_options_of_before_that_nothing_read_are_named_and_left_out(caplog):
    assert StoreConfig.from_dict({"io_workers": 2, "staging_buffers": 3, "host_gib": 1}) == StoreConfig(host_gib=1)
    assert "io_workers, staging_buffers has no effect" in caplog.text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"Cache": {"IOWorker": "x"}}, "Cache.IOWorker must be a number"),
        ({"Basic": {"Prot": 1}}, "unknown key Basic.Prot"),
        ({"Basic": {"Port": "x"}}, "Basic.Port must be a number"),
        ({"Basic": {"CacheDir": 3}}, "must be a path"),
        ({"Basic": {}, "Extra": {}}, "unknown section 'Extra'"),
        ({"hots_gib": 1}, "unknown store option hots_gib"),
        ({"policy": "random"}, "clean-first, lru, fifo"),
        ({"host_gib": "4"}, "must be of type float"),
        ({"direct": 1}, "must be of type bool"),
        ({"shards": True}, "must be of type int"),
        ({"host_gib": 0}, "needs memory"),
        ({"host_gib": -1}, "must not be negative"),
        ({"store_workers": 0}, "at least 1"),
        ({"remote_port": 70000}, "remote_port"),
        ([], "JSON object"),
    ],
)
def test_wrong_settings_say_so(raw, message):
    with pytest.raises(ConfigError, match=message):
        StoreConfig.from_dict(raw)


def test_wrong_server_options_say_so(tmp_path):
    for host in ("tcp://", "http://a/b", "user@host"):
        with pytest.raises(ConfigError, match=r"cache\.server\.host"):
            StoreConfig().with_server({"cache.server.host": host})
    with pytest.raises(ConfigError, match=r"cache\.server\.port"):
        StoreConfig().with_server({"cache.server.port": "five"})
    with pytest.raises(ConfigError, match="not valid JSON"):
        (tmp_path / "c").write_text("{")
        StoreConfig.from_file(tmp_path / "c")
    with pytest.raises(ConfigError, match="cannot read"):
        StoreConfig.from_file(tmp_path / "none")


def test_a_configured_store_works_and_shares_its_folder(tmp_path):
    raw = {"path": str(tmp_path / "s"), "host_gib": 0.001, "file_gib": 0.01, "spill_gib": 0.01, "page_tokens": 8,
           "shards": 2, "device_gib": 0.0005}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(raw))
    first = open_store(tmp_path / "c.json", ROW)
    for i in range(30):
        first.put(key(i), chunk(i))
        first.correct(key(i), "o", 1, torch.arange(40), *torch.ones(2, 40, 2, 8))
    assert first.flush(20)
    second = open_store(raw, ROW)
    stranger = open_store(raw, ROW, namespace="stranger")
    assert all(second.fetch(key(i)).tier == "file" for i in range(5))
    assert all(second.tier_of(key(i)) == "device" for i in range(5))
    for i in range(30):
        assert_same(second.get(key(i)), chunk(i))
        assert (first.get(key(i), "o").k[1] == 1).all()
        assert stranger.get(key(i)) is None
    ranks = [open_store(raw, ROW, rank=r, ranks=2) for r in range(2)]
    assert ranks[0].get(key(1)) is None  # a rank's heads are not the whole model's
    ranks[0].put(key(1), chunk(70))
    ranks[1].put(key(1), chunk(71))
    assert all(s.flush(20) for s in ranks)
    assert_same(open_store(raw, ROW, rank=1, ranks=2).get(key(1)), chunk(71))
    assert_same(first.get(key(1)), chunk(1))
    for s in ranks:
        s.close()
    assert all(a.nbytes <= a.capacity for s in (first, second) for a in s.arenas)
    assert all(s.close() for s in (first, second, stranger))


@pytest.fixture
def folder(tmp_path):
    store = tier(tmp_path / "s", shards=2)
    store.write([encoded(i) for i in range(6)])
    return tmp_path / "s"


def ask(capsys, *args) -> tuple[int, str]:
    status = main(["store", *map(str, args)])
    done = capsys.readouterr()
    return status, done.out + done.err


def test_stat_and_ls(folder, capsys):
    status, out = ask(capsys, "stat", folder)
    seen = json.loads(out)
    assert status == 0 and seen["chunks"] == 6 and seen["bytes"] == tier(folder).nbytes
    assert [n["chunks"] for n in seen["namespaces"].values()] == [6] and seen["superseded_bytes"] == 0
    status, out = ask(capsys, "ls", folder)
    assert status == 0 and len(out.splitlines()) == 6 and name(3)[16:].hex() in out
    assert ask(capsys, "ls", folder, "--namespace", "other") == (0, "")
    status, out = ask(capsys, "stat", folder.parent)
    assert status == 2 and "not a chunk store" in out


def test_verify_and_gc(folder, capsys):
    assert ask(capsys, "verify", folder)[0] == 0
    file = segment_files(folder)[0]
    raw = bytearray(file.read_bytes())
    raw[-5000] ^= 4
    file.write_bytes(raw)
    status, out = ask(capsys, "verify", folder)
    assert status == 1 and "1 are damaged" in out
    dead = SpillFile(folder / "spill", 1 << 20, 4096, tier(folder).files)
    dead.write(torch.ones(3, 4096, dtype=torch.uint8))
    out = ask(capsys, "gc", folder)[1]
    assert "0 spill files" in out and "gave back 0 bytes" not in out  # the spill file's owner lives
    dead.files.close(dead._fd)
    dead._fd = None
    status, out = ask(capsys, "gc", folder)
    assert status == 0 and "gave back 0 bytes" in out and "1 spill files" in out
    status, out = ask(capsys, "verify", folder)
    assert status == 0 and "5 chunks" in out and "0 are damaged" in out
    assert ask(capsys, "gc", folder, "--namespace", "")[0] == 0
    assert json.loads(ask(capsys, "stat", folder)[1])["chunks"] == 0


@pytest.mark.slow
@pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed")
def test_serve_starts_a_server_that_clients_can_use(tmp_path):
    redis = pytest.importorskip("redis")
    port, config, password = free_port(), tmp_path / "c.json", tmp_path / "password"
    config.write_text(json.dumps({"Basic": {"Port": port, "PoolSize": 1}}))
    password.write_text("letmein\n")
    command = [sys.executable, "-m", "cacheslide.cli.store", "store", "serve", str(config)]
    refused = subprocess.run([*command, "--bind", "0.0.0.0"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "--password-file" in refused.stderr
    server = subprocess.Popen([*command, "--password-file", str(password)], stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        client = redis.Redis(port=port, password="letmein")

        def settled() -> bool:
            try:
                return client.ping()
            except redis.exceptions.ConnectionError:
                return server.poll() is not None

        assert eventually(settled, 300) and server.poll() is None
        assert client.config_get("maxmemory")["maxmemory"] == str((1152 + 64) << 20)
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(port=port).ping()
    finally:
        server.terminate()
        server.wait(60)


def test_every_option_is_documented_and_no_other():
    table = Path("docs/store.md").read_text().split("\n## Configuration\n")[1].split("\nCrossCache")[0]
    named = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `")))
    assert sorted(named) == sorted(f.name for f in fields(StoreConfig))


def test_what_is_wrong_with_the_files_of_a_command_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: "/bin/false")
    config, empty = tmp_path / "c.json", tmp_path / "empty"
    config.write_text('{"remote_port": 6400}')
    empty.write_text("")
    for said, *args in (
        ("names no folder of chunks", "stat", str(config)),
        (f"{empty} is not valid JSON", "stat", str(empty)),
        ("cannot read", "serve", str(config), "--password-file", str(tmp_path / "none")),
        ("its first line is the password", "serve", str(config), "--password-file", str(empty)),
    ):
        assert main(["store", *args]) == 2 and said in capsys.readouterr().err


def test_a_library_that_mooncake_misses_is_not_taken_for_its_package():
    said = why_not("libibverbs.so.1: cannot open shared object file: No such file or directory")
    assert "libibverbs1" in said and "pip install" not in said
    assert "pip install" in why_not("libcuda.so.1: cannot open shared object file: No such file or directory")
    assert "pip install 'cacheslide[mooncake]'" in why_not("No module named 'mooncake'")
    assert "its helper process ended" in why_not("")


def test_too_little_memory_for_mooncake_is_refused():
    with pytest.raises(ConfigError, match="at least 16777216 bytes"):
        MooncakeOptions(segment=1 << 20)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"remote_engine": "memcached"}, "choose valkey, mooncake"),
        ({"remote_engine": "mooncake", "remote_tls": True}, "remote_tls cannot be used .* no users, passwords or TLS"),
        ({"remote_engine": "mooncake", "remote_password_file": "x"}, "remote_password_file cannot be used"),
        ({"remote_segment_gib": 1.0}, "remote_segment_gib cannot be used with remote_engine valkey"),
        ({"remote_protocol": "rdma"}, "option of remote_engine mooncake"),
        ({"remote_engine": "mooncake", "remote_protocol": "udp"}, "choose tcp, rdma"),
        ({"remote_engine": "mooncake", "remote_devices": "mlx5_0"}, "set remote_protocol to rdma"),
        ({"remote_engine": "mooncake", "remote_metadata_server": ""}, "P2PHANDSHAKE"),
        ({"remote_engine": "mooncake", "remote_metrics_port": 0}, "remote_metrics_port must lie in 1 to 65535"),
    ],
)
def test_wrong_settings_of_a_remote_tier_say_so(raw, message):
    with pytest.raises(ConfigError, match=message):
        StoreConfig.from_dict(raw)
