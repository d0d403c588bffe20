"""GPU memory of a server by pages: the blocks of its paged KV cache in use, polled from /metrics beside a load."""

import re
import threading
from collections.abc import Callable
from typing import Any

from harness.backends.http.server import page_of

EVERY_S = 0.1
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? ([0-9.e+-]+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
USAGE, CACHE = "vllm:kv_cache_usage_perc", "vllm:cache_config_info"


def parse(text: str) -> dict[str, Any]:
    """Share of blocks in use, their number and size in tokens, from Prometheus' text format; None for what it lacks."""
    out: dict[str, Any] = {"used": None, "blocks": None, "block_tokens": None}
    for line in text.splitlines():
        if not (match := _SAMPLE.match(line)):
            continue
        name, labels, value = match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])
        if name == USAGE:
            out["used"] = value
        elif name == CACHE:
            sizes = {key: labels.get(key, "") for key in ("num_gpu_blocks", "block_size")}
            blocks, tokens = (int(x) if x.isdigit() else None for x in sizes.values())
            out |= {"blocks": blocks, "block_tokens": tokens}
    return out


class Pages:
    """Polls a server while it is entered; `reading` holds the largest share in use, None without an answer."""

    def __init__(self, read: Callable[[], str | None], every: float = EVERY_S) -> None:
        self.read, self.every = read, every
        self.reading: dict[str, Any] | None = None
        self._ended, self._thread = threading.Event(), None

    @classmethod
    def of(cls, port: int) -> "Pages":
        """Of the local server at `port`."""
        return cls(lambda: page_of(port, "/metrics"))

    def __enter__(self) -> "Pages":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        self._take()
        while not self._ended.wait(self.every):
            self._take()

    def _take(self) -> None:
        if (text := self.read()) is None:
            return
        new, old = parse(text), self.reading
        if old is not None:
            new["used"] = max((x for x in (old["used"], new["used"]) if x is not None), default=None)
        self.reading = new
