"""Completers and traces: what is recorded can be read, checked and served again, to every system the same."""

import json
import shutil
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cacheslide.errors import ConfigError, DataError
from cacheslide.policies.registry import load_policy, policy_names
from harness.agents.completer import CompletionError, Request, Scripted
from harness.agents.in_process import InProcess
from harness.agents.loop import Stops, run_episode
from harness.agents.openai_server import OpenAIServer
from harness.agents.oracle import oracle
from harness.agents.registry import AGENTS, entry
from harness.agents.sandbox import missing
from harness.agents.trace import Recorded, prompt_digest, read_episodes, replay, write_episodes
from harness.backends.reference import ReferenceBackend
from harness.backends.tokens import Tokens
from harness.experiments.agents.load import loop_on
from harness.tasks.example import TextSegment
from tests.helpers.checkpoints import save_random
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

MODEL = ROOT / "models/tiny-llama-12m"
LONG = Stops(turns=60)
SEGMENTS = (TextSegment("system", "\nTalk", "reuse"), TextSegment("cue", "\nCall:", "recompute"))


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    return ReferenceBackend(MODEL)


def task_of(name: str):
    return next(iter(entry(name).tasks("test", 3, 1)))


def recorded(name: str, path: Path):
    with closing(entry(name).agent(task_of(name))) as agent:
        episode = run_episode(agent, oracle(name), LONG)
    write_episodes(path, [episode], {"seed": 3})
    return episode


@pytest.mark.parametrize("name", AGENTS)
def test_a_trace_gives_the_episode_back_and_its_loop_runs_again(name, tmp_path):
    if name == "swe_agent" and missing():
        pytest.skip(missing())
    made = recorded(name, tmp_path / "trace.jsonl")
    [read] = read_episodes(tmp_path / "trace.jsonl")
    assert read == made and read.success
    with closing(entry(name).agent(task_of(name))) as agent:
        again = run_episode(agent, Recorded(read), LONG)
    assert [prompt_digest(s.segments) for s in again.steps] == [prompt_digest(s.segments) for s in made.steps]
    assert (again.score, again.stop) == (made.score, made.stop)


def test_each_text_is_stored_once_and_a_changed_one_is_found(tmp_path):
    path = tmp_path / "trace.jsonl"
    made = recorded("reflexion", path)
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    texts = [x["text"] for x in lines if x["kind"] == "text"]
    assert len(set(texts)) == len(texts) < sum(len(s.segments) for s in made.steps)
    path.write_text(path.read_text().replace("Session notes", "Session motes"))
    with pytest.raises(DataError, match="hash"):
        read_episodes(path)
    path.write_text("\n".join(json.dumps(x) for x in lines[:-1]))
    with pytest.raises(DataError, match="no end"):
        read_episodes(path)
    path.write_text('{"kind": "step"}\n')
    with pytest.raises(DataError, match=":1: not a trace line"):
        read_episodes(path)


def test_a_recording_refuses_another_task(tmp_path):
    made = recorded("memgpt", tmp_path / "trace.jsonl")
    other = next(iter(entry("memgpt").tasks("test", 4, 1)))
    with pytest.raises(DataError, match="step 0: segment 'memory' differs"):
        run_episode(entry("memgpt").agent(other), Recorded(made), LONG)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ReferenceBackend:
    """A random model of five narrow layers with the shipped tokenizer: what is sent does not depend on the weights."""
    path = save_random(tmp_path_factory.mktemp("small"), vocab_size=1280, max_position_embeddings=4096)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    return ReferenceBackend(path)


@pytest.mark.parametrize("name", AGENTS)
def test_a_replayed_trace_gives_every_system_byte_identical_prompts(small, name, tmp_path):
    if name == "swe_agent" and missing():
        pytest.skip(missing())
    made = recorded(name, tmp_path / "trace.jsonl")
    [trace] = read_episodes(tmp_path / "trace.jsonl")
    trace.steps = trace.steps[:4]
    wanted = [prompt_digest(s.segments) for s in made.steps[:4]]
    ids = [tuple(s.token_ids for s in small.prompt(step.segments).segments) for step in made.steps[:4]]
    text = ["".join(s.text for s in step.segments).encode() for step in made.steps[:4]]
    reused = {}
    for system in policy_names():
        steps = replay(trace, InProcess(small, load_policy(system)), max_tokens=1)
        assert [s.prompt for s in steps] == wanted and [s.own.prompt_ids for s in steps] == ids, system
        assert [small.decode(sum(s.own.prompt_ids, ())).strip().encode() for s in steps] == [t.strip() for t in text]
        assert all(s.own.receipt["system"] == system and s.own.ttft_s > 0 for s in steps)
        reused[system] = sum(s.own.receipt["chunks_hit"] for s in steps)
    assert reused["recompute"] == 0 < reused["cacheslide"]
    assert reused["context_cache"] <= reused["cacheslide"]


def test_an_agent_runs_on_its_own_outputs_in_process(backend):
    agent = entry("function_calling").agent(task_of("function_calling"))
    episode = run_episode(agent, InProcess(backend, load_policy("cacheslide")), Stops(turns=3, retries=1, max_tokens=4))
    assert episode.stop in ("turns", "malformed", "repeated", "done") and episode.steps
    later = episode.steps[-1].completion
    assert later.receipt["chunks_hit"] > 0 and len(later.output_ids) <= 4 and "\n" not in later.text


