"""The synthetic task: splits, worlds, rendering, rows."""

import hashlib
import json
from collections import Counter
from random import Random

import pytest

from cacheslide.errors import DataError
from harness.tasks.synthetic import MIXES, SPLITS, STYLES, examples, read_rows, render, words, write_rows
from harness.tasks.synthetic.prompts import chunks_for, prompts
from harness.tasks.synthetic.world import build_world, draw_questions, draw_root_values
from tests.helpers.places import ROOT

SHIPPED = ROOT / "datasets" / "synthetic"
COMBINATIONS = [(style, mix) for style in STYLES for mix in MIXES]


def test_no_word_is_in_two_lists():
    every = [*words.FIRST, *words.SECOND, *words.MATERIAL, *words.MARK, *(w for g in words.FILLER.values() for w in g)]
    assert [w for w, n in Counter(every).items() if n > 1] == []


def test_splits_share_no_name_and_no_value():
    names = {s: {(a, b) for b, firsts in words.names(s).items() for a in firsts} for s in SPLITS}
    values = {s: set(words.values(s)) for s in SPLITS}
    for found, total in ((names, 64 * len(words.SECOND)), (values, 32 * 32)):
        assert sum(map(len, found.values())) == total
        assert len(set().union(*found.values())) == total
    assert len(words.names("test")) >= 150  # a 4k prompt needs that many different second words


@pytest.mark.parametrize("mix", MIXES)
def test_a_world_refers_only_backwards_and_keeps_to_its_mix(mix):
    rule = MIXES[mix]
    for seed in range(20):
        rng = Random(seed)
        world = build_world(rng, rule, "test", [10, 9, 11])
        seconds = [n.name[1] for n in world.nodes]
        assert len(set(seconds)) == len(seconds)
        for i, node in enumerate(world.nodes):
            assert node.target is None or node.target < i
            assert len(world.chain(i)) == node.depth + 1
            assert node.depth <= (rule.volatile_depth if node.root is not None else rule.stable_depth)


def test_every_root_changes_both_words_between_turns():
    rng = Random(0)
    old = draw_root_values(rng, "test", 8)
    new = draw_root_values(rng, "test", 8, old)
    assert all(a != c and b != d for (a, b), (c, d) in zip(old, new, strict=True))


def test_about_forty_percent_of_the_questions_are_volatile():
    got = [q.volatile for e in examples("hotpotqa", "deep", "test", 3, 60, 1024) for q in e.questions]
    assert 0.33 < sum(got) / len(got) < 0.47


@pytest.mark.parametrize(("style", "mix"), COMBINATIONS)
def test_statements_are_six_pieces_and_documents_long_enough(style, mix):
    prompt = next(prompts(style, mix, "test", 0, 1, 1024))
    for document in prompt.documents:
        assert render.CHUNK_TOKENS[0] <= len(document.pieces()) <= 345
        assert all(len(s.pieces) == 6 for s in document.sentences if s.node is not None)


@pytest.mark.parametrize(("style", "mix"), COMBINATIONS)
def test_answers_follow_from_the_text_alone(style, mix):
    """Resolve every question by reading the rendered prompt, as a person would."""
    verbs = {v.strip() for v in (*render._CONSTANT_VERBS, *render._LINK_VERBS, "=", "->")}
    for example in examples(style, mix, "test", 5, 3, 1024):
        tokens, bound = " ".join(s.text for s in example.segments[1:]).split(), {}
        for a, b, verb, c, d in zip(*(tokens[i:] for i in range(5)), strict=False):
            if b in words.SECOND and verb in verbs:
                bound[a, b] = (c, d)
        for question in example.questions:
            at, hops = tuple(question.text.split()[-3:-1]), -1
            while at in bound:
                at, hops = bound[at], hops + 1
            assert (" ".join(at),) == question.answers
            assert hops == question.depth


def test_the_turns_differ_in_the_updated_segment_only():
    example = next(examples("swebench", "deep", "test", 0, 1, 1024))
    changed = [a.name for a, b in zip(example.segments, example.previous, strict=True) if a.text != b.text]
    assert changed == [render.NOTES_PATH]
    assert [s.role for s in example.segments] == ["reuse", "recompute", "reuse", "reuse", "reuse"]


@pytest.mark.parametrize(("style", "mix"), COMBINATIONS)
def test_shipped_rows_are_reproduced_byte_for_byte(style, mix, tmp_path):
    name = f"{style}-{mix}-test.jsonl"
    sums = dict(reversed(line.split()) for line in (SHIPPED / "SHA256SUMS").read_text().splitlines())
    digest = write_rows(tmp_path / name, style, mix, "test", 0, 2, 1024)
    assert digest == sums[name] == hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest()
    assert list(read_rows(SHIPPED / name)) == list(examples(style, mix, "test", 0, 2, 1024))


@pytest.mark.parametrize("style", STYLES)
def test_a_missing_field_is_named(style, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, style, "deep", "test", 0, 1, 512)
    path.write_text(path.read_text().replace('"answer"', '"reply"').replace('"patch"', '"diff"'))
    with pytest.raises(DataError, match=r"field '(answer|patch)'"):
        list(read_rows(path))


def changes(value, path=()):
    """Copies of a JSON value with one place in it, or all of it, replaced by something odd."""
    yield from (None, 5, "", "x", [], [None], {}, {"a": 1})
    if isinstance(value, dict):
        for k in value:
            yield from ({**value, k: other} for other in changes(value[k]))
    elif isinstance(value, list):
        for i in range(min(2, len(value))):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in changes(value[i]))


@pytest.mark.parametrize("style", STYLES)
def test_an_odd_row_is_an_example_or_one_line(style, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, style, "deep", "test", 0, 1, 512)
    rows = path.read_text().splitlines(keepends=True)
    refused = 0
    for odd in changes(json.loads(rows[-1])):
        path.write_text("".join(rows[:-1]) + json.dumps(odd) + "\n")
        try:
            found = list(read_rows(path))
        except DataError as wrong:
            assert str(wrong).startswith(str(path)) and "\n" not in str(wrong)
            refused += 1
        else:
            assert all(isinstance(answer, str) for e in found for q in e.questions for answer in q.answers)
    assert refused > 50


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[" * 100_000, "not valid JSON (nested too deeply)"),
        (b'{"id":', "not valid JSON (Expecting value"),
        (b"9" * 5000, "not valid JSON (Exceeds the limit"),
        (b"5", "the row is no object"),
        (b'{"id": "\xff"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError) as wrong:
        list(read_rows(path))
    assert str(wrong.value).startswith(f"{path}:1: {said}")


def test_wrong_arguments_are_refused_and_leave_no_file(tmp_path):
    for style, mix, split, tokens in (
        ("haiku", "deep", "test", 1024),
        ("hotpotqa", "dense", "test", 1024),
        ("hotpotqa", "deep", "dev", 1024),
        ("hotpotqa", "deep", "test", 100000),
    ):
        with pytest.raises(DataError):
            write_rows(tmp_path / "rows.jsonl", style, mix, split, 0, 1, tokens)
    assert list(tmp_path.iterdir()) == []


def test_lengths_map_to_documents_and_questions_are_distinct():
    assert [chunks_for(t) for t in (512, 1024, 2048, 4096)] == [1, 3, 6, 13]
    world = build_world(Random(1), MIXES["deep"], "test", [10])
    asked = draw_questions(Random(2), world, 99)
    assert sorted(asked) == list(range(8, 18))
