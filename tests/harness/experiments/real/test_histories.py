"""Sessions that grow: what a turn leaves is what the next one reuses, and a run that was cut goes on alike."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.encoder import prefill_exact, read_chunk
from cacheslide.core.prompt import Role
from cacheslide.errors import PromptError
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from harness.experiments.real import histories, measure
from harness.experiments.real.arms import NOISE, Arm, arm
from harness.experiments.real.histories import Turns, history, measure_history
from harness.experiments.real.trials import Builder
from tests.helpers.made_passages import gemma, passage_row, passage_rows

pytestmark = pytest.mark.slow

FLOOR = Arm(NOISE, NOISE, "exact", None)
NOTHING, ISOLATED = arm("Nothing recomputed", "chain", NoCorrection()), arm("Isolated", "iso", NoCorrection())
WHOLE = arm("Everything", "chain", FirstTokens(1.0))
ARMS = [FLOOR, NOTHING, ISOLATED, WHOLE]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(histories, "TURNS", 5)
    monkeypatch.setattr(histories, "PASSAGE", 60)
    monkeypatch.setattr(histories, "NOTES", (20, 60))
    monkeypatch.setattr(measure, "GREEDY", 6)
    monkeypatch.setattr(measure, "PIECE", 100)


def session(index=1):
    return history(Builder(gemma(), passage_rows(4)), passage_row(index))


def fixed(prompt):
    return [s.token_ids for s in prompt.segments if s.role is Role.REUSE]


def test_every_turn_has_other_notes_and_one_passage_more():
    made, row = session(), passage_row(1)
    builder = Builder(gemma(), passage_rows(4))
    assert made == session() and made.id == "histories made id-1" and len(made.prompts) == 5
    for turn, prompt in enumerate(made.prompts):
        assert fixed(prompt) == fixed(made.prompts[-1])[: turn + 2]
        assert all(len(p) <= 60 for p in fixed(prompt)[1:])
    assert fixed(made.prompts[1])[1:] == [builder.passage(row.passages[i])[:60] for i in row.gold]
    assert len({p.segments[1].token_ids for p in made.prompts}) == 5
    assert made.answer == builder.encode(" " + row.answers[0]) and made.about["turns"] == 5
    assert history(builder, replace(row, gold=(), answers=("nowhere",))) is None


def test_a_session_longer_than_its_row_is_filled_with_other_rows(monkeypatch):
    monkeypatch.setattr(histories, "TURNS", 9)
    monkeypatch.setattr(histories, "PASSAGE", 600)
    prompts = session().prompts
    assert len(prompts) == 9 and len(fixed(prompts[-1])) == 10 and len(fixed(prompts[-1])[-1]) == 600


def serve(one, made, monkeypatch):
    """The states of all turns, and the chunks that stand in the system's stores in the end."""
    turns, states = Turns(gemma(), one), []
    prefill = turns.engine.prefill
    monkeypatch.setattr(
        turns.engine, "prefill", lambda *args, **more: states.append(prefill(*args, **more)) or states[-1]
    )
    for prompt in made.prompts:
        assert turns.serve(prompt, None) == {}
    plan = turns.engine.plan(made.prompts[-1])
    chunks = [turns.engine.store.get(key) or turns.engine.corrected.get(key) for key in plan.keys]
    return states, chunks


def test_a_chain_keeps_what_the_turn_left_that_computed_it(monkeypatch):
    made = session()
    states, chunks = serve(NOTHING, made, monkeypatch)
    assert [c.generation for c in chunks] == [0, 0, 1, 2, 3, 4]  # the head and the first passage are turn 0's
    assert [s.receipt.chunks_hit for s in states] == [0, 2, 3, 4, 5]
    for turn, (state, chunk) in enumerate(zip(states, chunks[1:], strict=True)):
        served = state.plan.chunks[-1]
        own = read_chunk(gemma().model, state.kv, state.plan.positions, served.start, served.end)
        assert torch.equal(chunk.k, own.k) and torch.equal(chunk.v, own.v)
        assert chunk.positions.tolist() == list(range(served.start, served.end))
        kv = prefill_exact(gemma().model, made.prompts[turn].token_ids)
        exact = read_chunk(gemma().model, kv, range(served.end), served.start, served.end)
        off = float((exact.v - chunk.v).abs().max())
        assert off < 1e-5 if turn == 0 else off > 1e-3  # errors included


def test_an_isolated_passage_is_encoded_alone_and_once(monkeypatch):
    states, chunks = serve(ISOLATED, session(), monkeypatch)
    assert [s.receipt.chunks_hit for s in states] == [0, 2, 3, 4, 5] and {c.generation for c in chunks} == {0}
    for ids, chunk in zip(fixed(session().prompts[-1]), chunks, strict=True):
        alone = read_chunk(gemma().model, prefill_exact(gemma().model, ids), range(len(ids)), 0, len(ids))
        torch.testing.assert_close(chunk.v, alone.v, atol=1e-5, rtol=1e-4)


def test_turns_are_compared_and_whatever_must_be_exact_is():
    records = list(measure_history(gemma(), session(), ARMS, set()))
    assert [(r["turn"], r["arm"]) for r in records] == [(t, a.name) for t in range(1, 5) for a in ARMS]
    kl = {(r["turn"], r["arm"]): max(r["answer"]["kl_max"], r["greedy"]["kl_max"]) for r in records}
    for turn in range(1, 5):
        assert kl[turn, NOISE] < 1e-6 and kl[turn, WHOLE.name] < 1e-5 < kl[turn, NOTHING.name]
    assert all(r["tokens"] == len(session().prompts[r["turn"]]) for r in records)
    assert sum(kl[t, ISOLATED.name] > kl[t, NOTHING.name] for t in range(1, 5)) >= 3


@pytest.mark.parametrize(("every", "turns"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])])
def test_every_so_many_turns_and_the_last_with_the_figures_of_all(every, turns):
    whole = {r["id"]: r for r in measure_history(gemma(), session(), [NOTHING], set())}
    records = list(measure_history(gemma(), session(), [NOTHING], set(), every))
    assert [r["turn"] for r in records] == turns and all(whole[r["id"]] == r for r in records)


def test_a_run_that_was_cut_goes_on_with_the_same_figures(monkeypatch):
    whole = list(measure_history(gemma(), session(), ARMS, set()))
    done = {r["id"] for r in whole[:6]}
    references = []
    monkeypatch.setattr(histories, "Reference", lambda *args: references.append(args[1]) or measure.Reference(*args))
    assert list(measure_history(gemma(), session(), ARMS, done)) == whole[6:]
    assert references == list(session().prompts[2:])  # turn 1 has all of its records
    monkeypatch.setattr(histories, "Turns", None)
    assert list(measure_history(gemma(), session(), ARMS, {r["id"] for r in whole})) == []


def test_an_arm_that_fails_has_no_caches_to_go_on_with(monkeypatch):
    """Turn 2 is not compared: what follows from it must not look like a measurement."""
    serve = Turns.serve

    def failing(self, prompt, reference):
        if prompt == session().prompts[2] and self.engine.policy == NOTHING.policy:
            raise PromptError("no room")
        return serve(self, prompt, reference)

    monkeypatch.setattr(Turns, "serve", failing)
    records = list(measure_history(gemma(), session(), [NOTHING, WHOLE], set(), every=3))
    assert [r.get("failure") for r in records] == ["an earlier turn failed: no room", None] * 2
    records = list(measure_history(gemma(), session(), [NOTHING], set()))
    assert [r.get("failure") for r in records] == [None, "no room"] + ["an earlier turn failed: no room"] * 2
