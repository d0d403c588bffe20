"""`cacheslide serve` before vLLM is imported: its help, the rule, and what it refuses at once."""

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from cacheslide.cli import main, serve
from cacheslide.cli.serve_options import HELP, TYPES, check_spelling, help_of
from cacheslide.cli.served_model import check_model
from cacheslide.errors import ConfigError, ModelError
from cacheslide.policies.registry import load_policy
from cacheslide.vllm.options import Annotations, ServerOptions
from tests.helpers.commands import MODEL, run
from tests.helpers.places import ROOT


def flags() -> list[str]:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def test_every_option_is_explained_here_and_in_the_docs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    table = (ROOT / "docs/vllm.md").read_text()
    assert stop.value.code == 0 and HELP.keys() == {f.name for f in fields(ServerOptions)}
    for name in HELP:
        assert help_of(name) in shown and f"\n| `{name}` |" in table, name
    assert TYPES.keys() == {f.name for f in fields(ServerOptions) if f.default is None}


def test_the_rule_and_its_numbers_reach_the_connector():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    rule = ["--system", "cacheslide", "--recompute-ratio", "0.1", "--layer", "4"]
    args, rest = parser.parse_known_args([MODEL, *rule, "--block-size", "32"])
    line = serve.command(args, rest)
    extra = json.loads(line[line.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert extra == {"policy": "cacheslide", "recompute_ratio": 0.1, "layer": 4}
    assert ServerOptions.from_extra_config(extra).system == load_policy("cacheslide").at_ratio(0.1).at_layer(4)


@pytest.mark.parametrize(
    ("asked", "system", "ratio", "layer"),
    [
        ({}, "cacheslide", 0.1, 4),
        ({"policy": "cacheslide"}, "cacheslide", 0.1, 4),
        ({"recompute_ratio": 0.5}, "cacheslide", 0.5, 4),
        ({"layer": 2}, "cacheslide", 0.1, 2),
        ({"policy": "cacheslide_first"}, "cacheslide_first", None, None),  # another system has numbers of its own
        ({"policy": "cacheslide_first", "recompute_ratio": 0.3}, "cacheslide_first", 0.3, None),
    ],
)
def test_a_requests_numbers_precede_the_servers(asked, system, ratio, layer):
    server = ServerOptions(policy="cacheslide", recompute_ratio=0.1, layer=4)
    expected = load_policy(system)
    expected = expected if ratio is None else expected.at_ratio(ratio)
    expected = expected if layer is None else expected.at_layer(layer)
    assert Annotations(**asked).system(server) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([MODEL, "--recompute-ratio", "1.5"], "recompute_ratio must lie in [0, 1], not 1.5"),
        ([MODEL, "--recompute-ratio", "nan"], "recompute_ratio: nan is no number"),
        ([MODEL, "--layer", "-1"], "layer must be an integer of at least 0"),
        ([MODEL, "--layer", "4"], "--layer 4 has no effect: cacheslide_mixed has no selection layer"),
        ([MODEL, "--policy", "cacheslide", "--layer", "8"], "the model has layers 0 to 7"),
        ([MODEL, "--policy", "recompute", "--recompute-ratio", "0.5"], "has no effect under recompute"),
        ([MODEL, "--recompute-ration", "0.5"], "did you mean --recompute-ratio?"),
        ([MODEL, "--chunk_sizes=8"], "did you mean --chunk-size?"),
        (["models/typo"], "no model at models/typo: there is no such folder"),
        (["/nowhere"], "no model at /nowhere: there is no such folder"),
        (["a/b/c"], "there is no such folder"),
        (["docs"], "no model at docs: config.json is missing"),
        (["someone/unheard-of"], "the hub's cache has no such model"),
    ],
)
def test_wrong_options_are_one_line_before_vllm_is_imported(capsys, monkeypatch, arguments, reason):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("cacheslide.cli.serve.find_spec", lambda name: True)
    monkeypatch.setattr("cacheslide.cli.serve._on_cpu", lambda: pytest.fail("vLLM is imported before the check"))
    monkeypatch.setattr(os, "execv", lambda *line: pytest.fail("the server is started"))
    code, out, err = run(capsys, "serve", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and reason in err, err


def folder_without(place: Path, name: str, config: dict | None = None) -> str:
    """The shipped model's folder without the files that begin with `name`, and with another configuration."""
    for file in (ROOT / MODEL).iterdir():
        if not file.name.startswith(name):
            (place / file.name).symlink_to(file)
    if config is not None:
        (place / "config.json").unlink()
        (place / "config.json").write_text(json.dumps(config))
    return str(place)


@pytest.mark.parametrize(
    ("lacks", "config", "reason", "instead"),
    [
        ("model-00002", None, "weights are incomplete: model-00002", "--load-format=dummy"),
        ("model", None, "no weights in", "--load_format"),
        ("tokenizer", None, "no tokenizer in", "--tokenizer"),
        ("config", None, "config.json is missing", "--hf-config-path"),
        ("-", {"architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel", "--hf-overrides"),
        ("-", {"architectures": 3}, "architectures must be a list of names", "--hf-overrides"),
        ("-", [], "architectures must be a list of names", "--hf-overrides"),
    ],
)
def test_an_incomplete_folder_is_named_unless_an_option_takes_its_place(tmp_path, lacks, config, reason, instead):
    folder, policy = folder_without(tmp_path, lacks, config), load_policy("cacheslide")
    with pytest.raises(ModelError, match=reason) as wrong:
        check_model(folder, policy, [])
    assert "\n" not in str(wrong.value)
    check_model(folder, policy, [instead, "x"])
    check_model(MODEL, policy, [])


@pytest.mark.slow
def test_no_option_of_vllm_is_taken_for_a_misspelling():
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm_parser, own = make_arg_parser(FlexibleArgumentParser()), flags()
    words = [flag for action in vllm_parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]
    assert len(words) > 200 and not set(words) & set(own)
    check_spelling(words, own)
    with pytest.raises(ConfigError, match="did you mean --layer"):
        check_spelling(["--layers"], own)
