"""The CoPE stack of a Hugging Face model, its adapter on disk, and a training run of a few steps."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheslide.errors import ConfigError, ModelError
from cacheslide.models.weights import fingerprint
from cacheslide.training.adapter import AdapterSettings, load_adapter, save_adapter
from cacheslide.training.attach import CopeStack
from harness.training import cope
from harness.training.model import llama
from harness.training.tokenizer import build_tokenizer, save_tokenizer
from tests.helpers.checkpoints import save_random

pytest.importorskip("peft")

pytestmark = pytest.mark.slow
SETTINGS = AdapterSettings(rank=3, alpha=6.0, p_max=7)


def attached(path, settings=SETTINGS, kind="sdpa"):
    """A checkpoint's model with a CoPE stack that differs from the native one in every part."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=kind).eval()
    native = model(IDS).logits
    stack = CopeStack(model, settings)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model, stack, native


IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_switched_off_it_is_the_base_model_bit_for_bit(tmp_path, kind):
    model, stack, native = attached(save_random(tmp_path, kind))
    on = model(IDS).logits
    with stack.off():
        assert torch.equal(model(IDS).logits, native)
    assert not torch.allclose(on, native, atol=1e-2) and torch.equal(model(IDS).logits, on)


def test_only_factors_and_tables_train_also_with_checkpointing(checkpoint):
    model, stack, _ = attached(checkpoint)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == len(stack.parameters()) == 5 * 9
    model(IDS, labels=IDS).loss.backward()
    want = {n: p.grad.clone() for n, p in stack.named().items()}
    assert all(g.abs().max() > 0 for g in want.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in stack.named().items():
        torch.testing.assert_close(parameter.grad, want[name])


def test_a_cache_a_bfloat16_model_and_right_padding(checkpoint):
    model, _, _ = attached(checkpoint)
    whole = model(IDS).logits
    first = model(IDS[:, :25])
    rest = model(IDS[:, 25:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 25:], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(IDS)
    mask[1, 30:] = 0
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[1, :30], whole[1, :30])
    assert model.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="pad on the right"):
        model(IDS, attention_mask=mask.flip(1))


def test_an_adapter_survives_the_disk_and_refuses_a_wrong_base(checkpoint, tmp_path):
    _, stack, _ = attached(checkpoint)
    adapter = stack.adapter(fingerprint(checkpoint), {"steps": 3})
    save_adapter(adapter, tmp_path / "a")
    found = load_adapter(tmp_path / "a", checkpoint)
    assert found.digest == adapter.digest and found.settings == SETTINGS and found.notes == {"steps": 3}
    _, second, _ = attached(checkpoint, AdapterSettings(rank=3, alpha=6.0, p_max=7))
    second.load(found)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), second.parameters(), strict=True))
    with pytest.raises(ModelError, match="belongs to the base model"):
        load_adapter(tmp_path / "a", save_random(tmp_path / "other", num_hidden_layers=4))
    with pytest.raises(ModelError, match="other settings"):
        second.load(replace(found, settings=AdapterSettings(rank=3, alpha=3.0, p_max=7)))


@pytest.mark.parametrize("what", ["tensors", "settings", "format", "text", "missing"])
def test_a_damaged_adapter_is_refused(checkpoint, tmp_path, what):
    _, stack, _ = attached(checkpoint)
    adapter = stack.adapter(fingerprint(checkpoint))
    save_adapter(adapter, tmp_path)
    file, raw = tmp_path / "cope.json", json.loads((tmp_path / "cope.json").read_text())
    if what == "tensors":
        changed = {k: v + (k == "layers.0.positions") for k, v in adapter.tensors.items()}
        save_adapter(replace(adapter, tensors=changed), tmp_path)
        file.write_text(json.dumps(raw))
    elif what == "settings":
        file.write_text(json.dumps(raw | {"settings": raw["settings"] | {"alpha": 1.0}}))
    elif what == "format":
        file.write_text(json.dumps(raw | {"format": 99}))
    elif what == "text":
        file.write_text("{")
    else:
        file.unlink()
    with pytest.raises(ModelError):
        load_adapter(tmp_path, checkpoint)


def test_settings_and_models_out_of_range_are_refused(checkpoint):
    for bad in ({"rank": 0}, {"p_max": 1}, {"projections": ("q_proj", "gate_proj")}):
        with pytest.raises(ConfigError, match="out of range"):
            AdapterSettings(**bad)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match="not to gpt2"):
        CopeStack(model, SETTINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained small model with the task's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    llama(1280, 1, 2, 0, layers=2, hidden=32, heads=2, ff=48).save_pretrained(path)
    save_tokenizer(build_tokenizer(), path)
    return path


ROWS = {"chunks": [1, 1], "statements": [4, 5], "chunk_tokens": None, "notes_filler": 0, "depth": 1, "questions": 2}


def run(base, out, resume=False, **changes):
    given = {"adapter": {"rank": 4, "p_max": 8}, "rows": [ROWS | {"length": 200, "batch": 2}], "workers": 0}
    given |= {"warmup": 2, "log_every": 1, "eval_prompts": 0, "minutes": 5.0} | changes
    return cope.CopeRun(cope.CopeSettings(**given), base, out, resume)


def test_a_run_learns_layer_by_layer_then_answers_and_resumes(base, tmp_path):
    first = run(base, tmp_path, steps=12, local=0.5, fade=0.5)
    first.train()
    first.save()
    kinds = [e["local"] for e in first.curve]
    assert kinds == sorted(kinds, reverse=True) and {True, False} == set(kinds) and first.step == 12
    assert "question" in first.curve[-1] and "question" not in first.curve[0]
    second = run(base, tmp_path, resume=True, steps=14, local=0.5, fade=0.5)
    assert second.step == 12 and len(second.curve) == 12 and second.spent > 0.1
    for a, b in zip(first.stack.parameters(), second.stack.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(first.optimizer.state[a]["exp_avg"], second.optimizer.state[b]["exp_avg"])
    second.train()
    assert second.step == 14
    second.finish()
    second.save()
    shipped = cope.load_adapter(tmp_path, base)
    assert all(x.dtype == torch.bfloat16 for x in shipped.tensors.values())
    assert all(torch.equal(shipped.tensors[n].float(), p) for n, p in second.stack.named().items())
    frozen = [p for p in second.model.parameters() if not p.requires_grad]
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in fresh.parameters())


def test_layers_learn_to_give_their_native_outputs(base, tmp_path):
    taught = run(base, tmp_path, local=1.0, table_lr=0.05)
    stream = cope.Stream(cope.specs({"rows": taught.s.rows}), cope.piece_ids(taught.tokenizer), taught.special, "x")
    batch = next(iter(stream))
    for _ in range(30):
        taught.update(batch)
    assert taught.curve[-1]["loss"] < 0.8 * taught.curve[0]["loss"]


def test_unknown_keys_are_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rows: []\nadapter: {}\nlearning: 3\n")
    with pytest.raises(ConfigError, match="learning"):
        cope.settings(file, [])
