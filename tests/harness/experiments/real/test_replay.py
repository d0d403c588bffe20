"""Recorded sessions replayed: the right rows of the right prompt, in order, and exact where that is exact."""

import pytest
import torch

from cacheslide.analysis.kinds import session_kinds
from cacheslide.errors import DataError, PromptError
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from harness.experiments.real import measure, replay
from harness.experiments.real.arms import NOISE, Arm, arm
from harness.experiments.real.replay import Recorded, Replayed, measure_session, recorded
from tests.helpers.made_passages import TOKENIZER, gemma
from tests.helpers.made_sessions import processors, react, reflexion_log, trajectory, words, write_trajectory

pytestmark = pytest.mark.slow

FLOOR = Arm(NOISE, NOISE, "exact", None)
NOTHING, ISOLATED = arm("Nothing recomputed", "chain", NoCorrection()), arm("Isolated", "iso", NoCorrection())
WHOLE = {family: arm(f"Everything, {family}", family, FirstTokens(1.0)) for family in ("chain", "iso")}
ARMS = [FLOOR, NOTHING, ISOLATED, *WHOLE.values()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measure, "GREEDY", 6)
    monkeypatch.setattr(measure, "PIECE", 100)


def text(n, seed):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(300, 1280, (n,), generator=g).tolist())


HEAD, A, B, C, D = text(40, 1), text(50, 2), text(45, 3), text(60, 4), text(35, 5)
MOVED = (
    HEAD + text(20, 10) + A + B + C,
    HEAD + text(31, 11) + A + B + C + D,  # all of it 11 tokens later
    HEAD + text(5, 12) + A + C + D,  # B is gone
    HEAD + text(9, 13) + C + D + A,  # A behind what it stood before: out of order
)
GROWING = tuple((HEAD + A + B + C + D)[:n] for n in (90, 135, 195, 230))


def session(prompts=MOVED, name="s"):
    return Recorded(f"replay made {name}", "made", tuple(prompts), tuple(session_kinds(prompts)))


def kl(record):
    return record["greedy"]["kl_max"]


def run(one, made):
    """Every turn served: the pieces that were reused with their rows in the prompt, and its state."""
    runs, out = Replayed(gemma(), one), []
    for ids, kinds in zip(made.prompts, made.kinds, strict=True):
        pieces = runs._prefix(ids, kinds)
        start = sum(p.length for p in pieces)
        found = runs._found(ids, kinds, start)
        reused = [(p, range(p.length)) for p in pieces]
        reused += [(p, range(s.start + start, s.stop + start)) for p, s in zip(found.pieces, found.spans, strict=True)]
        out.append((reused, runs.serve(ids, kinds)))
    return runs, out


def rows_of(reused):
    return [row for _, span in reused for row in span]


def test_pieces_are_the_same_text_of_the_turn_that_left_them():
    made = session()
    runs, turns = run(NOTHING, made)
    assert [[len(span) for _, span in reused] for reused, _ in turns] == [[], [40, 155], [40, 50, 94], [40, 95]]
    seen = set()
    for turn, (reused, state) in enumerate(turns):
        ids, rows = made.prompts[turn], rows_of(reused)
        for piece, span in reused:
            [source] = [q for q, left in enumerate(runs.left) if left is piece.chunk]
            assert source < turn and made.prompts[source][piece.rows] == ids[span.start : span.stop]
            seen.add((turn, source, span.start - piece.first))
        assert rows == sorted(set(rows)) and len(ids) - 1 not in rows
        assert state.receipt.tokens_reused == len(rows) and state.length == state.next_position == len(ids)
        assert torch.equal(runs.left[turn].k, state.kv.k[:, : len(ids)])
        assert runs.left[turn].positions.tolist() == list(range(len(ids)))
    assert {(1, 0, 0), (1, 0, 11)} <= seen and (2, 1, 0) in seen and {shift for t, _, shift in seen if t == 2} > {0}


