"""What a request becomes where vLLM takes it in: the tokens that run fit, misplaced annotations are named."""

import asyncio
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from cacheslide.policies import registry
from cacheslide.policies.default import DEFAULT_SYSTEM
from cacheslide.policies.registry import load_policy
from cacheslide.vllm import CONNECTOR, systems
from cacheslide.vllm import options as params
from cacheslide.vllm.frontend.admission import CHAT, Resolved, _chat_spans, options_of
from cacheslide.vllm.frontend.beams import start_search
from cacheslide.vllm.frontend.bodies import MarksInPlace
from cacheslide.vllm.frontend.intake import fitted, taken
from cacheslide.vllm.frontend.misplaced import misplaced
from cacheslide.vllm.frontend.separators import cut, text_after
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.options import ServerOptions, policy_of
from cacheslide.vllm.scheduler.planner import Planner

pytestmark = pytest.mark.slow

MODEL, LIMIT = "models/tiny-llama-12m", 100
GEOMETRY = Geometry("m", "torch.float32", 8, 6, 64, 384, 4, 8192)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def config(**options):
    """As much of vLLM's configuration as the door reads."""
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=options)
    model = SimpleNamespace(max_model_len=LIMIT, get_num_layers=lambda _: 8)
    return SimpleNamespace(kv_transfer_config=transfer, model_config=model, parallel_config=None)


def entered(prompt, annotations, tokenizer=None, **sampling):
    """A rendered prompt and its parameters behind the door."""
    settings = SamplingParams(**sampling, extra_args={"kv_transfer_params": {"cacheslide": annotations}})
    return taken(config(), SimpleNamespace(tokenizer=tokenizer), {"type": "token", **prompt}, settings, in_place=True)


# --- what runs fits ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("separator_too_long")
def test_a_text_that_has_more_tokens_in_parts_is_refused_with_both_lengths(tokenizer):
    text = " amber falcon follows brave ibex copper seven painter" * 6
    ids = tokenizer.encode(text)
    in_parts = cut("e", None, text, ids, tokenizer)[0]
    assert len(ids) + 1 <= LIMIT < len(in_parts)  # vLLM's own check passes it
    for start in (
        lambda: entered({"prompt": text, "prompt_token_ids": ids}, {"separator": "e"}, tokenizer, max_tokens=1),
        lambda: start_search(
            config(),
            SimpleNamespace(tokenizer=tokenizer),
            {"type": "token", "prompt": text, "prompt_token_ids": ids},
            {"cacheslide": {"separator": "e"}},
            1,
        ),
    ):
        with pytest.raises(
            VLLMValidationError, match=f"{len(ids)} tokens and runs with {len(in_parts)}.* at most {LIMIT}"
        ):
            start()


@pytest.mark.fault("separator_too_long")
@pytest.mark.parametrize("rows", [LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1])
def test_room_for_one_token_is_left(rows):
    """At exactly the limit the engine used to fail when it sampled."""

    class Merging:
        """One token for a text with a separator, one for every character of its parts."""

        def encode(self, text, add_special_tokens=True):
            return [5] if "|" in text else [6] * len(text)

        def decode(self, ids, skip_special_tokens=False):
            return "x" * len(ids)

    text = "a" * (rows - 1) + "|" + "a"
    prompt = {"prompt": text, "prompt_token_ids": [5]}
    if rows < LIMIT:
        run, settings = entered(prompt, {"separator": "|"}, Merging(), max_tokens=LIMIT - 1)
        assert len(run["prompt_token_ids"]) == rows and settings.max_tokens == LIMIT - rows
    else:
        with pytest.raises(VLLMValidationError, match=f"1 tokens and runs with {rows}"):
            entered(prompt, {"separator": "|"}, Merging(), max_tokens=1)


@pytest.mark.fault("separator_too_long")
def test_what_is_generated_fits_too():
    assert fitted(10, 50, 60, LIMIT) == 10 and fitted(None, 50, 99, LIMIT) is None
    assert fitted(50, 50, 60, LIMIT) == 40  # what filled the model's length fills it again
    assert fitted(50, 50, 40, LIMIT) == 50 and fitted(500, 50, 60, LIMIT) == 500  # vLLM ends it at its length
    with pytest.raises(VLLMValidationError, match=r"with 50 tokens and runs with 60.*the 45 asked for"):
        fitted(45, 50, 60, LIMIT)


