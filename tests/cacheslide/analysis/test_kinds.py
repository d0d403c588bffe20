"""Tokens by kind against a brute-force reference over random prompts, by hand, and in time."""

import random
import time
from itertools import combinations, pairwise

import numpy as np
import pytest

from cacheslide.analysis.chain import heaviest_chain
from cacheslide.analysis.kinds import KINDS, session_kinds
from cacheslide.analysis.prefixes import PrefixCache
from cacheslide.analysis.windows import window_names
from cacheslide.errors import DataError


def reference(prompts, k):
    """The definition, word for word: quadratic searches, and every chain tried."""
    out = []
    for t, own in enumerate(prompts):
        prefix = 0
        while t and prefix < min(len(own), len(prompts[t - 1])) and own[prefix] == prompts[t - 1][prefix]:
            prefix += 1
        runs, ends, i = [], {}, prefix
        while i + k <= len(own):
            window = own[i : i + k]
            holders = [q for q in range(t) if any(prompts[q][c : c + k] == window for c in range(len(prompts[q])))]
            if not holders:
                i += 1
                continue
            q = holders[-1]
            theirs, found = prompts[q], []
            for c in range(len(theirs) - k + 1):
                n = 0
                while i + n + k <= len(own) and own[i + n : i + n + k] == theirs[c + n : c + n + k]:
                    n += 1
                if n:
                    found.append((-n, c < ends.get(q, 0), c))
            n, _, c = min(found)
            runs.append((i, -n, q, c))
            ends[q] = c - n
            i -= n
        kinds = ["prefix"] * prefix + ["new"] * (len(own) - prefix)
        shared = {}
        for q in {r[2] for r in runs}:
            shared[q] = 0
            while shared[q] < min(prefix, len(prompts[q])) and own[shared[q]] == prompts[q][shared[q]]:
                shared[q] += 1
        spans, covered = [], 0
        for i, n, q, c in runs:
            start, end = max(i, covered), i + n + k - 1
            spans.append((start, end, q, c + start - i))
            kinds[start:end] = ["reordered"] * (end - start)
            covered = end
        in_order = 0
        for q, prefix in shared.items():
            own_spans = [s for s in spans if s[2] == q]
            cuts = {prefix} | {c for _, _, _, c in own_spans} | {c + end - start for start, end, _, c in own_spans}
            pieces = []
            for start, end, _, c in own_spans:
                at = c
                for stop in range(c + 1, c + end - start + 1):
                    if stop in cuts or stop == c + end - start:
                        pieces.append((at, stop, stop - at))
                        at = stop
            in_order += best_chain([piece for piece in pieces if piece[0] >= prefix])
        counts = {kind: kinds.count(kind) for kind in KINDS}
        counts["order_preserving"], counts["reordered"] = in_order, counts["reordered"] - in_order
        out.append(counts)
    return out


def best_chain(runs):
    """The weight of the heaviest chain: each run behind the best of all before it."""
    best = []
    for start, _, weight in runs:
        best.append(weight + max((b for b, r in zip(best, runs, strict=False) if r[1] <= start), default=0))
    return max(best, default=0)


def edited(rng, prompt, letters):
    """The prompt with pieces cut out, moved, doubled and put in."""
    out = list(prompt)
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.choices(range(len(out) + 1), k=2))
        piece, at = out[a:b], rng.randint(0, len(out))
        kind = rng.choice("cmdn")
        if kind in "cm":
            del out[a:b]
        if kind in "md":
            out[at:at] = piece
        if kind == "n":
            out[at:at] = [rng.randrange(letters) for _ in range(rng.randint(1, 6))]
    return out[:60]


@pytest.mark.parametrize("letters", [1, 2, 3, 8, 1000])
def test_kinds_are_the_references_on_random_sessions(letters):
    rng = random.Random(letters)
    seen = set()
    for _ in range(200 if letters < 8 else 60):
        prompts = [[rng.randrange(letters) for _ in range(rng.randint(0, 40))]]
        for _ in range(rng.randint(1, 4)):
            prompts.append(edited(rng, rng.choice(prompts), letters))
        k = rng.randint(1, 6)
        got = [turn.counts() for turn in session_kinds(prompts, k)]
        assert got == reference(prompts, k), (prompts, k)
        seen |= {kind for counts in got for kind, n in counts.items() if n}
    assert seen == set(KINDS)


def test_windows_have_one_name_exactly_where_their_tokens_are_equal():
    rng = random.Random(3)
    for k in (1, 2, 3, 5, 7, 8, 32):
        prompts = [[rng.randrange(2) for _ in range(n)] for n in (0, 1, 31, 32, 33, 70)]
        names = window_names([np.array(p, dtype=np.int64) for p in prompts], k)
        assert [len(n) for n in names] == [max(0, len(p) - k + 1) for p in prompts]
        tokens: dict = {}
        for prompt, own in zip(prompts, names, strict=True):
            for i, name in enumerate(own):
                assert tokens.setdefault(int(name), prompt[i : i + k]) == prompt[i : i + k]
        assert len({tuple(t) for t in tokens.values()}) == len(tokens)


