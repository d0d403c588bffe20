"""Whatever stands in a request's annotations: spans of its own tokens or one refusal, and nobody else's keys."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

import msgspec
from vllm.exceptions import VLLMValidationError

from cacheslide.core.keys import CacheIdentity
from cacheslide.errors import PromptError
from cacheslide.vllm.frontend.admission import CHAT, Limits, Resolved, admit
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.limits import DEPTH, NOTE, SEGMENTS, sayable, shown
from cacheslide.vllm.options import Annotations, ServerOptions
from cacheslide.vllm.scheduler.planner import Planner
from cacheslide.vllm.tenants import salted, tenant_of, unsalted

pytestmark = pytest.mark.slow

LIMIT, ROWS = 64, 40
GEOMETRY = Geometry("m", "torch.float32", 8, 6, 64, 384, 4, LIMIT)
IDS = [3 + (i * i) % 11 for i in range(ROWS)]
KEYS = (
    "segments separator roles messages find policy share layer namespace encode history release note family"
    " cacheslide x"
).split()

numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, -(10**30), 10**400])
texts = st.text(st.characters(exclude_categories=[]), max_size=8)  # lone surrogates too
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rows = st.integers(0, ROWS)
near = {
    "segments": st.lists(st.lists(rows, min_size=2, max_size=2), max_size=4) | st.just([[0, 4], [9, 30]]),
    "separator": st.lists(st.sampled_from(IDS), min_size=1, max_size=2) | st.just(True),
    "roles": st.lists(st.sampled_from(["reuse", "recompute"]), max_size=4),
    "messages": st.sampled_from(["auto", {"updated": [0]}, {"fixed": [-1]}, ["reuse"] * 3]),
    "find": st.booleans(),
    "policy": st.sampled_from(["cacheslide", "epic", "promptcache", "recompute", "cacheblend", "nobody"]),
    "recompute_ratio": st.floats(0, 1),
    "share": st.floats(0, 1),
    "layer": st.integers(0, 9),
    "namespace": st.sampled_from(["", "a", "a\0", "\0a"]),
    "encode": st.sampled_from(["now", "later", "off"]),
    "history": rows,
    "release": st.booleans(),
    "note": st.text(max_size=4),
    "family": st.fixed_dictionaries({"name": st.text(max_size=2), "rows": rows}),
}


@st.composite
def annotations(draw):
    """An object that looks like annotations: most of its values could be meant, some are anything."""
    way = draw(st.sampled_from(["segments", "separator", "messages", "find"]))
    names = [way, *draw(st.lists(st.sampled_from(KEYS), max_size=3))]
    return {name: draw(near.get(name, anything) if draw(st.integers(0, 5)) else anything) for name in names}


class Renderer:
    """Tokens without a tokenizer: a chat of three messages of ten tokens each."""

    tokenizer = None

    def render_messages(self, messages, params):
        return messages, {"prompt_token_ids": IDS[: 10 * len(messages)]}


def chat_params():
    from vllm.renderers.params import ChatParams

    return ChatParams()


def taken(said, salt=None, params=None):
    """A chat request with these annotations behind the door."""
    extra = {"kv_transfer_params": {"cacheslide": said} if params is None else params}
    request = SimpleNamespace(
        prompt_token_ids=IDS, mm_features=None, sampling_params=SimpleNamespace(extra_args=extra), cache_salt=salt
    )
    chat = [{"role": role, "content": "x"} for role in ("system", "user", "tool")]
    prompt = {"prompt_token_ids": IDS, CHAT: (chat, chat_params())}
    admit(request, prompt, Renderer(), {"chunk_size": 8, "separator": "[4]"}, Limits(LIMIT, 8))
    return request


def at_engine(request, planner):
    """What the scheduler's half tracks of it, behind vLLM's transport."""
    extra = msgspec.msgpack.decode(msgspec.msgpack.encode(request.sampling_params.extra_args))
    ids = request.prompt_token_ids
    sampling = SimpleNamespace(prompt_logprobs=None, max_tokens=1, detokenize=True)
    return planner.plan(
        SimpleNamespace(
            kv_transfer_params=extra["kv_transfer_params"],
            sampling_params=sampling,
            prompt_token_ids=ids,
            num_prompt_tokens=len(ids),
            cache_salt=request.cache_salt,
            request_id="r",
            _block_hasher=None,
            skip_reading_prefix_cache=False,
        )
    )


@pytest.mark.fault("malformed_marks")
@settings(max_examples=120, deadline=None)
@given(anything | annotations())
def test_annotations_are_parsed_or_refused(said):
    try:
        parsed = Annotations.parse({"cacheslide": said})
    except PromptError as error:
        str(error).encode()
        assert len(str(error)) < 4000
    else:
        assert parsed is None or isinstance(parsed, Annotations)


PLANNER = Planner(ServerOptions(chunk_size=8), GEOMETRY)


@pytest.mark.fault("malformed_marks")
@settings(max_examples=250, deadline=None)
@given(annotations() | anything)
@example({"segments": [[0, 4]], "share": 10**400})
@example({"segments": [[0, 4]], "layer": 2**64})
@example({"segments": [[0, 4]], "layer": 99})
@example({"segments": [[0, 4]], "note": "\ud800"})
@example({"segments": [[0, 4]], "share": float("nan")})
@example({"messages": {"fixed": 5}})
@example({"messages": {"roles": {"user": []}}})
@example({"segments": [[0, 4]], "family": {"name": "x", "rows": 3}})
def test_a_request_is_refused_or_planned_on_its_own_tokens(said):
    try:
        request = taken(said)
    except VLLMValidationError as error:
        str(error).encode()
        return
    if said is None:
        return
    assert "family" not in said
    tracked = at_engine(request, PLANNER)
    if tracked is not None and tracked.plan is not None:
        assert tracked.plan.prompt.token_ids == tuple(request.prompt_token_ids) and tracked.rows <= LIMIT


@pytest.mark.fault("malformed_marks")
@settings(max_examples=80, deadline=None)
@given(st.dictionaries(texts | st.sampled_from(KEYS), anything, max_size=3))
def test_parameters_beside_the_annotations_are_passed_on_or_refused(params):
    try:
        request = taken(None, params=params)
    except VLLMValidationError as error:
        str(error).encode()
    else:
        msgspec.msgpack.encode(request.sampling_params.extra_args)
        assert not (set(params) - {"cacheslide"}) & (set(KEYS) - {"x"})


@pytest.mark.fault("malformed_marks")
def test_what_is_nested_deeply_is_refused():
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    for said in (
        {"segments": deep},
        {"segments": [[0, 4]], "note": deep},
        {"messages": deep},
        {"separator": deep},
        deep,
    ):
        with pytest.raises(VLLMValidationError):
            taken(said)
    with pytest.raises(VLLMValidationError, match=f"more than {DEPTH} levels"):
        taken(None, params={"other": deep})
    assert taken(None, params={"other": [[[{"a": [1]}]]]})


@pytest.mark.fault("malformed_marks")
def test_what_is_too_much_is_refused_before_it_is_looked_at():
    for said, why in (
        ({"segments": [[0, 4]] * (SEGMENTS + 1)}, f"of at most {SEGMENTS}"),
        ({"segments": [[0, 4]], "note": "n" * (NOTE + 1)}, f"of at most {NOTE}"),
        ({"segments": [[0, 4]], "namespace": "n" * 300}, "of at most 256"),
        ({"segments": [[0, 4]], "policy": "n" * 300}, "of at most 256"),
        ({"separator": [4] * 300}, "of at most 256"),
        ({"segments": [[0, 4]], "x" * 10**6: 1}, "unknown key xxx"),
    ):
        with pytest.raises(VLLMValidationError, match=why) as refused:
            taken(said)
        assert len(str(refused.value)) < 4000


@given(anything)
@settings(max_examples=60, deadline=None)
def test_whatever_is_wrong_can_be_said(value):
    assert len(shown(value)) <= 2000 and shown(value).encode()
    assert sayable("\ud800é" * 2000).encode()


def test_annotations_of_the_door_cannot_be_sent():
    """JSON makes plain objects: what a client writes never passes for annotations that were checked."""
    assert type(json.loads('{"segments": []}')) is dict
    assert isinstance(
        taken({"segments": [[0, 4]]}).sampling_params.extra_args["kv_transfer_params"]["cacheslide"], Resolved
    )


# --- whose KV it is -------------------------------------------------------------------------------------------------

parts = st.text(st.sampled_from("ab\0:19") | st.characters(exclude_categories=["Cs"]), max_size=6)


@pytest.mark.fault("tenant_key")
@settings(max_examples=150, deadline=None)
@given(st.tuples(parts, parts, parts), st.tuples(parts, parts, parts))
@example(("", "a\0b", "c"), ("", "a", "b\0c"))
@example(("", "\0", ""), ("\0", "", ""))
def test_different_tenants_have_different_keys(one, other):
    assert (tenant_of(*one) == tenant_of(*other)) == (one == other)


@pytest.mark.fault("tenant_key")
@settings(max_examples=150, deadline=None)
@given(st.tuples(parts, parts), st.tuples(parts, parts))
@example(("a", "b"), ("", salted("a", "b")))
def test_different_namespaces_and_salts_have_different_block_hashes(one, other):
    assert (salted(*one) == salted(*other)) == (one == other)
    assert unsalted(salted(*one)) == one[1]


@given(parts)
def test_any_salt_has_one_that_it_was_made_of(salt):
    assert isinstance(unsalted(salt), str) and isinstance(unsalted("\0cacheslide:" + salt), str)


def test_keys_of_stores_written_before_stay_as_they_were():
    for triple in (("", "", ""), ("s", "", ""), ("", "n", ""), ("s", "n", "x")):
        assert tenant_of(*triple) == "\0".join(triple)
    assert salted("", "x") == "x" and salted("", "") == ""
    empty = CacheIdentity("m", "d", namespace=tenant_of("", "", ""))
    assert empty.digest() == CacheIdentity("m", "d", namespace="\0\0").digest()


@pytest.mark.fault("tenant_key")
def test_a_namespace_is_part_of_block_hashes_and_of_chunk_keys():
    keys = {}
    for namespace, salt in (("", None), ("a", None), ("", "a"), ("a", "b"), ("a\0b", "c"), ("a", "b\0c")):
        request = taken({"segments": [[0, 16]], "namespace": namespace}, salt)
        assert (request.cache_salt or "") == (salted(namespace, salt or ""))
        keys[namespace, salt] = at_engine(request, Planner(ServerOptions(chunk_size=8), GEOMETRY)).plan.keys[0]
    assert len(set(keys.values())) == len(keys)


@pytest.mark.fault("tenant_key")
def test_spans_are_found_among_those_of_the_same_tenant_only():
    planner = Planner(ServerOptions(chunk_size=8, span_tokens=4), GEOMETRY)

    def found(namespace, salt):
        tracked = at_engine(taken({"find": True, "namespace": namespace}, salt), planner)
        return len(tracked.spans)

    assert found("a\0b", "c") == 0 == found("a", "b\0c") == found("", "c") == found("a\0b", None)
    assert found("a\0b", "c") > 0
