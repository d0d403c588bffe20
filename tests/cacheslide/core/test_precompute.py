"""Chunks encoded ahead: the first turn already hits, with the KV that a request would have stored."""

import json

import pytest
import torch

from baselines import context_cache, prompt_cache
from cacheslide.cli import main
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.precompute import precompute, pregenerate, template
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PolicyError, PromptError
from cacheslide.policies import cacheslide, recompute
from cacheslide.store import MemoryChunkStore
from tests.helpers.token_ids import random_ids

FIXED, CHANGING = Role.REUSE, Role.RECOMPUTE


def parts(notes, question=()):
    return [
        Segment(random_ids(10, 1), FIXED),
        Segment(notes, CHANGING),
        Segment(random_ids(30, 2), FIXED),
        Segment(question, CHANGING),
    ]


@pytest.mark.parametrize("policy,rows", [(cacheslide.canonical, 40), (prompt_cache.policy, 40)])
def test_the_first_turn_hits_what_was_encoded_ahead(model, policy, rows):
    ahead, asked = (ReuseEngine(model, policy(), MemoryChunkStore(), chunk_size=16) for _ in range(2))
    done = precompute(ahead, template(parts(())))
    assert (done.tokens, done.computed) == (rows, done.chunks) and precompute(ahead, template(parts(()))).computed == 0
    first = Prompt(tuple(parts(random_ids(7, 5), random_ids(4, 6))))
    receipt = ahead.prefill(first).receipt
    assert receipt.chunks_hit == receipt.chunks == done.chunks and not receipt.fallback
    asked.build(first)
    for key in asked.plan(first).keys:
        assert torch.equal(ahead.store.get(key).k, asked.store.get(key).k)


def test_in_a_prompt_only_what_comes_first_can_be_encoded_ahead(model):
    engine = ReuseEngine(model, context_cache.policy(), MemoryChunkStore(), chunk_size=16)
    assert precompute(engine, template(parts(()))).tokens == 10
    receipt = engine.prefill(Prompt(tuple(parts(random_ids(7, 5), random_ids(4, 6))))).receipt
    assert receipt.tokens_reused == 10
    with pytest.raises(PolicyError, match="canonical"):
        precompute(engine, template([Segment((), CHANGING), Segment(random_ids(9, 1), FIXED)]))


def test_what_reuses_nothing_is_refused(model):
    with pytest.raises(PolicyError, match="reuses nothing"):
        precompute(ReuseEngine(model, recompute.policy(), MemoryChunkStore()), template(parts(())))
    with pytest.raises(PolicyError, match="no fixed segment"):
        precompute(ReuseEngine(model, cacheslide.canonical(), MemoryChunkStore()), template([(CHANGING, ())]))


def test_an_agents_new_history_is_encoded_between_its_turns(model):
    engine = ReuseEngine(model, cacheslide.canonical(), MemoryChunkStore(), chunk_size=16)
    before = Prompt(tuple(parts(random_ids(7, 5), random_ids(4, 6))))
    engine.build(before)
    result = Segment(random_ids(20, 8), FIXED, "tool")
    done = pregenerate(engine, before, [result])
    assert done.computed == 2 and done.chunks == 5  # the tail alone is new
    after = Prompt((*parts(random_ids(15, 9))[:3], result, Segment(random_ids(5, 7), CHANGING)))
    receipt = engine.prefill(after).receipt
    assert receipt.chunks_hit == receipt.chunks == 5
    with pytest.raises(PromptError, match="fixed segments"):
        pregenerate(engine, before, [Segment((5,), CHANGING)])


def test_the_command_fills_a_folder(tmp_path, capsys):
    model, file, store = "models/tiny-llama-12m", tmp_path / "t.json", tmp_path / "store"
    roles = [("reuse", "You answer."), ("recompute", None), ("reuse", " amber acorn amber acorn")]
    segments = [{"role": r} | ({"text": t} if t else {}) for r, t in roles]
    file.write_text(json.dumps({"segments": segments}))
    assert main(["precompute", model, "--template", str(file), "--store", str(store)]) == 0
    printed = capsys.readouterr()
    done = json.loads(printed.out)
    assert done["computed"] == done["chunks"] == 2
    assert printed.err == f"cacheslide: read by `cacheslide run --system cacheslide --store {store}`\n"
    file.write_text(json.dumps({"segments": [s | {"text": s.get("text", " new notes")} for s in segments]}))
    run = ["run", model, "--prompt", str(file), "--store", str(store), "--max-new-tokens", "1", "--json"]
    for system, hits in ((["--system", "cacheslide"], 2), ([], 0)):  # the default encodes chunks in the prompt
        assert main([*run, *system]) == 0
        assert json.loads(capsys.readouterr().out)["receipt"]["chunks_hit"] == hits
    file.write_text(json.dumps({"segments": segments}))
    assert main(["precompute", model, "--template", str(file), "--store", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0
    file.write_text("{}")
    assert main(["precompute", model, "--template", str(file), "--store", str(store)]) == 2
    assert "not a prompt file" in capsys.readouterr().err
