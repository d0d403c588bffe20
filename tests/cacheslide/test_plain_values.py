"""What a user's file may hold that no setting can have is one line that names the key; nothing raises anything else."""

import argparse
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheslide.core.prompt_file import read_segments
from cacheslide.errors import CacheSlideError, ConfigError, PromptError
from cacheslide.plain_values import check_plain, json_object, parse_json, read_json
from harness.configuration import check
from harness.inventory import read_config
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

SCHEMA = ROOT / "workflows/schemas/config.schema.yaml"
HOSTILE = {
    "not a number": float("nan"),
    "infinite": float("-inf"),
    "huge": 10**400,
    "65 bits": 2**64,
    "a line break": "a\nb",
    "NUL": "a\0b",
    "half a pair": "\ud800",
    "deep": [[[[]]]] * 1,
    "a list": [1],
    "an object": {"a": 1},
    "a long text": "x" * 100_000,
    "nothing": None,
    "true": True,
}
HOSTILE["deep"] = []
for _ in range(3000):
    HOSTILE["deep"] = [HOSTILE["deep"]]


def one_line(said: BaseException) -> bool:
    text = str(said)
    return len(text.splitlines()) == 1 and len(text) < 2000 and "\0" not in text


def keys(config: dict, path: tuple = ()):
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))


def smoke() -> dict:
    return yaml.safe_load((ROOT / "config/smoke.yaml").read_text())


@pytest.mark.parametrize("name", HOSTILE)
def test_no_value_of_a_configuration_is_more_than_one_line(name):
    for path in list(keys(smoke()))[::3]:
        config = smoke()
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = HOSTILE[name]
        try:
            check(config, SCHEMA)
        except ConfigError as said:
            assert one_line(said), (path, str(said)[:300])


@pytest.mark.parametrize(
    "name", ["not a number", "infinite", "huge", "65 bits", "a line break", "NUL", "half a pair", "deep"]
)
def test_what_no_setting_can_have_is_refused_by_its_key(name):
    with pytest.raises(ConfigError, match=r"^a\.1\.b: |nested too deeply$") as said:
        check_plain({"a": [0, {"b": HOSTILE[name]}]}, ConfigError)
    assert one_line(said.value)
    check_plain({"a": [0, 1.5, "ü x", None, True, -(2**63) + 1]}, ConfigError)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: &y [*x, *x, *x, *x, *x, *x, *x, *x, *x]\nc: &z [*y, *y, *y, *y, *y, *y, *y, *y, *y]\n"
        "d: &w [*z, *z, *z, *z, *z, *z, *z, *z, *z]\ne: &v [*w, *w, *w, *w, *w, *w, *w, *w, *w]\n"
        "f: [*v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v, *v]\n",
        "a: 1\na: 2\n",
        "a: .nan\n",
        f"a: {'9' * 5000}\n",
        "a: !!python/object:os.system {}\n",
        "a: " + "[" * 3000 + "]" * 3000,
        "a: [\n",
        "- 1\n",
        "",
        'a: "\\ud800"\n',
        "1: 2\n",
        'a: "x\\ny"\n',
    ],
)
def test_a_yaml_file_is_read_or_refused_in_one_line(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as said:
        read_config(file)
    assert one_line(said.value) and str(file) in str(said.value)


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00a")
    for read in (read_config, lambda path: read_json(path, ConfigError)):
        with pytest.raises(ConfigError) as said:
            read(file)
        assert one_line(said.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.integers(10**30, 10**40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(JSON, st.sampled_from(sorted(keys(smoke()))))
def test_any_value_in_any_key_is_taken_or_refused(value, path):
    config = smoke()
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        check(config, SCHEMA)
    except ConfigError as said:
        assert one_line(said)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | JSON.map(lambda value: json.dumps(value)))
def test_any_text_is_json_or_refused(text):
    try:
        parse_json(text)
    except ValueError as said:
        assert "\n" not in str(said)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        '{"segments": [' + "9" * 5000 + "]}",
        '{"segments": NaN}',
        '{"segments": [{"role": "reuse", "text": "\\ud800"}]}',
        '{"segments": [{"role": "reuse", "token_ids": [99999999999999999999999]}]}',
        '{"segments": [{"role": "reuse", "token_ids": {"a": 1}}]}',
        '{"segments": [{"role": ["reuse"], "token_ids": [1]}]}',
        '{"segments": [5]}',
        "5",
    ],
)
def test_a_prompt_file_is_read_or_refused_in_one_line(tmp_path, text):
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(PromptError) as said:
        read_segments(file, None)
    assert one_line(said.value) and isinstance(said.value, CacheSlideError)


@pytest.mark.parametrize("text", ["{", "[1]", "7", '{"a": NaN}', '{"a": 1e999}', "[" * 99_999, '{"a": "\\n\\u0000"}'])
def test_an_argument_that_is_no_object_is_one_line(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", type=json_object, default={})
    assert parser.parse_args(["--engine", '{"max_num_seqs": 3}']).engine == {"max_num_seqs": 3}
    with pytest.raises(SystemExit):
        parser.parse_args(["--engine", text])
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 300
