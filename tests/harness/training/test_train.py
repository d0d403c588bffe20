"""The small model: tokenizer, training rows, the compiled forward, a smoke run, the shipped checkpoint."""

import json
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheslide.errors import ConfigError
from harness.tasks.synthetic import MIXES, STYLES, examples, render
from harness.training import checkpoint, evaluate, train
from harness.training.data import QUESTION, RowSpec, collate, make_row
from harness.training.losses import needed_layer
from harness.training.model import Trainee, llama
from harness.training.tokenizer import build_tokenizer, piece_ids
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

SHIPPED = ROOT / "models" / "tiny-llama-12m"
SPEC = RowSpec((1, 2), (9, 11), (256, 330), 12, depth=4, questions=3, length=1400, batch=2, hint=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def small(tokenizer) -> Trainee:
    torch.manual_seed(0)
    return Trainee(llama(1280, bos=1, eos=2, pad=0, layers=2, hidden=64, heads=2, ff=64))


def test_the_tokenizer_round_trips_any_text(tokenizer):
    for text in ("", " amber acorn", "Héllo — 你好 🎉\tx  y\r\n  def f(x): return x+1\n\n", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_shipped_tokenizer_is_the_trained_one(tokenizer):
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    text = next(examples("swebench", "deep", "test", 0, 1, 512)).segments[2].text
    assert shipped(text).input_ids == [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert json.loads((SHIPPED / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


@pytest.mark.parametrize("style", STYLES)
def test_training_ids_are_those_of_the_segments_text(tokenizer, style):
    """Ids by table, by the whole text, and by segments tokenised one by one and joined are the same."""
    table = piece_ids(tokenizer)
    row = make_row(Random(3), SPEC, table, (1, 2), style=style)
    assert tokenizer.encode(tokenizer.decode(row.ids)).ids == row.ids
    for example in examples(style, "deep", "test", 0, 3, 1024):
        texts = [*(s.text for s in example.segments), example.questions[0].text, " " + example.questions[0].answers[0]]
        parts = [i for t in texts for i in tokenizer.encode(t, add_special_tokens=False).ids]
        assert tokenizer.encode("".join(texts)).ids == [1, *parts]
        assert len(tokenizer.encode(texts[-1], add_special_tokens=False).ids) == 2


def test_labels_sit_where_the_text_says(tokenizer):
    table = piece_ids(tokenizer)
    row = make_row(Random(5), SPEC, table, (1, 2), split="test", style="hotpotqa", mix=MIXES["deep"])
    ends = {table[" ."], table[" is"]}
    assert all(row.ids[p] in ends for p in row.scratch)
    for position, first, second, *_, kind, _, _, _, _ in row.labels:
        if kind == QUESTION:
            assert row.ids[position + 1 : position + 3] == [first, second]
    batch, n = collate([row, row], SPEC.length, pad=0), len(row.labels)
    shown = batch["ids"].flatten()[batch["pos"]]
    assert torch.equal(shown[n:], shown[:n])
    assert batch["asked"].sum() == 2 * row.questions == 2 * sum(x[4] == QUESTION for x in row.labels)


def test_pointer_doubling_reaches_seven_hops_in_three_layers():
    hops = torch.tensor([0, 1, 2, 3, 4, 7])
    assert needed_layer(hops, "double").tolist() == [0, 1, 2, 2, 3, 3]
    assert needed_layer(hops, "linear").tolist() == hops.tolist()


def test_the_training_forward_equals_transformers(small):
    """Without hints, our plain block and transformers' Llama give the same hidden states."""
    ids = torch.randint(3, 1000, (2, 37))
    want = torch.arange(2 * 37)
    with torch.no_grad():
        states, _ = small(ids, torch.tensor([10]), torch.tensor([False]), torch.tensor([0.0]), want)
        theirs = small.lm.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], theirs[1].flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small.lm.model.norm(states[1]), theirs[2].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_hint_changes_its_own_position_and_later_ones_only(small):
    ids = torch.randint(3, 1000, (1, 20))
    want = torch.arange(20)
    with torch.no_grad():
        bare, _ = small(ids, torch.tensor([9]), torch.tensor([True]), torch.tensor([0.0]), want)
        told, _ = small(ids, torch.tensor([9]), torch.tensor([True]), torch.tensor([1.0]), want)
    moved = (bare[0] - told[0]).abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [9]
    assert torch.equal(bare[1][:9], told[1][:9])


def test_a_checkpoint_reads_back(small, tokenizer, tmp_path):
    checkpoint.save(small, tokenizer, tmp_path)
    other = Trainee(llama(1280, bos=1, eos=2, pad=0, layers=2, hidden=64, heads=2, ff=64))
    checkpoint.load(other, tmp_path)
    for a, b in zip(small.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a.bfloat16().float(), b)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.rope_parameters["rope_theta"] == 10000.0


def test_a_smoke_run_learns_and_writes_its_log(tmp_path):
    """The whole script in seconds on a CPU: the loss falls, and a checkpoint, curve and scores are written."""
    changes = ["steps=8", "log_every=4", "eval_prompts=1", "warmup=10"]
    run = train.Run(train.settings(ROOT / "config" / "training-smoke.yaml", changes), tmp_path, None)
    run.train()
    run.save(run.evaluate())
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["steps"] == 8
    assert log["curve"][-1]["loss"] <= log["curve"][0]["loss"]
    assert "hotpotqa deep 512" in log["scores"]
    train.Run(train.settings(ROOT / "config" / "training-smoke.yaml", changes), tmp_path, tmp_path)


def test_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match="minuets"):
        train.settings(ROOT / "config" / "training.yaml", ["minuets=3"])


def test_the_shipped_model_answers_held_out_questions(tokenizer):
    """A few test prompts per style, on the CPU: near perfect with its context, near nothing without."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    for style in render.STYLES:
        scores = evaluate.score(model, tokenizer, examples(style, "deep", "test", 11, 2, 512))
        assert scores["f1"] >= 0.9
        assert scores["end"] >= 0.9
        bare = evaluate.score(model, tokenizer, examples(style, "deep", "test", 11, 20, 512), context=False)
        assert bare["f1"] <= 0.1


def test_the_shipped_model_is_small_enough():
    weights = sum(p.stat().st_size for p in SHIPPED.glob("*.safetensors"))
    assert weights <= 24 * 2**20