def test_a_chain_is_the_heaviest_and_in_order():
    rng = random.Random(5)
    for _ in range(150):
        runs = [
            (s, s + rng.randint(1, 5), rng.randint(1, 9)) for s in (rng.randrange(20) for _ in range(rng.randint(0, 9)))
        ]
        chain = [runs[i] for i in heaviest_chain(runs)]
        assert all(a[1] <= b[0] for a, b in pairwise(chain))
        every = [some for size in range(len(runs) + 1) for some in combinations(runs, size)]
        in_order = [some for some in every if all(a[1] <= b[0] for a, b in pairwise(some))]
        assert sum(r[2] for r in chain) == max(sum(r[2] for r in some) for some in in_order) == best_chain(runs)


def spell(*parts):
    """Tokens of named parts: each a letter and a length, different everywhere."""
    return [1000 * ord(name) + i for name, n in parts for i in range(n)]


def test_the_papers_prompt_slides_in_order():
    """System, notes, documents: the notes change their length, so the documents move and keep their order."""
    one = spell(("S", 50), ("a", 40), ("D", 100), ("E", 80))
    two = spell(("S", 50), ("b", 70), ("D", 100), ("c", 5), ("E", 80))
    turn = session_kinds([one, two])[1]
    assert turn.counts() == {"prefix": 50, "order_preserving": 180, "reordered": 0, "new": 75}
    assert [(s.start, s.length, s.shift) for s in turn.spans] == [(120, 100, 30), (225, 80, 35)]
    assert turn.counts(behind=150) == {"prefix": 0, "order_preserving": 150, "reordered": 0, "new": 5}


def test_what_changes_places_is_reordered_and_the_longer_part_keeps_its_order():
    one = spell(("S", 50), ("D", 100), ("E", 80))
    two = spell(("S", 50), ("E", 80), ("D", 100))
    assert session_kinds([one, two])[1].counts() == {"prefix": 50, "order_preserving": 100, "reordered": 80, "new": 0}


def test_a_second_copy_and_text_of_the_prefix_are_no_reuse_in_order():
    one = spell(("S", 50), ("D", 100))
    two = spell(("S", 50), ("x", 3), ("D", 100), ("y", 3), ("D", 100), ("z", 3), ("S", 40))
    counts = session_kinds([one, two])[1].counts()
    assert counts == {"prefix": 50, "order_preserving": 100, "reordered": 140, "new": 9}


def test_a_run_of_which_a_part_was_shown_before_is_in_order_from_there_on():
    one = spell(("P", 50), ("Q", 60), ("R", 70))
    two = spell(("x", 3), ("P", 50), ("Q", 60), ("Q", 60), ("R", 70))
    assert session_kinds([one, two])[1].counts() == {"prefix": 0, "order_preserving": 180, "reordered": 60, "new": 3}
    three = spell(("P", 50), ("Q", 60), ("Q", 60), ("R", 70))
    assert session_kinds([one, three])[1].counts() == {"prefix": 110, "order_preserving": 70, "reordered": 60, "new": 0}
    four = [*spell(("P", 50)), 7, *one[49:]]  # the token before the change stands behind it, too
    assert session_kinds([one, four])[1].counts() == {"prefix": 50, "order_preserving": 130, "reordered": 1, "new": 1}


def test_a_prompt_of_before_the_last_is_a_source_too():
    one, two, three = spell(("S", 40), ("D", 90)), spell(("S", 40), ("x", 20)), spell(("S", 40), ("y", 7), ("D", 90))
    turn = session_kinds([one, two, three])[2]
    assert turn.counts() == {"prefix": 40, "order_preserving": 90, "reordered": 0, "new": 7}
    assert (turn.spans[0].source, turn.spans[0].shift) == (0, 7)


def test_shorter_text_than_min_tokens_is_new():
    one, two = spell(("S", 5), ("D", 31)), spell(("S", 5), ("x", 1), ("D", 31))
    assert session_kinds([one, two])[1].counts()["new"] == 32
    assert session_kinds([one, two], 31)[1].counts()["order_preserving"] == 31
    with pytest.raises(DataError, match="at least 1"):
        session_kinds([one], 0)


def test_empty_prompts_and_first_turns_have_nothing_to_reuse():
    assert [t.counts()["new"] for t in session_kinds([[], [1] * 40, []])] == [0, 40, 0]


@pytest.mark.parametrize("text", ["varied", "one token", "period of 7"])
def test_thirty_thousand_tokens_take_seconds_at_most(text):
    rng = random.Random(1)
    make = {"varied": lambda i: rng.randrange(5000), "one token": lambda i: 7, "period of 7": lambda i: i % 7}[text]
    base = [make(i) for i in range(30_000)]
    prompts = [base, [9, *base[300:], 8], [*base[:100], 5, *base[20_000:], *base[200:10_000]]]
    start = time.perf_counter()
    turns = session_kinds(prompts)
    assert time.perf_counter() - start < 10
    assert all(sum(t.counts().values()) == t.tokens for t in turns)


def test_a_prefix_cache_over_all_requests_serves_whole_blocks():
    cache = PrefixCache(block=4)
    assert [cache.serve(ids) for ids in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 9], [2, 3, 4, 5])] == [
        0,
        4,
        0,
    ]
    assert cache.serve([1, 2, 3, 4, 5, 6, 7, 9, 1, 1, 1, 1]) == 8