def test_what_the_door_has_seen_is_not_read_again():
    prompt, settings = entered({"prompt_token_ids": [1, 5, 7, 8]}, {"separator": [7]}, max_tokens=2)
    assert prompt["prompt_token_ids"] == [1, 5, 8]
    annotations = settings.extra_args["kv_transfer_params"]["cacheslide"]
    assert (
        type(annotations) is Resolved
        and type(settings.clone().extra_args["kv_transfer_params"]["cacheslide"]) is Resolved
    )
    again = taken(config(), SimpleNamespace(tokenizer=None), prompt, settings)
    assert again == (prompt, settings)


# --- text and tokens agree --------------------------------------------------------------------------------------------


@pytest.mark.fault("echo_separator")
@pytest.mark.parametrize("separator", [" ## ", "##", "o", " "])
def test_the_text_is_that_of_the_tokens_that_run(tokenizer, separator):
    text = separator.join(["You are an agent .", "Notes of today", "A long document", "Question"])
    prompt = {"prompt": text, "prompt_token_ids": tokenizer.encode(text)}
    run, _ = entered(prompt, {"separator": separator}, tokenizer)
    assert run["prompt"] == text.replace(separator, "") and run is not prompt
    assert tokenizer.decode(run["prompt_token_ids"]) == tokenizer.decode(tokenizer.encode("")) + run["prompt"]


@pytest.mark.fault("echo_separator")
def test_the_text_of_ids_is_that_of_what_is_left_of_them(tokenizer):
    ids = tokenizer.encode("amber falcon")
    seven = ids[-1] + 1
    whole = [*ids, seven, *ids[1:]]
    prompt = {"prompt": tokenizer.decode(whole), "prompt_token_ids": whole}  # vLLM tells the text of ids for echo
    run, _ = entered(prompt, {"separator": [seven]}, tokenizer)
    assert run["prompt"] == tokenizer.decode(run["prompt_token_ids"]) == tokenizer.decode([*ids, *ids[1:]])
    assert text_after("not its text", whole, ids, tokenizer) == "amber falcon"


# --- families ---------------------------------------------------------------------------------------------------------


def member(ids, annotations, name="x", rows=None, salt=None):
    """A request that names a family, as the scheduler gets it."""
    annotations = {**annotations, "family": {"name": name, "rows": rows or len(ids)}}
    return SimpleNamespace(
        kv_transfer_params={"cacheslide": annotations},
        sampling_params=SimpleNamespace(prompt_logprobs=None, max_tokens=1, detokenize=False),
        prompt_token_ids=ids,
        num_prompt_tokens=len(ids),
        cache_salt=salt,
        request_id="r",
        _block_hasher=None,
        skip_reading_prefix_cache=False,
    )


@pytest.mark.fault("family")
def test_a_family_cannot_be_joined_from_outside():
    for family in ({"name": "x", "rows": 3}, None, 5):
        with pytest.raises(VLLMValidationError, match="family is set by beam search alone"):
            entered({"prompt_token_ids": [1, 2, 3]}, {"segments": [[0, 2]], "family": family})


@pytest.mark.fault("family")
def test_a_family_is_of_one_prompt_one_tenant_and_the_same_annotations():
    planner, annotations = Planner(ServerOptions(chunk_size=8), GEOMETRY), {"segments": [[0, 16]]}
    ids = list(range(3, 43))
    first = planner.plan(member(ids, annotations))
    first.family.first = 0  # its rows were completed by reuse
    joined = planner.plan(member([*ids, 9], annotations, rows=40))
    assert joined.follows and joined.family is first.family and joined.plan is first.plan
    strangers = {
        "other tokens": member([*ids[:-1], 7], annotations),
        "shorter": member(ids[:20], annotations),
        "longer": member([*ids, 9], annotations),
        "other spans": member(ids, {"segments": [[0, 24]]}),
        "another namespace": member(ids, annotations | {"namespace": "n"}),
        "another salt": member(ids, annotations, salt="s"),
        "another share": member(ids, annotations | {"recompute_ratio": 1.0}),
    }
    for who, request in strangers.items():
        tracked = planner.plan(request)
        assert not tracked.follows and tracked.plan is not first.plan, who
        assert tracked.plan.prompt.token_ids == tuple(request.prompt_token_ids) and tracked.family is not first.family


# --- annotations at other places --------------------------------------------------------------------------------------

ANNOTATIONS = {"segments": [[0, 3]]}


