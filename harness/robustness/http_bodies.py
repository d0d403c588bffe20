"""Hostile bodies over HTTP, on every endpoint that takes annotations, beside neighbours whose answers are known.

A server of the shipped model runs as a separate process. Counted as faults: status 500 and above, no answer, or an
error inside a started stream (`non_400`); an engine that died (`engine_deaths`); and a neighbour, annotated or not,
whose answer differs from the one its tokens get alone (`wrong_answers`).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from harness.robustness.annotations import Annotations

MODEL, CLIENTS, ROWS, EXAMPLES = "models/tiny-llama-12m", 4, 96, 8
START, SHORTEST, PATIENCE = 600, 30, 120  # seconds: limit of the start, minimum of the attack, limit of an answer
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
_CHAT = [{"role": role, "content": "what is amber falcon ?"} for role in ("system", "user", "assistant", "user")]
_TEXT = "You answer . | notes ## of today | a document ## that stays | question ?"
_OPTIONS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}, {"stream": True}, {"cache_salt": "s"}, {"cache_salt": "\0cacheslide:1:as"}, {"priority": 0}),
    *({"echo": True, "logprobs": 1}, {"use_beam_search": True, "n": 2}, {"n": 2, "temperature": 1.0}),
    *({"truncate_prompt_tokens": 8}, {"prompt_logprobs": 1}, {"min_tokens": 1}, {"stream": True, "echo": True}),
)


class Client:
    """One persistent connection to the server."""

    def __init__(self, port: int) -> None:
        self.port, self.connection = port, None

    def send(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and answer of a POST (without a body, a GET); status 0 without an answer."""
        for _ in range(2):  # the server may have closed a persistent connection
            fresh = self.connection is None
            self.connection = self.connection or HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            try:
                kind = {"Content-Type": "application/json"}
                self.connection.request("GET" if body is None else "POST", path, body, kind)
                answer = self.connection.getresponse()
                return answer.status, answer.read()
            except (OSError, HTTPException):
                self.connection.close()
                self.connection = None
                if fresh:
                    break
        return 0, b""


class Attack:
    """Generates the requests of one client."""

    def __init__(self, seed: int) -> None:
        self.make, self.random = Annotations(seed, ROWS, ([7], "|", "##", True)), random.Random(seed + 1)

    def body(self) -> tuple[str, bytes]:
        """The next path and body."""
        r = self.random
        path, base = r.choice(self._endpoints())
        body = {"model": "tiny", "max_tokens": 1, "temperature": 0, **base}
        if path in ("/v1/completions", "/v1/chat/completions"):
            body |= {
                k: v
                for k, v in r.choice(_OPTIONS).items()
                if path == "/v1/completions" or k not in ("echo", "logprobs")
            }
        elif r.random() < 0.2:
            body["stream"] = True
        body |= self._annotated()
        raw = json.dumps(body).encode()
        return path, self._damaged(raw) if r.random() < 0.08 else raw

    def _endpoints(self) -> list[tuple[str, dict[str, Any]]]:
        ids = [8 + i % 1000 for i in range(ROWS)]
        ids[30] = ids[60] = 7
        prompt = self.random.choice((ids, _TEXT, [ids, ids[:50]], [_TEXT, "short"], [7, 7], _TEXT * 20))
        return [
            *[("/v1/completions", {"prompt": prompt})] * 3,
            *[("/v1/chat/completions", {"messages": _CHAT})] * 2,
            ("/v1/chat/completions/batch", {"messages": [_CHAT, _CHAT[:2]]}),
            ("/v1/responses", {"input": "what is amber falcon ?", "max_output_tokens": 1}),
            ("/v1/messages", {"messages": _CHAT[1:]}),
            ("/inference/v1/generate", {"token_ids": ids, "sampling_params": {"max_tokens": 1}}),
            ("/v1/completions/render", {"prompt": prompt}),
            ("/tokenize", {"prompt": _TEXT}),
        ]

    def _annotated(self) -> dict[str, Any]:
        kind, params = self.random.random(), self.make.params()
        if kind < 0.9:
            return {"kv_transfer_params": params}
        places = ({"cacheslide": params}, {"extra_body": {"kv_transfer_params": params}}, {"kv_transfer_params": "x"})
        return self.random.choice((*places, {"vllm_xargs": {"cacheslide": "x"}}, {"sampling_params": params}))

    def _damaged(self, raw: bytes) -> bytes:
        r, at = self.random, self.random.randrange(len(raw))
        deep = r.choice((50, 900, 3000))
        return r.choice(
            (
                raw[:at],
                raw[:at] + bytes([r.randrange(256)]) + raw[at + 1 :],
                raw[:-1] + b', "kv_transfer_params": {"cacheslide": ' + b"[" * deep + b"]" * deep + b"}}",
                raw[:-1] + b', "kv_transfer_params": {"cacheslide": {"segments": [[0, 1e999]], "share": NaN}}}',
            )
        )


