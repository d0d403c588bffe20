"""The ledger task: what its text says, how turns differ, and that no static choice of tokens finds its evidence."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch

from baselines.random_tokens import RandomTokens
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import DataError
from harness.experiments.rules.static_cells import Forms
from harness.tasks.data import draw_examples, read_examples, write_dataset
from harness.tasks.ledger import STYLES, examples, read_rows, write_rows
from harness.tasks.ledger.prompts import Prompt, answer, draw_prompt, prompts
from harness.tasks.ledger.world import FIELDS, Shape
from harness.tasks.synthetic.words import names
from harness.training.ledger.tokens import ledger_tokenizer
from tests.helpers.ledger_readers import answers_with, read_text

pytestmark = pytest.mark.slow

GAIN = 3.0  # points of F1 that a static choice may gain over random tokens


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_an_independent_reader_of_the_text_gives_every_answer(style, tokens):
    for example in examples(style, "test", 3, 12, tokens):
        held = read_text("".join(s.text for s in example.segments))
        before = read_text("".join(s.text for s in example.previous))
        for question in example.questions:
            name = " ".join(question.text.split()[-3:-1])
            told, was = (" ".join(h[name, f] for f in FIELDS) for h in (held, before))
            assert (told,) == question.answers
            assert question.volatile == (told != was)


@pytest.mark.parametrize("style", STYLES)
def test_turns_share_their_documents_and_differ_in_what_is_fresh(style):
    for prompt in prompts(style, "validation", 0, 5, 2048):
        one, two = prompt.turns
        assert [d for d in one if not d.updated] == [d for d in two if not d.updated] and len(one) > 5
        assert [d.updated for d in one].count(True) == 2
        for d, e in zip(one, two, strict=True):
            if d.updated:
                values = [{e.slot: e.value for e, _ in x.evidence()} for x in (d, e)]
                shared = values[0].keys() & values[1].keys()
                assert shared and all(values[0][s] != values[1][s] for s in shared) and d != e


def test_what_reuse_must_lose_is_there():
    told, stale, again, depths = [], [], [], Counter()
    for style in STYLES:
        for p in prompts(style, "test", 0, 40, 2048):
            entered = Counter(e.slot for d in p.turns[1] for e, _ in d.evidence())
            for name, half_stale in zip(p.asked, answers_with(p, set()), strict=True):
                for f, word in enumerate(answer(p, 1, name)):
                    told.append(word)
                    stale.append(half_stale[f] != word)
                    again.append(entered[name, f] > 1)
                    depths[p.held[1][name, f].depth] += 1
    n = len(told)
    assert 0.3 < sum(stale) / n < 0.6 and 0.25 < sum(again) / n < 0.6
    assert all(depths[d] / n > 0.01 for d in range(4)) and max(depths) == 3
    assert max(Counter(told).values()) / n < 0.1  # the words alone say nothing


def test_the_same_arguments_give_the_same_bytes_and_files_hold_what_was_drawn(tmp_path):
    one, two = tmp_path / "hotpotqa-ledger.jsonl", tmp_path / "b.jsonl"
    digests = {write_rows(p, "hotpotqa", "test", 0, 3, 1024) for p in (one, two)}
    digests.add(write_dataset(two, "hotpotqa-ledger", "test", 0, 3, 1024))
    assert len(digests) == 1
    drawn = draw_examples("hotpotqa-ledger", "test", 0, 3, 1024)
    assert list(read_rows(one)) == drawn == list(examples("hotpotqa", "test", 0, 3, 1024)) == read_examples(one)
    assert drawn != list(examples("hotpotqa", "test", 1, 3, 1024)) and len({e.id for e in drawn}) == 3


@pytest.mark.parametrize("damage", ["[]", "{}", '{"id": 3}', "{", "null"])
def test_other_lines_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "hotpotqa-ledger.jsonl"
    path.write_text(damage + "\n")
    with pytest.raises(DataError, match=r"hotpotqa-ledger\.jsonl:1"):
        list(read_rows(path))


def test_a_field_of_the_wrong_type_is_refused(tmp_path):
    path = tmp_path / "hotpotqa-ledger.jsonl"
    write_rows(path, "hotpotqa", "test", 0, 1, 1024)
    row = json.loads(path.read_text())
    for change in ({"segments": 3}, {"metric": "em"}, {"meta": 3}, {"questions": [{"id": "a"}]}):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(DataError, match=":1"):
            list(read_rows(path))


def test_lengths_and_words_of_a_split():
    for tokens, count in ((1024, 12), (2048, 6), (8192, 3)):
        found = [sum(len(d.pieces()) for d in p.turns[1]) for p in prompts("swebench", "test", 0, count, tokens)]
        assert tokens * 0.85 < sum(found) / len(found) < tokens * 1.15
    for p in prompts("hotpotqa", "test", 0, 2, 2048):
        assert all(first in names("test")[second] for first, second in (e.name for s in p.world.read(0) for e in s))
    for wrong in ({"style": "x"}, {"split": "x"}, {"tokens": 99}):
        given = {"style": "hotpotqa", "split": "test", "seed": 0, "count": 1, "tokens": 1024} | wrong
        with pytest.raises(DataError):
            list(prompts(**given))


def reused_of(prompt: Prompt, table: dict[str, int]) -> tuple[ReusedTokens, list[tuple[str, int]]]:
    """The documents' tokens as a rule sees them, and the place of each."""
    ids, starts, lengths, places = [], [], [], []
    for d in prompt.turns[1]:
        pieces = d.pieces()
        if not d.updated:
            starts.append(len(ids))
            lengths.append(len(pieces))
            places += [(d.title, i) for i in range(len(pieces))]
        ids += [table[p] for p in pieces]
    return ReusedTokens(tuple(starts), tuple(lengths), None, torch.tensor(ids)), places


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.26])
def test_no_static_choice_of_tokens_beats_random_ones_for_an_ideal_reader(ratio):
    """What a model could gain at best where an entry's meaning lies at its evidence: words right, in points."""
    tokenizer, table = ledger_tokenizer()
    rules = {k: r.at_ratio(ratio) for k, r in Forms.of(tokenizer).rules().items() if "keys" not in k}
    controls = [RandomTokens(ratio, seed=s) for s in range(4)]
    right: dict[str, list[float]] = {name: [] for name in (*rules, "random", "all")}
    for style in STYLES:
        for p in prompts(style, "test", 5, 40, 2048):
            reused, places = reused_of(p, table)
            gold = [answer(p, 1, name) for name in p.asked]

            def share(mask, p=p, places=places, gold=gold) -> float:
                told = answers_with(p, {places[i] for i in mask.nonzero()[:, 0].tolist()})
                pairs = [x == y for a, b in zip(told, gold, strict=True) for x, y in zip(a, b, strict=True)]
                return 100 * sum(pairs) / len(pairs)

            for name, rule in rules.items():
                right[name].append(share(rule.known_before_start(reused)))
            by_chance = [share(r.known_before_start(reused)) for r in controls]
            right["random"].append(sum(by_chance) / len(by_chance))
            right["all"].append(share(torch.ones(reused.count, dtype=torch.bool)))
    mean = {name: sum(x) / len(x) for name, x in right.items()}
    assert mean["all"] == 100 and mean["random"] < 75
    gained = {n: round(m - mean["random"], 1) for n, m in mean.items() if n != "all"}
    assert not {n: g for n, g in gained.items() if g > GAIN}