@pytest.mark.fault("malformed_marks")
@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"cacheslide": ANNOTATIONS}, "cacheslide is not"),
        (
            {"extra_body": {"kv_transfer_params": {"cacheslide": ANNOTATIONS}}},
            "extra_body.kv_transfer_params.cacheslide",
        ),
        ({"vllm_xargs": {"cacheslide": "x"}}, "vllm_xargs.cacheslide"),
        ({"kv_transfer_params": {"CacheSlide": ANNOTATIONS}}, "kv_transfer_params.CacheSlide"),
        ({"kv_transfer_params": {"x": {"cache_slide": ANNOTATIONS}}}, "kv_transfer_params.x.cache_slide"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "cacheslide": {}}]}]}, "messages.0.content.0"),
        ({"sampling_params": {"cacheslide": ANNOTATIONS}}, "sampling_params.cacheslide"),
        ({"input": [{"role": "user", "cacheslide": ANNOTATIONS}]}, "input.0.cacheslide"),
        ([{"cacheslide": 1}], "0.cacheslide"),
        ({"cache__slide": ANNOTATIONS}, "cache__slide"),
        ({"kv_transfer_params.cacheslide": ANNOTATIONS}, "kv_transfer_params.cacheslide is not"),
    ],
)
def test_annotations_at_a_wrong_place_are_named(body, place):
    said = misplaced("/v1/completions", body)
    assert place in said and "kv_transfer_params.cacheslide" in said
    assert answer_to(body)[0] == 400


def test_what_is_the_users_own_is_left_alone():
    schema = {"type": "object", "properties": {"cacheslide": {"type": "string"}}}
    for body in (
        {"kv_transfer_params": {"cacheslide": {**ANNOTATIONS, "cacheslide": 1}}},  # said where annotations are read
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {"metadata": {"cacheslide": "run 5"}, "prompt": 'a text about "cacheslide"'},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"cacheslide": 1}}}]}]},
        {"sampling_params": {"extra_args": {"kv_transfer_params": {"cacheslide": ANNOTATIONS}}}},
        {"prompt": [5, 6, 7]},
        5,
    ):
        assert misplaced("/v1/completions", body) == "" and answer_to(body) == (200, json.dumps(body).encode())
    assert "takes no annotations" in misplaced("/tokenize", {"kv_transfer_params": {"cacheslide": ANNOTATIONS}})


@pytest.mark.fault("malformed_marks")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "name", ["cacheslide", "\\u0063acheslide", "cache\\u005Fslid\\u0065", "\\u0043ACHE\\u002dSLIDE"]
)
def test_a_name_in_any_spelling_of_json_is_found(name, encoding):
    status, body = answer_to(None, f'{{"x": {{"{name}": 1}}}}'.encode(encoding))
    assert status == 400 and b"is not where annotations are read" in body


@pytest.mark.fault("malformed_marks")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"kv_transfer_params": {"cacheslide": {"segmentss": [[0, 3]]}}}, "unknown key segmentss"),
        ({"kv_transfer_params": {"cacheslide": {"separator": " ", "segmentss": 1}}}, "unknown key segmentss"),
        ({"kv_transfer_params": {"cacheslide": {"segments": [[0]]}}}, "a segment must be a pair"),
        ({"kv_transfer_params": {"cacheslide": 5}}, "must be an object"),
    ],
)
def test_what_is_only_handed_on_is_checked_too(body, said):
    assert said in misplaced("/v1/completions/render", body)
    good = {"kv_transfer_params": {"cacheslide": {"separator": " ", "policy": "epic"}}}
    assert misplaced("/v1/completions/render", good) == ""


def test_annotations_in_two_places_are_refused():
    two = {"kv_transfer_params": {"cacheslide": ANNOTATIONS}, "sampling_params": {"extra_args": None}}
    assert misplaced("/inference/v1/generate", two) == ""
    two["sampling_params"]["extra_args"] = {"kv_transfer_params": {"cacheslide": {"nonsense": 1}}}
    assert "given twice" in misplaced("/inference/v1/generate", two)


