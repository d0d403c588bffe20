"""Serving agents: packed runs, beams, retained KV and teacher-forcing give what serving one by one gives."""

import threading
from dataclasses import replace

import pytest
import torch

from cacheslide import Prompt, ReuseEngine, load_policy
from cacheslide.errors import ConfigError, DataError, PromptError
from cacheslide.store import MemoryChunkStore
from harness.agents.completer import Completion, Request, Scripted
from harness.agents.in_process import InProcess
from harness.agents.loop import Stops, run_episode
from harness.agents.oracle import oracle
from harness.agents.registry import entry
from harness.agents.trace import Forced, prompt_digest
from harness.backends.beams import Beam, beam_search
from harness.backends.reference import ReferenceBackend
from harness.load import Closed, drive
from harness.load.driver import Together
from harness.tasks.example import TextSegment
from tests.helpers.places import ROOT
from tests.helpers.prompts import prompt
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow

MODEL = ROOT / "models/tiny-llama-12m"
LONG = Stops(turns=60)


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    return ReferenceBackend(MODEL)


def recorded(name: str, count: int = 1, **options):
    tasks = list(entry(name).tasks("test", 3, count, **options))
    return tasks, [run_episode(entry(name).agent(t), oracle(name), LONG) for t in tasks]


def requests_of(episodes, steps, max_tokens=5):
    return [
        Request(e.task_id, s.index, s.segments, max_tokens + i)
        for i, e in enumerate(episodes)
        for s in e.steps[steps[0] : steps[1]]
    ]


@pytest.mark.parametrize("name", ["cacheslide", "epic"])
def test_a_packed_run_gives_what_one_by_one_gives(backend, name):
    _, episodes = recorded("reflexion", 2, tokens=400)
    first, second = requests_of(episodes, (0, 1)), requests_of(episodes, (1, 2))
    alone, packed = (InProcess(backend, load_policy(name)) for _ in range(2))
    for some in (first, second):
        one, all_ = [alone.complete(r) for r in some], packed.complete_batch(some)
        assert [c.output_ids for c in one] == [c.output_ids for c in all_]
        assert [c.text for c in one] == [c.text for c in all_]
        for c in all_:
            assert len(c.token_s) >= len(c.output_ids) and c.total_s == c.token_s[-1] >= c.ttft_s > 0
    assert all(c.receipt["chunks_hit"] > 0 for c in all_)


def test_retained_chunks_carry_their_generation_into_the_receipts(backend):
    _, [episode] = recorded("function_calling", jobs=3)
    served = {k: InProcess(backend, load_policy("naive_reuse"), generations=k) for k in (0, 2)}
    receipts = {k: [c.complete(r).receipt for r in requests_of([episode], (0, 6), 1)] for k, c in served.items()}
    # A step's receipt names the oldest chunk it read: the second turn's copies are the first that rest on reused KV.
    assert [r["generation"] for r in receipts[2]] == [0, 0, 1, 2, 0, 1]
    assert {r["generation"] for r in receipts[0]} == {0}
    work = {k: sum(r["build_row_layers"] for r in rows) for k, rows in receipts.items()}
    assert 0 < work[2] < work[0]


def dense_beams(model, served: Prompt, width: int, length: int, stop: frozenset[int]) -> list[Beam]:
    """The same search, every beam prefilled from scratch."""
    live, done = [Beam((), 0.0, False)], []
    for _ in range(length):
        found = []
        for beam in live:
            whole = Prompt((*served.segments, replace(served.segments[-1], token_ids=beam.token_ids)))
            engine = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore())
            scores = engine.prefill(whole).logits.log_softmax(-1) + beam.logprob
            found += [(float(v), (*beam.token_ids, i), beam) for i, v in enumerate(scores)]
        found.sort(key=lambda f: -f[0])
        live, ended = [], 0
        for value, ids, parent in found:
            if len(live) == width:
                break
            if ids[-1] not in stop:
                live.append(Beam(ids, value, False))
            elif len(live) + ended < width:
                done, ended = [*done, Beam(parent.token_ids, value, True)], ended + 1
        if len(done) >= width:
            break
    found = done if len(done) >= width else [*done, *live]
    return sorted(found, key=lambda b: -b.score)[:width]


