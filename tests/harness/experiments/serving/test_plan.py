"""The serving experiment without a server: its plan, its prompts, its table."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import yaml

from cacheslide.core.prompt import Role
from cacheslide.errors import CacheSlideError, DataError
from harness.backends.http.workload import Conversation, Shape
from harness.experiments.serving.client import Condition, main, table
from harness.experiments.serving.plan import ServingPlan, read_plan
from tests.helpers.places import ROOT
from tests.helpers.serving_files import load

PLAN = {"model": "models/tiny-llama-12m", "systems": ["vllm", "cacheslide"], "tokens": [512], "batches": [2]}


def plan(tmp_path, **changes) -> ServingPlan:
    path = tmp_path / "serving.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return read_plan(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"system": ["vllm"]}, "unknown key system; config/README.md"),
        ({"systems": ["magic"]}, "unknown system 'magic'"),
        ({"tokens": ["512"]}, "tokens must be a list of ints"),
        ({"batches": [0]}, "batches: .* too small"),
        ({"vllm": {"block_sise": 3}}, "vllm: unknown key block_sise"),
        ({"vllm": {"store_device": "cpu"}}, "name the devices under store_devices"),
        ({"store_devices": ["disk"]}, "store_devices: disk is not one of"),
        ({"reused": 1.0}, "reused must lie between"),
        ({"turns": 0}, "turns must be an integer of at least 1"),
        ({"model": "models/absent"}, "config.json does not say vocab_size"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_reason(tmp_path, changes, reason):
    with pytest.raises(CacheSlideError, match=reason):
        plan(tmp_path, **changes).vocab  # noqa: B018


def test_a_missing_key_ends_the_command_with_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: m\n")
    assert main(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out.json")]) == 2
    assert "systems, tokens, batches is missing" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(PLAN | {"tokens": [100]}))
    assert main(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out.json")]) == 2
    assert "leaves 10 updated ones, which is too few" in capsys.readouterr().err


def test_servers_systems_shares_and_loads_follow_from_the_plan(tmp_path):
    found = plan(
        tmp_path,
        systems=["vllm", "vllm_prefix_cache", "prompt_cache", "cacheslide"],
        recompute_ratios=[0.1, 1],
        store_devices=["cpu", "model"],
        rates=[2],
        batches=[1, 4],
    )
    annotated = ["prompt_cache", "cacheslide"]
    assert list(found.servers()) == [
        (None, ["vllm"]),
        (None, ["vllm_prefix_cache"]),
        ("cpu", annotated),
        ("model", annotated),
    ]
    assert list(found.settings(annotated)) == [("prompt_cache", None), ("cacheslide", 0.1), ("cacheslide", 1)]
    assert list(found.loads()) == [(1, None), (4, None), (4, 2)]
    assert found.options.max_model_len == 520 and replace(found, vllm={"max_model_len": 9}).options.max_model_len == 9


def test_shipped_plans_are_valid_and_every_key_is_documented():
    for path in sorted((ROOT / "config").glob("serving*.yaml")):
        read_plan(path)
        assert path.name in (ROOT / "config/README.md").read_text()
    rows = (ROOT / "config/README.md").read_text().split("\n## Servers")[1].split("\n## ")[0].splitlines()
    named = {key for row in rows if row.startswith("| `") for key in row.split("|")[1].replace("`", "").split(",")}
    assert {key.strip() for key in named} == {f.name for f in fields(ServingPlan)}


@pytest.mark.parametrize(("tokens", "chunks", "reused"), [(512, 8, 0.9), (301, 3, 0.5), (181, 7, 0.9)])
def test_conversations_keep_their_chunks_and_move_them(tokens, chunks, reused):
    shape = Shape(tokens, 1280, reused, chunks)
    conversation = Conversation(shape, seed=1, number=2)
    turns = [conversation.turn(i) for i in range(5)]
    kept = [[s.token_ids for s in t.segments if s.role is Role.REUSE] for t in turns]
    assert all(len(t) == tokens for t in turns) and all(k == kept[0] and len(k) == chunks for k in kept)
    assert sum(map(len, kept[0])) == round(reused * tokens) and max(map(len, kept[0])) - min(map(len, kept[0])) <= 1
    for before, now in pairwise(turns):
        assert before.segments[0] != now.segments[0] and before.starts[1] != now.starts[1]
        assert before.segments[-1].role is now.segments[-1].role is Role.RECOMPUTE
    assert min(t for p in turns for t in p.token_ids) >= 160 and max(t for p in turns for t in p.token_ids) < 1280
    assert Conversation(shape, 1, 2).turn(3) == turns[3] != Conversation(shape, 1, 3).turn(3)
    with pytest.raises(DataError, match="too few to move"):
        Shape(chunks * 10, 1280, 0.9, chunks)


def test_a_ratio_needs_reuse_answers_and_a_baseline():
    base = Condition("vllm", 512, 1)
    ours = Condition("cacheslide", 512, 1, None, 0.26, "cpu")
    loads = {
        base: load(0.4, None),
        ours: load(0.1, 400),
        replace(ours, system="epic"): load(0.1, 0),
        replace(ours, system="cacheblend"): load(0.1, 400, "HTTP 500"),
        replace(ours, tokens=1024): load(0.1, 400),
    }
    rows = {(r["system"], r["tokens"]): r for r in table(loads)}
    good = rows["cacheslide", 512]
    assert good["ttft_ratio"]["value"] == pytest.approx(0.25) and not good["ratio_reason"]
    assert good["efficiency"] == pytest.approx(1.0) and good["tokens_reused"] == 400
    assert rows["vllm", 512]["ratio_reason"] == "the reference of the comparison"
    for key, reason in {
        ("epic", 512): "nothing was reused in 3 of 3",
        ("cacheblend", 512): "1 of 3 requests failed",
        ("cacheslide", 1024): "vllm was not measured under this load",
    }.items():
        assert rows[key]["ttft_ratio"] is None and reason in rows[key]["ratio_reason"]
    failed = table({base: load(0.4, None, "lost"), ours: load(0.1, 400)})[1]
    assert failed["ttft_ratio"] is None and failed["ratio_reason"] == "requests of vllm failed"