def answer_to(body, raw: bytes | None = None, path: str = "/v1/completions", pieces: int = 3):
    """Status of a JSON request through the middleware, and what the app behind it read, or the error."""
    data = json.dumps(body).encode() if raw is None else raw
    size = -(-len(data) // pieces) or 1
    incoming = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(incoming)} for i, part in enumerate(incoming)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[dict] = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        read, more = b"", True
        while more:
            message = await receive()
            read, more = read + message["body"], message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": read})

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
    asyncio.run(MarksInPlace(app)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_bodies_that_are_none_go_on_as_they_came():
    for raw in (b"", b'{"cacheslide": ', b'{"cacheslide": ' + b"[" * 100_000, b'\xff"cacheslide"', b"null"):
        assert answer_to(None, raw) == (200, raw)
    status, body = answer_to({"cacheslide": {}, "x": "é" * 50}, pieces=50)
    assert status == 400 and "belong in kv_transfer_params.cacheslide" in json.loads(body)["error"]["message"]


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("malformed_marks")
def test_a_new_value_reads_nothing_again(monkeypatch, tmp_path):
    """Options and systems are read once, not once a value: each read an entry point's list or a file."""
    (tmp_path / "store.json").write_text(json.dumps({"path": str(tmp_path / "chunks"), "file_gib": 1}))
    extra = {"store": str(tmp_path / "store.json")}
    options_of(extra)
    policy_of("cacheslide")
    reads = []
    monkeypatch.setattr(systems, "load_policy", lambda name: reads.append(name) or load_policy(name))
    monkeypatch.setattr(registry, "entry_points", lambda **group: reads.append("names"))
    monkeypatch.setattr(params, "_store_config", lambda raw: reads.append(raw))
    for i in range(20):
        assert options_of(extra).policy == DEFAULT_SYSTEM
        policy_of("cacheslide", i / 20, i % 8)
        with pytest.raises(ValueError, match=f"unknown system 'nobody{i}'"):
            policy_of(f"nobody{i}")
    assert not reads
    assert options_of({"chunk_size": 7}).chunk_size == 7  # another server's


def test_options_are_built_once_an_engine(monkeypatch):
    """Whatever requests come, and where several engines of one process take turns."""
    built, plain = [], ServerOptions.from_extra_config
    monkeypatch.setattr(ServerOptions, "from_extra_config", lambda extra: built.append(extra) or plain(extra))
    engines = [config(chunk_size=size) for size in (16, 32, 48)]
    for turn in range(20):
        params = SimpleNamespace(
            extra_args={"kv_transfer_params": {"cacheslide": {"segments": [[0, 3]]}}}, max_tokens=1
        )
        prompt = {"type": "token", "prompt_token_ids": [1, 2, 3, 4, 5 + turn]}
        for engine in engines:
            _, out = taken(engine, None, prompt, params)
            assert isinstance(out.extra_args["kv_transfer_params"]["cacheslide"], Resolved)
    assert [extra["chunk_size"] for extra in built] == [16, 32, 48]
    engines[0].kv_transfer_config.kv_connector_extra_config["chunk_size"] = 64  # changed in place: read again
    assert options_of(engines[0].kv_transfer_config.kv_connector_extra_config).chunk_size == 64


# --- chats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatParams:
    """What of vLLM's own is used."""

    chat_template: str
    chat_template_kwargs: dict
    return_assistant_tokens_mask: bool = False


class Strict:
    """Renders a token a word; refuses chats that name nobody, and quotes them."""

    def __init__(self):
        self.tried = []

    def render_messages(self, messages, params):
        self.tried.append(len(messages))
        text = " ".join(m["content"] for m in messages)
        if len(messages) < 3 and "secret" in text:
            raise ValueError(f"nobody is named in {text!r}")
        return messages, {"prompt_token_ids": [sum(map(ord, word)) for word in text.split()]}


@pytest.mark.fault("tenant_key")
def test_a_templates_error_is_that_of_the_very_same_chat():
    renderer, params = Strict(), ChatParams("t", {})

    def spans(first):
        messages = [{"role": "system", "content": first}, {"role": "user", "content": "b c"}]
        messages.append({"role": "user", "content": "d"})
        _, rendered = renderer.render_messages(messages, params)
        request = SimpleNamespace(mm_features=None, prompt_token_ids=rendered["prompt_token_ids"])
        del renderer.tried[:]
        return _chat_spans({"updated": [2]}, request, {CHAT: (messages, params)}, renderer)

    before, secret = spans("hello all"), spans("my secret")
    assert before[0] and not before[1] and "my secret" in secret[1] and renderer.tried
    assert spans("hello all") == before  # the same senders: nothing of another's chat
    assert spans("my secret") == secret and not renderer.tried  # the same chat: known, and vLLM logs it once
