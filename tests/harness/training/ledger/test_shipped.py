"""The shipped ledger model: its files, its training's settings, its logits in two implementations, its answers."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.tasks.data import draw_examples
from harness.tasks.ledger import STYLES
from harness.training import evaluate
from harness.training.ledger.checkpoint import config, generation
from harness.training.ledger.settings import read_settings
from harness.training.ledger.tokens import ledger_tokenizer
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

SHIPPED = ROOT / "models/tiny-ledger-4m"


def test_its_files_are_those_that_training_writes():
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 8 * 2**20
    settings = read_settings(ROOT / "config/training-ledger.yaml")
    read = {name: json.loads((SHIPPED / name).read_text()) for name in ("config.json", "generation_config.json")}
    assert list(read.values()) == [config(settings.size()), generation()]
    tokenizer, _ = ledger_tokenizer()
    assert json.loads((SHIPPED / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


def test_it_was_trained_by_the_configuration_in_the_tree():
    """Apart from the time, the processes that drew rows, and whether the state was kept."""
    used = json.loads((SHIPPED / "training.json").read_text())["settings"]
    now = json.loads(json.dumps(vars(read_settings(ROOT / "config/training-ledger.yaml"))))
    assert {key for key in used | now if used[key] != now[key]} == {"seconds", "workers", "state"}


def test_transformers_and_the_engine_read_it_alike():
    example = draw_examples("hotpotqa-ledger", "test", 5, 1, 1024)[0]
    ids = AutoTokenizer.from_pretrained(SHIPPED)("".join(s.text for s in example.segments)).input_ids
    backend = ReferenceBackend(SHIPPED)
    prompt = backend.prompt(example.segments)
    assert [t for s in prompt.segments for t in s.token_ids] == ids
    engine = backend.engine(load_policy("recompute"), MemoryChunkStore(), EngineSettings())
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
        expected = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(engine.prefill(prompt).logits, expected, atol=1e-3, rtol=1e-3)


def test_it_answers_held_out_questions_and_none_without_context():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    scores = evaluate.table(model, tokenizer, "test", 11, 2, [1024, 2048], mixes=("ledger",))
    for style in STYLES:
        for tokens in (1024, 2048):
            assert scores[f"{style} ledger {tokens}"]["f1"] >= 0.95
            assert scores[f"{style} ledger {tokens}"]["end"] >= 0.95
        assert scores[f"{style} no context"]["f1"] <= 0.2
