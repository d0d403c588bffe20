"""Bytes a server writes under host-memory pressure, by eviction policy: `python -m harness.experiments.slide.served`.

A server (`cacheslide serve`, over HTTP) keeps chunks in host memory that holds a share of the pages in use, over files.
Agents have documents of their own and run episodes one after the other. A turn is one request: new notes in front, the
documents, the episode's history so far, and a question (a tool's output, say) that becomes history. The documents'
chunks are exact and written once, in an episode before counting starts. All that follows is computed over reused
chunks, so history is corrected KV, a generation older every turn: nothing else holds it, and leaving memory costs a
write. An episode's last request sets `release`, and its history is dropped. Agents take turns in a random order,
the same for every policy.

Written are the bytes that the kernel counts for the server and all its processes (/proc/PID/io, write_bytes: the store
writes around the page cache), beside the server's own counts. Answers must not depend on the policy, and every chunk
must come back: the record holds both checks.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.units import GIB
from harness.backends.client import Request, Result
from harness.backends.http.client import HttpClient
from harness.backends.http.server import Server, connector_command
from harness.limit import Limit, add_minutes
from harness.quiet import watched
from harness.results.provenance import machine
from harness.results.records import write_json
from harness.step import command

SYSTEM = "cacheslide_first_turn"  # keeps KV as the prompt had it, so that history is copied, corrected
POLICIES = ("lru", "clean-first")
QUIET_S, PATIENCE_S = 2.0, 60.0  # queued writes count as done after so long without one; the longest wait
ITEM_BYTES = 4  # float32
DEAD = 1 << 20  # no ratio below this many bytes, which logs and processes write anyway


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens; `memory` is the share of the pages in use that host memory holds.

    Pages in use are those of all documents and of the history that every agent's episode has when it ends.
    """

    agents: int = 8
    episodes: int = 4  # of an agent, the first not counted
    turns: int = 4
    document: int = 768
    notes: int = 48
    history: int = 128
    chunk: int = 64
    memory: float = 1 / 3
    releases: bool = True
    seed: int = 1

    @property
    def tokens_in_use(self) -> int:
        """Tokens with cached KV at an episode's end, of all agents."""
        return self.agents * (self.document + (self.turns - 1) * self.history)


CONDITIONS = {
    "main": Workload(),
    "shorter history": Workload(history=64),
    "half of memory": Workload(memory=1 / 2),
    "episodes that outlive a generation": Workload(turns=7, history=64),
    "nobody says that an episode has ended": Workload(releases=False),
}


