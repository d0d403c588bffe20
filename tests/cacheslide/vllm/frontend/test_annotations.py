"""Ways to mark a prompt, without an engine: separators, chat messages, spans seen before, and what is refused."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError

from cacheslide.errors import ConfigError, PromptError
from cacheslide.vllm.frontend.admission import admit
from cacheslide.vllm.frontend.chat import annotate_messages, message_roles
from cacheslide.vllm.frontend.separators import cut, split_ids
from cacheslide.vllm.options import Annotations, ServerOptions
from cacheslide.vllm.scheduler.span_memory import SpanMemory, content_cuts
from tests.helpers.chat_template import TEMPLATE

pytestmark = pytest.mark.slow

MODEL = "models/tiny-llama-12m"
CHAT = [
    {"role": "system", "content": "Answer with the value that the name stands for ."},
    {"role": "user", "content": "what is amber falcon ?"},
    {"role": "assistant", "content": "copper seven ."},
    {"role": "tool", "content": "silver otter is bone ten ."},
    {"role": "user", "content": "what is silver otter ?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


# --- separators --------------------------------------------------------------------------------------------------


def test_ids_are_cut_at_every_occurrence():
    assert split_ids([1, 7, 8, 2, 3, 7, 7, 8], [7, 8]) == [[1], [2, 3, 7], []]
    assert split_ids([7, 7, 7], [7, 7]) == [[], [7]]
    ids, spans = cut([7, 8], ["reuse", "recompute", "reuse"], None, [1, 7, 8, 2, 3, 7, 8], None)
    assert ids == [1, 2, 3] and spans == [(0, 1)]  # an empty part marks nothing
    ids, spans = cut([0], None, None, [5, 5, 0, 6, 0, 4, 4, 0, 9], None)
    assert ids == [5, 5, 6, 4, 4, 9] and spans == [(0, 2), (3, 5)]


def test_a_text_is_cut_before_it_is_tokenised(tokenizer):
    """Across the separator the tokenizer would merge; cut first, a part has its tokens whatever stands beside it."""
    parts = ["You answer from no", "tes of to", "day .\nA document", " about amber falcon"]
    glued = " # ".join(parts)
    ids, spans = cut(" # ", None, glued, tokenizer.encode(glued), tokenizer)
    alone = [tokenizer.encode(p, add_special_tokens=False) for p in parts]
    special = tokenizer.encode("")
    assert ids == special + [t for part in alone for t in part]
    starts = np.cumsum([len(special) + len(alone[0]), *map(len, alone[1:])]).tolist()
    assert spans == [(0, starts[0]), (starts[1], starts[2])]
    assert ids != tokenizer.encode("".join(parts))  # the control: here joining does merge
    changed = glued.replace("tes of to", "something else")
    again, moved = cut(" # ", None, changed, tokenizer.encode(changed), tokenizer)
    assert [again[a:b] for a, b in moved] == [ids[a:b] for a, b in spans]


def test_a_separator_that_cannot_be_found_says_so(tokenizer):
    text = "a document # about notes"
    ids = tokenizer.encode(text)
    with pytest.raises(PromptError, match="came as ids"):
        cut("@@", None, None, ids, tokenizer)
    with pytest.raises(PromptError, match="'@@' is not in the prompt"):
        cut("@@", None, text, ids, tokenizer)
    with pytest.raises(PromptError, match=r"token ids \[3, 3, 3\] are not"):
        cut([3, 3, 3], None, text, ids, tokenizer)
    with pytest.raises(PromptError, match="2 parts, but 3 roles"):
        cut("#", ["reuse"] * 3, text, ids, tokenizer)
    with pytest.raises(PromptError, match="roles must be a list"):
        cut("#", ["keep", "reuse"], text, ids, tokenizer)
    with pytest.raises(PromptError, match="truncated"):
        cut("#", None, text, ids[:-2], tokenizer)
    with pytest.raises(PromptError, match="needs a tokenizer"):
        cut("#", None, None, ids, None)
    with pytest.raises(PromptError, match="separator is empty"):
        cut("", None, text, ids, tokenizer)
    with pytest.raises(PromptError, match="nothing but separators"):
        cut([5], None, None, [5, 5], None)


# --- chat messages ------------------------------------------------------------------------------------------------


def test_roles_of_messages():
    def short(annotations):
        return "".join(r[2] for r in message_roles(annotations, CHAT))  # u: reuse, c: recompute

    assert short("auto") == "uuuuc"
    assert short({"roles": {"tool": "recompute"}}) == "uuucc"
    assert short({"roles": {"user": "recompute"}, "fixed": [-1]}) == "ucuuu"
    assert short({"updated": [0]}) == "cuuuc"
    assert short(["recompute", "reuse", "reuse", "reuse", "reuse"]) == "cuuuu"
    for wrong, said in [
        (["reuse"], "1 roles for 5 messages"),
        ("all", "'auto', a list"),
        ({"fixd": []}, "unknown key fixd"),
        ({"fixed": [5]}, "names message 5, but there are 5"),
        ({"updated": [True]}, "names message True"),
        ({"roles": {"user": "keep"}}, "must be 'reuse' or 'recompute', not 'keep'"),
        ({"roles": []}, "from sender to role"),
    ]:
        with pytest.raises(PromptError, match=said):
            message_roles(wrong, CHAT)


def test_messages_lie_where_the_template_put_them(tokenizer):
    annotated = annotate_messages(tokenizer, CHAT, {"updated": [1]}, chat_template=TEMPLATE)
    whole = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=False, add_generation_prompt=True, chat_template=TEMPLATE
    )
    assert annotated.token_ids == whole and not annotated.note
    said = [tokenizer.decode(whole[a:b]) for a, b in annotated.segments]
    assert [text.count("<s>") for text in said] == [1, 2]
    assert "Answer with" in said[0] and "copper seven" in said[1] and "bone ten" in said[1]
    assert not any("what is" in text for text in said)
    grown = [*CHAT, {"role": "assistant", "content": "bone ten ."}, {"role": "user", "content": "what is amber ?"}]
    longer = annotate_messages(tokenizer, grown, chat_template=TEMPLATE)
    [(start, end)] = longer.segments
    assert start == 0 and longer.token_ids[:end][: len(whole)] == whole
    assert "bone ten" in tokenizer.decode(longer.token_ids[len(whole) : end])
    params = annotated.params(policy="epic")["cacheslide"]
    assert Annotations.parse({"cacheslide": json.loads(json.dumps(params))}).segments == tuple(annotated.segments)


def test_a_boundary_that_the_template_does_not_allow_is_given_up(tokenizer):
    """A template that writes the system prompt into the last message, and one that refuses short chats."""
    late = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<s>' + m['role'] + '\n' }}"
        "{% if loop.last %}{{ messages[0]['content'] }}{% endif %}{{ m['content'] + '</s>\n' }}{% endif %}{% endfor %}"
    )
    annotated = annotate_messages(tokenizer, CHAT, {"updated": [2]}, chat_template=late)
    assert "differently when others follow" in annotated.note
    assert annotated.segments == [(0, 0)] or not annotated.segments
    strict = "{% if messages|length < 2 %}{{ raise_exception('too short') }}{% endif %}" + TEMPLATE
    annotated = annotate_messages(tokenizer, CHAT, {"updated": [1, 3]}, chat_template=strict)
    assert "does not render the first 1 messages alone (too short)" in annotated.note
    [(start, end)] = annotated.segments
    assert "copper seven" in tokenizer.decode(annotated.token_ids[start:end])
    assert annotated.params()["cacheslide"]["note"] == annotated.note


# --- spans seen before --------------------------------------------------------------------------------------------


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 5000, n).tolist()


def test_cuts_follow_the_content():
    text = tokens(6000, 1)
    cuts = content_cuts(text, 16, 64, 256)
    assert cuts[0][0] == 0 and cuts[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    sizes = [b - a for a, b in cuts[:-1]]
    assert min(sizes) >= 16 and max(sizes) <= 256 and 40 < sum(sizes) / len(sizes) < 100
    moved = content_cuts(tokens(77, 2) + text, 16, 64, 256)
    ends = {b for _, b in cuts}
    assert len(ends & {b - 77 for _, b in moved}) > 0.9 * len(ends)
    assert content_cuts([5] * 100, 4, 16, 32)[0] == (0, 32) and content_cuts([], 4, 16, 64) == []


def test_found_spans_keep_the_order_of_the_earlier_prompt():
    memory = SpanMemory(32, 10_000)
    a, b, c = (tokens(300, seed) for seed in (1, 2, 3))
    first = tokens(40, 10) + a + tokens(60, 11) + b + c
    assert memory.match("t", first) == []
    second = tokens(90, 12) + a + tokens(20, 13) + b + c
    found = memory.match("t", second)
    covered = sum(end - start for start, end in found)
    assert 0.8 * 900 < covered <= 900
    assert all(second[s:e] == a[s - 90 : e - 90] for s, e in found if e <= 390)
    assert all(x[1] <= y[0] for x, y in pairwise(found))
    stuck = tokens(90, 12) + a + tokens(20, 15) + b + c  # the first update has stayed: the fixed spans are the same
    assert [(s, e) for s, e in memory.match("t", stuck) if s >= 100] == [(s, e) for s, e in found if s >= 100]
    assert memory.match("t", stuck)[0] == found[0]
    swapped = SpanMemory(32, 10_000)
    swapped.match("t", first)
    rows = [row for s, e in swapped.match("t", c + tokens(50, 14) + a) for row in range(s, e)]
    assert rows and (max(rows) < 300 or min(rows) >= 350)  # one of the two, never both: their order changed


def test_memory_is_bounded_forgets_the_oldest_and_keeps_tenants_apart():
    memory = SpanMemory(32, 60)
    prompts = [tokens(600, seed) for seed in range(6)]
    for p in prompts:
        memory.match("t", p)
        assert memory.held <= 60
    assert memory.match("t", prompts[0]) == [] and memory.match("u", prompts[-1]) == []
    assert sum(e - s for s, e in memory.match("t", prompts[0])) == 600
    grown = prompts[0] + tokens(100, 9)
    before = memory.held
    assert len(memory.match("t", grown)) >= 5 and memory.held < before + len(content_cuts(grown, *memory.sizes))
    memory.match("t", tokens(20_000, 50))  # longer than what may be known: not learnt
    memory.clear()
    assert memory.held == 0 and not memory._where and memory.match("t", grown) == []


# --- at the door --------------------------------------------------------------------------------------------------


def asked(annotations, ids=(1, 5, 6, 7, 8), text=None, **options):
    """A request as vLLM's input processor made it, after `admit`."""
    sampling = SimpleNamespace(extra_args={"kv_transfer_params": {"cacheslide": annotations}})
    request = SimpleNamespace(prompt_token_ids=list(ids), sampling_params=sampling, mm_features=None)
    prompt = {"prompt_token_ids": list(ids)} | ({"prompt": text} if text else {})
    admit(request, prompt, SimpleNamespace(tokenizer=None), options)
    return request.prompt_token_ids, request.sampling_params.extra_args["kv_transfer_params"]["cacheslide"]