@contextmanager
def server(answer):
    """An HTTP server in a thread; `answer(body)` gives the status and the raw reply. Yields (url, bodies)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append((self.path, body, self.headers["Authorization"]))
            status, reply = answer(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            return None

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", bodies
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def events(*parts, done=True) -> bytes:
    out = "".join(f"data: {json.dumps(p)}\n\n" for p in parts)
    return (out + ("data: [DONE]\n\n" if done else "")).encode()


def test_a_server_gets_ids_and_annotations_or_plain_text():
    receipt = {"cacheslide": {"tokens_reused": 3}}
    last = {"choices": [{"text": " x", "finish_reason": "stop"}], "kv_transfer_params": receipt}
    pieces = [{"choices": [{"text": " reply"}]}, last]
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    with server(lambda body: (200, events(*pieces))) as (url, bodies):
        annotated = OpenAIServer(url, "m", tokenizer, policy="cacheslide").complete(Request("s", 0, SEGMENTS, 8))
        plain = OpenAIServer(url, "m", api_key="secret").complete(Request("s", 0, SEGMENTS, 8))
    assert annotated.text == plain.text == " reply x" and len(annotated.token_s) == 2
    assert annotated.receipt == receipt["cacheslide"]
    (path, first, nobody), (_, second, somebody) = bodies
    assert nobody is None and somebody == "Bearer secret"
    assert path == "/v1/completions" and first["stream"] and first["stop"] == ["\n"] and first["max_tokens"] == 8
    assert tokenizer.decode(first["prompt"], skip_special_tokens=True) == "\nTalk\nCall:" == second["prompt"]
    assert first["prompt"] == [i for ids in annotated.prompt_ids for i in ids] and plain.prompt_ids is None
    fixed = [0, len(annotated.prompt_ids[0])]
    assert first["kv_transfer_params"] == {"cacheslide": {"segments": [fixed], "policy": "cacheslide"}}
    assert "kv_transfer_params" not in second and "cache_salt" not in second


def test_agents_load_a_server_with_salts_of_their_own(tmp_path):
    """The closed loop of the server's experiment, against a server that gives the recorded answers."""
    tokens, tasks = Tokens(MODEL), list(entry("function_calling").tasks("test", 3, 2, jobs=1))
    episodes = [run_episode(entry("function_calling").agent(t), oracle("function_calling"), LONG) for t in tasks]
    said = {"".join(s.text for s in step.segments): step.completion.text for e in episodes for step in e.steps}

    def answer(body):
        text = said[tokens.tokenizer.decode(body["prompt"], skip_special_tokens=True)]
        return 200, events({"choices": [{"text": text, "finish_reason": "stop"}]})

    with server(answer) as (url, bodies):
        completer = OpenAIServer(url, "m", tokens.tokenizer, policy="epic", salt="a-2-0", layer=3)
        done = loop_on(completer, tokens, tasks, episodes, 2)
    assert len(done) == sum(len(e.steps) for e in episodes) and all(d.correct and d.ttft_s > 0 for d in done)
    for _, body, _ in bodies:
        assert body["cache_salt"] == "a-2-0"
        annotations = body["kv_transfer_params"]["cacheslide"]
        assert (annotations["policy"], annotations["layer"]) == ("epic", 3)


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (400, b'{"message": "too long"}', "HTTP 400.*too long"),
        (200, events({"choices": [{"text": "a"}]}, done=False), "broke off"),
        (200, b"data: {nonsense\n\n", "no completion"),
        (200, events({"error": {"message": "out of memory"}}), "out of memory"),
        (200, events({"choices": [{"text": "a"}]}), "finish_reason None"),
        (200, events(*[{"choices": [{"text": "a"}]}] * 40), "far more than the 8 tokens"),
    ],
)
def test_a_broken_server_is_one_clear_error(status, reply, message):
    with (
        server(lambda body: (status, reply)) as (url, _),
        pytest.raises(CompletionError, match=message),
    ):
        OpenAIServer(url, "m").complete(Request("s", 0, SEGMENTS, 8))


def test_an_absent_server_and_bad_settings():
    with pytest.raises(CompletionError, match="no completion from"):
        OpenAIServer("http://127.0.0.1:9/v1", "m", timeout=2).complete(Request("s", 0, SEGMENTS, 8))
    with pytest.raises(ConfigError, match="looks like"):
        OpenAIServer("localhost:8000", "m")
    with pytest.raises(ConfigError, match="tokenizer"):
        OpenAIServer("http://localhost/v1", "m", policy="cacheslide")


def test_lone_surrogates_survive_a_trace(tmp_path):
    agent = entry("function_calling").agent(task_of("function_calling"))
    episode = run_episode(agent, Scripted("odd", lambda r: "get \ud800 x"), Stops(retries=0))
    write_episodes(tmp_path / "t.jsonl", [episode])
    assert read_episodes(tmp_path / "t.jsonl") == [episode] and episode.stop == "malformed"