def test_keys_that_moved_are_turned_to_where_they_stand_now():
    """Values stay; keys of the first layer, which know nothing of their context, are those of recompute."""
    _, turns = run(NOTHING, session())
    reused, state = turns[1]
    exact = replay.prefill_exact(gemma().model, MOVED[1])
    rows, n = rows_of(reused), len(MOVED[1])
    torch.testing.assert_close(state.kv.k[0, :n][rows], exact.k[0, :n][rows], atol=1e-4, rtol=1e-3)
    assert (state.kv.v[-1, :n][rows] - exact.v[-1, :n][rows]).abs().max() > 1e-3


def test_everything_recomputed_is_recompute_and_nothing_recomputed_is_not():
    records = list(measure_session(gemma(), session(), ARMS, set()))
    assert [(r["turn"], r["arm"]) for r in records] == [(t, a.name) for t in (1, 2, 3) for a in ARMS]
    for r in records:
        exact = r["arm"] in (NOISE, *(a.name for a in WHOLE.values()))
        assert kl(r) < 1e-5 if exact else kl(r) > 1e-4, r
        assert r["tokens"] == len(MOVED[r["turn"]]) and r["trial"] == "replay made s" and "answer" not in r
        prefix = 0 if r["arm"] == NOISE else len(HEAD)  # it stands where it stood: no share of it is recomputed
        assert (r["tokens_reused"] == prefix) is exact
        assert (r["compute_fraction"] == pytest.approx(1 - prefix / r["tokens"])) is exact


def test_a_share_is_one_of_the_text_behind_the_prefix():
    """The first tokens of the whole prompt are its prefix: to recompute them would change nothing."""
    arms = [NOTHING, *(arm("First tokens", "chain", FirstTokens(r)) for r in (0.1, 0.5))]
    nothing, few, half = list(measure_session(gemma(), session(), arms, set()))[:3]
    assert [r["tokens_recomputed"] for r in (nothing, few, half)] == [0, 16, 78]  # of 155
    assert [r["tokens_reused"] for r in (nothing, few, half)] == [195, 179, 117]
    assert nothing["compute_fraction"] == pytest.approx(66 / 261) and few["compute_fraction"] == pytest.approx(82 / 261)
    assert kl(half) < kl(nothing) and abs(kl(few) - kl(nothing)) > 1e-5


def test_a_prompt_that_only_grows_is_exact_with_nothing_recomputed():
    records = list(measure_session(gemma(), session(GROWING), [NOTHING, ISOLATED], set()))
    assert len(records) == 6 and all(kl(r) < 1e-5 for r in records)
    assert [r["tokens_reused"] for r in records[::2]] == [90, 135, 195]


def test_the_last_token_is_computed_even_where_the_prompt_is_the_same():
    made = session((MOVED[0], MOVED[0], MOVED[0][:-30]))
    _, turns = run(NOTHING, made)
    assert [state.receipt.tokens_reused for _, state in turns] == [0, len(MOVED[0]) - 1, len(MOVED[0]) - 31]
    assert all(state.logits.isfinite().all() for _, state in turns)


def test_an_isolated_span_is_encoded_alone():
    _, turns = run(ISOLATED, session())
    for turn, (reused, _) in enumerate(turns):
        for piece, span in reused:
            ids = MOVED[turn][span.start : span.stop]
            alone = replay.prefill_exact(gemma().model, ids)
            assert piece.first == 0 and torch.equal(piece.chunk.k, alone.k[:, : len(ids)])


def test_a_run_that_was_cut_goes_on_with_the_same_figures(monkeypatch):
    whole = list(measure_session(gemma(), session(), ARMS, set()))
    done = {r["id"] for r in whole[:7]}
    references = []
    monkeypatch.setattr(replay, "Reference", lambda *args: references.append(args[1]) or measure.Reference(*args))
    assert list(measure_session(gemma(), session(), ARMS, done)) == whole[7:]
    assert [p.token_ids for p in references] == list(MOVED[2:])
    monkeypatch.setattr(replay, "Replayed", None)
    assert list(measure_session(gemma(), session(), ARMS, {r["id"] for r in whole})) == []


