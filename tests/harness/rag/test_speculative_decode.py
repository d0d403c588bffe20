"""Decoding with retrieval on the way: promotions never change an answer, and a steady context is plain decoding."""

from dataclasses import replace

import pytest

from cacheslide.errors import ConfigError, StoreError
from harness.rag.speculative_decode import DecodeSettings, decode_sample
from tests.helpers.made_passages import gemma, passage_row
from tests.helpers.rag import manager, prompts

pytestmark = pytest.mark.slow

SETTINGS = DecodeSettings(k=2, max_new_tokens=9, stride=2, ahead=1, promotions=2)
RANKED = [0, 1, 2, 3, 4, 5]


class Wandering:
    """An index that asks for other passages the longer the query gets; `steady` ones stay."""

    def __init__(self, steady=False):
        self.steady, self.queries = steady, []

    def scores(self, query):
        self.queries.append(query)
        first = 0 if self.steady else len(self.queries) % 5
        return [float(i in (first, first + 1)) for i in range(6)]


@pytest.fixture(autouse=True)
def endless(monkeypatch):
    """Nothing stops a random model's text."""
    monkeypatch.setattr(type(gemma()), "stop_ids", lambda self: frozenset())


def decode(index=None, settings=SETTINGS, rest="placeholder", **more):
    return decode_sample(manager(**more), prompts(), passage_row(0), index or Wandering(), RANKED, settings, rest)


def test_promotions_change_times_and_no_token():
    plain, figures = decode(settings=replace(SETTINGS, promotions=0))
    assert figures["promotions"] == figures["hits"] == 0 < figures["misses"] and len(plain.ids) == 9
    for promotions in (1, 2, 6):
        for rest in ("placeholder", "cpu"):
            fast, other = decode(settings=replace(SETTINGS, promotions=promotions), rest=rest)
            assert fast.ids == plain.ids and other["promotions"] > 0
            assert [p["passages"] for p in other["prefills"]] == [p["passages"] for p in figures["prefills"]]
            if promotions == 6:  # all that the proxy sees a reason for
                assert other["hits"] > 0 and other["misses"] < figures["misses"]


def test_retrievals_see_the_text_so_far_and_prefills_reuse_all_chunks():
    index = Wandering()
    decoder, figures = decode(index)
    assert figures["retrievals"] == len(index.queries) == 4
    row = passage_row(0)
    for number, query in enumerate(index.queries, 1):
        assert query == f"{row.question} {gemma().decode(decoder.ids[: 2 * number])}"
    for prefill in figures["prefills"]:
        assert prefill["chunks_hit"] == 3 and not prefill["fallback"]
    assert [p["step"] for p in figures["prefills"]] == [0, 2, 4, 6, 8]


def test_a_steady_context_is_one_prefill_and_plain_greedy_decoding():
    decoder, figures = decode(Wandering(steady=True))
    made, sample = manager(), prompts()
    made.encode([sample.head, *sample.passages[:2]], "device")
    state = made.engine.prefill(sample.prompt([0, 1]), room=9)
    assert decoder.ids == made.engine.generate(state, state.logits, 9, frozenset())
    assert len(figures["prefills"]) == 1 and figures["retrievals"] == 4 and figures["hits"] == figures["misses"] == 0
    assert figures["wasted_promotions"] == figures["promotions"] > 0


def test_an_answer_that_ends_is_not_decoded_further(monkeypatch):
    whole, _ = decode(Wandering(steady=True))
    monkeypatch.setattr(type(gemma()), "stop_ids", lambda self: frozenset({whole.ids[3]}))
    decoder, figures = decode(Wandering(steady=True))
    first = whole.ids.index(whole.ids[3])
    assert decoder.ids == whole.ids[:first] and figures["tokens"] == first


def test_no_forecast_where_no_retrieval_follows():
    _, figures = decode(settings=replace(SETTINGS, max_new_tokens=2))
    assert figures["promotions"] == figures["retrievals"] == 0 and figures["tokens"] == 2


def test_a_device_too_small_for_a_prompt_is_one_line():
    _, figures = decode(Wandering(steady=True), settings=replace(SETTINGS, promotions=0))
    with pytest.raises(StoreError, match="cannot hold a prompt's 3 chunks"):
        decode(device_bytes=figures["device_bytes"] - 1)


def test_a_small_device_still_gives_the_same_answer():
    plain, figures = decode(settings=replace(SETTINGS, promotions=0))
    _, least = decode(Wandering(steady=True), settings=replace(SETTINGS, promotions=0))
    small, tight = decode(device_bytes=int(least["device_bytes"] * 1.35), settings=replace(SETTINGS, promotions=1))
    assert small.ids == plain.ids and tight["device_bytes"] < figures["device_bytes"]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"stride": 0}, {"promotions": -1}, {"ahead": 2}, {"max_new_tokens": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        replace(SETTINGS, **wrong)