def test_separators_leave_the_prompt_and_become_segments():
    annotations = {"separator": [6], "roles": ["recompute", "reuse"], "recompute_ratio": 0.5}
    ids, resolved = asked(annotations)
    assert ids == [1, 5, 7, 8] and resolved == {"segments": [(2, 4)], "recompute_ratio": 0.5}
    assert annotations["separator"] == [6]  # what the client holds is not written to
    assert asked({"separator": True}, separator="[6]")[1] == {"segments": [(0, 2)]}
    assert asked({"roles": ["recompute", "reuse"]}, separator=[6])[1] == {"segments": [(2, 4)]}
    assert asked({"find": True}) == ([1, 5, 6, 7, 8], {"find": True})


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"separator": True}, "no separator of its own"),
        ({"separator": [6], "segments": [[0, 1]]}, "segments and separator are two ways"),
        ({"find": True, "messages": "auto"}, "messages and find are two ways"),
        ({"separator": 6}, "separator must be a text"),
        ({"separator": [-1]}, "separator must be a text"),
        ({"messages": "auto"}, "in a chat request only"),
        ({"find": "yes"}, "find must be true or false"),
        ({"find": True, "history": 2}, "give no segments and no history"),
        ({"segments": [[0, 3]], "history": 2}, "starts inside the segment"),
        ({"segments": [], "history": 9}, "history starts at row 9 of 5"),
        ({"segments": [], "history": -1}, "history starts at row -1 of 5"),
        ({"segments": [], "history": True}, "history must be the row"),
        ({"segments": [], "history": 0, "note": 3}, "note must be a string"),
    ],
)
def test_annotations_that_make_no_sense_are_refused(annotations, said):
    with pytest.raises(VLLMValidationError, match=said):
        asked(annotations)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"separator": "[1, 2.5]"}, "separator must be"),
        ({"separator": [-1]}, None),
        ({"find_spans": "yes"}, "find_spans must be"),
        ({"executor_graphs": 1}, "executor_graphs must be"),
        ({"span_tokens": 2}, "span_tokens must be"),
        ({"max_generation": -1}, "max_generation must be"),
    ],
)
def test_options_that_make_no_sense_stop_the_server(options, said):
    with pytest.raises(ConfigError, match=said or "separator must be"):
        ServerOptions.from_extra_config(options)


def test_a_separator_that_looks_like_a_list_but_is_none_is_a_text():
    assert ServerOptions(separator="[SEP]").own_separator == "[SEP]"
    assert ServerOptions(separator="[1, 2]").own_separator == [1, 2]