def test_an_arm_that_fails_leaves_nothing_for_later_turns(monkeypatch):
    """Turn 1 leaves no KV: what turn 2 takes from it would be another turn's."""
    serve = Replayed.serve

    def failing(self, ids, *more):
        if ids == MOVED[1] and self.policy == NOTHING.policy:
            raise PromptError("no room")
        return serve(self, ids, *more)

    monkeypatch.setattr(Replayed, "serve", failing)
    records = list(measure_session(gemma(), session(), [NOTHING, WHOLE["chain"]], set()))
    assert [r.get("failure") for r in records[::2]] == ["no room"] + ["an earlier turn failed: no room"] * 2
    assert all(kl(r) < 1e-5 for r in records[1::2])


@pytest.fixture
def folder(tmp_path):
    write_trajectory(tmp_path / "issue__a.traj", trajectory(turns=9, **processors(4)))
    write_trajectory(tmp_path / "issue__b.traj", trajectory(turns=6))
    write_trajectory(tmp_path / "issue__c.traj", trajectory(turns=6))
    steps = [("look", "Search[mill]", words(60, 5)), ("so", "Finish[bone]", "Answer is INCORRECT")]
    log = reflexion_log(
        {"INCORRECT": [react("What mill?", steps)]}, {"CORRECT": [react("What mill?", steps, ("again",))]}
    )
    (tmp_path / "log.txt").write_text(log)
    return tmp_path


def test_sessions_are_read_by_group_with_numbers_and_hashes_only(folder):
    out = recorded(folder, TOKENIZER, 10**6, 9, 100)
    assert sorted((r.dataset, len(r.prompts)) for r in out)[-3:] == [
        ("swe-agent", 9),
        ("swe-agent-full", 6),
        ("swe-agent-full", 6),
    ]
    assert [r.dataset for r in recorded(folder, TOKENIZER, 10**6, 1, 100)].count("swe-agent-full") == 1
    for r in out:
        assert r.id == f"replay {r.dataset} {r.about['session']}" and len(r.about["sha256"]) == 64
        assert set(r.about) == {"session", "sha256", "of_turns", "turns"} and r.about["turns"] == len(r.prompts)
        assert [k.tokens for k in r.kinds] == [len(p) for p in r.prompts]


def test_long_prompts_end_a_session_and_short_ones_are_left_out(folder, monkeypatch):
    [whole] = [r for r in recorded(folder, TOKENIZER, 10**6, 9, 100) if r.dataset == "swe-agent"]
    lengths = [len(p) for p in whole.prompts]
    assert lengths[2] < lengths[3] and lengths[0] < lengths[1]
    [cut] = [r for r in recorded(folder, TOKENIZER, lengths[3] - 1, 9, 100) if r.dataset == "swe-agent"]
    assert cut.prompts == whole.prompts[:3] and cut.about["of_turns"] == 9
    [few] = [r for r in recorded(folder, TOKENIZER, lengths[3] - 1, 9, 3) if r.dataset == "swe-agent"]
    assert few.prompts == whole.prompts[:3]
    assert not [r for r in recorded(folder, TOKENIZER, lengths[2] - 1, 9, 100) if r.dataset == "swe-agent"]
    monkeypatch.setattr(replay, "SHORTEST", lengths[1])
    [later] = [r for r in recorded(folder, TOKENIZER, 10**6, 9, 100) if r.dataset == "swe-agent"]
    assert later.prompts == whole.prompts[1:]


def test_a_folder_without_sessions_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="holds no recorded sessions"):
            recorded(path, TOKENIZER, 8192, 9, 16)
