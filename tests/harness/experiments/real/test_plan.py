"""The configuration and the command of the study on a real model: what is wrong is one line, and nothing is written."""

import json

import pytest
import yaml

from cacheslide.errors import ConfigError
from harness.experiments.real.plan import RealPlan, read_plan
from harness.experiments.real.study import main, shard_of
from harness.step import command
from tests.helpers.made_passages import save_gemma, write_musique

PLAN = {"model": "here", "data": ["one.json"]}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, a data file, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("study")
    model, data = save_gemma(folder / "model"), write_musique(folder / "made.json", 5)
    config = PLAN | {"model": str(model), "data": [str(data)], "dtype": "float32", "lengths": [200], "validation": 2}
    (folder / "real.yaml").write_text(yaml.safe_dump(config | {"prompts": 1, "sessions": 1}))
    return folder


def read(tmp_path, **changes):
    raw = {k: v for k, v in (PLAN | changes).items() if v is not ...}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(raw))
    return read_plan(tmp_path / "real.yaml")


def test_the_projects_own_configuration_is_a_plan_with_every_default(tmp_path):
    own = read_plan("config/real.yaml")
    assert own == RealPlan(own.model, own.data, recordings=own.recordings)
    assert read(tmp_path, lengths=[300, 200]).lengths == (300, 200)


def test_the_command_line_goes_before_the_file(tmp_path):
    read(tmp_path, prompts=7, seed=3)
    plan = read_plan(tmp_path / "real.yaml", prompts=2, data=["a", "b"], model=None)
    assert (plan.prompts, plan.data, plan.model, plan.seed) == (2, ("a", "b"), "here", 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"promps": 3}, "unknown key promps; config/README.md lists every key"),
        ({"model": ...}, "model is missing"),
        ({"model": ..., "data": ...}, "model, data is missing"),
        ({"model": ["a", "b"]}, r"model must be a text, not \('a', 'b'\)"),
        ({"model": {"a": 1}}, "model must be a text"),
        ({"model": ""}, "model names a checkpoint"),
        ({"model": "~no-such-user/model"}, "names the home of no user here"),
        ({"data": "one.json"}, "data must be a list of texts, not 'one.json'"),
        ({"data": []}, "data must be a list of texts"),
        ({"data": [["one.json"]]}, "data must be a list of texts"),
        ({"data": [""]}, "data must be a list of texts"),
        ({"data": [3]}, "data must be a list of texts"),
        ({"without": "one.json"}, "without must be a list of texts, not 'one.json'"),
        ({"without": [""]}, "without must be a list of texts"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": {"a": 1}}, "dtype must be a text"),
        ({"recordings": None}, "recordings must be a text, not None"),
        ({"lengths": 2000}, "lengths must be a list of whole numbers, not 2000"),
        ({"lengths": ["2000"]}, "lengths must be a list of whole numbers"),
        ({"lengths": [True]}, "lengths must be a list of whole numbers"),
        ({"lengths": [2000.5]}, "lengths must be a list of whole numbers"),
        ({"lengths": [2000, 199]}, "lengths are 200 tokens or more"),
        ({"lengths": []}, "lengths must be a list of whole numbers"),
        ({"settings": "matter"}, "settings must be a list of texts, not 'matter'"),
        ({"settings": ["matter", "harder"]}, r"unknown setting 'harder' \(known: unrelated, "),
        ({"settings": [["matter"]]}, "settings must be a list of texts"),
        ({"layers_on": ["harder"]}, "unknown setting 'harder'"),
        ({"seed": "x"}, "seed must be a whole number of at least 0, not 'x'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": True}, "seed must be a whole number"),
        *[({name: value}, f"{name} must be a whole number of at least 1, not {value}")
          for name in ("prompts", "validation", "sessions", "every_turn", "turns", "longest")
          for value in (0, -3, True, 1.5, None)],
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_line(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says) as wrong:
        read(tmp_path, **changes)
    assert "\n" not in str(wrong.value) and len(str(wrong.value)) < 400


@pytest.mark.parametrize(("text", "shard"), [("0/1", (0, 1)), ("3/4", (3, 4))])
def test_a_shard_is_two_numbers(text, shard):
    assert shard_of(text) == shard


@pytest.mark.parametrize("text", ["1/1", "0/0", "-1/4", "1", "1/2/3", "a/b", "", "0.5/2", "2/-4"])
def test_any_other_shard_is_one_line(text):
    with pytest.raises(ConfigError, match="--shard"):
        shard_of(text)


def spoiled(places, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "none.yaml"], "cannot read none.yaml"),
        (["--shard", "4/4"], "--shard 4/4: I counts from 0 to N - 1"),
        (["--prompts", "0"], "prompts must be a whole number of at least 1, not 0"),
        (["--lengths", "-5"], "lengths are 200 tokens or more"),
        (["--settings", "harder"], "unknown setting 'harder'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "nonsense"], "no device 'nonsense' here"),
        (["--model", "none/at/all"], "none/at/all"),
        (["--model", ""], "model names a checkpoint"),
        (["--data", "none.json"], "none.json: no such file"),
        (["--without", "none.json"], "none.json: no such file"),
        (["--without", "SAME"], "made.json: every question stands in"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, not -1"),
        (["--best", "none.json"], "cannot read none.json"),
        (["EMPTY"], "empty.json: holds no rows"),
        (["TWICE"], "two data files are of one set"),
        (["FEW"], "validation takes 2 of 2 rows: at least one must be left for results"),
        (["UNSUITED"], "no row of lost.json and no session suits any of its settings"),
        (["BEST", "{}"], "holds no layers by system"),
        (["BEST", "[1]"], "holds no layers by system"),
        (["BEST", '{"layers": {"CacheBlend, by V": "3"}}'], "holds no layers by system"),
        (["BEST", "{"], "is not valid JSON"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(places, tmp_path, capsys, more, says):
    made = {
        "EMPTY": lambda: ["--data", spoiled(places, tmp_path, "empty.json", "")],
        "TWICE": lambda: ["--data", str(places / "made.json")] * 2,
        "FEW": lambda: ["--data", str(write_musique(tmp_path / "few.json", 2))],
        "UNSUITED": lambda: ["--data", str(lost(tmp_path))],
        "BEST": lambda: ["--best", spoiled(places, tmp_path, "best.json", more[1])],
    }
    more = made[more[0]]() if more[0] in made else [str(places / "made.json") if m == "SAME" else m for m in more]
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(["slice", "--config", str(places / "real.yaml"), "--out", str(tmp_path / "out"), *more]))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and says in said[-1]
    assert not [line for line in said if "Traceback" in line] and not (tmp_path / "out").exists()


def lost(tmp_path):
    """Rows without a needed passage."""
    path = write_musique(tmp_path / "lost.json", 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["answer"] = "nowhere"
        for part in row["paragraphs"]:
            part["is_supporting"] = False
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "recordings names no folder"),
        (["--recordings", "none"], "none holds no recorded sessions"),
        (["--threads", "0"], "an integer of at least 1 is expected, not '0'"),
    ],
)
def test_a_replay_without_sessions_is_one_line(places, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(["replay", "--config", str(places / "real.yaml"), "--out", str(tmp_path / "out"), *more]))
    assert ended.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
