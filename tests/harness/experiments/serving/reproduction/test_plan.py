"""The plan of a reproduction: its cells, what is left out and why, and stages that end in time."""

import re
from dataclasses import MISSING, fields, replace

import pytest

from cacheslide.errors import CacheSlideError, ConfigError
from cacheslide.policies.registry import load_policy
from harness.experiments.serving.reproduction.__main__ import chosen, main, shown_plan
from harness.experiments.serving.reproduction.cells import beyond_slots, cells, points
from harness.experiments.serving.reproduction.settings import Settings, read_settings
from harness.experiments.serving.reproduction.stages import cell_seconds, plan, recompute_s, too_large
from tests.helpers.made_reproduction import settings, written
from tests.helpers.places import ROOT

FILES = {name: ROOT / f"config/{name}.yaml" for name in ("h200", "h200-x2")}


@pytest.mark.parametrize("name", FILES)
def test_every_stage_of_the_study_ends_in_time_and_no_cell_is_lost(name):
    own = read_settings(FILES[name])
    made = plan(own)
    measured = [c for stage in made.stages for c in stage.cells]
    assert len({c.id for c in measured}) == len(measured)
    assert all(made.seconds(s, first=True) <= 540 for s in made.stages)
    assert sum(map(made.seconds, made.stages)) <= 90 * 60
    wanted, _ = cells(own)
    lost = {c.id for c in wanted} - {c.id for c in measured} - set(made.left_out)
    assert not lost
    assert len({c.arms for c in measured if c.kind == "server"}) >= 13


def test_all_systems_that_vllm_serves_are_in_every_cell_and_others_have_a_reason():
    made = plan(read_settings(FILES["h200"]))
    base = made.stages[0].cells[0]
    assert {"recompute", "prefix_cache", "prefix_cache_ideal", "cacheblend", "epic", "prompt_cache", "context_cache",
            "reorder", "cacheslide", "cacheslide_mixed@0.05"} <= set(base.arms)  # fmt: skip
    assert "keeps notes" in made.left_out["kvcomm"] and "keeps notes" in made.left_out["cache_craft"]
    assert not {"kvcomm", "cache_craft"} & {a for s in made.stages for c in s.cells for a in c.arms}
    uncached = [c for s in made.stages for c in s.cells if not c.prefix_caching]
    assert uncached and not {"prefix_cache", "prefix_cache_ideal"} & set(uncached[0].arms)
    at_70b = plan(read_settings(FILES["h200-x2"]))
    assert max(c.tokens for s in at_70b.stages for c in s.cells) == 16384
    assert max(c.batch for s in at_70b.stages for c in s.cells) == 4
    assert "at most 16384 tokens" in at_70b.left_out["ttft tokens 32768x1 90%"]


def test_one_axis_is_varied_at_a_time(tmp_path):
    own = settings(tmp_path, tokens=[512, 1024], batches=[1, 2], reused=[0.5, 0.9])
    assert list(points(own)) == [
        ("base", 512, 1, 0.9), ("tokens", 1024, 1, 0.9), ("batch", 512, 2, 0.9), ("reused", 512, 1, 0.5),
    ]  # fmt: skip


def test_systems_without_a_ratio_are_not_swept(tmp_path):
    made = plan(settings(tmp_path, systems=["naive_reuse"], taus=[]))
    measured = [c for s in made.stages for c in s.cells]
    assert {c.axis for c in measured} == {"base", "batch", "clients"}
    assert all("naive_reuse" in c.arms for c in measured if c.kind != "server")


def test_what_does_not_fit_is_named(tmp_path):
    own = settings(tmp_path, batches=[1, 4096], tokens=[512])
    [name] = [n for n in plan(own).left_out if "x4096" in n]
    assert re.match(r"does not fit: \d+ GiB needed of 139 on each GPU", plan(own).left_out[name])
    assert own.weight_gib == pytest.approx(7.25e9 * 4 / 2**30, rel=0.01)  # float32
    assert own.token_gib == 2 * 32 * 8 * 128 * 4 / 2**30
    [cell] = [c for c in cells(own)[0] if c.id == "ttft base 512x1 90%"]
    assert not too_large(own, cell) and too_large(replace(own, most_requests=1), replace(cell, batch=2))


def test_slots_hold_where_every_turn_takes_equal_multiples():
    policy = load_policy("prompt_cache")
    assert not beyond_slots(policy, 8192, 0.9) and not beyond_slots(policy, 4096, 0.9)
    assert "655 to 983 updated in front" in beyond_slots(policy, 16384, 0.9)
    assert not beyond_slots(load_policy("epic"), 16384, 0.9)


def test_long_cells_have_fewer_turns_and_are_split_with_recompute_in_every_part(tmp_path):
    own = settings(tmp_path, recompute_8k_s=150.0, repeats=8, warmups=1, ratios=[0.1])
    parts = [c for s in plan(own).stages for c in s.cells if c.axis == "batch"]
    assert len(parts) > 1 and all(c.arms[0] == "recompute" and c.repeats == 4 for c in parts)
    assert all(cell_seconds(own, c) <= 540 for c in parts) and len({c.id for c in parts}) == len(parts)
    arms = [a for c in parts for a in c.arms[1:]]
    assert len(set(arms)) == len(arms) >= 8


def test_estimates_follow_the_measured_times_of_recompute():
    own = read_settings(FILES["h200"])
    measured = {4096: 0.1024, 8192: 0.216, 16384: 0.504, 32768: 1.216}
    assert all(recompute_s(own, n) == pytest.approx(s, rel=0.15) for n, s in measured.items())


def test_the_commands_print_the_plan_and_name_a_wrong_stage(tmp_path, capsys):
    path = written(tmp_path)
    main(["plan", "--config", str(path)])
    text = capsys.readouterr().out
    made = plan(read_settings(path))
    assert text == shown_plan(made) + "\n" and "left out: kvcomm: " in text and "stage  1 " in text
    with pytest.raises(ConfigError, match=f"--stage 99: the plan has stages 1 to {len(made.stages)}"):
        chosen(made, 99)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shapes": "x"}, "unknown key shapes; config/README.md"),
        ({"shape": "gpt"}, "shape: 'gpt' is not one of mistral-7b"),
        ({"shape": ""}, "give a shape .* or a model"),
        ({"tokens": [0]}, "tokens: every value must be at least 1"),
        ({"reused": [1.0]}, "reused: every value must lie between 0 and 1"),
        ({"ratios": "x"}, "ratios must be a list of floats"),
        ({"base": {"tokens": 512}}, "base holds tokens, batch, reused"),
        ({"tokens": [1024]}, "base: tokens 512 is not one of tokens"),
        ({"systems": ["magic"]}, "unknown system 'magic'"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"gpu_gib": 0}, "gpu_gib must be a number above 0"),
        ({"model": "models/absent"}, "config.json cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, changes, reason):
    with pytest.raises(CacheSlideError, match=reason):
        plan(settings(tmp_path, **changes))


def test_every_key_is_documented_with_its_default_and_no_other():
    part = (ROOT / "config/README.md").read_text().split("\n## The reproduction on GPUs")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", part, re.MULTILINE))
    assert set(rows) == {f.name for f in fields(Settings)}
    for one in fields(Settings):
        shown = rows[one.name].strip("`")
        if type(one.default) in (int, float):
            assert shown == str(one.default)
        elif type(one.default) is tuple and one.default:
            assert shown == ", ".join(map(str, one.default))
        assert (shown == "required") == (one.default is MISSING and one.default_factory is MISSING)
