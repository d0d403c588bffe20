"""Hostile bodies on every endpoint of a running server: 400 with the reason, the engine goes on."""

import json
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm")

from tests.helpers.annotated import SEPARATOR, joined, messages
from tests.helpers.chat_template import TEMPLATE
from tests.helpers.servers import Server, receipt, running

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 1024
CHAT = messages(0)
ENDPOINTS = {
    "/v1/completions": {"prompt": [5] * 40},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT]},
    "/v1/responses": {"input": "what is amber falcon ?", "max_output_tokens": 4},
    "/v1/messages": {"messages": CHAT[1:3]},
    "/inference/v1/generate": {"token_ids": [5] * 40, "sampling_params": {"max_tokens": 4}},
}
SPANS = {"segments": [[0, 4]]}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bodies")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with running(folder, "--chat-template", str(folder / "chat.jinja")) as found:
        yield found


@pytest.fixture(autouse=True)
def plain_answers(server):
    """What requests without annotations are answered, before and after each test."""

    def ask():
        status, answer = server.complete([7] * 70, None, logprobs=1)
        assert status == 200
        return answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["token_logprobs"]

    before = ask()
    yield
    text, logprobs = ask()
    assert text == before[0] and logprobs == pytest.approx(before[1], abs=1e-4)


def sent(server, path: str, body: bytes) -> tuple[int, dict]:
    """Status and answer of a body as it stands."""
    try:
        with urlopen(Request(server.url + path, body, {"Content-Type": "application/json"}), timeout=120) as answer:
            return answer.status, json.load(answer)
    except HTTPError as refused:
        return refused.code, json.loads(refused.read())


@pytest.mark.fault("malformed_marks")
@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_refuses_what_is_malformed_with_the_reason(server, path):
    for annotations, said in (
        (SPANS | {"policy": "cacheslide", "layer": 99}, "selects at layer 99, but the model has layers 0 to 7"),
        (SPANS | {"layer": 2**64}, "layer must be"),
        (SPANS | {"recompute_ratio": 10**400}, "recompute_ratio must lie in"),
        (SPANS | {"recompute_ratio": float("nan")}, "recompute_ratio must lie in"),
        (SPANS | {"note": "\ud800"}, "no text that can be encoded"),
        (SPANS | {"family": {"name": "x", "rows": 3}}, "family is set by beam search alone"),
        ({"messages": {"fixed": 5}}, "messages"),
        (json.loads("[" * 20 + "]" * 20), "must be an object"),
        (SPANS | {"note": json.loads("[" * 20 + "]" * 20)}, "note must be"),
        (SPANS | {"note": json.loads("[" * 900 + "]" * 900)}, "levels deep"),
    ):
        for stream in ({}, {"stream": True}):
            body = ENDPOINTS[path] | stream | {"kv_transfer_params": {"cacheslide": annotations}}
            status, error = server.post(path, **body)
            own = path == "/inference/v1/generate" and error["param"] is None  # vLLM says it first
            assert status == 400 and (own or said in error["message"]), (path, annotations, error)
    for place in ({"cacheslide": SPANS}, {"kv_transfer_params": {"x": 10**30}}, {"kv_transfer_params": {"share": 1}}):
        status, error = server.post(path, **ENDPOINTS[path], **place)
        assert status == 400 and ("kv_transfer_params" in error["message"] or error["param"] is None)


@pytest.mark.fault("malformed_marks")
def test_bodies_that_no_parser_takes(server):
    open_body = b'{"model": "tiny", "max_tokens": 1, "prompt": [5, 6, 7], "kv_transfer_params": {"cacheslide": '
    for raw in (
        b"[" * 100_000,
        b'{"segments": ' + b"[" * 5000 + b"]" * 5000 + b"}}}",
        b'{"recompute_ratio": 1e999}}}',
        b"\xff}}",
    ):
        assert sent(server, "/v1/completions", open_body + raw)[0] == 400
    status, _ = sent(server, "/tokenize", b'{"model": "tiny", "prompt": "a", "kv_transfer_params": {"cacheslide": {}}}')
    assert status == 400


