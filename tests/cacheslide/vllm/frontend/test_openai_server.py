"""The OpenAI server as `cacheslide serve` starts it: annotations, receipts in answers and streams, refusals."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from tests.helpers.annotated import CHAT_ANNOTATIONS, SEPARATOR, joined, messages
from tests.helpers.chat_template import TEMPLATE
from tests.helpers.servers import Server, receipt, running

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LAYERS = 8  # of the shipped model


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with running(folder, "--separator=<sep>", "--chat-template", str(folder / "chat.jinja")) as found:
        yield found


def test_annotated_turns_over_http(server):
    plain = server.complete(joined(1), None)[1]
    assert plain["kv_transfer_params"] is None
    status, first = server.complete(joined(0), {"separator": SEPARATOR})
    assert status == 200 and "no chunk" in receipt(first)["fallback"]
    _, second = server.complete(joined(1), {"separator": SEPARATOR})
    assert receipt(second)["chunks_hit"] == receipt(second)["chunks"] > 5 and receipt(second)["tokens_reused"] > 100
    used = receipt(second)["tokens_reused"] + receipt(second)["tokens_recomputed"]
    assert receipt(second)["tokens_recomputed"] == pytest.approx(0.15 * used, abs=1)  # the server's default rule
    assert (
        receipt(second)["tokens_per_layer"] == [receipt(second)["tokens_per_layer"][0]] * LAYERS
    )  # selects at no layer
    assert second["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]  # the separators are gone
    _, own = server.complete(joined(2, "<sep>"), {"separator": True})
    assert receipt(own)["chunks_hit"] == receipt(own)["chunks"]
    [reused] = [n for name, n in server.metrics().items() if name.startswith("cacheslide:rows_reused_total")]
    assert reused >= receipt(second)["tokens_reused"]


def test_streams_end_with_the_receipt(server):
    annotations = {"separator": SEPARATOR}
    server.complete(joined(0), annotations)
    for path, body in (
        ("/v1/completions", {"prompt": joined(2), "kv_transfer_params": {"cacheslide": annotations}}),
        ("/v1/chat/completions", {"messages": messages(2), "kv_transfer_params": {"cacheslide": CHAT_ANNOTATIONS}}),
    ):
        _, whole = server.post(path, **body)
        _, stream = server.post(path, stream=True, stream_options={"include_usage": True}, **body)
        events = stream["events"]
        assert events[-1] == "data: [DONE]"
        parts = [json.loads(e.removeprefix("data: ")) for e in events[:-1]]
        with_receipt = [p for p in parts if "kv_transfer_params" in p]
        assert with_receipt == parts[-1:] and parts[-1]["choices"] == [] and parts[-1]["id"] == parts[0]["id"]
        assert receipt(parts[-1])["tokens"] == receipt(whole)["tokens"] and receipt(parts[-1])["measured"]
        if "prompt" in body:
            text = "".join(c["text"] for p in parts for c in p["choices"])
            assert text == whole["choices"][0]["text"]
    _, stream = server.complete(joined(2), stream=True)
    assert not any("kv_transfer_params" in e for e in stream["events"])


def test_beam_search_with_annotations(server):
    """Ratio 1 gives the beams of an exact search, ratio 0 does not: chunks come from another turn."""
    search = {"use_beam_search": True, "n": 3, "logprobs": 1}

    def beams(answer) -> list[str]:
        return [choice["text"] for choice in answer["choices"]]

    def likely(answer) -> list[float]:
        return [x for choice in answer["choices"] for x in choice["logprobs"]["token_logprobs"]]

    annotations = {"separator": SEPARATOR}
    status, exact = server.complete(joined(1), annotations | {"policy": "recompute"}, **search)
    assert status == 200 and "reuses nothing" in receipt(exact)["fallback"]
    apart = {"cache_salt": "beams"}  # the exact search's blocks are not found
    server.complete(joined(0), annotations, **apart)
    _, every = server.complete(joined(1), annotations | {"recompute_ratio": 1.0}, **search, **apart)
    _, none = server.complete(joined(1), annotations | {"recompute_ratio": 0.0}, **search, **apart)
    for answer, used in ((every, "tokens_recomputed"), (none, "tokens_reused")):
        assert receipt(answer)[used] > 100 and not receipt(answer)["fallback"]
        assert receipt(answer)["beams"] == {"requests": 1 + 3 * 3, "completed_by_reuse": 1}
    assert beams(every) == beams(exact) and likely(every) == pytest.approx(likely(exact), abs=1e-3)
    assert likely(none) != pytest.approx(likely(exact), abs=1e-3)
    chat = {"messages": messages(1), "kv_transfer_params": {"cacheslide": CHAT_ANNOTATIONS}}
    server.post("/v1/chat/completions", **chat)
    status, answer = server.post("/v1/chat/completions", use_beam_search=True, n=2, **chat)
    assert status == 200 and receipt(answer)["chunks"] > 5 and receipt(answer)["beams"]["requests"] == 7
    _, plain = server.complete(joined(1, ""), None, **search)
    assert plain["kv_transfer_params"] is None


def test_messages_are_annotated_in_chat_requests(server):
    def ask(turn, annotations):
        return server.post(
            "/v1/chat/completions", messages=messages(turn), kv_transfer_params={"cacheslide": annotations}
        )

    ask(0, CHAT_ANNOTATIONS)
    status, answer = ask(1, CHAT_ANNOTATIONS)
    assert status == 200 and receipt(answer)["chunks_hit"] == receipt(answer)["chunks"] > 5
    status, error = ask(1, {"messages": {"updated": [7]}})
    assert status == 400 and "names message 7, but there are 5" in error["message"]


@pytest.mark.parametrize(
    ("annotations", "body", "said"),
    [
        ({"separator": "@@"}, {}, "'@@' is not in the prompt"),
        ({"separator": "##", "roles": ["reuse"]}, {}, "parts, but 1 roles"),
        ({"segments": [[0, 9999]]}, {}, "outside the prompt"),
        ({"messages": "auto"}, {}, "in a chat request only"),
        ({"find": True, "history": 3}, {}, "no segments and no history"),
        ({"separator": "@@"}, {"use_beam_search": True, "n": 2}, "'@@' is not in the prompt"),
        ([], {}, "must be an object"),
    ],
)
def test_what_cannot_be_done_is_a_400_with_the_reason(server, annotations, body, said):
    status, error = server.complete(joined(1), annotations, **body)
    assert status == 400 and said in error["message"]


def test_sixteen_clients_at_once(server):
    """Every way to annotate, streamed and whole, beside plain requests: all are answered, equal ones alike."""
    asked = [
        (joined(1), {"separator": SEPARATOR, "recompute_ratio": 1.0}, False),
        (joined(1), {"separator": SEPARATOR, "recompute_ratio": 1.0}, True),
        (joined(1, ""), None, False),
        (joined(2, ""), {"find": True, "recompute_ratio": 1.0}, False),
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda a: server.complete(a[0], a[1], stream=a[2]), 4 * asked))
    assert [status for status, _ in answers] == 16 * [200]
    texts = [a["choices"][0]["text"] for _, a in answers if "choices" in a]
    for kind in range(3):
        assert len(set(texts[kind::3])) == 1
