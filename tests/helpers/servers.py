"""A running `cacheslide serve`, and the receipts in its answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm")
from tests.helpers.annotated import MODEL
from tests.helpers.vllm_variables import VLLM_ENVIRONMENT

START = 600  # seconds: two processes import vLLM and load a model


class Server:
    """A client of the running server."""

    def __init__(self, port: int, process: subprocess.Popen) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, **body) -> tuple[int, dict]:
        """Status and answer."""
        body = {"model": "tiny", "max_tokens": 4, "temperature": 0} | body
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request) as answer:
                if not body.get("stream"):
                    return answer.status, json.load(answer)
                return answer.status, {"events": [line.decode().strip() for line in answer if line.strip()]}
        except HTTPError as refused:
            return refused.code, json.loads(refused.read())["error"]

    def metrics(self) -> dict[str, float]:
        """This connector's counters, by name and labels as they are printed."""
        with urlopen(self.url + "/metrics") as page:
            lines = [line for line in page.read().decode().splitlines() if line.startswith("cacheslide:")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def complete(self, prompt, annotations=None, **body) -> tuple[int, dict]:
        """A completion request."""
        extra = {} if annotations is None else {"kv_transfer_params": {"cacheslide": annotations}}
        return self.post("/v1/completions", prompt=prompt, **extra, **body)


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """A server of the shipped model with its log in `folder`; killed at the end, whatever state it is in."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = f"""--chunk-size 32 --encode now --dtype float32 --max-model-len 1024 --enforce-eager
        --max-num-seqs 16 --served-model-name tiny --port {port}"""
    environment = {**os.environ, **VLLM_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cacheslide.cli", "serve", MODEL, *common.split(), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + START
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health")
                break
            except URLError:
                assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield Server(port, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own


def receipt(answer: dict) -> dict:
    return answer["kv_transfer_params"]["cacheslide"]