@pytest.mark.parametrize(("width", "stops"), [(1, 0), (3, 0), (4, 30), (5, 60)])
def test_beams_branch_the_kv_of_one_prefill(model, width, stops):
    """Against a search that prefills every beam anew; with many stop ids, so that beams end at different steps."""
    served, length = prompt(9, 4), 4
    stop = frozenset(range(30, 30 + stops))
    engine = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore())
    state = engine.prefill(served, room=width * length)
    before = state.kv.k[:, : state.length].clone()
    found, times = beam_search(model, state, state.logits, width, length, stop)
    wanted = dense_beams(model, served, width, length, stop)
    assert [b.token_ids for b in found] == [b.token_ids for b in wanted]
    torch.testing.assert_close(torch.tensor([b.score for b in found]), torch.tensor([b.score for b in wanted]))
    assert times == sorted(times) and len(times) <= length
    assert torch.equal(before, state.kv.k[:, : state.length])
    if width == 1 and not stops:
        assert list(found[0].token_ids) == engine.generate(engine.prefill(served, room=4), state.logits, 4, stop)
    if stops:
        assert any(b.ended for b in wanted)
    with pytest.raises(ConfigError, match="width"):
        beam_search(model, state, state.logits, 0, length, stop)


def test_a_beam_request_reuses_and_keeps(backend):
    _, [episode] = recorded("memgpt", tokens=400)
    served = InProcess(backend, load_policy("cacheslide"))
    first, second = requests_of([episode], (0, 2))
    served.complete(first)
    got = served.beam(second, 3)
    assert got.receipt["chunks_hit"] > 0 and got.total_s >= got.ttft_s > 0 and got.output_ids
    assert got.prompt_ids == tuple(s.token_ids for s in backend.prompt(second.segments).segments)


def test_forced_agents_see_recorded_turns_whatever_the_system_says():
    tasks, episodes = recorded("memgpt", 3, tokens=400)
    forced = Forced(Scripted("mute", lambda r: " nonsense"), episodes)
    run = drive(tasks, entry("memgpt").agent, forced, Closed(3), LONG)
    for made, again in zip(episodes, run.episodes, strict=True):
        assert [prompt_digest(s.segments) for s in again.steps] == [prompt_digest(s.segments) for s in made.steps]
        assert again.success and all(s.completion.token_s for s in again.steps)
    assert len(forced.own) == sum(len(e.steps) for e in episodes) and not any(o.agrees for o in forced.own.values())
    with pytest.raises(DataError, match="no episode"):
        forced.complete(Request("other", 0, episodes[0].steps[0].segments, 1))


class Packed:
    """A completer that notes its batches, refuses one text, and holds its first batch until others wait."""

    system = "packed"

    def __init__(self) -> None:
        self.sizes, self.go = [], threading.Event()

    def complete_batch(self, requests):
        if not self.sizes:
            assert self.go.wait(60)
        self.sizes.append(len(requests))
        if any("bad" in r.text for r in requests):
            raise PromptError("too long")
        return [Completion(r.text, token_s=(0.5,), total_s=0.75) for r in requests]


def test_what_waits_is_served_together_and_a_bad_request_fails_alone():
    inner = Packed()
    front, got = Together(inner, limit=4), {}

    def ask(text: str) -> None:
        try:
            got[text] = front.complete(Request(text, 0, (TextSegment("cue", text, "recompute"),), 1))
        except PromptError as refused:
            got[text] = str(refused)

    threads = [threading.Thread(target=ask, args=(t,)) for t in ("first", "a", "b", "bad", "c", "d")]
    threads[0].start()
    assert eventually(lambda: front._engine.locked() and not front._queue)
    for number, thread in enumerate(threads[1:], 1):
        thread.start()
        assert eventually(lambda n=number: len(front._queue) == n)
    inner.go.set()
    for thread in threads:
        thread.join(60)
    assert inner.sizes == [1, 4, 1, 1, 1, 1, 1]  # the four that waited longest, then each of them alone, then the rest
    assert got.pop("bad") == "too long" and {t: c.text for t, c in got.items()} == {t: t for t in got}
    assert got["first"].ttft_s >= 0.5 and got["d"].token_s[0] > 0.5 and got["d"].total_s > 0.75
    with pytest.raises(ConfigError, match="at least 1"):
        Together(inner, 0)
