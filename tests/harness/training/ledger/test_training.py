"""Training of the ledger model: rows and their labels, what is supervised, what is served afterwards, going on."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from cacheslide.errors import ConfigError
from cacheslide.models.adapter import RowGroup
from cacheslide.models.reference import ReferenceDecoder
from harness.tasks.ledger import examples
from harness.tasks.ledger.sentences import STYLES
from harness.tasks.ledger.world import Shape
from harness.tasks.synthetic.words import names
from harness.training.ledger import seeds, train
from harness.training.ledger.checkpoint import export, save_state
from harness.training.ledger.data import ASK, COPY, FIELDS_OF_LABEL, NONE, Relabel, RowSpec, Stream, prompt_rows
from harness.training.ledger.losses import Plan, attention_loss, training_loss
from harness.training.ledger.model import LedgerModel, Size, plain_weights
from harness.training.ledger.settings import read_settings
from harness.training.ledger.tokens import ledger_pieces, ledger_tokenizer
from tests.helpers.ledger_readers import read_text
from tests.helpers.places import ROOT

SMOKE, FULL = (ROOT / "config" / f"training-ledger{n}.yaml" for n in ("-smoke", ""))
TINY = Size(layers=6, hidden=32, heads=2, kv_heads=1, head_dim=16, ff=48, positions=4096)
COLUMN = {name: i for i, name in enumerate(FIELDS_OF_LABEL)}


def drawn(split: str = "train", style: str | None = None, seed: str = "row"):
    return next(prompt_rows(Random(seed), RowSpec(Shape(), (2, 4), 4096, 1), split, style))


def answers_in(row) -> list[tuple[str, str]]:
    """Each question's name with its answer, decoded."""
    tokenizer, _ = ledger_tokenizer()
    out = []
    for at in row.asked:
        name = tokenizer.decode(row.ids[at - 2 : at].tolist()).strip()
        out.append((name, tokenizer.decode(row.ids[at + 1 : at + 3].tolist()).strip()))
    return out


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("relabelled", [False, True])
def test_an_independent_reader_gives_a_rows_answers_also_in_other_words(style, relabelled):
    row = drawn(style=style)
    if relabelled:
        before, row = row, Relabel(768)(row, np.random.default_rng(0))
        assert (before.ids != row.ids).any() and len(before.ids) == len(row.ids)
    tokenizer, _ = ledger_tokenizer()
    held = read_text(tokenizer.decode(row.ids[1 : row.asked[0]].tolist()))
    assert len(row.asked) > 3
    for name, told in answers_in(row):
        assert told == f"{held[name, 'make']} {held[name, 'mark']}"
    allowed = names("train")
    assert all(name.split()[0] in allowed[name.split()[1]] for name, _ in held)


def test_every_piece_is_one_token_and_the_vocabulary_fits_the_model():
    tokenizer, table = ledger_tokenizer()
    assert set(table) == set(ledger_pieces()) and tokenizer.get_vocab_size() <= Size().vocab
    [example] = examples("swebench", "test", 0, 1, 1024)
    text = "".join(s.text for s in example.segments)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_labels_point_at_the_words_they_name():
    row = drawn()
    labels = {name: row.labels[:, i] for name, i in COLUMN.items()}
    for at, to, word in (("subject_at", "subject", "subject"), ("source_at", "source", "source")):
        known = (labels[at] != NONE) & (labels[to] != NONE)
        assert known.any() and (row.ids[labels[at][known]] == labels[word][known]).all()
    asked, copies = labels["kind"] == ASK, labels["kind"] == COPY
    assert (row.ids[labels["at"][asked] + 1] == labels["held"][asked]).all()
    looks = labels["look_at"] != NONE
    assert (looks == (asked | copies)).all() and (labels["look_at"][looks] < labels["at"][looks]).all()
    by_place = dict(zip(labels["at"], labels["held"], strict=True))
    assert all(by_place[a] == h for a, h in zip(labels["look_at"][looks], labels["held"][looks], strict=True))
    told = labels["kind"] != ASK
    assert (labels["field_at"][told] <= labels["at"][told]).all()


@pytest.mark.parametrize("layers", [6, 8, 12, 24, 30])
def test_a_plan_orders_gathering_looking_and_asking(layers):
    plan = Plan.of(layers)
    order = [plan.gather, plan.gather + 1, *plan.look, plan.ask]
    assert order == sorted(set(order)) and plan.ask < layers - 1 and set(order) == plan.watched


