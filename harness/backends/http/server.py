"""Starts a server on a free local port, waits until it answers, and ends it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError
from harness.backends.http.stream import Endpoint
from harness.backends.in_process import EngineOptions, environment

HOST = "127.0.0.1"
TAIL = 30  # lines of the log in an error


class ServerError(CacheSlideError):
    """A server did not start, or ended by itself."""


def vanilla_command(model: str, prefix_caching: bool, arguments: Sequence[str]) -> list[str]:
    """Command line of vLLM's OpenAI server without the connector."""
    switch = "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, switch, *arguments]


def connector_command(model: str, options: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """Command line of vLLM's server with the connector; `options` are those of `ServerOptions`."""
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "cacheslide.cli.serve", model, *flags, *arguments]


def engine_flags(options: EngineOptions, dtype: str) -> list[str]:
    """vLLM's flags for engine options; the chunk store's options belong to the connector."""
    out = ["--dtype", dtype]
    for name, value in options.arguments().items():
        flag = f"--{name.replace('_', '-')}"
        if value is not False:
            out += [flag] if value is True else [flag, str(value)]
    return out


class Server:
    """A running server: a context manager.

    Parameters
    ----------
    command : list of str
        Its command line, without host and port; see `vanilla_command` and `connector_command`.
    model : str
        The model's name in requests (the folder that the server was started with).
    log : Path
        File of its output.
    device : str
        "cpu" or "cuda".
    eager : bool
        Whether it runs without compilation.
    timeout : float
        Maximum seconds to start.
    """

    def __init__(
        self,
        command: Sequence[str],
        model: str,
        log: str | Path,
        device: str = "cpu",
        eager: bool = False,
        timeout: float = 900.0,
    ) -> None:
        self.log, self.timeout = Path(log), timeout
        self.port = _free_port()
        self.command = [*command, "--host", HOST, "--port", str(self.port)]
        self.endpoint = Endpoint(f"http://{HOST}:{self.port}", model)
        self.environment = {**os.environ, **environment(device, eager)}
        self.environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # meant for engines in this process
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(  # its own session, so that its workers end with it
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _wait(self) -> None:
        until = time.monotonic() + self.timeout
        while time.monotonic() < until:
            if (status := self.process.poll()) is not None:
                raise ServerError(f"the server ended with status {status} before it answered:\n{self.tail()}")
            if _get(self.port, "/health") is not None:
                return
            time.sleep(0.25)
        raise ServerError(f"the server did not answer within {self.timeout:.0f} s:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of the log, for an error message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL:]) or "(its log is empty)"

    def version(self) -> str | None:
        """vLLM's version as reported by the server."""
        body = _get(self.port, "/version")
        return json.loads(body).get("version") if body else None

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process is None:
            return
        for how, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(self.process.pid, how)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            if how is signal.SIGTERM and _group_lives(self.process.pid):
                time.sleep(1)
                continue
            break
        self.process.wait()
        self.process = None


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def page_of(port: int, path: str) -> str | None:
    """The text of a page of the local server at `port`; None without an answer of status 200."""
    body = _get(port, path)
    return None if body is None else body.decode("utf-8", "replace")


def _get(port: int, path: str) -> bytes | None:
    """The body of an answer of status 200, else None. Ignores proxies of the environment."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except OSError:
        return None
    finally:
        connection.close()
    return body if response.status == 200 else None