class Neighbours:
    """Well-formed requests with known answers: unannotated, and annotated so that the answer is exact."""

    def __init__(self, client: Client) -> None:
        self.client, self.asked, self.wrong = client, 0, []
        self.prompts = [[1] + [(11 + 37 * k + i * (k + 3)) % 1200 + 8 for i in range(90)] for k in range(4)]
        self.known = [self._ask(prompt, None) for prompt in self.prompts]
        spans = {"segments": [[8, 72]]}
        exact = {"policy": "cacheslide", "recompute_ratio": 1.0, "layer": 0}
        self.annotations = (
            None,
            spans | {"policy": "recompute"},
            spans | exact,
            spans | {"recompute_ratio": 1.0},
            {"find": False},
        )

    def ask(self) -> None:
        """Send every prompt with every kind of annotations."""
        for k, prompt in enumerate(self.prompts):
            for annotations in self.annotations:
                said = self._ask(prompt, annotations)
                self.asked += 1
                if said != self.known[k]:
                    self.wrong.append(f"{annotations} got {said!r}, not {self.known[k]!r}")

    def _ask(self, prompt: list[int], annotations: Any) -> Any:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        body |= {} if annotations is None else {"kv_transfer_params": {"cacheslide": annotations}}
        status, answer = self.client.send("/v1/completions", json.dumps(body).encode())
        return json.loads(answer)["choices"][0]["text"] if status == 200 else status


@contextmanager
def served(work: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    """A server of the shipped model: its port, and its process, which ends with all its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (work / "chat.jinja").write_text(TEMPLATE)
    options = f"""--dtype float32 --enforce-eager --max-model-len 512 --chunk-size 16 --encode now --separator [7]
        --served-model-name tiny --max-num-seqs 16 --port {port} --chat-template {work / "chat.jinja"}"""
    line = [sys.executable, "-m", "cacheslide.cli", "serve", MODEL, *options.split()]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    quiet |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (work / "log").open("w") as log:
        process = subprocess.Popen(line, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True)
    try:
        client, until = Client(port), time.monotonic() + START
        while client.send("/health", None)[0] != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {(work / 'log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield port, process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """Send bodies for about `minutes`, start included; `faults` is the sum of all faults."""
    counts = dict.fromkeys(("bodies_tried", "answered", "refused", "non_400"), 0)
    examples: list[str] = []
    lock, begun = threading.Lock(), time.monotonic()
    with served(work) as (port, process):
        neighbours, until = Neighbours(Client(port)), max(begun + 60 * minutes, time.monotonic() + SHORTEST)

        def attack(number: int) -> None:
            client, sender = Client(port), Attack(1000 * seed + number)
            while time.monotonic() < until and process.poll() is None:
                path, body = sender.body()
                status, answer = client.send(path, body)
                late = status == 200 and b'data: {"error"' in answer
                with lock:
                    counts["bodies_tried"] += 1
                    counts["answered" if status == 200 else "refused"] += 1
                    if status == 0 or status >= 500 or late:
                        counts["non_400"] += 1
                        if len(examples) < EXAMPLES:
                            examples.append(f"{path} {status} {body[:400]!a} {answer[:200]!a}")

        threads = [threading.Thread(target=attack, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            neighbours.ask()
        for thread in threads:
            thread.join()
        neighbours.ask()
        dead = int(Client(port).send("/health", None)[0] != 200)
    wrong = len(neighbours.wrong)
    return {
        **counts,
        "engine_deaths": dead,
        "neighbours_asked": neighbours.asked,
        "wrong_answers": wrong,
        "examples": [*examples, *neighbours.wrong[:EXAMPLES]],
        "clients": CLIENTS,
        "minutes": minutes,
        "faults": counts["non_400"] + dead + wrong,
    }