def test_attention_loss_is_low_where_the_target_is_seen_and_blind_to_what_comes_later():
    k = torch.eye(4)[None] * 10
    q = torch.zeros(1, 4, 4)
    q[0, 2] = k[0, 1] * 10
    at, target = torch.tensor([[2, 1]]), torch.tensor([[1, NONE]])
    loss, hit = attention_loss(q, k, at, target)
    assert loss < 1e-3 and hit.tolist() == [[True, False]]
    q[0, 1] = k[0, 3] * 10  # a later key: not there to be seen
    loss, hit = attention_loss(q, k, torch.tensor([[1]]), torch.tensor([[3]]))
    assert loss > 100 and not hit.any()
    even, _ = attention_loss(torch.zeros(1, 4, 4), k, torch.tensor([[3]]), torch.tensor([[0]]))
    assert even == pytest.approx(np.log(4), abs=1e-5)


def test_the_exported_model_computes_what_was_trained(tmp_path):
    torch.manual_seed(0)
    model = LedgerModel(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())  # what a checkpoint can hold
    export(model, ledger_tokenizer()[0], tmp_path)
    decoder = ReferenceDecoder.from_pretrained(tmp_path)
    ids = torch.from_numpy(drawn().ids[:200].astype(np.int64))
    states, _ = model(ids[None], frozenset())
    kv, hidden = decoder.new_kv(len(ids)), decoder.embed(ids)
    rows = torch.arange(len(ids))
    for layer in range(TINY.layers):
        q, k, v = decoder.qkv(layer, hidden, rows)
        kv.write(layer, rows, k, v)
        hidden = decoder.finish(layer, hidden, decoder.attend(layer, q, [RowGroup(kv, rows)]))
    torch.testing.assert_close(decoder.logits(hidden), model.logits(states[-1])[0], rtol=2e-3, atol=2e-3)


def test_every_parameter_of_the_decoder_is_trained():
    model = LedgerModel(TINY)
    spec = RowSpec(Shape(), (1, 2), 2304, 2)
    batch = next(iter(Stream([spec], TINY.vocab, "x")))
    loss, right = training_loss(model, batch, Plan.of(TINY.layers), 0.5)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert {"answer", "copy1", "look_at 4"} <= set(right) and all(h <= n for h, n in right.values())


@pytest.mark.slow
def test_a_run_learns_stops_and_goes_on(tmp_path):
    changes = ["steps=30", "log_every=5", "save_seconds=0", "lr=3.0e-3", "warmup=5"]
    first = train.Run(read_settings(SMOKE, changes), tmp_path)
    first.train()
    first.save()
    losses = [c["loss"] for c in first.curve]
    assert first.step == 30 and losses[-1] < 0.8 * losses[0]
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["step"] == 30 and told["curve"] and (tmp_path / "model.safetensors").stat().st_size < 2**21
    again = train.Run(read_settings(SMOKE, ["steps=40", *changes[1:]]), tmp_path, resume=True)
    assert again.step == 30 and again.curve == first.curve and again.seconds >= told["seconds"]
    for (name, p), q in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        own, other = first.optimizer.state[p], again.optimizer.state[q]
        assert all(torch.equal(own[k].reshape(-1), other[k].reshape(-1)) for k in own)
    again.train()
    assert again.step == 40 and again.curve[-1]["loss"] < losses[0]


def test_what_cannot_be_gone_on_with_is_refused(tmp_path):
    few = ["steps=0", "model={layers: 6, hidden: 32, head_dim: 16, ff: 48}"]
    settings, state = read_settings(SMOKE, few), tmp_path / "training-state.safetensors"
    run = train.Run(settings, tmp_path)
    run.stage = 2
    run.save()
    whole = state.read_bytes()
    assert train.Run(settings, tmp_path, resume=True).stage == 2
    with pytest.raises(ConfigError, match="more stages"):
        train.Run(replace(settings, stages=settings.stages[:2]), tmp_path, resume=True)
    state.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        train.Run(settings, tmp_path, resume=True)
    state.write_bytes(whole)
    save_state(run.model, run.optimizer, tmp_path, {})
    with pytest.raises(ConfigError, match="does not say how far"):
        train.Run(settings, tmp_path, resume=True)