def test_evidence_lies_at_words_of_every_kind_and_at_all_places_of_a_sentence():
    kinds, behind = Counter(), Counter()
    for style in STYLES:
        for p in prompts(style, "test", 0, 10, 2048):
            for d in p.turns[1]:
                pieces = d.pieces()
                for s in d.sentences:
                    for (entry, at), nxt in zip(s.entries, [*[o for _, o in s.entries[1:]], None], strict=False):
                        word, told = s.pieces[at].strip(), {"value": entry.value, "set": entry.name[1]}
                        told |= {"source": entry.source and entry.source[1]} | {f: f for f in FIELDS}
                        kinds[next((k for k, w in told.items() if w == word), "verb")] += 1
                        behind[len(s.pieces) - 1 - at] += nxt is None
                assert all(a < b for a, b in pairwise(at for _, at in d.evidence())) and pieces
    n = kinds.total()
    assert set(kinds) == {*FIELDS, "value", "set", "source", "verb"} and max(kinds.values()) / n < 0.5
    assert max(behind.values()) / behind.total() < 0.35 and behind[0] == 0


def test_shape_makes_curricula_of_the_same_kind():
    plain = replace(
        Shape(),
        entries=(3, 4),
        chunk_tokens=None,
        roots=2,
        update_roots=1,
        overruled=0,
        rebound=0.0,
        depth=1,
        notes_filler=0,
        lead=0.0,
        tail=0.0,
        joined=0.0,
        forms=2,
    )
    p = draw_prompt(Random("a"), "hotpotqa", "train", 2, plain)
    entries = [e for d in p.turns[1] for e, _ in d.evidence()]
    assert len({e.slot for e in entries}) == len(entries) and len(p.turns[1]) == 4
    assert max(h.depth for h in p.held[1].values()) <= 1
    assert sum(len(d.pieces()) for d in p.turns[1]) < 16 * len(entries)