class Agent:
    """One agent's prompts; token ids are drawn at random."""

    def __init__(self, number: int, load: Workload, vocabulary: int) -> None:
        self.load, self.rng, self.number = load, random.Random(f"{load.seed} {number}"), number
        self.ids = range(min(64, vocabulary // 2), vocabulary)
        self.document = self._draw(load.document)
        self.history: list[list[int]] = []
        self.turn = 0

    def _draw(self, n: int) -> list[int]:
        return self.rng.choices(self.ids, k=n)

    def next(self) -> Request:
        """The next turn, of this episode or a new one."""
        last = self.turn == self.load.turns - 1
        notes = self._draw(self.rng.randrange(self.load.notes // 2, self.load.notes))
        question = self._draw(self.load.history)
        prompt, spans = notes, []
        for piece in (self.document, *self.history):
            spans.append([len(prompt), len(prompt) + len(piece)])
            prompt = prompt + piece
        annotations: dict[str, Any] = {"segments": spans, "policy": SYSTEM}
        annotations |= ({"release": True} if self.load.releases else {}) if last else {"history": len(prompt)}
        self.turn, self.history = (0, []) if last else (self.turn + 1, [*self.history, question])
        return Request(f"agent {self.number}", prompt + question, 1, {"cacheslide": annotations}, stream=False)


def episodes(load: Workload, vocabulary: int) -> Iterator[list[Request]]:
    """The requests of every round, in which all agents run one episode."""
    agents, rng = [Agent(n, load, vocabulary) for n in range(load.agents)], random.Random(load.seed)
    for _ in range(load.episodes):
        order = [agent for agent in agents for _ in range(load.turns)]
        rng.shuffle(order)
        yield [agent.next() for agent in order]


def written(leader: int) -> dict[str, int]:
    """/proc/PID/io of all processes of a session, added up: bytes to and from disks, and through system calls."""
    out = dict.fromkeys(("write_bytes", "read_bytes", "wchar", "rchar"), 0)
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                lines = dict(line.split(": ") for line in (entry / "io").read_text().splitlines())
                out = {name: n + int(lines[name]) for name, n in out.items()}
        except OSError:  # it has ended
            continue
    return out


def settled(leader: int) -> dict[str, int]:
    """`written`, once writing has stopped."""
    until, now = time.monotonic() + PATIENCE_S, written(leader)
    while time.monotonic() < until:
        time.sleep(QUIET_S)
        before, now = now, written(leader)
        if now["write_bytes"] == before["write_bytes"]:
            break
    return now


def counters(endpoint: str) -> dict[str, float]:
    """The server's own counts of chunks that left memory, and of failures."""
    plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine
    with plain.open(f"{endpoint}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^cacheslide:(\w+)_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        if (label := re.search(r'(?:state|reason|entry|tier)="(\w[\w ]*)"', labels)) is not None:
            found[f"{name}.{label[1]}"] = found.get(f"{name}.{label[1]}", 0) + float(value)
    return {name: value for name, value in found.items() if value}


def serve(model: str, work: Path, load: Workload, policy: str) -> dict[str, Any]:
    """One server run under one policy."""
    shape = json.loads((Path(model) / "config.json").read_text())
    heads = shape.get("num_key_value_heads", shape["num_attention_heads"])
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    token = 2 * shape["num_hidden_layers"] * heads * head_dim * ITEM_BYTES
    memory = int(load.memory * load.tokens_in_use) * token
    store = {"path": str(work / "chunks"), "host_gib": memory / GIB, "file_gib": 2, "spill_gib": 2, "shards": 1}
    (work / "store.json").write_text(json.dumps(store | {"policy": policy}))
    options = {"store": work / "store.json", "chunk_size": load.chunk, "policy": SYSTEM, "encode": "now"}
    longest = load.notes + load.document + load.turns * load.history + 1
    flags = ["--block-size", "32", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(longest + 63)]
    flags += ["--kv-cache-memory-bytes", str(512 << 20), "--skip-tokenizer-init"]
    answers: list[Result] = []
    with Server(connector_command(model, options, flags), model, work / "server.log", eager=True) as server:
        client, leader = HttpClient(replace(server.endpoint, token_ids=True)), server.process.pid
        for number, requests in enumerate(episodes(load, shape["vocab_size"])):
            if number == 1:
                before, warm = settled(leader), len(answers)
                counted, begun = counters(server.endpoint.url), time.monotonic()
            answers += [result.checked() for result in client.run(requests, clients=1)]
        seconds = time.monotonic() - begun
        after, own = settled(leader), counters(server.endpoint.url)
    receipts = [a.receipt for a in answers[warm:]]
    return {
        "policy": policy,
        "memory_bytes": memory,
        "requests": len(receipts),
        "seconds": seconds,
        "io": {name: after[name] - before[name] for name in after},
        "server": {name: n - counted.get(name, 0) for name, n in own.items()},
        "chunks": sum(r["chunks"] for r in receipts),
        "chunks_hit": sum(r["chunks_hit"] for r in receipts),
        "generations": sorted({r["generation"] for r in receipts}),
        "answers": [a.token_ids for a in answers],
    }


def compare(model: str, work: Path, load: Workload) -> dict[str, Any]:
    """A workload under every policy, and the ratio of bytes written."""
    runs = {}
    for policy in POLICIES:
        with tempfile.TemporaryDirectory(dir=work) as folder, watched() as quiet:
            runs[policy] = serve(model, Path(folder), load, policy)
        runs[policy]["quiet"] = quiet
        print(policy, runs[policy]["io"]["write_bytes"] >> 20, "MiB written", flush=True)
    answers = [run.pop("answers") for run in runs.values()]
    more, less = (runs[p]["io"]["write_bytes"] for p in POLICIES)
    return {
        "workload": asdict(load) | {"tokens_in_use": load.tokens_in_use},
        "runs": runs,
        "same_answers": all(a == answers[0] and all(a) for a in answers),
        "all_chunks_came_back": all(run["chunks"] == run["chunks_hit"] for run in runs.values()),
        "lru_over_clean_first_bytes": more / less if less >= DEAD else None,
        "at_least": more / max(less, DEAD),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure the conditions and save each finished one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/slide/served.json"))
    parser.add_argument("--work", type=Path, default=Path("build/slide"), help="folder on the disk to be measured")
    parser.add_argument("--model", default="models/tiny-llama-12m")
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), metavar="NAME", help=", ".join(CONDITIONS))
    parser.add_argument("--small", action="store_true", help="few agents and short episodes: whether it runs")
    add_minutes(parser)
    args = parser.parse_args(argv)
    if unknown := set(args.conditions) - set(CONDITIONS):
        raise ConfigError(f"unknown condition {', '.join(sorted(unknown))}: choose {', '.join(CONDITIONS)}")
    limit = Limit(args.minutes)
    args.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"model": args.model, "system": SYSTEM, "machine": machine(), "conditions": {}}
    for name in args.conditions:
        if limit.over:
            break
        load = CONDITIONS[name]
        load = replace(load, agents=4, episodes=2, document=128, history=64, memory=1 / 2) if args.small else load
        found = record["conditions"][name] = compare(args.model, args.work, load)
        if name == "main":
            record["served_lru_over_clean_first_bytes"] = found["lru_over_clean_first_bytes"] or found["at_least"]
        write_json(args.out, record)


if __name__ == "__main__":
    command(main)