@pytest.mark.slow
def test_seeds_are_trained_by_one_command_and_compared(tmp_path):
    given = ["--config", str(SMOKE), "--out", str(tmp_path), "--seeds", "0", "1", "--audit", "-"]
    seeds.main([*given, "--set", "steps=3", "eval_tokens=[]"])
    told = json.loads((tmp_path / "summary.json").read_text())["seeds"]
    assert set(told) == {"seed-0", "seed-1"} and all(t["step"] == 3 for t in told.values())
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in told)
    assert one != two
    with pytest.raises(ConfigError, match="seed-0, seed-1 ended with an error"):
        seeds.main([*given, "--out", str(tmp_path / "other"), "--resume", "--set", "steps=3"])
    with pytest.raises(ConfigError, match="lr must be"):
        seeds.main([*given, "--set", "lr=x"])
    with pytest.raises(SystemExit):
        seeds.main([*given, "--together", "0"])
    seeds.main([*given, "--seconds", "0", "--set", "eval_tokens=[]"])  # not the configuration's ten minutes
    told = json.loads((tmp_path / "summary.json").read_text())["seeds"]
    assert [t["step"] for t in told.values()] == [0, 0]


def test_a_stage_ends_by_its_answers_or_by_the_clock(tmp_path):
    run = train.Run(read_settings(FULL, ["seconds=100", "model={layers: 6, hidden: 32}"]), tmp_path)
    run.started -= 5
    assert run.passed({"answer": 0.91}) and not run.passed({"answer": 0.89})
    run.started -= 6
    assert run.passed({"answer": 0.1})
    run.stage = len(run.s.stages) - 1
    assert not run.passed({"answer": 1.0})


def test_settings_are_checked_when_read(tmp_path):
    full = read_settings(FULL)
    size = full.size()
    weights = sum(w.numel() for w in plain_weights(LedgerModel(size)).values())
    assert size.layers >= 24 and 2 * weights <= 8 * 2**20
    assert max(s.length for i in range(len(full.stages)) for s in full.specs(i)) == 8192
    for change, said in (
        ("stages=[{rows: []}]", "must hold pass and rows, may"),
        ("stages=[{pass: 1, rows: [{lenght: 3}]}]", "unknown keys lenght"),
        ("stages=[{pass: 1, rows: [{length: 3}]}]", "missing"),
        ("model={width: 3}", "unknown keys width"),
        ("secnds=3", "unknown keys secnds"),
        ("seconds", "not of the form"),
        ("lr=[", "not valid YAML"),
        ("warmup=0", "warmup must be an integer of at least 1"),
        ("log_every=0", "log_every must be"),
        ("decay=0", "decay must be"),
        ("lr=2e-3", "lr must be a number"),
        ("workers=-1", "workers must be"),
        ("steps=-1", "steps must be"),
        ("eval_tokens=5", "eval_tokens must be a list"),
        ("eval_tokens=[5]", "eval_tokens: ledger prompts have 800 to 8300 tokens"),
        ("stages=[]", "at least one stage"),
        ("stages=[{pass: 1, rows: 3}]", "at least one row spec"),
        ("stages=[{pass: 1, rows: [3]}]", "keys and values are expected"),
        ("stages=[{pass: x, rows: [{documents: [1, 1], length: 2304, batch: 1}]}]", "pass must be a number"),
        ("stages=[{pass: 1, rows: [{documents: [1, 1], length: 99, batch: 1}]}]", "none of 20 prompts fits into 99"),
        ("stages=[{pass: 1, rows: [{documents: [1, 1], length: 99999, batch: 1}]}]", "more than the model's 16384"),
        ("stages=[{pass: 1, rows: [{documents: [2, 1], length: 2304, batch: 1}]}]", "documents must be an integer of"),
        ("stages=[{pass: 1, rows: [{documents: [1, 1], length: 9, batch: 1, shape: {roots: 999}}]}]", "can be drawn"),
        ("stages=[{pass: 1, rows: [{documents: [1, 1], length: 9, batch: 1, shape: {lead: 2}}]}]", "lead must be"),
        ("model=3", "keys and values are expected"),
        ("model={heads: 3, kv_heads: 2}", "multiple of kv_heads"),
        ("model={layers: 1}", "too few"),
        ("model={vocab: 3}", "words, not 3"),
        ("model={hidden: -3}", "hidden must be"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_settings(FULL, [change])
    with pytest.raises(ConfigError, match="nothing to resume"):
        train.Run(read_settings(SMOKE), tmp_path, resume=True)
