"""Servers share chunks: on one host through files, on two through Valkey or Redis; killed, and apart by tenant."""

import json
import os
import signal

import pytest

pytest.importorskip("vllm")

from cacheslide.store import StoreConfig
from cacheslide.store.config import open_persistent
from tests.helpers.annotated import SEPARATOR, joined
from tests.helpers.servers import receipt, running
from tests.helpers.valkey import SERVER
from tests.helpers.valkey import server as valkey
from tests.helpers.waiting import eventually

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.server,
    pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed"),
]
ANNOTATIONS = {"separator": SEPARATOR}


def configuration(folder, cache, port) -> str:
    """A CrossCache file."""
    file = folder / f"{cache.name}.json"
    basic = {"Port": port, "ChunkSize": 32, "PoolSize": 1, "CacheDir": str(cache)}
    workers = {"LoadWorker": 2, "StoreWorker": 1, "CommWorker": 2}
    file.write_text(json.dumps({"Basic": basic, "Request": workers, "Cache": {"LookupMapScale": 512}}))
    return str(file)


def published(file: str, chunks: int) -> None:
    """Wait until so many chunks are on disk and in the server."""

    def there() -> bool:
        persistent = open_persistent(StoreConfig.from_file(file))
        names = list(persistent.file.names())
        return len(names) >= chunks and all(persistent.remote.contains(n) for n in names)

    assert eventually(there, 300)


def test_servers_share_what_one_of_them_built(tmp_path):
    with valkey(tmp_path) as port:
        here = configuration(tmp_path, tmp_path / "here", port)
        with running(tmp_path / "a", "--store", here) as first:
            first.complete(joined(0), ANNOTATIONS)
            _, warm = first.complete(joined(1), ANNOTATIONS)
            chunks = receipt(warm)["chunks"]
            assert receipt(warm)["chunks_hit"] == chunks > 5 and set(receipt(warm)["tiers"]) == {"host"}
            published(here, chunks)
            with running(tmp_path / "b", "--store", here) as second:
                _, found = second.complete(joined(1), ANNOTATIONS)
                assert receipt(found)["tiers"] == {"file": receipt(warm)["tiers"]["host"]}
                assert found["choices"][0]["text"] == warm["choices"][0]["text"]
                for tenant in ({"cache_salt": "key of another"}, {}):
                    _, other = second.complete(
                        joined(1), ANNOTATIONS | ({} if tenant else {"namespace": "other"}), **tenant
                    )
                    assert receipt(other)["chunks_hit"] == 0
                counted = {n.split("{")[0]: v for n, v in second.metrics().items() if 'tier="file"' in n}
                assert counted["cacheslide:store_chunks_total"] == chunks
                assert counted["cacheslide:store_bytes_total"] == receipt(found)["tiers"]["file"]["bytes"]
            os.killpg(first.process.pid, signal.SIGKILL)
            first.process.wait(60)
        with running(tmp_path / "c", "--store", here) as again:
            assert receipt(again.complete(joined(1), ANNOTATIONS)[1])["tiers"]["file"]["chunks"] == chunks
        elsewhere = configuration(tmp_path, tmp_path / "elsewhere", port)
        with running(tmp_path / "d", "--store", elsewhere) as far:
            _, found = far.complete(joined(1), ANNOTATIONS)
            assert receipt(found)["tiers"]["remote"]["chunks"] == chunks
            assert found["choices"][0]["text"] == warm["choices"][0]["text"]