@pytest.mark.fault("separator_too_long")
@pytest.mark.parametrize("way", [{}, {"stream": True}, {"use_beam_search": True, "n": 2}])
def test_a_cut_text_that_does_not_fit_is_refused(server, way):
    text = " amber falcon follows brave ibex copper seven painter" * (LIMIT // 16)
    status, error = server.complete(text, {"separator": "e"}, **way)
    assert status == 400 and "tokens and runs with" in error["message"] and str(LIMIT) in error["message"]
    status, answer = server.complete(text[: len(text) // 2], {"separator": "e"})
    assert status == 200 and answer["usage"]["prompt_tokens"] < LIMIT


@pytest.mark.fault("separator_too_long")
def test_ids_up_to_the_last_token_run(server):
    for rows in (LIMIT - 2, LIMIT - 1):  # one token more goes, as the separator
        status, answer = server.complete([5] * (rows - 2) + [7] + [6], {"separator": [7]}, max_tokens=1)
        assert status == 200 and answer["usage"] == answer["usage"] | {
            "prompt_tokens": rows - 1,
            "completion_tokens": 1,
        }
    assert server.complete([5] * LIMIT, {"segments": [[0, 9]]}, max_tokens=1)[0] == 400


@pytest.mark.fault("malformed_marks")
def test_one_prompt_of_a_body_that_is_wrong_refuses_the_body(server):
    prompts = [[5] * 200, [6] * 10, [7] * 200]
    for way in ({}, {"stream": True}, {"use_beam_search": True, "n": 2}, {"n": 2, "temperature": 1}):
        status, error = server.complete(prompts, {"segments": [[0, 100]]}, **way)
        assert status == 400 and "outside the prompt of 10 tokens" in error["message"]
    running_now = [line for line in _metrics(server) if line.startswith("vllm:num_requests_running{")]
    assert [float(line.split()[-1]) for line in running_now] == [0.0]
    status, answer = server.complete([prompts[0], prompts[2]], {"segments": [[0, 100]]})
    assert status == 200 and len(answer["choices"]) == 2


def _metrics(server) -> list[str]:
    with urlopen(server.url + "/metrics") as page:
        return page.read().decode().splitlines()


@pytest.mark.fault("echo_separator")
@pytest.mark.parametrize("by", [SEPARATOR, " "])
def test_what_is_echoed_is_what_ran(server, by):
    """Text, tokens and offsets are those that vLLM gives for the same token ids."""
    annotations, settings = {"separator": by}, {"echo": True, "logprobs": 1}
    _, annotated = server.complete(joined(0, by), annotations, **settings)
    _, again = server.complete(joined(0, by), annotations, return_token_ids=True)
    choice, ids = annotated["choices"][0], again["choices"][0]["prompt_token_ids"]
    assert by not in choice["text"].removesuffix(_generated(choice, len(ids)))
    _, plain = server.complete(ids, None, **settings)
    same = plain["choices"][0]
    assert (
        same["text"] == "<s>" + choice["text"]
    )  # vLLM tells the text of ids with special tokens, that of text without
    for name in ("tokens", "text_offset"):
        assert choice["logprobs"][name] == same["logprobs"][name]
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert same["text"][offset:].startswith(token) or token == "</s>"
    events = server.complete(joined(0, by), annotations, **settings, stream=True)[1]["events"]
    parts = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]
    assert "".join(c["text"] for p in parts for c in p["choices"]) == choice["text"]


def _generated(choice, rows: int) -> str:
    return "".join(choice["logprobs"]["tokens"][rows:]).removesuffix("</s>")


@pytest.mark.fault("family")
def test_no_request_runs_on_anothers_plan(server):
    family = {"family": {"name": "x", "rows": 60}}
    for ids in ([8] * 60, [9] * 60, [9] * 20):
        status, error = server.complete(ids, {"segments": [[0, 16]], **family})
        assert status == 400 and "family" in error["message"]


@pytest.mark.fault("tenant_key")
def test_a_receipt_tells_nothing_of_other_namespaces(server):
    """vLLM's own prefix cache is one for all; a namespace has its own part of it, as a salt has."""
    ids = [11 + i % 50 for i in range(200)]

    def cached(namespace: str, **body) -> int:
        annotations = {"segments": [[0, 64]], "namespace": namespace, "encode": "off"}
        status, answer = server.complete(ids, annotations, **body)
        assert status == 200
        return receipt(answer)["tokens_prefix_cached"]

    assert cached("one") == 0
    assert cached("one") > 100
    assert cached("two") == 0 and cached("one", cache_salt="s") == 0 and cached("") == 0
    assert cached("one", cache_salt="s") > 100
    status, _ = server.complete(ids, None, cache_salt="\0cacheslide:3:one")
    assert status == 200 and cached("one") > 100
