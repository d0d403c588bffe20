"""Arms of the study on a real model over one trial: what must be equal to recompute is, what cannot run says why."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from baselines.reorder import updated_last
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.quality.divergence import divergence
from cacheslide.store import MemoryChunkStore
from harness.experiments.real import arms as systems
from harness.experiments.real import measure as measuring
from harness.experiments.real.arms import (
    NOISE,
    Arm,
    arm,
    candidates,
    confirm_arms,
    core,
    frontier,
    history_arms,
    slice_arms,
    unique,
)
from harness.experiments.real.measure import GREEDY, Reference, measure, run_arm
from harness.experiments.real.trials import Builder
from harness.results.real_records import rule_and_layer
from tests.helpers.made_passages import LAYERS, gemma, passage_rows

pytestmark = pytest.mark.slow

NOTHING = arm("Nothing recomputed", "chain", NoCorrection())
WHOLE = {family: arm("Everything", family, FirstTokens(1.0)) for family in ("chain", "canon", "iso")}
FLOOR = Arm(NOISE, NOISE, "exact", None)


@cache
def trial(setting="matter"):
    return Builder(gemma(), passage_rows(6), 0, (300,)).trial(setting, 1)


def kl(record):
    return max(record[name]["kl_max"] for name in ("answer", "greedy"))


def test_names_are_unique_and_begin_with_their_line():
    best = {"CacheSlide, by K": 4, "CacheBlend, by V": 2, "CacheBlend, by K": 3, "CacheSlide as printed": 6}
    for made in (frontier(), frontier(best), frontier({"CacheSlide, by K": 3}), slice_arms(), history_arms(best),
                 confirm_arms(best), candidates(18)):  # fmt: skip
        names = [a.name for a in made]
        assert len(set(names)) == len(names) == len(unique([*made, *made]))
        assert all(a.name.startswith(a.line) or a.family == "stale" for a in made)
        for a in (a for a in made if a.layer is not None):
            assert a.name.endswith(f" {100 * a.ratio:g} % at layer {a.layer}")
            assert a.family == "stale" or a.policy.correction.layer == a.layer


def test_the_core_has_every_arm_that_it_names():
    """A name that the frontier no longer has would go missing without a word."""
    best = {"CacheSlide as printed": 6}
    names = {a.name for a in core(best)}
    assert (
        len(names) == 55
        and names < {a.name for a in frontier(best)}
        and {"CacheSlide as printed 26 % at layer 6", "CacheSlide as printed, updated keys only 26 % at layer 6"}
        < names
    )
    for begins in ("First tokens", "CacheBlend, by V", "CacheBlend, by K"):  # what comparisons choose from
        assert sum(name.startswith(begins) for name in names) > 1


def test_the_core_follows_the_layers_that_were_chosen():
    best = {"CacheSlide, by K": 9, "CacheBlend, by V": 7, "Question-aware": 4}
    names = {a.name for a in core(best)}
    assert {"CacheSlide, by K 26 % at layer 9", "CacheBlend, by V 15 % at layer 7"} < names
    assert "Question-aware 10 % at layer 4" in names and len(names) == 57
    assert {"Question-aware 10 % at layer 5", "CacheSlide, by K 26 % at layer 1"} < {a.name for a in core()}


def test_what_is_confirmed_is_measured_on_the_frontier_too():
    best = {"CacheBlend, by V": 7}
    made = {a.name: a for a in confirm_arms(best)}
    assert {*systems.CONFIRMED, "Overlap, half first 10 %", "Remembered 10 %", NOISE, "Nothing recomputed"} < set(made)
    frontiers = {a.name: a for a in frontier(best)}
    assert all(frontiers[name] == a for name, a in made.items())
    assert "CacheBlend, by V 15 % at layer 7" in made and len(made) == 12


def test_a_budget_has_no_ratio_and_points_of_one_line():
    both = [a for a in frontier() if a.line == "Budget, left"]
    assert [(a.name, a.ratio, a.policy.correction.left) for a in both] == [
        ("Budget, left 50 %", None, 0.5),
        ("Budget, left 30 %", None, 0.3),
    ]
    assert {rule_and_layer(a.name) for a in both} == {("Budget, left", None)}


def test_every_rule_runs_over_both_chains():
    rules: dict[str, dict[str, list]] = {"chain": {}, "canon": {}}
    for a in frontier():
        if a.family in rules:
            rules[a.family].setdefault(a.line, []).append(a.policy.correction)
    for line in (
        "Remembered",
        "Remembered + boundary 32",
        "Boundary",
        "Question-aware",
        "Shrinking",
        "Budget, left",
        "Overlap",
        *(f"Mixed, {split}" for split in systems.MIXED),
    ):
        assert rules["chain"][line] == rules["canon"][f"Canonical, {line[0].lower()}{line[1:]}"]


def test_the_layer_that_was_chosen_is_swept_beside_the_others():
    def swept(line, made):
        return sorted({a.layer for a in made if a.line == line and a.layer is not None})

    best = {"CacheSlide, by K": 4, "CacheSlide as printed": 6}
    assert swept("CacheSlide, by K", frontier(best)) == [1, 3, 4, 5, 8]
    assert swept("CacheBlend, by V", frontier(best)) == list(systems.LAYERS)
    assert swept("CacheSlide as printed", frontier(best)) == [6] and swept("CacheSlide as printed", frontier()) == [1]
    assert swept("CacheBlend, by V", history_arms({"CacheBlend, by V": 7})) == [7]


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 18])
def test_candidates_only_have_layers_that_exist(layers):
    made = candidates(layers)
    assert bool(made) is (layers > 1)
    for a in made:
        a.policy.check(layers)
        assert 1 <= a.layer <= layers // 2


def test_every_arm_runs_or_says_why_not():
    records = list(measure(gemma(), trial(), unique([*frontier(), *slice_arms(), *candidates(LAYERS)]), set()))
    assert len({r["id"] for r in records}) == len(records) > 60
    failed = {r["arm"]: r["failure"] for r in records if "failure" in r}
    assert failed and all(name.endswith("at layer 8") for name in failed)
    assert set(failed.values()) == {"the correction selects at layer 8, but the model has layers 0 to 5"}
    for r in records:
        assert r["trial"] == trial().id and r["id"] == f"{trial().id} | {r['arm']}"
        if "failure" not in r:
            assert r["tokens"] == len(trial().prompt) and 0 < r["compute_fraction"] <= 1
            assert r["answer"]["tokens"] == len(trial().answer) and r["greedy"]["tokens"] == GREEDY


def test_the_frontier_is_ordered_as_it_must_be():
    """Everything recomputed is recompute whatever the cache was; nothing recomputed is not, and isolated is worse."""
    arms = [FLOOR, NOTHING, arm("Isolated", "iso", NoCorrection()), WHOLE["chain"]]
    floor, nothing, isolated, whole = measure(gemma(), trial(), arms, set())
    assert kl(whole) < 1e-5 < 1e-3 < kl(nothing) < kl(isolated)
    assert whole["answer"]["agreement"] == 1 and abs(whole["answer"]["nll_change"]) < 1e-5
    assert whole["greedy"]["greedy_equal"] and whole["tokens_recomputed"] == nothing["tokens_reused"] > 300
    assert (floor["tokens_reused"], floor["compute_fraction"]) == (0, 1.0) and floor["tokens"] == whole["tokens"]
    for family in ("canon", "iso"):
        [record] = measure(gemma(), trial(), [WHOLE[family]], set())
        assert kl(record) < 1e-5


@pytest.mark.parametrize("piece", [37, 64, 10**6])
def test_the_noise_floor_is_the_same_prefill_in_pieces(monkeypatch, piece):
    monkeypatch.setattr(measuring, "PIECE", piece)
    reference = Reference(gemma(), trial().prompt, trial().answer)
    whole, state = reference.engine.prefill(trial().prompt), reference.in_pieces()
    n = len(trial().prompt)
    assert (state.length, state.next_position) == (n, n)
    torch.testing.assert_close(state.kv.k[:, :n], whole.kv.k[:, :n], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(state.logits, whole.logits, atol=1e-4, rtol=1e-3)
    assert kl(reference.compare(reference.engine, state)) < 1e-6


def test_the_targets_are_the_answer_and_recomputes_own_continuation():
    reference = Reference(gemma(), trial().prompt, trial().answer)
    state = reference.engine.prefill(trial().prompt, room=GREEDY)
    assert reference.greedy == tuple(reference.engine.generate(state, state.logits, GREEDY, frozenset()))
    own = reference.engine.prefill(trial().prompt, room=reference.room)
    assert torch.equal(reference.on_answer, reference.engine.score(own, trial().answer))
    assert set(Reference(gemma(), trial().prompt, ()).compare(reference.engine, own)) == {"greedy"}


class Poisoned(MemoryChunkStore):
    """Every chunk that it takes is no numbers."""

    def put(self, key, chunk):
        super().put(
            key, replace(chunk, k=torch.full_like(chunk.k, float("nan")), v=torch.full_like(chunk.v, torch.inf))
        )


@pytest.mark.parametrize("family", ["chain", "canon", "iso"])
def test_a_token_that_is_recomputed_is_not_read_from_the_cache(family):
    reference = Reference(gemma(), trial().prompt, trial().answer)
    assert kl(run_arm(gemma(), reference, trial(), WHOLE[family], Poisoned())) < 1e-5


def test_figures_that_are_no_numbers_are_a_failure_with_its_reason(monkeypatch):
    monkeypatch.setattr(measuring, "MemoryChunkStore", Poisoned)
    broken, whole = measure(gemma(), trial(), [NOTHING, WHOLE["chain"]], set())
    assert broken["failure"] == "logits that are not finite have no distribution to compare" and len(broken) == 4
    assert kl(whole) < 1e-5


def test_no_row_of_a_buffer_is_read_before_it_is_written(monkeypatch):
    arms = [FLOOR, NOTHING, arm("CacheBlend", "iso", systems.TopDeviation(0.15), 1), *systems.others()]
    clean = list(measure(gemma(), trial(), arms, set()))
    make = gemma().model.new_kv

    def poisoned(rows):
        kv = make(rows)
        kv.k[:], kv.v[:] = float("nan"), float("nan")
        return kv

    monkeypatch.setattr(gemma().model, "new_kv", poisoned)
    assert list(measure(gemma(), trial(), arms, set())) == clean and "failure" not in str(clean)


def test_a_reordered_prompt_is_compared_with_recompute_of_the_prompt_as_given():
    given = Reference(gemma(), trial().prompt, trial().answer)
    moved = Reference(gemma(), updated_last(trial().prompt), trial().answer)
    [one] = [a for a in systems.others() if a.name == "Reordered"]
    got = run_arm(gemma(), given, trial(), one, MemoryChunkStore())
    want = divergence(given.on_answer, moved.on_answer, trial().answer)
    assert got["answer"]["kl"] == pytest.approx(want.kl, rel=1e-3) and want.kl > 1e-3
    assert got["tokens"] == len(trial().prompt) and got["tokens_reused"] > 0 == got["tokens_recomputed"]


def test_what_is_done_is_not_measured_again(monkeypatch):
    arms = [FLOOR, NOTHING, WHOLE["chain"]]
    records = list(measure(gemma(), trial(), arms, set()))
    ran = []
    monkeypatch.setattr(measuring, "run_arm", lambda *args: ran.append(args[3]) or run_arm(*args))
    done = {records[0]["id"], records[2]["id"], "another trial | Nothing recomputed"}
    assert list(measure(gemma(), trial(), arms, done)) == [records[1]] and ran == [NOTHING]
    monkeypatch.setattr(measuring, "Reference", None)  # nothing is left to be compared with
    assert list(measure(gemma(), trial(), arms, {r["id"] for r in records})) == []
